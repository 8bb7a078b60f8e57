"""Metrics: their values against independent implementations, over processes, in records, tables and evaluations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

from approx_attn.comparison.command import compare
from approx_attn.comparison.records_file import read_records
from approx_attn.config.compose import compose_config
from approx_attn.errors import ConfigError
from approx_attn.metrics import METRICS, Tally, figures, metric_direction, metric_names, metric_of
from approx_attn.run.evaluate import evaluate
from approx_attn.run.record import read_result
from approx_attn.run.train import train
from helpers import QUIET, SMALL_MODEL

ALL = ("f1", "balanced_accuracy", "per_class_accuracy", "calibration_error")
SMALL = ["data=digits", *QUIET, *SMALL_MODEL, "trainer.max_epochs=1", "optimizer.lr=0.01"]


def predictions(classes: int, items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; the last class has no items and is predicted all the same."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes - 1, (items,), generator=generator)
    logits = torch.randn(items, classes, generator=generator)
    logits[torch.arange(items), labels] += 1.0
    return logits, labels


def tallied(logits: torch.Tensor, labels: torch.Tensor) -> Tally:
    tally = Tally(logits.shape[1])
    for part, of_part in zip(logits.split(7), labels.split(7), strict=True):
        probability, predicted = part.softmax(-1).max(-1)
        tally.update(predicted, of_part, probability)
    return tally


def test_metrics_are_those_of_their_definitions() -> None:
    logits, labels = predictions(5, 200)
    predicted = logits.argmax(-1)
    found = figures(ALL, tallied(logits, labels).compute())
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    recalls = recall_score(labels, predicted, average=None, labels=range(4))
    assert [found[f"per_class_accuracy/{index}"] for index in range(4)] == pytest.approx(list(recalls))
    assert "per_class_accuracy/4" not in found, "a class without items has no accuracy"
    expected = multiclass_calibration_error(logits.softmax(-1), labels, num_classes=5, n_bins=15, norm="l1")
    assert found["calibration_error"] == pytest.approx(float(expected), rel=1e-5)


def test_shares_of_unequal_processes_add_up() -> None:
    logits, labels = predictions(5, 200)
    shares = [tallied(logits[part], labels[part]) for part in (slice(0, 180), slice(180, 200))]
    shares[0].merge_state(shares[1])
    together = figures(ALL, tallied(logits, labels).compute())
    assert figures(ALL, shares[0].compute()) == pytest.approx(together, rel=1e-6)


def test_names_and_directions() -> None:
    assert {name: metric_direction(name) for name in METRICS} == {
        **dict.fromkeys(("accuracy", "f1", "balanced_accuracy", "per_class_accuracy", "exact_match", "bleu"), "max"),
        **dict.fromkeys(("loss", "calibration_error"), "min"),
    }
    assert metric_direction("val/loss") == metric_direction("best_val/loss") == "min"
    assert metric_of("test/per_class_accuracy/cat").header == "accuracy of class cat %"
    assert metric_names(None) == ("accuracy",)
    assert metric_names(["f1", "f1"]) == metric_names("f1") == ("f1",)
    for wrong in ("val/acuracy", "f1/cat"):
        with pytest.raises(ConfigError, match="is no metric"):
            metric_direction(wrong)
    for value, message in ((["f2"], "'f2' is unknown"), ([], "must be a list"), (3, "must be a list")):
        with pytest.raises(ConfigError, match=f"metrics.*{message}"):
            metric_names(value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two mechanisms and seeds, made with accuracy alone."""
    folder = tmp_path_factory.mktemp("metrics")
    compare([*SMALL, *words(folder), "metric=accuracy"], Console(quiet=True))
    return folder


def words(folder: Path) -> list[str]:
    return [
        *("attention=[exact,uniform]", "seeds=[1,2]", "measure.repeats=0", "name=table"),
        *(f"paths.runs={folder}/runs", f"results={folder}/results"),
    ]


def test_a_run_has_the_metrics_asked_for(tmp_path: Path) -> None:
    asked = f"metrics=[{','.join(ALL)}]"
    watched = "callbacks.best_checkpoint.monitor=val/f1"
    run = train(compose_config([*SMALL, asked, watched, f"paths.run_dir={tmp_path}"]))
    kept = np.load(tmp_path / "test_predictions.npz")
    assert run.metrics["test/f1"] == pytest.approx(f1_score(kept["label"], kept["prediction"], average="macro"))
    assert sum(key.startswith("test/per_class_accuracy/") for key in run.metrics) == 10
    assert 0.0 < run.metrics["test/calibration_error"] < 1.0
    assert "best_val/f1" in run.metrics
    assert "val/calibration_error" in (tmp_path / "metrics.csv").read_text()
    again = evaluate(tmp_path / "checkpoints" / "best.ckpt")
    assert again == pytest.approx({key: value for key, value in run.metrics.items() if key.startswith("test/")})


def test_runs_that_go_on_from_others_have_the_metrics_asked_for(tmp_path: Path) -> None:
    watched = ["metrics=[calibration_error]", "callbacks.best_checkpoint.monitor=val/calibration_error"]
    run = train(compose_config([*SMALL, *watched, f"paths.runs={tmp_path}"]))
    assert run.trainer.checkpoint_callback.mode == "min"  # type: ignore[union-attr]
    words = [*SMALL, *watched, "metrics=[calibration_error,f1]", f"paths.runs={tmp_path}"]
    again = train(compose_config([*words, "resume=true"]))
    assert again.task is None
    assert again.metrics.keys() == {*run.metrics, "test/f1"}
    longer = train(compose_config([*words, f"extend={run.run_dir}", "trainer.max_epochs=3"]))
    assert longer.metrics["best_val/calibration_error"] <= run.metrics["best_val/calibration_error"]
    assert 0.0 <= longer.metrics["test/f1"] <= 1.0
    best = run.run_dir / "checkpoints" / "best.ckpt"
    warm = train(compose_config([*words, f"init_from={best}", "trainer.max_epochs=0"]))
    assert warm.metrics["test/f1"] == pytest.approx(again.metrics["test/f1"])


def test_old_runs_are_compared_by_metrics_that_their_predictions_tell(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("approx_attn.run.train.train", lambda config: pytest.fail("it was trained before"))
    rows = compare(
        [*SMALL, *words(runs), "metric=calibration_error", f"metrics=[{','.join(ALL)}]"], Console(quiet=True)
    )
    records = [read_result(path.parent) for path in (runs / "runs").rglob("result.json")]
    assert len(records) == 4
    assert all(set(record["metrics"]) & {"test/f1", "test/calibration_error"} == set() for record in records if record)
    folder = runs / "results" / "table"
    assert rows[0].figure is not None
    assert "test calibration error %" in (folder / "table.csv").read_text() + (folder / "table.md").read_text()
    others = (folder / "other_metrics.csv").read_text().splitlines()
    assert len(others) == 1 + 2 * (1 + 1 + 10), "f1, balanced accuracy and ten classes, for two mechanisms"
    (path,) = (runs / "runs" / "digits" / "exact").glob("*-seed1")
    checked = evaluate(path / "checkpoints" / "best.ckpt", metrics=["f1", "calibration_error"])
    by_hand = [evaluate(p / "checkpoints" / "best.ckpt", metrics=["f1"])["test/f1"] for p in path.parent.iterdir()]
    line = next(line for line in others if line.startswith("f1,exact"))
    assert float(line.split(",")[2]) == pytest.approx(np.mean(by_hand))
    assert checked["test/calibration_error"] > 0.0
    stored = read_records(folder / "records.json")
    assert stored.metric.name == "calibration_error"
    assert stored.records["exact"][1]["metrics"]["test/calibration_error"] == pytest.approx(
        checked["test/calibration_error"], rel=1e-4
    )
    assert "Other metrics" in (folder / "report.html").read_text()


def test_what_old_predictions_do_not_tell_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (runs / "runs" / "digits" / "uniform").glob("*-seed2")
    with np.load(path / "test_predictions.npz") as kept:
        np.savez(path / "test_predictions.npz", prediction=kept["prediction"], label=kept["label"])
    rows = compare([*SMALL, *words(runs), "metric=calibration_error"], Console(quiet=True))
    assert "predictions do not tell it; approx-attn evaluate checkpoint=" in rows[1].missing[2]
    compare([*SMALL, *words(runs), "metrics=[calibration_error,f1]"], Console(width=500))
    printed = capsys.readouterr().out
    assert "calibration_error of uniform seed 2: the run was made without it" in printed
    assert "f1 of" not in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metrics=[calibration]"], "metrics: 'calibration' is unknown; did you mean 'calibration_error'"),
        (["callbacks.best_checkpoint.monitor=val/f1"], r"monitor must be one of .* got 'val/f1'"),
        (
            ["metrics=[f1]", "callbacks.early_stopping.monitor=val/f1", "callbacks.early_stopping.mode=min"],
            r"callbacks\.early_stopping\.mode must be max or null with monitor=val/f1, got 'min'",
        ),
        (["data=mqar", "metrics=[per_class_accuracy]"], "per_class_accuracy is for classification"),
    ],
)
def test_wrong_metrics_are_refused_before_training(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(compose_config([*SMALL, *overrides, f"paths.run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
