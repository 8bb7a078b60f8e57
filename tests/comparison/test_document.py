"""RESULTS.md from the folder of a small comparison: what it says, what it leaves alone, what it refuses."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from approx_attn.cli import run_verb
from approx_attn.comparison.command import compare
from approx_attn.comparison.document import overview_line, read_comparison, section
from approx_attn.comparison.records_file import portable_command, without_paths
from approx_attn.comparison.schedule import describe_schedule, load_reference, reference_experiment
from approx_attn.comparison.terms import Terms, Tuning

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["data.train_size=64", "data.val_size=16", "data.test_size=32", "data.max_depth=3", "data.max_args=4"]
TINY = ["data.min_length=5", "data.max_length=20", "model.dim=16", "model.depth=1", "trainer.max_epochs=2", *SIZES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a comparison on ListOps, two seeds, of 2 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("comparison")
    places = [f"paths.runs={folder / 'runs'}", f"results={folder / 'results'}", f"data.cache_dir={folder / 'cache'}"]
    words = ["attention=[exact,eigen_topk,uniform,linformer]", "seeds=[1,2]", "measure.repeats=1", "name=tiny"]
    compare(["data=listops", *TINY, *places, *words], Console(file=io.StringIO()))
    return folder / "results" / "tiny"


@pytest.fixture
def document(finished, tmp_path) -> Path:
    path = tmp_path / "RESULTS.md"
    assert run_verb("results", [str(finished), f"output={path}"]) == 0
    return path


def test_the_table_is_the_one_of_the_comparison_with_everything_that_made_it(finished, document):
    text = document.read_text()
    assert (finished / "table.md").read_text().split("\n\n")[0] in text
    assert "python scripts/compare.py data=listops" in text
    assert "Seeds 1, 2" in text
    environment = read_comparison(finished).summary["environments"][0]
    assert f"torch {environment['packages']['torch']}" in text
    assert environment["processor"] in text
    # 4 steps of 32, of the 5,000 of 32 that the reference has; positions 20 of 2,000 each.
    assert "4 of 5,000 steps of 32 sequences of 5–20 instead of 500–2,000 tokens" in text
    assert "0.08% of the sequences and 0.0008% of the token positions" in text
    assert "data.train_size 64 instead of 96000" in text
    assert "optimizer.lr 0.001 instead of 0.0001" in text


def test_what_was_equal_and_which_learning_rates_were_tried_is_said(finished):
    comparison = read_comparison(finished)
    assert "Equal training" not in section(comparison)
    tuning = Tuning((1e-3, 3e-3), "val/loss", 1, {"exact": (0.5, 0.4)})
    told = "- Equal training time, 90.0 s; learning rates from 0.001, 0.003 by val/loss of seed 1."
    assert told in section(replace(comparison, terms=Terms("time", 4, 90.0, tuning)))


def test_nothing_of_this_machine_enters(finished, document):
    text = document.read_text()
    assert str(finished.parents[1]) not in text
    assert "paths.runs" not in text


def test_best_eigen_against_best_baseline(finished, document):
    with (finished / "table.csv").open() as file:
        means = {row["attention"]: 100 * float(row["accuracy_mean"]) for row in csv.DictReader(file)}
    (line,) = [line for line in document.read_text().splitlines() if line.startswith("| tiny |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [cells[1], cells[3]] == ["eigen_topk", "linformer"]
    assert float(cells[2].split()[0]) == pytest.approx(means["eigen_topk"], abs=0.0051)
    difference = means["eigen_topk"] - means["linformer"]
    assert float(cells[5].split()[0]) == pytest.approx(difference, abs=0.01)
    assert cells[6].startswith("at least as good" if difference >= 0 else "worse")


def test_the_best_is_chosen_by_validation_and_not_by_test_figures(finished):
    comparison = read_comparison(finished)
    summary = comparison.summary
    assert summary["validation_mode"] == "max"
    test = {"eigen_topk": 0.9, "eigen_row": 0.8, "linformer": 0.5, "performer": 0.6, "uniform": 1.0}
    validation = {"eigen_topk": 0.1, "eigen_row": 0.2, "linformer": 0.4, "performer": 0.3, "uniform": 1.0}
    test["eigen_row rest=drop"] = validation["eigen_row rest=drop"] = 1.0  # a control
    figures = {
        part: {name: {"1": value} for name, value in by.items()} for part, by in [("t", test), ("v", validation)]
    }

    def line(**changes):
        changed = {**summary, "figures": figures["t"], "validation": figures["v"], **changes}
        return overview_line(replace(comparison, summary=changed)).split(" | ")

    assert line()[1:5] == ["eigen_row", "80.00", "linformer", "50.00"]
    assert line(validation_mode="min")[1:5] == ["eigen_topk", "90.00", "performer", "60.00"]
    none_kept = {name: {"1": None} for name in test}
    assert line(validation=none_kept)[-1].startswith("no eigen mechanism with validation figures")
    assert line()[-1] == "at least as good, one seed; without nystromformer, sliding_window, low_rank_topk |"


def test_writing_again_changes_tables_alone(finished, document, tmp_path):
    text = document.read_text()
    by_hand = text.replace("*Reading: to be written.*", "It loses, because.").replace("## tiny", "## ListOps, short")
    stale = by_hand.replace("| uniform |", "| outdated |")
    assert stale != by_hand
    document.write_text(stale)
    second = tmp_path / "second"
    shutil.copytree(finished, second)
    content = json.loads((second / "records.json").read_text())
    (second / "records.json").write_text(json.dumps({**content, "name": "second"}))
    assert run_verb("results", [str(finished), f"output={document}"]) == 0
    assert document.read_text() == by_hand
    assert run_verb("results", [str(second), f"output={document}"]) == 0
    both = document.read_text()
    assert "It loses, because." in both
    assert both.index("## ListOps, short") < both.index("## second")
    assert "| tiny |" in both, "the overview keeps comparisons that were not given"
    assert "| second |" in both


def test_lines_that_another_rule_chose_do_not_stay_under_a_new_head(finished, document):
    text = document.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| tiny |")]
    other = text.replace(line, line.replace("tiny", "other"))
    document.write_text(other)
    assert run_verb("results", [str(finished), f"output={document}"]) == 0
    assert "| other |" in document.read_text()
    document.write_text(other.replace("by validation figure", "by mean test figure"))
    assert run_verb("results", [str(finished), f"output={document}"]) == 0
    assert "| other |" not in document.read_text()


def test_folders_and_documents_that_cannot_be_used_are_refused(finished, document, tmp_path, capsys):
    before = document.read_text()
    assert run_verb("results", [str(tmp_path), f"output={document}"]) == 2
    assert "does not hold the records of a comparison" in capsys.readouterr().err
    assert run_verb("results", [str(finished), str(finished), f"output={document}"]) == 2
    assert "name=<other>" in capsys.readouterr().err
    assert run_verb("results", [str(finished), f"outptu={document}"]) == 2
    assert "did you mean 'output'" in capsys.readouterr().err
    published = [f"results={finished.parent}", f"output={document}"]
    assert run_verb("results", published) == 2
    assert "publish=[<name>] puts those of a finished comparison there" in capsys.readouterr().err
    assert run_verb("results", ["publish=[tiny,missing]", *published]) == 2
    assert "missing does not hold the records of a comparison" in capsys.readouterr().err
    assert run_verb("results", ["publish=[tiny]", str(finished), *published]) == 2
    assert "no folders beside them" in capsys.readouterr().err
    assert list(finished.parent.glob("*.json")) == []
    assert document.read_text() == before
    document.write_text(before.replace("<!-- end -->", ""))
    assert run_verb("results", [str(finished), f"output={document}"]) == 2
    assert "<!-- end -->" in capsys.readouterr().err


def test_commands_lose_the_places_of_a_machine():
    command = (
        "python scripts/compare.py data=imdb data.path=/home/me/imdb results=/scratch/results paths.runs=~/runs "
        "model.path=../bert 'attention=[exact,{name: eigen_row, basis: /home/me/basis.safetensors}]' seeds=[1,2]"
    )
    assert portable_command(command, "imdb") == (
        "python scripts/compare.py data=imdb 'data.path=<imdb folder>' 'model.path=<model.path>' "
        "'attention=[exact,{name: eigen_row, basis: <path>}]' 'seeds=[1,2]'"
    )
    assert "stanfordnlp/imdb" in portable_command("compare data.path=stanfordnlp/imdb", "imdb")


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("imdb", "lra_text"), ("cifar10", "lra_image"), ("lra_image", "lra_image"), ("mqar", None), ("finetune", None)],
)
def test_recipes_know_their_reference(name, experiment):
    assert reference_experiment(name) == experiment


def test_the_whole_schedule_is_called_so():
    config = load_reference("lra_image")
    spec = {"max_length": 1024, "num_items": [45000, 5000, 10000]}
    text = describe_schedule(config, spec, [35000, 35000])
    assert text.startswith("35,000 steps of 256 sequences; 45,000 training sequences of 1,024 tokens")
    assert "the reference schedule" in text
    half = describe_schedule(config, spec, [17500])
    assert "50% of the sequences and 50% of the token positions" in half
    assert "Other settings" not in half


def test_a_comparison_of_a_mechanism_that_is_gone_is_written_as_it_was(finished, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    for path in old.iterdir():
        if path.suffix in (".csv", ".md", ".json"):
            path.write_text(path.read_text().replace("eigen_topk", "eigen_block"))
    assert run_verb("results", [str(old), f"output={tmp_path / 'RESULTS.md'}"]) == 0
    table = (tmp_path / "RESULTS.md").read_text()
    assert "| eigen_block |" in table
    assert overview_line(read_comparison(old)).split(" | ")[1] == "eigen_block"


# -- published records -----------------------------------------------------------------------------------


def pictures(report: Path) -> list[str]:
    return re.findall(r"data:image/png;base64,[^\"]+", report.read_text())


def test_published_records_alone_give_the_same_document_and_report(finished, document, tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(finished, results / "tiny")
    places = [f"results={results}", f"output={tmp_path / 'published.md'}"]
    assert run_verb("results", ["publish=[tiny]", *places]) == 0
    shutil.rmtree(results / "tiny")
    (tmp_path / "published.md").unlink()
    assert run_verb("results", places) == 0
    assert (tmp_path / "published.md").read_text() == document.read_text()
    assert run_verb("results", ["report=[tiny]", *places]) == 0
    for name in ("table.csv", "plot.png"):
        assert (results / "tiny" / name).read_bytes() == (finished / name).read_bytes()
    assert pictures(results / "tiny" / "report.html") == pictures(finished / "report.html")
    assert "Learning curves" in (results / "tiny" / "report.html").read_text()


def test_sections_without_records_stay_and_are_named(finished, document, tmp_path, capsys):
    older = document.read_text().replace("comparison: tiny", "comparison: older").replace("| tiny |", "| older |")
    document.write_text(older)
    shutil.copy(finished / "records.json", tmp_path / "tiny.json")
    assert run_verb("results", [f"results={tmp_path}", f"output={document}"]) == 0
    assert "As they were, for want of records: older" in capsys.readouterr().out
    assert document.read_text().startswith(older.split("<!-- overview -->")[0])
    assert older.split("## tiny")[1].strip() in document.read_text()


def test_results_are_what_the_published_records_tell(tmp_path):
    """A table in RESULTS.md that was changed by hand, or a record published without the document, fails here."""
    copy = tmp_path / "RESULTS.md"
    shutil.copy(ROOT / "RESULTS.md", copy)
    assert run_verb("results", [f"results={ROOT / 'results'}", f"output={copy}"]) == 0
    assert copy.read_text() == (ROOT / "RESULTS.md").read_text(), "approx-attn results writes it anew"


def test_published_records_are_small_and_name_no_place_of_a_machine():
    paths = sorted((ROOT / "results").glob("*.json"))
    assert paths
    for path in paths:
        assert path.stat().st_size < 150_000
        assert without_paths(path.read_text()) == path.read_text()
