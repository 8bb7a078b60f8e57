"""Comparisons at equal time and with tuned learning rates: which runs they are, what the files say, what is refused."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from approx_attn.comparison.aggregate import StepMeasurement
from approx_attn.comparison.command import compare, main
from approx_attn.comparison.equal_time import at_equal_time
from approx_attn.comparison.plan import plan
from approx_attn.comparison.records_file import read_records
from approx_attn.comparison.terms import Tuning
from approx_attn.config.compose import plain
from approx_attn.run import train as training
from helpers import QUIET, SMALL_MODEL

WORDS = ["data=digits", *QUIET, *SMALL_MODEL, "attention=[exact,topk]", "trainer.max_epochs=2"]
WORDS += ["trainer.limit_train_batches=4", "data.batch_size=8", "callbacks.last_checkpoint=null", "name=terms"]


def arguments(folder: Path, *more: str) -> list[str]:
    places = [f"paths.runs={folder / 'runs'}", f"results={folder / 'results'}"]
    return [*WORDS, *places, "measure.repeats=1", "measure.warm_up=0", *more]


def measured(**seconds: float) -> dict[str, StepMeasurement]:
    return {label: StepMeasurement(each / seconds["exact"], 0.0, each, 1) for label, each in seconds.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison at equal time of two learning rates, the second of which no run survives."""
    folder = tmp_path_factory.mktemp("terms")
    words = arguments(folder, "seeds=[1,2]", "equal=time", "tune=[1e-3,1e30]", "callbacks.finite_loss.every_n_steps=1")
    return folder, words, compare(words, Console(file=io.StringIO(), width=220))


# -- equal time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps", "interval"),
    [
        (["trainer.max_epochs=10"], 1000, 100),  # a validation each epoch
        (["trainer.max_epochs=10", "trainer.check_val_every_n_epoch=5"], 1000, 500),
        (["trainer.max_epochs=10", "trainer.val_check_interval=0.25"], 1000, 25),
        (["trainer.max_epochs=-1", "trainer.max_steps=350"], 350, 116),
        (["trainer.max_epochs=10", "trainer.limit_train_batches=50"], 500, 50),
        (["trainer.max_epochs=10", "trainer.accumulate_grad_batches=8"], 130, 100),  # the last takes 4 batches
        (
            [
                "trainer.max_epochs=-1",
                "trainer.max_steps=600",
                "trainer.check_val_every_n_epoch=null",
                "trainer.val_check_interval=150",
            ],
            600,
            150,
        ),
    ],
)
def test_steps_follow_the_time_of_a_step_and_validations_stay_as_many(settings, steps, interval):
    comparison = plan([*WORDS[:-4], "trainer.limit_train_batches=1.0", *settings, "seeds=[1,2]", "equal=time"])
    found = at_equal_time(comparison, measured(exact=0.1, topk=0.2), 100)
    assert found.terms.steps == steps
    trainer = plain(found.runs["topk"][2].config)["trainer"]
    assert (trainer["max_epochs"], trainer["max_steps"]) == (-1, round(steps / 2))
    assert trainer["check_val_every_n_epoch"] is None
    assert trainer["val_check_interval"] == pytest.approx(interval / 2, abs=1)


def test_the_reference_has_the_runs_of_the_comparison_at_equal_steps():
    words = [*WORDS, "seeds=[1,2]"]
    found = at_equal_time(plan([*words, "equal=time"]), measured(exact=0.1, topk=0.2), 50)
    steps = plan(words)
    assert [found.runs["exact"][seed].folder == steps.runs["exact"][seed].folder for seed in (1, 2)] == [True, True]
    assert found.runs["topk"][1].folder != steps.runs["topk"][1].folder


def test_a_warm_up_counted_in_steps_is_scaled_with_them():
    comparison = plan([*WORDS, "scheduler.warmup=4", "seeds=[1]", "equal=time"])
    found = at_equal_time(comparison, measured(exact=0.3, topk=0.1), 4)
    assert found.runs["topk"][1].config.scheduler.warmup == 12
    assert found.runs["exact"][1].config.scheduler.warmup == 4


def test_runs_train_as_long_as_the_reference_by_the_kept_time_of_a_step(finished):
    folder, _, rows = finished
    kept = json.loads((folder / "results" / "terms" / "measurements.json").read_text())["steps"]
    steps = round(8 * kept["exact"]["seconds"] / kept["topk"]["seconds"])
    assert [row.steps for row in rows] == [8, max(steps, 1)]
    with (folder / "results" / "terms" / "table.csv").open() as file:
        exact, topk = csv.DictReader(file)
    assert float(topk["steps"]) == max(steps, 1)
    assert float(exact["training_seconds"]) == pytest.approx(8 * kept["exact"]["seconds"])
    markdown = (folder / "results" / "terms" / "table.md").read_text()
    assert "| steps | seconds |" in markdown
    assert "time of the 8 steps of exact" in markdown


def test_the_same_command_neither_measures_nor_trains_again_and_more_mechanisms_change_no_numbers(
    finished, monkeypatch
):
    _, words, rows = finished
    monkeypatch.setattr(training, "train", lambda *arguments: pytest.fail("trained again"))
    assert compare(words, Console(file=io.StringIO())) == rows
    trained = []

    def refuse(config, *more):
        trained.append(config.attention["_target_"])
        raise RuntimeError("not now")

    monkeypatch.setattr(training, "train", refuse)
    more = compare([*words, "attention=[exact,topk,uniform]"], Console(file=io.StringIO()))
    assert [row.figure for row in more] == [*(row.figure for row in rows), None]
    assert {target.rpartition(".")[2] for target in trained} == {"UniformAttention"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda kept: {**kept, "device": "cuda"}, "device cuda and not cpu"),
        (lambda kept: {**kept, "environment": {"torch_threads": 77}}, "threads 77 and not"),
        (lambda kept: {**kept, "steps": {"exact": {"seconds": "two"}}}, "no measured steps that can be read"),
    ],
)
def test_measurements_that_do_not_fit_are_refused(finished, capsys, changed, named):
    folder, words, _ = finished
    path = folder / "results" / "terms" / "measurements.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(changed(json.loads(before))))
        assert main(words) == 2
    finally:
        path.write_text(before)
    message = capsys.readouterr().err
    assert named in message
    assert f"{path} " in message
    assert message.count("\n") == 1


def test_curves_against_time_come_from_the_records_alone(finished):
    folder, words, _ = finished
    for path in [*(folder / "runs").rglob("metrics.csv"), folder / "results" / "terms" / "time.png"]:
        path.unlink()
    (run,) = (path for path in (folder / "runs").glob("digits/exact/*-seed2/result.json"))
    history = json.loads(run.read_text())["history"]
    assert [step for step, _ in history["val/accuracy"]] == [step for step, _ in history["val/loss"]] == [4, 8]
    compare(words, Console(file=io.StringIO()))
    assert (folder / "results" / "terms" / "time.png").read_bytes().startswith(b"\x89PNG")


# -- learning rates ------------------------------------------------------------------------------------


def test_every_mechanism_gets_its_best_rate_by_validation_and_diverged_runs_are_shown(finished):
    folder, _, rows = finished
    assert [row.learning_rate for row in rows] == [1e-3, 1e-3]
    assert [row.finished for row in rows] == [(1, 2), (1, 2)]
    terms = read_records(folder / "results" / "terms" / "records.json").terms
    assert terms.equal == "time"
    assert terms.tuning.grid == (1e-3, 1e30)
    assert terms.tuning.seed == 1
    assert [terms.tuning.figures[label][1] for label in ("exact", "topk")] == [None, None]
    assert "| learning rate |" in (folder / "results" / "terms" / "table.md").read_text()
    assert "Learning rates" in (folder / "results" / "terms" / "report.html").read_text()


def test_what_no_rate_trains_is_missing(tmp_path):
    words = arguments(
        tmp_path, "seeds=[1,2]", "tune=[1e30]", "attention=[exact]", "callbacks.finite_loss.every_n_steps=1"
    )
    (row,) = compare(words, Console(file=io.StringIO()))
    assert row.figure is None
    assert "learning rate 1e+30" in row.missing[1]
    assert row.missing[2] == "not run"
    assert not list((tmp_path / "runs").rglob("*-seed2"))


@pytest.mark.parametrize(
    ("monitor", "figures", "best", "edge"),
    [
        ("val/accuracy", (0.5, 0.9, 0.7), 2.0, ""),
        ("val/loss", (0.5, 0.9, 0.7), 1.0, "the smallest for exact"),
        ("val/accuracy", (None, 0.2, 0.7), 3.0, "the largest for exact"),
        ("val/accuracy", (0.9, 0.9, float("nan")), 1.0, "the smallest for exact"),
        ("val/accuracy", (None, None, None), None, ""),
    ],
)
def test_the_best_rate_is_that_of_the_watched_figure_and_an_edge_is_said(monitor, figures, best, edge):
    tuning = Tuning((1.0, 2.0, 3.0), monitor, 1, {"exact": figures})
    assert tuning.best("exact") == best
    told = " ".join(tuning.sentences())
    assert f"of 1, 2, 3 with the best {monitor} of seed 1" in told
    assert ("edge" in told) == bool(edge)
    assert edge in told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["equal=seconds"], "equal must be steps or time"),
        (["equal=time", "measure.repeats=0"], "measure.repeats must be at least 1"),
        (["equal=time", "trainer.max_time=00:01:00:00"], "trainer.max_time must be null"),
        (["equal=time", "trainer.devices=2"], "trainer.devices must be 1"),
        (["tune=[]"], "tune must be a list"),
        (["tune=[0.1,0.1]"], "tune must be a list"),
        (["tune=[fast]"], "tune must be a list"),
        (["tune=[-1.0]"], "tune must be a list"),
        (["tune=0.1,0.2"], "tune takes a list"),
        (["tune=[0.1]", "optimizer.lr=0.1"], "optimizer.lr is chosen from tune"),
        (["tune=[0.1]", "callbacks.best_checkpoint=null"], "callbacks.best_checkpoint.monitor"),
    ],
)
def test_bad_terms_are_one_sentence_before_anything_is_written(tmp_path, capsys, words, named):
    assert main(arguments(tmp_path, "seeds=[1]", *words)) == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- where runs start ----------------------------------------------------------------------------------


def test_every_run_starts_from_the_weights_of_its_mechanism_and_seed(finished):
    folder, *_ = finished
    comparison = plan(arguments(folder, "seeds=[1,2]", "start_from=terms", "name=longer", "data.batch_size=4"))
    starts = {(label, seed): Path(run.config.init_from) for label, seed, run in comparison.jobs()}
    assert len(set(starts.values())) == 4
    for (label, seed), checkpoint in starts.items():
        assert checkpoint.is_file()
        assert label in checkpoint.parts
        assert f"-seed{seed}" in str(checkpoint)


def test_a_mechanism_that_is_not_there_starts_from_the_reference(finished):
    folder, *_ = finished
    comparison = plan(arguments(folder, "seeds=[1,2]", "start_from=terms", "attention=[exact,eigen_topk]", "name=new"))
    starts = {(label, seed): run.config.init_from for label, seed, run in comparison.jobs()}
    assert starts["eigen_topk", 2] == starts["exact", 2] != starts["exact", 1]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["start_from=other"], "start_from=other must be the name of a finished comparison"),
        (["start_from=terms", "seeds=[1,3]"], "no best checkpoint of exact seed 3; it has exact (seeds 1, 2)"),
        (["start_from=a/b"], "start_from"),
    ],
)
def test_a_start_that_is_not_there_is_refused(finished, words, named, capsys):
    folder, *_ = finished
    assert main(arguments(folder, "seeds=[1,2]", *words)) == 2
    assert named in capsys.readouterr().err
