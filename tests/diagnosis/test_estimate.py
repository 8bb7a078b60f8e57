"""Estimates beside what runs really hold and do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from approx_attn import cli
from approx_attn.attention import build_attention
from approx_attn.config.compose import load_config
from approx_attn.config.instantiate import build
from approx_attn.data.base import SequenceDataModule
from approx_attn.diagnosis.estimate import Estimate, estimate, extrapolated, split_words, verdict
from approx_attn.diagnosis.estimated_time import operations, planned
from approx_attn.errors import ConfigError
from approx_attn.output import shown_seconds
from approx_attn.run.measurement import peak_memory
from approx_attn.run.train import train

SHORT = ["progress_bar=false", "logger=csv", "trainer.accelerator=cpu", "trainer.max_epochs=2"]
SHORT += ["trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]


def config(folder: Path, *words: str) -> dict[str, Any]:
    return load_config([*words, f"paths.run_dir={folder / 'run'}"])


def value(part: list, name: str) -> float:
    return next(figure.value for figure in part if figure.name.startswith(name))


@pytest.mark.parametrize(
    "words",
    [
        ["data=digits", "attention=exact"],
        pytest.param(
            ["data=digits", "attention=eigen_row", "data.batch_size=128", "data.eval_batch_size=32"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["evaluation is the peak", "training is the peak"],
)
def test_memory_is_that_of_a_real_run(words: list[str], tmp_path: Path) -> None:
    chosen = config(tmp_path, *words, *SHORT)
    result = estimate(chosen, steps=2)
    held = peak_memory(lambda: train(chosen))
    assert result.peak_bytes == pytest.approx(held, rel=0.3)
    evaluation, training = (sum(f.value for f in part) for part in (result.evaluation, result.training))
    assert (evaluation > training) == (words[1] == "attention=exact")


def test_counts_are_those_of_a_real_run(tmp_path: Path) -> None:
    chosen = config(tmp_path, "data=digits", *SHORT, "data.batch_size=300", "trainer.limit_train_batches=1.0")
    result = train(chosen)
    data = build(chosen["data"], "data", SequenceDataModule)
    data.setup()
    assert planned(chosen, data, world=1).train == result.record["steps"]
    assert planned(chosen, data, world=2).train == result.record["steps"] // 2


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Estimate]:
    folder = tmp_path_factory.mktemp("estimate")
    common = ["data=digits", *SHORT[1:3], "trainer.devices=4", "trainer.accelerator=gpu"]
    return {
        name: estimate(config(folder, *common, f"trainer={name}"), tflops=1.0, utilization=0.5)
        for name in ("ddp", "fsdp")
    }


def test_devices_split_what_the_strategy_splits(computed: dict[str, Estimate]) -> None:
    ddp, fsdp = computed["ddp"], computed["fsdp"]
    for name in ("parameters", "optimizer state"):
        assert value(ddp.memory, name) == 4 * value(fsdp.memory, name)
    assert value(ddp.memory, "gradients on their way") == value(ddp.training, "gradients")
    assert value(ddp.memory, "optimizer state") == pytest.approx(2 * value(ddp.training, "gradients"), rel=0.01)
    assert any("Messages between devices" in note for note in ddp.notes)


def test_time_of_another_device_is_operations_over_speed(computed: dict[str, Estimate]) -> None:
    time = computed["ddp"].time
    assert value(time, "one training step") == pytest.approx(value(time, "operations") / 0.5e12)
    # 64 tokens, 39,434 parameters: at least the products with the weights, forward and backward.
    assert value(time, "operations") > 6 * 32 * 64 * 30_000
    assert computed["ddp"].seconds == value(time, "training") + value(time, "evaluation")


def test_extrapolation_is_along_a_line() -> None:
    assert extrapolated({8: 10.0, 16: 14.0}, 32) == 22.0
    assert extrapolated({4: 10.0}, 8) == 20.0


def test_a_device_bears_batches_up_to_a_size(computed: dict[str, Estimate]) -> None:
    assert "fits into 80 GiB" in verdict(computed["ddp"], 80, 32)
    assert "does not fit into 0.001 GiB; no batch does" in verdict(computed["ddp"], 0.001, 32)


def test_the_verb_prints_how_every_figure_came_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "data=digits", *SHORT[1:], "steps=2", "memory=1"]) == 0
    text = capsys.readouterr().out
    for word in ("peak memory", "optimizer state", "extrapolated", "one training step", "measured", "fits into 1 GiB"):
        assert word in text


def test_times_read_in_units_that_fit() -> None:
    shown = [shown_seconds(seconds) for seconds in (0.00421, 2.0, 300.0, 7200.0)]
    assert shown == ["4.21 ms", "2.0 s", "5.0 min", "2.0 h"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=0"], "steps must be a whole number above 0"),
        (["tflops=-1"], "tflops must be a number above 0"),
        (["utilization=30"], "utilization must be a share above 0 and up to 1, got 30"),
        (["memory=much"], "memory must be a number above 0"),
        (["seed=1,2"], "an estimate is of one run"),
        (["data=digitz"], "did you mean 'digits'"),
        (["data=mqar", "attention=linformer"], "does not support causal attention"),
    ],
)
def test_bad_words_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_words_are_shared_out() -> None:
    own, words = split_words(["data=digits", "steps=3", "data.batch_size=8"])
    assert own["steps"] == 3
    assert words == ["data=digits", "data.batch_size=8"]
    with pytest.raises(ConfigError, match="cannot be read"):
        split_words(["steps"])


@pytest.mark.parametrize("name", ["exact", "topk", "sliding_window", "linear"])
def test_counted_operations_are_those_of_the_cost_record(name: str) -> None:
    length = 128
    mechanism = build_attention(name, num_heads=2, head_dim=16, max_length=length)
    query = torch.randn(3, 2, length, 16)
    counted = operations(lambda: mechanism(query, query, query))
    assert counted == pytest.approx(2 * 3 * mechanism.cost(length).multiply_adds, rel=0.01)


def test_the_cluster_kernel_has_its_operations_counted() -> None:
    mechanism = build_attention("eigen_cluster", num_heads=2, head_dim=16, max_length=128, block_size=8, keep=0.25)
    query = torch.randn(3, 2, 128, 16, requires_grad=True)
    forward = operations(lambda: mechanism(query, query, query))
    assert forward == pytest.approx(2 * 3 * mechanism.cost(128).multiply_adds, rel=0.05)
    training = operations(lambda: mechanism(query, query, query)[0].sum().backward())
    assert 3 * forward < training < 4 * forward


def test_validation_is_counted_over_the_whole_run_where_epochs_do_not_count(tmp_path: Path) -> None:
    chosen = config(tmp_path, "data=digits", "trainer.max_epochs=7", "trainer.val_check_interval=10")
    data = build(chosen["data"], "data", SequenceDataModule)
    data.setup()
    batches = math.ceil(data.spec.num_items[1] / data.eval_batch_size)
    plan = planned(chosen, data, world=1)
    assert plan.validation == batches * 7 * (plan.train // 7 // 10)
    chosen["trainer"].update(check_val_every_n_epoch=None, val_check_interval=50)
    assert planned(chosen, data, world=1).validation == batches * (plan.train // 50)
