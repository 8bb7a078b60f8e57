"""Distributed runs: two processes do what one does with the joint batch, and only the first writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from approx_attn.cli import main
from approx_attn.config.compose import compose_config, plain
from approx_attn.data.digits import DigitsData
from approx_attn.data.packing import IGNORE
from approx_attn.errors import ConfigError
from approx_attn.run import distributed
from approx_attn.run.evaluate import evaluate
from approx_attn.run.tasks.base import data_order
from approx_attn.run.train import TrainResult, train
from approx_attn.run.trainer import build_trainer
from helpers import QUIET, SMALL_MODEL

# Odd sizes of the evaluated splits: one of two processes repeats an item. SGD: Adam makes noise of zero gradients.
SETTINGS = [
    *QUIET,
    *SMALL_MODEL,
    *("model.depth=2", "model.dropout=0", "optimizer=sgd", "trainer.max_epochs=1", "trainer.limit_train_batches=5"),
]
DIGITS = ["data=digits", "data.val_size=179", "data.test_size=359", "data.eval_batch_size=50"]
RECALL = ["data=mqar", "data.train_size=200", "data.val_size=51", "data.test_size=33", "data.eval_batch_size=8"]


def config(folder: Path, *overrides: str) -> dict[str, Any]:
    return plain(compose_config([*overrides[:1], *SETTINGS, *overrides[1:], f"paths.run_dir={folder}"]))


def alone_and_together(folder: Path, trainer: str, data: list[str], *overrides: str) -> tuple[TrainResult, TrainResult]:
    alone = train(config(folder / "alone", *data, *overrides, "data.batch_size=32"))
    options = [f"trainer={trainer}", "trainer.devices=2", "data.batch_size=16"]
    return alone, train(config(folder / "together", *data, *overrides, *options))


def assert_same_run(alone: TrainResult, together: TrainResult) -> None:
    for name in ("best", "last"):
        ours, theirs = (
            torch.load(result.run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for result in (together, alone)
        )
        assert set(ours) == set(theirs)
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, rtol=1e-5, atol=1e-6, msg=key)
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-5)
    predictions = [np.load(result.run_dir / "test_predictions.npz") for result in (alone, together)]
    for key in ("prediction", "label"):
        np.testing.assert_array_equal(predictions[0][key], predictions[1][key])
    assert together.record["environment"]["processes"] == 2
    assert together.record["steps"] == alone.record["steps"] == 5


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path) -> None:
    metrics = "metrics=[f1,balanced_accuracy,per_class_accuracy,calibration_error]"
    alone, together = alone_and_together(tmp_path, "ddp", DIGITS, "attention=eigen_row", metrics)
    assert {"test/f1", "test/calibration_error"} <= together.metrics.keys()
    assert_same_run(alone, together)
    assert together.record["config"]["trainer"]["strategy"] == "ddp"
    assert json.loads((together.run_dir / "result.json").read_text()) == together.record
    figures = evaluate(together.run_dir / "checkpoints" / "best.ckpt")
    assert figures["test/accuracy"] == pytest.approx(together.metrics["test/accuracy"])
    with pytest.raises(ConfigError, match=r"trainer\.devices must be 1"):
        evaluate(together.run_dir / "checkpoints" / "best.ckpt", trainer={"devices": 2})
    again = train({**together.record["config"], "resume": True})
    assert again.resumed
    assert again.metrics == together.metrics


# With learned bases, and a running statistic held in a buffer; eigen_topk draws tokens for its auxiliary loss.
MECHANISMS = {
    "exact": [],
    "eigen_row": [],
    "eigen_linear": [],
    "eigen_cluster": [],
    "eigen_topk": ["task.auxiliary_weight=0"],
    "low_rank_topk": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize("attention", MECHANISMS)
def test_strategies_train_every_kind_of_mechanism(attention: str, trainer: str, tmp_path: Path) -> None:
    options = MECHANISMS[attention]
    assert_same_run(*alone_and_together(tmp_path, trainer, DIGITS, f"attention={attention}", *options))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_token_prediction_counts_every_token_once(trainer: str, tmp_path: Path) -> None:
    assert_same_run(*alone_and_together(tmp_path, trainer, RECALL, "attention=eigen_row"))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_resumed_distributed_run_equals_an_uninterrupted_one(trainer: str, tmp_path: Path) -> None:
    options = [*DIGITS, f"trainer={trainer}", "trainer.devices=2", "optimizer=adamw", "trainer.max_epochs=2"]
    whole = train(config(tmp_path, *options))
    last = tmp_path / "checkpoints" / "last.ckpt"
    theirs = torch.load(last, weights_only=True)
    # As if it had been killed after the first epoch.
    (tmp_path / "result.json").unlink()
    last.with_name("last.previous.ckpt").rename(last)
    assert 0 < torch.load(last, weights_only=True)["global_step"] < theirs["global_step"] == 10
    resumed = train(config(tmp_path, *options, "resume=true"))
    assert resumed.resumed
    ours = torch.load(last, weights_only=True)
    assert ours["global_step"] == 10
    for key, weight in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], weight), key
    assert resumed.metrics == whole.metrics


@pytest.mark.slow
def test_what_a_process_fails_with_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        *DIGITS[:1],
        *SETTINGS,
        "trainer=ddp",
        "trainer.devices=2",
        "optimizer.lr=1e30",
        "trainer.gradient_clip_val=null",
    ]
    code = main(["train", *words, "callbacks.finite_loss.every_n_steps=1", f"paths.run_dir={tmp_path / 'run'}"])
    assert code == 1
    errors = capfd.readouterr().err
    assert "DivergedError: the loss is" in errors
    assert len(errors.strip().splitlines()) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.strategy=ddp_spawn", "trainer.devices=2"], "must be ddp or fsdp"),
        (["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1"], "launcher=slurm, srun or torchrun"),
        (["trainer.strategy={_target_: os.system}"], "trainer.strategy must be a name"),
        (["trainer.strategy=dpp"], "trainer"),
    ],
)
def test_processes_that_cannot_be_started_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", "data=digits", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_trainer_files_build_with_one_device_too(name: str, tmp_path: Path) -> None:
    trainer = build_trainer(config(tmp_path, f"trainer={name}", "trainer.devices=1"), tmp_path)
    assert trainer.world_size == 1
    assert not distributed.must_start(trainer)


def test_repeated_items_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [batch["labels"] for batch in DigitsData(eval_batch_size=50, test_size=359).test_dataloader()]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        loader = DigitsData(eval_batch_size=50, test_size=359).test_dataloader()
        shares.append(torch.cat([batch["labels"] for batch in loader]))
    assert [len(share) for share in shares] == [180, 180], "no process waits for the other"
    assert (shares[0] != IGNORE).all()
    assert (shares[1] == IGNORE).tolist() == [False] * 179 + [True]
    torch.testing.assert_close(torch.stack(shares, 1).flatten()[:-1], torch.cat(whole))


def test_entries_of_processes_come_into_the_order_of_the_data() -> None:
    # Items 0, 2 and 4 in the first process, 1 and 3 (and a repeated one) in the second; entries per item as stated.
    scored = [torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0])]
    entries = torch.tensor([0, 0, 4, 1, 3, 3, 3])
    assert entries[data_order(scored)].tolist() == [0, 0, 1, 3, 3, 3, 4]
