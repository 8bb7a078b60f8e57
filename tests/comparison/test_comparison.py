"""Comparisons through their public door: what runs, what is skipped, what the table says, what is refused."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from approx_attn.comparison.command import compare, main
from approx_attn.comparison.missing_runs import TimeLeft
from approx_attn.comparison.plan import plan
from approx_attn.comparison.records_file import read_records
from approx_attn.errors import ConfigError
from approx_attn.run import train as training

TINY = ["data=digits", "model.dim=16", "model.depth=1", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]


def arguments(folder: Path, *more: str) -> list[str]:
    return [*TINY, f"paths.runs={folder / 'runs'}", f"results={folder / 'results'}", "measure.repeats=1", *more]


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    words = arguments(folder, "attention=[exact,topk]", "seeds=[1,2]", "name=tiny")
    return folder, words, compare(words, quiet_console())


def test_every_file_tells_the_same(finished):
    folder, _, rows = finished
    results = folder / "results" / "tiny"
    with (results / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["attention"] for line in table] == ["exact", "topk"]
    assert [float(line["accuracy_mean"]) for line in table] == pytest.approx([row.figure.mean for row in rows])
    assert float(table[0]["step_time"]) == 1.0
    assert float(table[1]["exact_pairs"]) == pytest.approx(0.25)
    html = (results / "report.html").read_text()
    for row in rows:
        assert row.name in html
    assert "McNemar" in html
    assert "scripts/train.py" in html
    assert (results / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| topk |" in (results / "table.md").read_text()


def test_done_runs_are_not_trained_again(finished, monkeypatch):
    _, words, rows = finished
    monkeypatch.setattr(training, "train", lambda *arguments: pytest.fail("trained again"))
    assert compare(words, quiet_console()) == rows


def test_steps_to_a_figure_come_from_the_runs_that_are_there(finished, monkeypatch):
    folder, words, _ = finished
    monkeypatch.setattr(training, "train", lambda *arguments: pytest.fail("trained again"))
    rows = compare([*words, "reach=0", "name=reached"], quiet_console())
    assert [row.steps_to.steps.mean for row in rows] == [2, 2]
    assert read_records(folder / "results" / "reached" / "records.json").rows() == rows
    with pytest.raises(ConfigError, match=r"reach must be a validation figure such as 0\.9, or null, got 'soon'\."):
        plan([*words, "reach=soon"])


def test_another_comparison_shares_the_runs(finished, monkeypatch):
    folder, *_ = finished
    trained = []
    real = training.train
    monkeypatch.setattr(training, "train", lambda config, *more: trained.append(config) or real(config, *more))
    words = arguments(folder, "attention=[exact,uniform]", "seeds=[1]", "measure.repeats=0")
    again = compare(words, quiet_console())
    assert len(trained) == 1
    assert again[0].figure.count == 1
    assert again[1].step_time is None


def test_a_failing_run_is_shown_as_missing_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    real = training.train

    def fail_for_topk(config, *more):
        if config.attention["_target_"].endswith("TopKAttention"):
            raise RuntimeError("lost its way")
        return real(config, *more)

    monkeypatch.setattr(training, "train", fail_for_topk)
    words = arguments(tmp_path, "attention=[topk,exact]", "seeds=[1]", "name=failing", "measure.repeats=0")
    topk, exact = compare(words, quiet_console())
    assert main(words) == 1
    assert "error: 1 of 2 runs failed.\n" in capsys.readouterr().err
    assert topk.figure is None
    assert list(topk.missing) == [1]
    assert exact.figure is not None
    with (tmp_path / "results" / "failing" / "table.csv").open() as file:
        line = next(csv.DictReader(file))
    assert line["accuracy_mean"] == ""
    assert line["missing_seeds"] == "1"


def test_an_option_sweep_multiplies_the_mechanisms_that_have_it():
    comparison = plan(["attention=[exact,topk]", "attention.keep=0.1,0.5", "seeds=[1]"])
    assert list(comparison.runs) == ["exact", "topk keep=0.1", "topk keep=0.5"]
    keeps = [by_seed[1].config.attention.get("keep") for by_seed in comparison.runs.values()]
    assert keeps == [None, 0.1, 0.5]


def test_entries_may_carry_their_own_options():
    comparison = plan(["attention=[exact,{name: topk, keep: 3}]", "attention.keep=0.5", "seeds=[4]"])
    assert list(comparison.runs) == ["exact", "topk keep=3"]
    assert comparison.runs["topk keep=3"][4].config.attention.keep == 3


@pytest.mark.parametrize("words", [[], ["verbose=true"]])
def test_verbose_shows_where_an_error_comes_from(monkeypatch, capsys, words):
    def lost(arguments):
        raise RuntimeError("lost its way")

    monkeypatch.setattr("approx_attn.comparison.command.compare", lost)
    assert main(words) != 0
    message = capsys.readouterr().err
    assert "lost its way" in message
    assert ("Traceback" in message) == bool(words)


def test_an_entry_may_set_an_option_back_to_null():
    comparison = plan(["attention=[exact,{name: eigen_row, rank: null}]", "seeds=[4]"])
    assert comparison.runs["eigen_row rank=null"][4].config.attention.rank is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["attention=[exact,topkk]"], "did you mean 'topk'"),
        (["attention.keeep=0.5"], "did you mean 'keep'"),
        (["attention=[exact,{name: topk, kep: 3}]"], "attention.kep"),
        (["attention=[topk]"], "reference='exact'"),
        (["attention=[exact,exact]"], "twice"),
        (["seeds=[]"], "seeds"),
        (["seeds=[1,1]"], "seeds"),
        (["seeds=[a]"], "seeds"),
        (["seed=1"], "seeds=[...]"),
        (["paths.run_dir=here"], "write paths.runs="),
        (["metric=acuracy"], "did you mean 'accuracy'"),
        (["attention=[]"], "reference='exact'"),
        (["measure.repeat=1"], "measure.repeat"),
        (["measure.repeats=-1"], "measure.repeats must be a whole number of at least 0"),
        (["measure.warm_up=two"], "measure.warm_up must be a whole number of at least 0"),
        (["name=../elsewhere"], "name must be a plain name"),
        (["name=.."], "name must be a plain name"),
        (["data=digitz"], "did you mean 'digits'"),
        (["model.dim=1,2"], "model.dim cannot be swept"),
        (["data=mqar", "attention=[exact,linformer]"], "does not support causal"),
        (["attention=[exact,topk]", "attention.keep=1.5"], "attention.keep"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, capsys, words, named):
    given = [f"paths.runs={tmp_path / 'runs'}", f"results={tmp_path / 'results'}", "seeds=[1]", *words]
    assert main(given) != 0
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["results", "paths.runs"])
def test_a_place_that_cannot_be_written_to_is_refused_before_work(key, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *arguments: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path, "attention=[exact]", f"{key}={tmp_path / 'file' / 'x'}")) == 2
    assert f"error: {key}={tmp_path / 'file' / 'x'}" in capsys.readouterr().err


def test_measurements_are_kept_with_where_they_were_made(finished):
    folder, *_ = finished
    kept = json.loads((folder / "results" / "tiny" / "measurements.json").read_text())
    assert set(kept["steps"]) == {"exact", "topk"}
    assert kept["environment"]["torch_threads"] >= 1


def test_plain_lines_say_what_ended_what_is_left_and_where_report_and_picture_are(tmp_path, monkeypatch):
    console = quiet_console()

    def end_at_once(config, callbacks=()):
        raise RuntimeError("lost its way")

    monkeypatch.setattr(training, "train", end_at_once)
    words = arguments(tmp_path, "attention=[exact,topk]", "seeds=[1]", "name=lines", "measure.repeats=0")
    compare(words, console)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == [
        f"[{number}/2] {name} seed 1: FAILED: RuntimeError: lost its way (0 s)"
        for number, name in ((1, "exact"), (2, "topk"))
    ]
    folder = tmp_path / "results" / "lines"
    assert lines[-2:] == [f"Picture: {folder / 'plot.png'}", f"Report: {folder / 'report.html'}"]


def test_on_a_terminal_a_bar_follows_epoch_and_step_and_leaves_no_trace_in_a_pipe(tmp_path):
    shown = []
    for force_terminal in (True, False):
        console = Console(file=io.StringIO(), width=200, force_terminal=force_terminal)
        folder = tmp_path / str(force_terminal)
        compare(arguments(folder, "attention=[exact]", "seeds=[1,2]", "measure.repeats=0"), console)
        shown.append(console.file.getvalue())
    for text in ("[1/2] exact seed 1", "epoch 1/1, step", "[2/2] exact seed 2", "left"):
        assert text in shown[0]
    assert "epoch" not in shown[1]
    assert re.search(r"\[1/2\] exact seed 1: test accuracy % \d+\.\d+ \(\d+ s, about .* left\)", shown[1])


def test_time_left_follows_runs_of_the_same_mechanism_and_the_current_run():
    left = TimeLeft(["topk", "exact", "new"])
    assert left.left("exact", elapsed=1.0, done=0.0) is None
    assert left.left("exact", elapsed=1.0, done=0.25) == pytest.approx(3.0 + 3 * 4.0)
    left.add("exact", 10.0)
    left.add("topk", 30.0)
    assert left.left() == pytest.approx(30.0 + 10.0 + 20.0)
    assert left.left("topk", elapsed=40.0) == pytest.approx(0.0 + 60.0)
