"""The examination of a GPU, on the CPU at small sizes."""

from __future__ import annotations

import csv

import pytest
import torch

from approx_attn.attention.eigen.cluster import EigenClusterAttention
from approx_attn.diagnosis.benchmark.gpu import CASES, check, examine, main

SMALL = ["num_heads=2", "head_dim=16", "repeats=1", "warm_up=0", "sequences=1", "memory=false", "causal=[false,true]"]


def test_examination_checks_measures_and_writes(tmp_path, capsys):
    options = {64: {"keep": 16, "cluster_size": 8}, 128: {"keep": 32, "cluster_size": 16}}
    assert examine(torch.device("cpu"), options, [*SMALL, "dtype=bfloat16"], tmp_path, check_length=160)
    with (tmp_path / "checks.csv").open() as file:
        checks = list(csv.DictReader(file))
    assert [(line["dtype"], line["case"]) for line in checks] == [
        (dtype, case) for dtype in ("float32", "bfloat16") for case in CASES
    ]
    assert {line["passed"] for line in checks} == {"True"}
    with (tmp_path / "table.csv").open() as file:
        rows = [line for line in csv.DictReader(file) if line["label"] != "sdpa"]
    places = [
        (length, causal, part) for length in (64, 128) for causal in (False, True) for part in ("forward", "train")
    ]
    assert [(int(row["length"]), row["causal"] == "True", row["pass_name"]) for row in rows] == places
    assert all(float(row["speedup"]) > 0 for row in rows)
    assert "eigen_cluster keep=32 cluster_size=16" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_a_wrong_output_fails_its_check(monkeypatch, case):
    right = EigenClusterAttention.attend

    def wrong(self, query, *rest):
        output, weights = right(self, query, *rest)
        return (output * 1.01 if query.dtype == torch.float32 else output), weights

    assert check(case, torch.float32, torch.device("cpu"), 96).is_passed
    monkeypatch.setattr(EigenClusterAttention, "attend", wrong)
    assert not check(case, torch.float32, torch.device("cpu"), 96).is_passed


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: torch sees no CUDA device, and this measures one.\n"
    assert not (tmp_path / "out").exists()
