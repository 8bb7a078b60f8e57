"""Tasks: what is scored, which parameters decay, and the learning rate over a run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from approx_attn.config.compose import load_config
from approx_attn.config.instantiate import build
from approx_attn.data import IGNORE, DataSpec
from approx_attn.errors import ConfigError
from approx_attn.run.schedules import WarmupSchedule
from approx_attn.run.tasks import ClassificationTask, SequenceTask, TokenPredictionTask
from approx_attn.run.tasks.base import parameter_groups
from helpers import SMALL_MODEL

CLASSIFICATION = DataSpec("classification", vocab_size=20, num_classes=4, max_length=10, causal=False)
RECALL = DataSpec("token_prediction", vocab_size=20, num_classes=20, max_length=10, causal=True)


def make_task(spec: DataSpec, *overrides: str) -> SequenceTask:
    data = "digits" if spec.kind == "classification" else "mqar"
    config = load_config([f"data={data}", *SMALL_MODEL, *overrides])
    task: SequenceTask = build(config["task"], "task", SequenceTask, config=config, spec=vars(spec))
    return task.eval()


def recall_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 20, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = torch.full((3, 10), IGNORE)
    labels[:, 5], labels[0, 7] = tokens[:, 1], 4
    return {"tokens": tokens, "keep": torch.ones(3, 10, dtype=torch.bool), "labels": labels}


def test_classification_loss_is_cross_entropy() -> None:
    task = make_task(CLASSIFICATION)
    tokens = torch.randint(1, 20, (5, 10))
    keep = torch.arange(10) < torch.tensor([[10], [3], [4], [5], [6]])
    batch = {"tokens": tokens, "keep": keep, "labels": torch.tensor([0, 1, 2, 3, 0])}
    loss, _, _ = task._loss(batch)
    torch.testing.assert_close(loss, F.cross_entropy(task.model(tokens, keep), batch["labels"]))


def test_token_loss_counts_labelled_positions_only() -> None:
    task = make_task(RECALL)
    batch = recall_batch()
    loss, scored, labels = task._loss(batch)
    assert len(scored) == len(labels) == 4
    logits = task.model(batch["tokens"])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))


def test_batch_without_labels_gives_zero_loss_and_gradient() -> None:
    task = make_task(RECALL)
    batch = {**recall_batch(), "labels": torch.full((3, 10), IGNORE)}
    loss, _, _ = task._loss(batch)
    loss.backward()
    assert loss == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_task_and_model_must_fit_the_data() -> None:
    with pytest.raises(ConfigError, match="TokenPredictionTask is for token_prediction data"):
        make_task(CLASSIFICATION, "task=token_prediction")
    with pytest.raises(ConfigError, match="cannot be used with data that is causal"):
        make_task(RECALL, "model=encoder_classifier")
    with pytest.raises(ConfigError, match="cannot be used with data that is points in space"):
        make_task(replace(RECALL, causal=False, coordinate_dim=3), "model=encoder_classifier")
    with pytest.raises(ValueError, match="auxiliary_weight"):
        make_task(RECALL, "task.auxiliary_weight=-1")
    assert isinstance(make_task(CLASSIFICATION), ClassificationTask)
    assert isinstance(make_task(RECALL), TokenPredictionTask)


def test_weight_decay_spares_what_has_no_origin_at_zero() -> None:
    task = make_task(CLASSIFICATION, "attention=linformer", "optimizer.weight_decay=0.3")
    decayed, spared = parameter_groups(task.model)
    names = {id(p): name for name, p in task.model.named_parameters()}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} <= {"weight", "in_proj_weight"}
    in_mechanism = {id(p) for mechanism in task.mechanisms for p in mechanism.parameters()}
    assert in_mechanism
    assert in_mechanism <= {id(p) for p in spared["params"]}
    optimizer = task.build_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_schedule_rises_then_falls(decay: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupSchedule(optimizer, 100, warmup=0.1, decay=decay, final=0.5)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < rates[0] < rates[5] < rates[10] == 2.0
    assert rates[100] == pytest.approx(2.0 if decay == "constant" else 1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_schedule_continues_from_its_state() -> None:
    def make() -> tuple[torch.optim.Optimizer, WarmupSchedule]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, WarmupSchedule(optimizer, 50, warmup=5)

    optimizer, schedule = make()
    for _ in range(20):
        optimizer.step()
        schedule.step()
    state: dict[str, Any] = schedule.state_dict()
    other_optimizer, other = make()
    other.load_state_dict(state)
    for current in (schedule, other):
        current.step()
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("options", [{"warmup": -1}, {"decay": "steps"}, {"final": 2.0}])
def test_impossible_schedules_name_their_key(options: dict) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=f"scheduler.{next(iter(options))}"):
        WarmupSchedule(optimizer, 10, **options)
