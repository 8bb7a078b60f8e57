"""What models that learned a new language keep of the old one: reads finished comparisons, prints one row for each.

Every comparison has to start from others' weights (start_from=<name>) with model.new_language set.
"""

import argparse
import json
from pathlib import Path

import torch

from approx_attn.comparison.statistics import mean_interval, summarise
from approx_attn.data.generators.translation_languages import language
from approx_attn.diagnosis.exchange import dictionary_accuracy, embedding, evaluate_with_words
from approx_attn.run.record import read_result

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("comparisons", nargs="+", help="names of comparisons in --results")
parser.add_argument("--results", default="results", help="the folder that compare wrote to")
options = parser.parse_args()


def figures(run: Path) -> dict[str, float]:
    """The figures of one run, in percent but for the number of parameters."""
    record = read_result(run)
    config, child = record["config"], run / "checkpoints" / "best.ckpt"
    parent, side = Path(config["init_from"]["path"]), config["model"]["new_language"]
    first = torch.load(parent, weights_only=True)["hyper_parameters"]["config"]["data"]
    key = f"{side}_language"
    back = evaluate_with_words(child, {side: parent}, data={key: first[key]})
    dictionary = dictionary_accuracy(
        embedding(child, side), embedding(parent, side), language(config["data"][key]), language(first[key])
    )
    return {
        "new pair": 100 * record["metrics"]["test/exact_match"],
        "BLEU": 100 * record["metrics"]["test/bleu"],
        "first pair": 100 * back["test/exact_match"],
        "dictionary": 100 * dictionary,
        "parameters": record["parameters"],
    }


header = ("new pair", "BLEU", "first pair", "dictionary", "parameters")
print("| comparison | " + " | ".join(header) + " | seeds |")
print("|---|" + "---:|" * (len(header) + 1))
for name in options.comparisons:
    by_seed = json.loads((Path(options.results) / name / "runs.json").read_text())["exact"]
    found = [figures(Path(folder)) for folder in by_seed.values()]
    summaries = [summarise([each[column] for each in found]) for column in header]
    cells = [f"{each.mean:.1f} ± {mean_interval(each):.1f}" for each in summaries[:-1]]
    print(f"| {name} | {' | '.join(cells)} | {summaries[-1].mean:,.0f} | {len(found)} |")
