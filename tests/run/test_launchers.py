"""Sweeps through Hydra's launchers: jobs in processes of their own, errors said once, shared results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from approx_attn.config.compose import ConfigError, compose_config
from helpers import TINY

ROOT = Path(__file__).resolve().parents[2]


def start(script: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(runs: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(runs.rglob("result.json"))]


@pytest.mark.slow
def test_joblib_runs_every_job_and_says_once_which_failed(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = ["trainer.gradient_clip_val=null", "callbacks.finite_loss.every_n_steps=1", f"paths.runs={tmp_path}"]
    job = start("train", "-m", "launcher=joblib", *TINY, *options, "optimizer.lr=1e30,0.001")
    output, errors = job.communicate()
    assert job.returncode == 1
    assert sorted(record["status"] for record in records(tmp_path)) == ["failed", "finished"]
    assert "trained, test/accuracy" in output
    assert errors.count("error: DivergedError") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_submitit_runs_every_job(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    job = start("train", "-m", "hydra/launcher=submitit_local", *TINY, f"paths.runs={tmp_path}", "seed=1,2")
    _, errors = job.communicate()
    assert job.returncode == 0, errors
    assert sorted(record["seed"] for record in records(tmp_path)) == [1, 2]


def test_slurm_jobs_are_described_by_the_configuration() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["launcher=slurm", "trainer=ddp", "trainer.num_nodes=2", "hydra.launcher.partition=gpu"]
    from approx_attn.config.compose import _compose

    config = _compose(words, "train", choices=True)
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher["nodes"], launcher["partition"]) == (2, "gpu")


def test_a_missing_launcher_is_one_sentence_with_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"hydra-submitit-launcher; pip install approx-attn\[launch\]"):
        compose_config(["hydra/launcher=submitit_elsewhere"])


# A comparison that notes every run that it trains.
COUNTING = """
import sys
from pathlib import Path
from approx_attn.comparison import command as comparison
from approx_attn.run.tasks.base import SequenceTask

def note(task):
    with open(sys.argv[1], "a") as file:
        file.write(f"{task.config['attention']['_target_']} {task.config['seed']}\\n")

SequenceTask.on_fit_start = note
sys.exit(comparison.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_comparisons_at_once_share_runs_and_none_runs_twice(tmp_path: Path) -> None:
    places = [f"paths.runs={tmp_path / 'runs'}", f"results={tmp_path / 'results'}", "measure.repeats=0"]
    words = [word for word in TINY if not word.startswith("progress_bar")]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTING, str(tmp_path / "trained"), *words, *places, "seeds=[1,2]", attention],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for attention in ("attention=[exact,topk]", "attention=[uniform,topk,exact]")
    ]
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    trained = (tmp_path / "trained").read_text().splitlines()
    assert len(trained) == len(set(trained)) == 6, "three mechanisms with two seeds"
    assert [record["status"] for record in records(tmp_path / "runs")] == ["finished"] * 6
