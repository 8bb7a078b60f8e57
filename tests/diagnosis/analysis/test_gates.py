"""Learned masks: the share kept by place, with gates that are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from approx_attn import cli
from approx_attn.config.compose import compose_config
from approx_attn.diagnosis.analysis.gates import share_kept
from approx_attn.run.train import train
from helpers import QUIET, SMALL_MODEL


def test_shares_are_of_the_pairs_that_a_mask_leaves() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    is_open = torch.eye(4, dtype=torch.bool)[None] | (torch.arange(4) == 0)  # the diagonal and the first key
    (row,) = share_kept(is_open, causal)
    assert row == {
        "head": 0,
        "kept": 0.7,
        "diagonal": 1.0,
        "previous": pytest.approx(1 / 3),
        "next": None,
        "first_key": 1,
    }


def test_analyze_shows_the_masks_of_a_checkpoint(tmp_path: Path) -> None:
    words = ["data=digits", *QUIET, *SMALL_MODEL, "trainer.max_steps=1", "attention=differentiable_mask"]
    more = ["attention.initial_open=0.6", "attention.closed_offsets=[0]", f"paths.run_dir={tmp_path / 'run'}"]
    run = train(compose_config([*words, *more]))
    model = run.run_dir / "checkpoints" / "last.ckpt"
    code = cli.main(
        [
            "analyze",
            f"model={model}",
            "parts=[gates]",
            "sequences=8",
            f"output={tmp_path / 'out'}",
            "progress_bar=false",
        ]
    )
    assert code == 0
    rows = json.loads((tmp_path / "out" / "numbers.json").read_text())["tables"]["gates"]
    assert {(row["kept"], row["diagonal"], row["next"]) for row in rows} == {(63 / 64, 0.0, 1.0)}
    assert (tmp_path / "out" / "figures" / "gates.png").is_file()
