"""Training as a function: the run folder, checkpoints, resuming, auxiliary losses, evaluation of a checkpoint."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

from approx_attn.cli import main
from approx_attn.config.compose import compose_config, plain
from approx_attn.errors import ConfigError
from approx_attn.run import record
from approx_attn.run.callbacks.finite_loss import DivergedError
from approx_attn.run.evaluate import evaluate, load_task
from approx_attn.run.tasks import ClassificationTask, SequenceTask
from approx_attn.run.train import train
from helpers import QUIET, SMALL_MODEL

LIMITS = [f"trainer.limit_{part}_batches={count}" for part, count in (("train", 4), ("val", 1), ("test", 1))]


def config(runs: Path, *overrides: str) -> dict[str, Any]:
    return plain(
        compose_config([f"paths.runs={runs}", *QUIET, *SMALL_MODEL, *LIMITS, "trainer.max_epochs=2", *overrides])
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(config(tmp_path_factory.mktemp("runs"), "attention=topk"))


def test_run_folder_holds_everything(run: Any) -> None:
    kept = json.loads((run.run_dir / "result.json").read_text())
    assert kept["status"] == "finished"
    assert kept["metrics"] == run.metrics
    assert 0.0 <= run.metrics["test/accuracy"] <= 1.0
    assert kept["steps"] == 8
    assert kept["parameters"] == sum(p.numel() for p in run.task.model.parameters())
    assert 0 < kept["cost"]["exact_pairs"] < kept["cost"]["total_pairs"]
    assert {"name": kept["name"], "attention": kept["attention"], "seed": kept["seed"]} == {
        "name": "digits",
        "attention": "topk",
        "seed": 1,
    }
    assert yaml.safe_load((run.run_dir / "config.yaml").read_text()) == kept["config"]
    assert "val/accuracy" in (run.run_dir / "metrics.csv").read_text()
    predictions = np.load(run.run_dir / "test_predictions.npz")
    assert len(predictions["prediction"]) == len(predictions["label"]) == 360
    assert np.mean(predictions["prediction"] == predictions["label"]) == pytest.approx(run.metrics["test/accuracy"])
    assert run.run_dir.parent.name == "topk"
    assert run.run_dir.name.endswith("-seed1")


def test_checkpoints_hold_plain_containers(run: Any) -> None:
    best = run.run_dir / "checkpoints" / "best.ckpt"
    task = ClassificationTask.load_from_checkpoint(best, weights_only=True)
    for name, weight in run.task.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], weight)
    torch.load(run.run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def test_checkpoint_alone_gives_the_same_figures(run: Any) -> None:
    figures = evaluate(run.run_dir / "checkpoints" / "best.ckpt")
    assert figures["test/accuracy"] == pytest.approx(run.metrics["test/accuracy"])
    assert figures["test/loss"] == pytest.approx(run.metrics["test/loss"])
    assert set(evaluate(run.run_dir / "checkpoints" / "best.ckpt", split="val")) == {"val/accuracy", "val/loss"}


def test_another_mechanism_is_tested_in_a_trained_model(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run.run_dir / "checkpoints" / "best.ckpt"

    def loss(attention: Any, **convert: Any) -> float:
        return evaluate(checkpoint, convert={"attention": attention, **convert})["test/loss"]

    own = pytest.approx(run.metrics["test/loss"], rel=1e-4)
    assert loss({"name": "topk", "keep": run.task.mechanisms[0].keep}) == own
    assert loss("uniform") != own
    assert loss("mean", calibration_sequences=32) not in (own, loss("uniform"))  # it is fitted
    with pytest.raises(ConfigError, match=r"layers='nowhere' means no attention layer"):
        loss("uniform", layers="nowhere")
    with pytest.raises(ConfigError, match=r"convert\.calibration_sequences"):
        loss("mean", calibration_sequences=0)
    assert main(["evaluate", f"checkpoint={checkpoint}", "convert.attention=uniform", "progress_bar=false"]) == 0
    assert f"{loss('uniform'):.6f}" in capsys.readouterr().out


def test_same_seed_same_run_and_never_the_same_folder(run: Any) -> None:
    again = train(run.record["config"])
    assert again.run_dir != run.run_dir
    assert again.metrics == run.metrics
    other = train({**run.record["config"], "seed": 2})
    assert other.metrics["test/loss"] != run.metrics["test/loss"]


def test_finished_run_is_reported_and_not_run_again(run: Any) -> None:
    before = (run.run_dir / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    result = train({**run.record["config"], "resume": True})
    assert result.run_dir == run.run_dir
    assert result.metrics == run.metrics
    assert result.task is None
    assert (run.run_dir / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_how_batches_are_served_does_not_change_a_run(run: Any) -> None:
    settings = dict(run.record["config"])
    served = {**settings, "data": {**settings["data"], "num_workers": 1}}
    assert train({**served, "resume": True}).run_dir == run.run_dir
    again = train(served)
    assert again.run_dir != run.run_dir
    assert again.metrics == run.metrics


def test_an_equal_run_that_ended_while_this_one_waited_is_not_trained_over(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def held_by_another(folder: Path) -> Iterator[None]:
        shutil.copytree(run.run_dir, folder)
        yield

    monkeypatch.setattr(record, "run_lock", held_by_another)
    result = train({**run.record["config"], "paths": {"runs": str(tmp_path), "run_dir": None}})
    assert result.task is None
    assert result.metrics == run.metrics


def test_auxiliary_loss_is_added_and_logged(tmp_path: Path) -> None:
    options = ["attention=differentiable_mask", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
    with_it = train(config(tmp_path, *options))
    without = train(config(tmp_path, *options, "task.auxiliary_weight=0"))
    assert "train/auxiliary_loss" in (with_it.run_dir / "metrics.csv").read_text()
    gates = [list(result.task.mechanisms[0].parameters()) for result in (with_it, without)]  # type: ignore[union-attr]
    assert not all(torch.equal(a, b) for a, b in zip(*gates, strict=True))


def test_token_prediction_scores_labelled_positions_only(tmp_path: Path) -> None:
    small = ["data=mqar", "data.train_size=128", "data.val_size=100", "data.test_size=100"]
    result = train(config(tmp_path, *small, "data.eval_batch_size=100"))
    predictions = np.load(result.run_dir / "test_predictions.npz")
    assert len(predictions["label"]) == 100 * 8  # queries, not tokens
    assert predictions["label"].min() >= 0


@pytest.mark.parametrize(("epochs", "told"), [(3, False), (100_000, True)])
def test_a_long_training_says_how_long_after_its_first_steps(
    epochs: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["callbacks.step_timer.warm_up=0", "trainer.max_time=00:00:00:02", f"trainer.max_epochs={epochs}"]
    train(config(tmp_path, *words))
    assert ("training will take about" in capsys.readouterr().err) == told


def spoil_loss(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """Replace the loss of every training step by `spoil(loss, step)`, steps counted from 1."""
    original = SequenceTask.training_step

    def training_step(self: SequenceTask, batch: Any, batch_index: int) -> Any:
        return spoil(original(self, batch, batch_index), self.trainer.global_step + 1)

    monkeypatch.setattr(SequenceTask, "training_step", training_step)


def test_the_best_checkpoint_is_the_best_whichever_figure_is_watched(tmp_path: Path) -> None:
    words = ["trainer.max_epochs=4", "callbacks.early_stopping.monitor=val/accuracy"]
    for figure, best in (("accuracy", max), ("loss", min)):
        result = train(config(tmp_path, *words, f"callbacks.best_checkpoint.monitor=val/{figure}"))
        with (result.run_dir / "metrics.csv").open(newline="") as file:
            seen = [float(row[f"val/{figure}"]) for row in csv.DictReader(file) if row[f"val/{figure}"]]
        assert len(set(seen)) > 1
        assert result.metrics[f"best_val/{figure}"] == pytest.approx(best(seen))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["trainer.max_steps=3"], "trainer.max_steps=3 ends before the first validation, after batch 4"),
        (["trainer.limit_val_batches=0"], "trainer.limit_val_batches=0 leaves nothing to validate on"),
        (
            ["trainer.check_val_every_n_epoch=3"],
            "trainer.max_epochs=2 ends before the first validation, after batch 12",
        ),
        (["trainer.max_steps=1", "trainer.accumulate_grad_batches=3"], "trainer.max_steps=1 ends before the first"),
    ],
)
def test_a_run_without_validation_says_so_and_tests_its_last_weights(
    words: list[str], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(config(tmp_path, *words))
    assert reason in caplog.text
    assert (result.record["validations"], result.record["tested_weights"]) == (0, "last")
    figures = evaluate(result.run_dir / "checkpoints" / "last.ckpt")
    assert figures["test/loss"] == pytest.approx(result.metrics["test/loss"])


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_steps=4"],
        ["trainer.max_steps=2", "trainer.val_check_interval=0.5"],
        ["trainer.check_val_every_n_epoch=2"],
        ["trainer.max_steps=2", "trainer.accumulate_grad_batches=3"],
    ],
)
def test_a_run_that_comes_to_just_one_validation_does_not_say_that_there_is_none(
    words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = train(config(tmp_path, *words)).record
    assert (record["validations"], record["tested_weights"]) == (1, "best")
    assert "validation" not in caplog.text


def test_diverged_run_says_where_and_is_recorded_as_failed(tmp_path: Path) -> None:
    settings = config(tmp_path, "trainer.gradient_clip_val=null", "optimizer.lr=1e30")
    with pytest.raises(
        DivergedError,
        match=r"step \d+ with attention=exact \(learning rate 1e\+30,.*learning rate too high.*optimizer\.lr",
    ):
        train(settings)
    (path,) = tmp_path.glob("digits/exact/*/result.json")
    failure = json.loads(path.read_text())
    assert failure["status"] == "failed"
    assert "step" in failure["error"]


@pytest.mark.parametrize(
    ("bad_step", "cause"), [(1, "no step had been made yet"), (3, "learning rate too high"), (7, "learning rate")]
)
def test_the_first_step_without_a_finite_loss_is_named(
    bad_step: int, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, lambda loss, step: loss * float("nan") if step == bad_step else loss)
    with pytest.raises(DivergedError, match=rf"at step {bad_step} with attention=topk .*{cause}"):
        train(config(tmp_path, "attention=topk", "callbacks.finite_loss.every_n_steps=5"))


def test_a_loss_that_explodes_stops_the_run_and_a_spike_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ["callbacks.finite_loss.every_n_steps=1", "+callbacks.finite_loss.patience=3"]
    with monkeypatch.context() as patch:
        spoil_loss(patch, lambda loss, step: loss * 100 if step in (2, 3, 5) else loss)
        train(config(tmp_path / "spikes", *often))
    spoil_loss(monkeypatch, lambda loss, step: loss * 2.0**step)
    with pytest.raises(DivergedError, match=r"the loss is \S+ at step \d, up from \S+ at first, with attention=exact"):
        train(config(tmp_path / "grows", *often))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention=topk", "attention.keep=1.5"], r"attention\.keep"),
        (["attention=eigen_row", "attention.keep=4", "attention.rank=8"], r"attention\.rank"),
        (["data=mqar", "attention=linformer"], "does not support causal attention"),
        (["data=mqar", "model=encoder_classifier"], "causal"),
        (["data=mqar", "task=classification"], "token_prediction"),
        (["data=text_classification", "data.path=no/such/folder"], r"data\.path"),
        (["optimizer.lr=-1"], r"optimizer\.lr must be a number above 0"),
        (["trainer.max_epochs=many"], r"trainer\.max_epochs"),
        (["trainer.precision=17"], "precision"),
        (
            ["trainer.val_check_interval=0"],
            r"trainer\.val_check_interval must be a share of an epoch above 0 or a number",
        ),
        (["callbacks.early_stopping.monitor=val/acuracy"], r"monitor must be one of"),
        (
            ["callbacks.early_stopping.mode=max"],
            r"callbacks\.early_stopping\.mode must be min or null with monitor=val/l",
        ),
        (["seed=-1"], "seed"),
        (["+attention.kep=0.1"], r"attention\.kep is not an option of exact"),
        (["+data.foo=1"], r"data\.foo is not an option"),
        (["attention._target_=os.system"], "_target_ must lie in one of the packages"),
        (["name=../../x"], r"name must be a plain name, not a path, got '\.\./\.\./x'"),
        (["name=.."], "name must be a plain name"),
        (["name=/x/y"], "name must be a plain name"),
        (["callbacks.best_checkpoint.filename=../../x"], r"callbacks\.best_checkpoint\.filename must stay inside"),
        (["callbacks.best_checkpoint.filename=a/b"], r"callbacks\.best_checkpoint\.filename must be a plain name"),
        (["+callbacks.best_checkpoint.dirpath=elsewhere"], r"callbacks\.best_checkpoint\.dirpath is not an option"),
        (["+callbacks.x={_target_: pytorch_lightning.callbacks.OnExceptionCheckpoint,dirpath: e}"], "dirpath is not"),
        (["+logger.csv.save_dir=elsewhere"], r"logger\.csv\.save_dir is not an option"),
        (["+logger.csv.name=../x"], r"logger\.csv\.name must stay inside the folder of the run"),
        (["+logger.csv.version=/x/y"], r"logger\.csv\.version must stay inside"),
        (["logger=default", "+logger.tensorboard.sub_dir=../../x"], r"logger\.tensorboard\.sub_dir must stay inside"),
        (["logger=default", "+logger.tensorboard.filename_suffix=/../../x"], r"filename_suffix must stay inside"),
        (["+trainer.default_root_dir=elsewhere"], r"trainer\.default_root_dir is not an option"),
        (["callbacks.resumable.minutes=-1"], r"callbacks\.resumable\.minutes"),
    ],
)
def test_wrong_configuration_is_refused_before_anything_is_written(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "runs", *overrides))
    assert not (tmp_path / "runs").exists()


def test_another_configuration_is_not_taken_for_the_run_in_a_folder(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run")
    asked = {**run.record["config"], "resume": True, "paths": {"runs": "runs", "run_dir": str(tmp_path / "run")}}
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = {**asked, "optimizer": {**asked["optimizer"], "lr": 0.5}, "seed": 2}
    for finished in (True, False):
        if not finished:
            (tmp_path / "run" / "result.json").unlink()
            del before[tmp_path / "run" / "result.json"]
        with pytest.raises(
            ConfigError, match=r"another run: seed 1 there and 2 here, .*optimizer\.lr 0\.004 there and 0\.5"
        ):
            train(other)
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    longer = {**asked, "trainer": {**asked["trainer"], "max_epochs": 9}}
    with pytest.raises(
        ConfigError, match=r"trainer\.max_epochs 2 there and 9 here; extend trains a finished run longer"
    ):
        train(longer)
    assert train({**asked, "data": {**asked["data"], "num_workers": 1}}).metrics == run.metrics


@pytest.mark.parametrize("key", ["paths.runs", "paths.run_dir"])
def test_a_place_that_cannot_be_written_to_is_refused_before_work(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("approx_attn.run.train.make_splits", lambda data: pytest.fail("data were read"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"{key}=.*run.* cannot be written: .*file is not a folder"):
        train(config(tmp_path, f"{key}={tmp_path / 'file' / 'run'}"))


def test_a_warm_start_is_from_the_weights_of_a_checkpoint(run: Any, tmp_path: Path) -> None:
    best = run.run_dir / "checkpoints" / "best.ckpt"
    given = ["attention=topk", f"init_from={best}"]
    untrained = train(config(tmp_path, *given, "trainer.max_epochs=0"))
    assert untrained.metrics["test/loss"] == pytest.approx(run.metrics["test/loss"])
    trained = train(config(tmp_path, *given))
    assert trained.record["steps"] == 8
    assert trained.record["init_from"]["path"] == str(best)
    assert trained.run_dir.name != run.run_dir.name
    # A run is started from weights, wherever they lie.
    moved = Path(shutil.copy(best, tmp_path / "moved.ckpt"))
    again = {**config(tmp_path, "attention=topk", f"init_from={moved}"), "resume": True}
    assert train(again).run_dir == trained.run_dir
    assert train({**trained.record["config"], "resume": True}).run_dir == trained.run_dir
    saved = torch.load(best, weights_only=True)
    next(iter(saved["state_dict"].values())).zero_()
    torch.save(saved, moved)
    assert train(again).run_dir != trained.run_dir


def test_a_warm_start_takes_other_attention(run: Any, tmp_path: Path) -> None:
    best = run.run_dir / "checkpoints" / "best.ckpt"

    def tested(*words: str) -> Any:
        return train(config(tmp_path, f"init_from={best}", "trainer.max_epochs=0", *words))

    exact = tested("attention=exact")
    # With all pairs exact nothing is estimated; that a calibrated basis is filled shows that it was fitted.
    whole = ["attention=eigen_topk", "attention.keep=1.0", "attention.basis_init=calibrated"]
    assert tested(*whole).metrics["test/loss"] == pytest.approx(exact.metrics["test/loss"], rel=1e-4)
    # And the other way: a basis that is not needed is left behind.
    trained = train(config(tmp_path, f"init_from={best}", *whole))
    best = trained.run_dir / "checkpoints" / "best.ckpt"
    assert tested("attention=exact").metrics["test/loss"] == pytest.approx(trained.metrics["test/loss"], rel=1e-4)
    with pytest.raises(ConfigError, match=r"max_epochs=0 tests a model .* init_from has no fitting model\.\S+"):
        tested("attention=linformer")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["attention=topk", "model.dim=32"],
            r"token_embedding\.weight is \(\d+, 16\) there and \(\d+, 32\) here, .* more",
        ),
        (["attention=topk", "model.depth=3"], r"does not fit this model: model\.\S+ is missing there and \(.*\) here"),
        (["init_from=nowhere.ckpt"], r"init_from must be a checkpoint file or null, got 'nowhere\.ckpt'"),
        (["init_from=README.md"], r"init_from='README\.md' is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(words: list[str], message: str, run: Any, tmp_path: Path) -> None:
    given = f"init_from={run.run_dir / 'checkpoints' / 'best.ckpt'}"
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "runs", given, *words))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_never_enters_a_folder_of_somebody_else(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lr: 1")
    with pytest.raises(ConfigError, match=r"paths\.run_dir must be a new folder, an empty one or that of a run"):
        train({**config(tmp_path, f"paths.run_dir={tmp_path}"), "resume": resume})
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_earlier_version_s_run_without_a_marker_is_still_found(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / "old")
    (tmp_path / "old" / ".approx-attn-run").unlink()
    settings = {**run.record["config"], "paths": {"runs": "runs", "run_dir": str(tmp_path / "old")}}
    assert train({**settings, "resume": True}).metrics == run.metrics


@pytest.mark.parametrize(
    "target", ["os.system", "approx_attn.run.record.os.system", "approx_attn.cli.main", "torch.optim.SGD"]
)
def test_hostile_checkpoint_cannot_name_another_class(target: str, run: Any, tmp_path: Path) -> None:
    saved = torch.load(run.run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    saved["hyper_parameters"]["config"]["model"]["_target_"] = target
    torch.save(saved, tmp_path / "hostile.ckpt")
    with pytest.raises(ConfigError, match="_target_"):
        load_task(tmp_path / "hostile.ckpt")


def of_earlier_version(config: dict[str, Any], module: str, cls: str, **options: Any) -> dict[str, Any]:
    """The configuration with a mechanism as configurations named it that were written then."""
    node = {"_target_": f"approx_attn.attention.eigen.{module}.{cls}", "_partial_": True, **options}
    return {**config, "attention": node, "model": {**config["model"], "attention": node}}


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (("block", "EigenBlockAttention"), "attention=eigen_block is unknown; eigen_cluster has replaced it."),
        (("topk", "EigenTopKAttention", 8), "attention.block_size is no longer an option of eigen_topk; eigen_cluster"),
    ],
    ids=["mechanism", "option"],
)
def test_what_was_trained_with_a_mechanism_that_is_gone(
    attention: tuple, message: str, run: Any, tmp_path: Path
) -> None:
    saved = torch.load(run.run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    module, cls, *size = attention
    options = {"block_size": size[0]} if size else {}
    old = of_earlier_version(saved["hyper_parameters"]["config"], module, cls, **options)
    saved["hyper_parameters"]["config"] = old
    torch.save(saved, tmp_path / "old.ckpt")
    for use in (lambda: evaluate(tmp_path / "old.ckpt"), lambda: train({**old, "paths": {"runs": str(tmp_path)}})):
        with pytest.raises(ConfigError, match=re.escape(message)):
            use()


def test_what_was_trained_with_an_option_that_is_gone_and_was_off(tmp_path: Path) -> None:
    result = train(config(tmp_path, "attention=eigen_topk"))
    saved = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    old = of_earlier_version(saved["hyper_parameters"]["config"], "topk", "EigenTopKAttention", block_size=None)
    saved["hyper_parameters"]["config"] = old
    torch.save(saved, tmp_path / "old.ckpt")
    figures = evaluate(tmp_path / "old.ckpt")
    assert figures["test/loss"] == pytest.approx(result.metrics["test/loss"])


def test_a_checkpoint_does_not_say_where_data_is_written(tmp_path: Path) -> None:
    small = ["data=mqar", "data.train_size=100", "data.val_size=100", "data.test_size=100", "data.eval_batch_size=100"]
    result = train(config(tmp_path / "runs", *small, f"data.cache_dir={tmp_path / 'cache'}"))
    assert (tmp_path / "cache").exists()
    saved = torch.load(result.run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    saved["hyper_parameters"]["config"]["data"]["cache_dir"] = str(tmp_path / "elsewhere")
    torch.save(saved, tmp_path / "hostile.ckpt")
    assert evaluate(tmp_path / "hostile.ckpt")["test/loss"] == pytest.approx(result.metrics["test/loss"])
    assert not (tmp_path / "elsewhere").exists()


def test_damaged_or_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_task(tmp_path / "missing.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_task(tmp_path / "damaged.ckpt")


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_figures(tmp_path: Path) -> None:
    plain_run = train(config(tmp_path))
    compiled = train(config(tmp_path, "compile=true"))
    assert compiled.task.model._compiled_call_impl is not None  # type: ignore[union-attr]
    assert compiled.record["config"]["compile"] is True
    assert compiled.run_dir.name != plain_run.run_dir.name
    assert compiled.metrics["test/loss"] == pytest.approx(plain_run.metrics["test/loss"], rel=1e-3)
    checkpoint = compiled.run_dir / "checkpoints" / "best.ckpt"
    assert evaluate(checkpoint)["test/loss"] == pytest.approx(compiled.metrics["test/loss"], rel=1e-3)


def test_the_progress_bar_keeps_to_one_line_and_counts_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(config(tmp_path, "progress_bar=true", "trainer.max_epochs=1"))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    shown = [line for line in re.split(r"[\r\n]+", text) if "acc: " in line]
    assert shown
    assert all(line.startswith("Epoch 1/1 ") and "loss: " in line and len(line) <= 80 for line in shown)


def test_training_leaves_no_global_state_behind(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    train(config(tmp_path, "trainer.max_epochs=1"))
    assert torch.are_deterministic_algorithms_enabled() == before
    assert isinstance(pl.Trainer(logger=False, enable_checkpointing=False), pl.Trainer)
