"""Random changes of a configuration: it runs, or one sentence says what is wrong, before anything is written."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from approx_attn import cli
from approx_attn.attention import available_attention
from approx_attn.config.compose import load_config
from helpers import TINY

FIRST = int(os.environ.get("FUZZ_SEED", "1"))  # another one looks elsewhere

# Where a run writes, what starts other processes, and what prints tracebacks when asked to.
LEFT_ALONE = ("paths", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.max_time", "verbose")
VALUES = ["null", "true", "false", "-1", "0", "1", "2", "3", "7", "-0.5", "0.3", "1.0", "1.5", "1e-3", "nan", "inf"]
VALUES += ["abc", "''", "[]", "[1,2]", "{a: 1}", "1:2", "exact", "val/loss", "min", "???", "${seed}", "${nothing}"]


@functools.cache
def keys(attention: str) -> tuple[str, ...]:
    """Dotted keys of all values, and of the nodes that hold them."""

    def walk(node: Any, path: str) -> Iterator[str]:
        if path:
            yield path
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}" if path else key)

    every = walk(load_config([*TINY, f"attention={attention}"]), "")
    return tuple(key for key in every if not key.startswith(LEFT_ALONE))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A mechanism and one to three changes of what can be set."""
    attention = draw(st.sampled_from(available_attention()))
    words = [f"attention={attention}"]
    for key in draw(st.lists(st.sampled_from(keys(attention)), min_size=1, max_size=3, unique=True)):
        value = draw(st.sampled_from(VALUES))
        words.append(
            draw(st.sampled_from([f"{key}={value}"] * 8 + [f"~{key}", f"{key[:-1]}={value}", f"+{key}x={value}"]))
        )
    return words


def check(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = folder / f"{len(list(folder.iterdir()))}"
    code = cli.main(["train", *TINY, *words, f"paths.runs={runs}"])
    errors = capsys.readouterr().err.strip()
    errors = "\n".join(line for line in errors.splitlines() if "Warning" not in line and not line.startswith("  "))
    line = " ".join(words)
    if code == 0:
        assert list(runs.rglob("result.json")), f"{line}: no record"
        return
    assert code == 2 or (code == 1 and "DivergedError" in errors), f"{line}: {errors}"
    assert len(errors.splitlines()) == 1, f"{line}: {errors}"
    assert errors.startswith("error: "), f"{line}: {errors}"
    assert len(errors) > len("error: ") + 10, f"{line}: {errors}"
    assert code == 1 or not runs.exists(), f"{line}: wrote something, then {errors}"


def fuzz(examples: int, seeded: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same examples every time: what fails is a change's doing, never chance."""

    @seed(seeded)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(words=command_lines())
    def run(words: list[str]) -> None:
        check(words, folder, capsys)

    run()


def test_changed_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(12, 0, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # which processes share
def test_many_changed_configurations(
    part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(200, part + FIRST, tmp_path, capsys)
