"""Runs that are stopped: by a signal, by a full disk, or with damaged files; what goes on equals what never stopped."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from approx_attn.callbacks import Resumable
from approx_attn.configuration import compose_config, plain
from approx_attn.stopping import Stopped
from approx_attn.tasks import SequenceTask
from approx_attn.training import TrainResult, train

TINY = [
    "progress_bar=false",
    "logger=csv",
    "attention=topk",
    "model.dim=16",
    "model.num_heads=2",
    "model.feed_forward_dim=16",
    "model.depth=1",
    "model.dropout=0.2",
    "data.eval_batch_size=60",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=3",
    "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=2",
]


def config(runs: Path, *overrides: str) -> dict[str, Any]:
    return {**plain(compose_config([f"paths.runs={runs}", *TINY, *overrides])), "resume": True}


class Killed(BaseException):
    """What ends a run here as suddenly as SIGKILL would."""


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, call: int, what: Any) -> None:
    """Send a signal, or raise an error, in the given call of `training_step` or `validation_step`, once."""
    original, calls = getattr(SequenceTask, where), [0]

    def step(self: SequenceTask, batch: Any, batch_index: int) -> Any:
        calls[0] += 1
        if calls[0] == call:
            if not isinstance(what, int):
                raise what
            os.kill(os.getpid(), what)
        return original(self, batch, batch_index)

    monkeypatch.setattr(SequenceTask, where, step)


def last(result: TrainResult) -> dict[str, Any]:
    return torch.load(result.run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equality of nested containers, bit for bit in tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def logged(result: TrainResult) -> list[dict[str, str]]:
    with (result.run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(resumed: TrainResult, whole: TrainResult) -> None:
    assert resumed.metrics == whole.metrics
    ours, theirs = last(resumed), last(whole)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert same(ours[part], theirs[part]), part
    assert logged(resumed) == logged(whole)


VARIATIONS = {
    "plain": [],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "validated mid-epoch": ["trainer.val_check_interval=0.5", "callbacks.best_checkpoint.monitor=val/loss"],
    "counted in steps": ["trainer.max_steps=15"],
    "generated": ["data=mqar", "data.train_size=500", "data.val_size=180", "data.test_size=60", "data.batch_size=64"],
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: train(config(folder / str(i), *words)) for i, (name, words) in enumerate(VARIATIONS.items())}


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize(
    ("where", "call"),
    [("training_step", 2), ("training_step", 6), ("training_step", 9), ("training_step", 15), ("validation_step", 5)],
)
def test_sigterm_loses_nothing(
    variation: str,
    where: str,
    call: int,
    whole_runs: dict[str, TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(tmp_path, *VARIATIONS[variation])
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt(patch, where, call, signal.SIGTERM)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM after step \d+.*resume=true continues") as stop:
            train(settings)
    assert stop.value.code == 128 + 15
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list(tmp_path.rglob("result.json"))
    steps = []
    monkeypatch.setattr(Resumable, "on_train_start", lambda self, trainer, task: steps.append(trainer.global_step))
    resumed = train(settings)
    accumulated = 2 if variation == "accumulated" else 1
    if where == "training_step":
        assert steps in ([-(-call // accumulated)], [])  # not one step is done again; none at all after the last
    assert resumed.resumed
    assert_same_run(resumed, whole_runs[variation])
