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
both = "two of them, with a new source and with a new target, whose words the first then writes"
parser.add_argument("--both", nargs=2, action="append", default=[], help=both)
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


def runs_of(name: str) -> list[Path]:
    """The runs of a comparison, in the order of their seeds."""
    by_seed = json.loads((Path(options.results) / name / "runs.json").read_text())["exact"]
    return [Path(folder) for folder in by_seed.values()]


def shown(values: list[float]) -> str:
    """Mean and 95% interval over seeds."""
    summary = summarise(values)
    return f"{summary.mean:.1f} ± {mean_interval(summary):.1f}"


header = ("new pair", "BLEU", "first pair", "dictionary", "parameters")
print("| comparison | " + " | ".join(header) + " | seeds |")
print("|---|" + "---:|" * (len(header) + 1))
for name in options.comparisons:
    found = [figures(run) for run in runs_of(name)]
    cells = [shown([each[column] for each in found]) for column in header[:-1]]
    print(f"| {name} | {' | '.join(cells)} | {found[0]['parameters']:,} | {len(found)} |")
for source, target in options.both:
    matches = []
    for run, other in zip(runs_of(source), runs_of(target), strict=True):
        new = read_result(other)["config"]["data"]["target_language"]
        best, words = (folder / "checkpoints" / "best.ckpt" for folder in (run, other))
        tested = evaluate_with_words(best, {"target": words}, data={"target_language": new})
        matches.append(100 * tested["test/exact_match"])
    print(f"{source} with the words of {target}, a pair that neither has seen: {shown(matches)}")
