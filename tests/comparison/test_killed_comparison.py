"""A comparison that is killed again and again ends with the table of one that was left alone, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ARGUMENTS = [
    "data=digits",
    "name=killed",
    "measure.repeats=1",
    "measure.warm_up=0",
    "logger=csv",
    "model.dim=16",
    "model.num_heads=2",
    "model.feed_forward_dim=16",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=6",
    "trainer.log_every_n_steps=2",
    "callbacks.resumable.minutes=0.005",
]
MEASURED = ("step_time", "step_time_spread", "step_seconds", "training_seconds", "memory_bytes")
MEASURED_HEADERS = ("step time", "peak memory")

# Importing takes longer than training here. So one process imports, and every attempt is a copy of it.
NURSERY = """
import glob, json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from approx_attn.comparison import command as comparison
from approx_attn.run import train as training
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(order["folder"])
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = comparison.main(order["arguments"])
        sys.stdout.flush()
        os._exit(code)
    if order["kill_after"] is not None:
        time.sleep(order["kill_after"])
        os.kill(pid, signal.SIGKILL)  # nothing happens to one that has ended and is not waited for yet
    if order["terminate_at"] is not None:
        while not glob.glob(order["folder"] + "/" + order["terminate_at"], recursive=True):
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def attempt(
    nursery: subprocess.Popen[str],
    folder: Path,
    arguments: list[str],
    kill_after: float | None = None,
    terminate_at: str | None = None,
) -> int:
    """Start a comparison; the exit status as `os.waitpid` gives it.

    Args:
        kill_after: seconds until SIGKILL.
        terminate_at: pattern of a file; SIGTERM is sent when there is one.
    """
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    order = {"folder": str(folder), "arguments": arguments, "kill_after": kill_after, "terminate_at": terminate_at}
    nursery.stdin.write(json.dumps(order) + "\n")
    nursery.stdin.flush()
    return int(nursery.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """The records of runs that ended well: where they lie, and which file of which time that is."""
    found = {}
    for path in sorted(folder.glob("runs/**/result.json")):
        assert json.loads(path.read_text())["status"] == "finished"
        found[path.relative_to(folder)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def table(folder: Path) -> tuple[list[dict[str, str]], str]:
    """table.csv and table.md without what was measured on the clock."""
    results = folder / "results" / "killed"
    with (results / "table.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key not in MEASURED} for row in csv.DictReader(file)]
    lines = [line.split("|") for line in (results / "table.md").read_text().splitlines()]
    kept = [i for i, header in enumerate(lines[0]) if header.strip() not in MEASURED_HEADERS]
    return rows, "\n".join("|".join(line[i] for i in kept) if len(line) > 1 else line[0] for line in lines)


def outcome(folder: Path, run: Path) -> dict[str, Any]:
    """What a run computed: everything in its record but times, its weights, and its log."""
    record = json.loads((folder / run).read_text())
    for key in ("seconds", "step_seconds", "environment"):
        del record[key]
    weights = torch.load((folder / run).parent / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    log = ((folder / run).parent / "metrics.csv").read_text()
    return {"record": record, "weights": {key: value.tolist() for key, value in weights.items()}, "log": log}


def timed(nursery: subprocess.Popen[str], folder: Path, arguments: list[str]) -> float:
    """Seconds that a comparison takes when it is left alone."""
    started = time.monotonic()
    assert attempt(nursery, folder, arguments) == 0, (folder / "log.txt").read_text()
    return time.monotonic() - started


@pytest.mark.slow
def test_a_comparison_that_is_killed_ends_as_one_that_was_left_alone(
    nursery: subprocess.Popen[str], tmp_path: Path
) -> None:
    kills = 20
    arguments = [*ARGUMENTS, "attention=[exact,topk,eigen_row]", "seeds=[1,2]", "trainer.max_epochs=12"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    seconds, overhead = (timed(nursery, alone, arguments) for _ in range(2))  # the second time all runs are done
    wanted = finished(alone)

    moments, dead, seen = random.Random(0), 0, {}
    while dead < kills:
        left = (seconds - overhead) * (1.0 - len(seen) / len(wanted))
        moment = moments.uniform(0.0, overhead + left / (kills - dead))  # the time before the first step included
        status = attempt(nursery, killed, arguments, kill_after=moment)
        if os.WIFEXITED(status):  # it was faster
            assert status == 0, (killed / "log.txt").read_text()
            continue
        dead += 1
        now = finished(killed)
        assert {path: now.get(path) for path in seen} == seen  # none is lost, none is run again
        seen = now
    assert attempt(nursery, killed, arguments) == 0, (killed / "log.txt").read_text()
    last = finished(killed)
    assert {path: last.get(path) for path in seen} == seen
    assert last.keys() == wanted.keys()
    for run in wanted:
        assert outcome(killed, run) == outcome(alone, run)
    assert table(killed) == table(alone)
    assert not list(killed.rglob("*.part"))


@pytest.mark.slow
def test_sigterm_ends_a_comparison_with_its_code_and_the_same_command_continues(
    nursery: subprocess.Popen[str], tmp_path: Path
) -> None:
    arguments = [*ARGUMENTS, "attention=[exact,topk]", "seeds=[1]", "trainer.max_epochs=12"]
    status = attempt(nursery, tmp_path, arguments, terminate_at="runs/**/last.ckpt")
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 128 + 15
    log = (tmp_path / "log.txt").read_text()
    assert "SIGTERM: stopping after this step" in log
    step = int(re.search(r"stopped by SIGTERM after step (\d+); the same command", log)[1])  # type: ignore[index]
    (checkpoint,) = tmp_path.rglob("last.ckpt")  # the second run has not begun
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    assert attempt(nursery, tmp_path, arguments) == 0
    assert len(finished(tmp_path)) == 2


@pytest.mark.slow
def test_sigterm_ends_processes_that_train_together_at_the_same_step(
    nursery: subprocess.Popen[str], tmp_path: Path
) -> None:
    arguments = [*ARGUMENTS, "attention=[exact]", "seeds=[1]", "trainer=ddp", "trainer.devices=2"]
    arguments += ["trainer.accelerator=cpu", "trainer.limit_train_batches=6", "trainer.max_epochs=100"]
    stopped, alone = tmp_path / "stopped", tmp_path / "alone"
    stopped.mkdir()
    alone.mkdir()
    status = attempt(nursery, stopped, arguments, terminate_at="runs/**/last.previous.ckpt")
    log = (stopped / "log.txt").read_text()
    assert os.WIFEXITED(status), log
    assert os.WEXITSTATUS(status) == 128 + 15, log
    (checkpoint,) = stopped.rglob("last.ckpt")
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < 600
    assert not finished(stopped)
    assert attempt(nursery, stopped, arguments) == 0, (stopped / "log.txt").read_text()
    assert attempt(nursery, alone, arguments) == 0, (alone / "log.txt").read_text()
    for run in finished(alone):
        assert outcome(stopped, run) == outcome(alone, run)
