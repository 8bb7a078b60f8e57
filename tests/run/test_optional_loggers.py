"""Loggers as words of the configuration: what they need is said, what they write stays in the folder of the run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from approx_attn.config.compose import available_choices, load_config
from approx_attn.errors import ConfigError
from approx_attn.run.train import train
from approx_attn.run.trainer import build_loggers
from helpers import TINY

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # by word


@pytest.mark.parametrize("word", available_choices("logger"))
def test_every_word_keeps_the_table_of_metrics(word: str) -> None:
    assert load_config([f"logger={word}"])["logger"]["csv"]["_target_"].endswith("RunCSVLogger")


@pytest.mark.parametrize("word", PACKAGES)
def test_a_missing_package_is_one_sentence_with_what_to_install(word: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[word]):
        pytest.skip(f"{word} is installed")
    with pytest.raises(ConfigError, match=rf"logger\.{word} needs a package .* pip install approx-attn\[{word}\]"):
        train(load_config([*TINY, f"logger={word}", f"paths.run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", PACKAGES)
def test_files_lie_in_the_folder_of_the_run(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PACKAGES[word])
    monkeypatch.chdir(tmp_path)
    train(load_config([*TINY, f"logger={word}", f"paths.run_dir={tmp_path / 'run'}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert any(word in path.name for path in (tmp_path / "run").iterdir())


def test_tensorboard_files_lie_in_the_folder_of_the_run(tmp_path: Path) -> None:
    config = load_config([*TINY, "logger=tensorboard"])
    for logger in build_loggers(config, tmp_path / "run"):
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.finalize("success")
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
