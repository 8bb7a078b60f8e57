"""Runs that are stopped: by a signal, by a full disk, or with damaged files; what goes on equals what never stopped."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from approx_attn.config.compose import compose_config, plain
from approx_attn.errors import ConfigError, Stopped
from approx_attn.run import checkpoints
from approx_attn.run.callbacks import Resumable
from approx_attn.run.evaluate import load_task
from approx_attn.run.loggers import RunCSVLogger
from approx_attn.run.record import DiskFullError
from approx_attn.run.signals import handlers_restored
from approx_attn.run.tasks import SequenceTask
from approx_attn.run.train import TrainResult, train
from helpers import QUIET, SMALL_MODEL

SETTINGS = [
    *QUIET,
    *SMALL_MODEL,
    *("attention=topk", "model.dropout=0.2", "data.eval_batch_size=60"),
    *("trainer.max_epochs=3", "trainer.limit_train_batches=6", "trainer.limit_val_batches=3"),
    *("trainer.limit_test_batches=1", "trainer.log_every_n_steps=2"),
]


def config(runs: Path, *overrides: str) -> dict[str, Any]:
    return {**plain(compose_config([f"paths.runs={runs}", *SETTINGS, *overrides])), "resume": True}


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
    assert [resumed.record[key] for key in ("steps", "epochs")] == [whole.record[key] for key in ("steps", "epochs")]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
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


PLACES = [("training_step", call) for call in (9, 2, 6, 15)] + [("validation_step", 5)]


@pytest.mark.parametrize(
    ("variation", "where", "call"),
    [  # every place of one variation, and one place of the others; their rest is slow
        pytest.param(name, *place, marks=() if name == "plain" or place in PLACES[:1] else pytest.mark.slow)
        for name in VARIATIONS
        for place in PLACES
    ],
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


@pytest.mark.parametrize("call", [1, 3])
def test_a_run_killed_within_an_epoch_goes_on_from_its_last_checkpoint(
    call: int, whole_runs: dict[str, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    settings["callbacks"]["resumable"]["minutes"] = 0  # at every step in which nothing else is due
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 6 + call + 1, Killed())
        with pytest.raises(Killed):
            train(settings)
    steps = []
    original = Resumable.on_train_start

    def on_train_start(self: Resumable, trainer: Any, task: Any) -> None:
        steps.append(trainer.global_step)
        original(self, trainer, task)

    monkeypatch.setattr(Resumable, "on_train_start", on_train_start)
    assert_same_run(train(settings), whole_runs["plain"])
    assert steps == [6 + call]


@pytest.mark.parametrize("variation", ["counted in steps", "generated"])
def test_a_killed_run_goes_on_from_the_end_of_an_epoch(
    variation: str, whole_runs: dict[str, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, *VARIATIONS[variation])
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 8, Killed())
        with pytest.raises(Killed):
            train(settings)
    resumed = train(settings)
    assert resumed.resumed
    assert_same_run(resumed, whole_runs[variation])


def test_early_stopping_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = ["trainer.max_epochs=9", "callbacks.early_stopping.patience=1", "optimizer.lr=1.0e-9"]
    whole = train(config(tmp_path / "whole", *stops))
    assert whole.record["epochs"] < 9
    settings = config(tmp_path / "killed", *stops)
    with monkeypatch.context() as patch:
        interrupt(patch, "test_step", 1, Killed())
        with pytest.raises(Killed):
            train(settings)
    assert_same_run(train(settings), whole)


def test_ctrl_c_stops_after_the_step_and_the_second_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    settings = config(tmp_path)
    original, sent = SequenceTask.training_step, []

    def press(self: SequenceTask, batch: Any, batch_index: int) -> Any:
        if batch_index == 3:
            for _ in range(2 - len(sent)):
                sent.append(self.trainer.global_step)
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceTask, "training_step", press)
        with pytest.raises(Stopped, match="SIGINT after step 3") as stop:
            train(settings)
        assert stop.value.code == 130
        assert not list(tmp_path.rglob("last.ckpt"))  # in the middle of a step there is nothing to keep
        sent.append(0)
        sent.pop(0)  # one press from here on
        sent.pop()
        with pytest.raises(Stopped, match="SIGINT after step 4"):
            train(settings)
    assert list(tmp_path.rglob("last.ckpt"))
    assert signal.getsignal(signal.SIGINT) is before  # a job in the background ignores it


def test_sigterm_in_the_test_ends_the_process_as_it_would_without_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, "test_step", 1, signal.SIGTERM)

    def end(signum: int, frame: Any) -> None:
        raise Killed

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Killed):
            train(config(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.rglob("result.json"))


def test_slurm_is_asked_to_start_the_job_again_and_the_job_continues(
    tmp_path: Path, whole_runs: dict[str, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    settings = {**config(tmp_path / "runs"), "resume": False}
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 9, signal.SIGUSR1)
        with pytest.raises(Stopped, match="SIGUSR1 after step 9"):
            train(settings)
    assert asked.read_text() == "requeue 70_3\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = train(settings)
    assert again.resumed
    assert_same_run(again, whole_runs["plain"])


def test_a_job_launcher_is_told_after_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    interrupt(monkeypatch, "training_step", 2, signal.SIGUSR2)
    saved = []

    def launcher(signum: int, frame: Any) -> None:
        saved.extend(tmp_path.rglob("last.ckpt"))
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, launcher)
    try:
        with pytest.raises(SystemExit) as end:
            train(config(tmp_path))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert end.value.code == -1
    assert saved


def test_handlers_that_a_library_leaves_behind_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handlers_restored():
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
    assert signal.getsignal(signal.SIGTERM) is before


# -- damaged files -------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change one byte of a weight: `torch.load` would not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def exchange(path: Path) -> None:
    torch.save({"not": "a checkpoint"}, path)


DAMAGES = [cut, flip, empty, exchange]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a run that was killed in its third epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "training_step", 15, Killed())
        with pytest.raises(Killed):
            train(config(folder))
    return folder


@pytest.fixture
def killed_copy(killed_run: Path, tmp_path: Path) -> Iterator[Path]:
    """The same in a folder of its own; a checkpoint names the best one by an absolute path, so it is moved back."""
    backup = tmp_path / "backup"
    shutil.copytree(killed_run, backup)
    yield killed_run
    shutil.rmtree(killed_run)
    shutil.copytree(backup, killed_run)


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    spoil: Any, killed_copy: Path, whole_runs: dict[str, TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = killed_copy.rglob("last.ckpt")
    spoil(path)
    resumed = train(config(killed_copy))
    (warning,) = caplog.messages
    assert "last.ckpt" in warning
    assert "continuing from the checkpoint before" in warning
    assert "last.previous.ckpt (step 6)" in warning
    assert "\n" not in warning
    assert_same_run(resumed, whole_runs["plain"])


@pytest.mark.parametrize("names", [["last.ckpt", "last.previous.ckpt"], ["best.ckpt"]])
def test_where_no_checkpoint_is_whole_the_run_starts_from_scratch_and_says_so(
    names: list[str], killed_copy: Path, whole_runs: dict[str, TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (path,) = killed_copy.rglob(name)
        flip(path)
    resumed = train(config(killed_copy))
    (warning,) = caplog.messages
    assert all(name in warning for name in names)
    assert "starts from scratch" in warning
    assert not resumed.resumed
    assert_same_run(resumed, whole_runs["plain"])


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(
    killed_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = killed_copy.rglob("last.ckpt")
    cut(path)
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 7, Killed())  # after the next checkpoint
        with pytest.raises(Killed):
            train(config(killed_copy))
    assert checkpoints.damage(path) is None
    assert checkpoints.damage(path.with_name("last.previous.ckpt")) is None


def test_a_flipped_bit_in_a_checkpoint_is_not_evaluated(killed_copy: Path) -> None:
    (path,) = killed_copy.rglob("best.ckpt")
    flip(path)
    with pytest.raises(ConfigError, match=r"best\.ckpt' cannot be read: .*wrong checksum"):
        load_task(path)


# -- a full disk ---------------------------------------------------------------------------------------


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str, after: int = 0) -> None:
    """From the given write on there is no space for files of that name: the system itself says so."""
    real, calls = tempfile.mkstemp, [0]

    def mkstemp(**kwargs: Any) -> tuple[int, str]:
        descriptor, path = real(**kwargs)
        if name in kwargs["prefix"]:
            calls[0] += 1
            if calls[0] > after:
                os.close(descriptor)
                descriptor = os.open("/dev/full", os.O_WRONLY)
        return descriptor, path

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "test_predictions.npz", "result.json"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_space(
    name: str, whole_runs: dict[str, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, name, after=1 if name.endswith("ckpt") else 0)
        with pytest.raises(DiskFullError, match=rf"No space left on the disk of .*{name};.*resume=true") as full:
            train(config(tmp_path))
    assert "\n" not in str(full.value)
    assert not list(tmp_path.rglob("result.json"))  # nothing failed but the disk
    assert not list(tmp_path.rglob("*.part"))
    for path in tmp_path.rglob("*.ckpt"):
        assert checkpoints.damage(path) is None
    resumed = train(config(tmp_path))
    assert resumed.resumed
    assert_same_run(resumed, whole_runs["plain"])


def test_a_full_disk_under_the_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RunCSVLogger.save

    def save(self: RunCSVLogger) -> None:
        self.experiment.metrics_file_path = "/dev/full"
        original(self)

    monkeypatch.setattr(RunCSVLogger, "save", save)
    with pytest.raises(DiskFullError, match="No space left on the disk of /dev/full"):
        train(config(tmp_path))
    assert not list(tmp_path.rglob("result.json"))


def test_a_limit_on_files_is_told_once_with_tensorboard_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Any, data: bytes) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    with pytest.raises(DiskFullError, match="No space left on the disk of"):
        train(config(tmp_path, "logger=tensorboard"))
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.rglob("result.json"))


def test_a_full_disk_while_stopping_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 9, signal.SIGTERM)
        fill_disk(patch, "last.ckpt", after=1)
        with pytest.raises(DiskFullError, match=r"last\.ckpt"):
            train(config(tmp_path))
    (path,) = tmp_path.rglob("last.ckpt")
    assert checkpoints.damage(path) is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# -- training longer -----------------------------------------------------------------------------------

LEVEL = ["scheduler=constant", "scheduler.warmup=2"]  # a schedule that does not depend on the length of the run


@pytest.mark.parametrize(
    ("short", "longer"),
    [
        (["trainer.max_epochs=2"], ["trainer.max_epochs=4"]),
        *(
            pytest.param(
                ["trainer.max_epochs=9", f"trainer.max_steps={steps}"],
                ["trainer.max_epochs=9", "trainer.max_steps=15"],
                marks=pytest.mark.slow,
            )
            for steps in (12, 9)
        ),
    ],
)
def test_a_finished_run_is_trained_on_in_a_folder_of_its_own(
    short: list[str], longer: list[str], tmp_path: Path
) -> None:
    whole = train(config(tmp_path / "whole", *LEVEL, *longer))
    first = train(config(tmp_path, *LEVEL, *short))
    before = {path: path.read_bytes() for path in first.run_dir.rglob("*") if path.is_file()}
    extended = train(config(tmp_path, *LEVEL, *longer, f"extend={first.run_dir}"))
    assert extended.run_dir not in (first.run_dir, train(config(tmp_path, *LEVEL, *longer)).run_dir)
    assert_same_run(extended, whole)
    assert extended.record["extends"] == {
        "run_dir": str(first.run_dir),
        **{key: first.record[key] for key in ("config_hash", "epochs", "steps")},
    }
    assert {path: path.read_bytes() for path in first.run_dir.rglob("*") if path.is_file()} == before


def test_a_longer_run_has_the_rates_of_its_own_schedule_and_stops_by_its_own_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = ["callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=9"]
    first = train(config(tmp_path, *stops, "trainer.max_epochs=4"))
    assert first.record["epochs"] == 2
    rates = []
    original = SequenceTask.training_step

    def training_step(self: SequenceTask, batch: Any, batch_index: int) -> Any:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return original(self, batch, batch_index)

    monkeypatch.setattr(SequenceTask, "training_step", training_step)
    extended = train(config(tmp_path, *stops, "trainer.max_epochs=10", f"extend={first.run_dir}"))
    assert extended.record["epochs"] == 4
    # linear warm-up over a tenth of 60 steps, then linearly to zero; 12 steps had been made
    assert rates == pytest.approx([0.004 * (1 - (step - 6) / 54) for step in range(12, 24)])


def test_what_cannot_be_extended_is_refused(tmp_path: Path) -> None:
    first = train(config(tmp_path, "trainer.max_epochs=1"))
    folders = set(tmp_path.rglob("*"))
    for words, message in (
        (["extend=nowhere", "trainer.max_epochs=2"], "extend must be the folder of a finished run, got 'nowhere'"),
        ([f"extend={first.run_dir}", "trainer.max_epochs=1"], "trainer.max_epochs must be above the 1 that"),
        ([f"extend={first.run_dir}", "optimizer.lr=0.1"], r"other settings than its length: optimizer.lr 0.004 there"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config(tmp_path, *words))
    (first.run_dir / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"has no checkpoints/last\.ckpt to go on from"):
        train(config(tmp_path, f"extend={first.run_dir}", "trainer.max_epochs=2"))
    assert set(tmp_path.rglob("*")) <= folders
