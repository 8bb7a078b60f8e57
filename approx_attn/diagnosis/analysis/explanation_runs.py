"""Is attention explanation? Experiments around one trained classifier, the base.

After Wiegreffe and Pinter, *Attention is not not Explanation*, EMNLP 2019 (arXiv 1908.04626):

- uniform weights: does the task need attention at all?
- seeds: how far do weights and predictions of the same model differ by chance?
- imposed weights: the base's architecture with the base's weights, frozen, learns the rest anew.
- adversary: the base's architecture learns to predict as the base does with weights as different as possible,
  loss = TVD(predictions) − λ·JSD(weights). (The paper trains with a KL divergence and reports the JSD.)
- context-free models guided by weights (the paper's §3.3): every token is embedded by itself, so all they know of a
  token's importance is the weight: a uniform one, one that they learn, the base's or an adversary's. Weights that the
  base made only to suit itself would not help a model that had no part in making them.

Every experiment is a run of the training framework with the configuration of the base's checkpoint, once for each of
several seeds, none of which is the base's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.registry import attention_class
from approx_attn.config.instantiate import build
from approx_attn.data.base import SequenceDataModule
from approx_attn.diagnosis.analysis.explanation import (
    AdversarialTask,
    GuidedTask,
    ImposedWeightsTask,
    ObservedAttention,
    logits_and_weights,
    prediction_distance,
    weight_divergence,
)
from approx_attn.errors import ConfigError
from approx_attn.models import AttentionPooling
from approx_attn.run import checkpoints
from approx_attn.run.evaluate import load_task
from approx_attn.run.record import read_json, write_json_atomically
from approx_attn.run.tasks.classification import ClassificationTask
from approx_attn.run.train import make_splits, train

MEASURES_FILE = "explanation.json"
OWN_WEIGHTS = ("base", "seed", "adversary")
"""Experiments whose attention layers are those of the base and choose their weights themselves."""


@dataclass(frozen=True)
class Outcome:
    """One trained model beside the base, on the test split.

    Attributes:
        experiment: base, seed, uniform, imposed, adversary, or context_free_ and uniform, own, base or adversary.
        seed: of the run.
        divergence_weight: λ of an adversary, or of the one that guided the model.
        accuracy: on the test split.
        prediction_distance: mean total variation between its class probabilities and the base's.
        weight_divergence: mean Jensen-Shannon divergence of its attention weights from the base's, in nats, at
            most log 2; None where weights are not its own, or those of another architecture.
    """

    experiment: str
    seed: int
    divergence_weight: float | None
    accuracy: float
    prediction_distance: float
    weight_divergence: float | None


@dataclass(frozen=True)
class Experiment:
    """A run to be made: what `Outcome` says of it, and its configuration."""

    name: str
    seed: int
    config: Mapping[str, Any]
    divergence_weight: float | None = None

    def folder(self, root: Path) -> Path:
        """Where its outcome goes; its run lies in `run` below."""
        weight = "" if self.divergence_weight is None else f"-weight{self.divergence_weight:g}"
        return root / f"{self.name}-seed{self.seed}{weight}"


def run_experiments(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    seeds: int = 3,
    divergence_weights: Sequence[float] = (0.05, 0.2),
    progress: bool = True,
) -> list[Outcome]:
    """Train what the experiments need, each as a run below `folder`, and measure it on the test split.

    What ran to its end before is not run again. Context-free models are trained for data of single token sequences.

    Args:
        checkpoint: the base, a classifier with exact attention that training wrote.
        folder: where the runs go.
        seeds: how often every experiment is run, with the seeds that follow the base's.
        divergence_weights: λ of the adversaries.
        progress: show progress bars.

    Raises:
        ConfigError: a checkpoint of another task or mechanism.
    """
    base = load_task(checkpoint)
    config = deepcopy(dict(base.config))
    mechanism = str(config["attention"]["_target_"])
    exact = f"{ExactAttention.__module__}.{ExactAttention.__qualname__}"
    if not isinstance(base, ClassificationTask) or mechanism.rpartition(".")[2] != exact.rpartition(".")[2]:
        raise ConfigError(
            f"model={str(checkpoint)!r} must be a classifier with attention=exact for the experiments on explanation, "
            f"got {type(base).__name__} with {mechanism}."
        )
    config |= {"progress_bar": progress, "verbose": False, "resume": False}
    config["paths"] = {**config["paths"], "run_dir": None}
    first, root, source = int(config["seed"]), Path(folder), str(Path(checkpoint).resolve())
    outcomes = [_outcome(Experiment("base", first, config), root, base)]
    for seed in range(first + 1, first + seeds + 1):
        seeded = {**config, "seed": seed, "data": _reseeded(config["data"], seed)}
        experiments = list(_with_context(seeded, seed, source, divergence_weights))
        if "tokens" in inspect.signature(base.model.forward).parameters and not base.spec["two_towers"]:
            # Behind the adversaries, some of which guide them.
            experiments += _without_context(seeded, seed, source, divergence_weights, root, base)
        outcomes += [_outcome(experiment, root, base) for experiment in experiments]
    order = list(dict.fromkeys((outcome.experiment, outcome.divergence_weight) for outcome in outcomes))
    return sorted(outcomes, key=lambda outcome: order.index((outcome.experiment, outcome.divergence_weight)))


def _with_context(
    config: dict[str, Any], seed: int, source: str, divergence_weights: Sequence[float]
) -> Iterable[Experiment]:
    """The base's architecture: as it is, with weights that are given, and against the base."""
    yield Experiment("seed", seed, config)
    yield Experiment("uniform", seed, _with(config, attention_class("uniform")))
    yield Experiment("imposed", seed, _with(config, ObservedAttention, ImposedWeightsTask, base=source))
    for weight in divergence_weights:
        options = {"base": source, "divergence_weight": float(weight)}
        adversary = _with(config, ObservedAttention, AdversarialTask, **options)
        # Its validation loss says nothing about the divergence it is after: the last weights count.
        kept = {k: v for k, v in (adversary.get("callbacks") or {}).items() if k in ("step_timer", "finite_loss")}
        last = {
            "_target_": "pytorch_lightning.callbacks.ModelCheckpoint",
            "filename": "last",
            "every_n_epochs": 1,
            "save_on_train_epoch_end": True,
        }
        yield Experiment(
            "adversary", seed, {**adversary, "callbacks": {**kept, "last_checkpoint": last}}, float(weight)
        )


def _without_context(
    config: dict[str, Any],
    seed: int,
    source: str,
    divergence_weights: Sequence[float],
    root: Path,
    base: ClassificationTask,
) -> Iterable[Experiment]:
    """Tokens embedded by themselves, under uniform, learned and imposed weights."""
    shape = base.mechanisms[-1]
    model = {
        "_target_": f"{AttentionPooling.__module__}.{AttentionPooling.__qualname__}",
        "encoder": "affine",
        "dim": shape.num_heads * shape.head_dim,
        "num_heads": shape.num_heads,
        "dropout": config["model"].get("dropout", 0.1),
    }
    config = {**config, "model": model}
    yield Experiment("context_free_uniform", seed, _with(config, attention_class("uniform")))
    yield Experiment("context_free_own", seed, _with(config, ExactAttention))
    yield Experiment("context_free_base", seed, _with(config, ObservedAttention, GuidedTask, base=source))
    for weight in divergence_weights:
        adversary = Experiment("adversary", seed, {}, float(weight)).folder(root) / "run"
        guide = str((adversary / checkpoints.FOLDER / checkpoints.LAST).resolve())
        guided = _with(config, ObservedAttention, GuidedTask, base=guide)
        yield Experiment("context_free_adversary", seed, guided, float(weight))


def _reseeded(data: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The data in the order of another seed; which items are in which split stays."""
    return {**data, "seed": seed} if "seed" in data else dict(data)


def _with(
    config: dict[str, Any], mechanism: type[nn.Module], task: type[nn.Module] | None = None, **options: Any
) -> dict[str, Any]:
    """The configuration with another mechanism, and with another task if one is given."""
    attention = {"_target_": f"{mechanism.__module__}.{mechanism.__qualname__}", "_partial_": True}
    changed = {**config, "attention": attention, "model": {**config["model"], "attention": attention}}
    if task is not None:
        changed["task"] = {**config["task"], "_target_": f"{task.__module__}.{task.__qualname__}", **options}
    return changed


def _outcome(experiment: Experiment, root: Path, base: ClassificationTask) -> Outcome:
    """Train, measure and keep the outcome; one that is there already is read."""
    folder = experiment.folder(root)
    known = read_json(folder / MEASURES_FILE)
    if known is not None:
        return Outcome(**known)
    if experiment.name == "base":
        task, metrics = base, {}
        data = build(experiment.config["data"], "data", SequenceDataModule)
        make_splits(data)
    else:
        paths = {**experiment.config["paths"], "run_dir": str(folder / "run")}
        result = train({**experiment.config, "paths": paths})
        assert isinstance(result.task, ClassificationTask)
        assert result.data is not None
        task, data, metrics = result.task, result.data, result.metrics
    own = experiment.name in OWN_WEIGHTS
    distance, divergence = compare_with_base(task, base, data.test_dataloader(), weights=own)
    accuracy = metrics.get("test/accuracy")
    if accuracy is None:
        accuracy = _accuracy(task, data.test_dataloader())
    outcome = Outcome(
        experiment.name, experiment.seed, experiment.divergence_weight, float(accuracy), distance, divergence
    )
    write_json_atomically(folder / MEASURES_FILE, asdict(outcome))
    return outcome


@torch.no_grad()
def compare_with_base(
    task: ClassificationTask, base: ClassificationTask, batches: Any, *, weights: bool = True
) -> tuple[float, float | None]:
    """(mean prediction distance, mean weight divergence or None without `weights`) of a model from the base."""
    task, base = task.eval(), base.to(task.device).eval()
    distance = divergence = 0.0
    sequences = parts = 0
    for batch in batches:
        batch = {key: part.to(task.device) for key, part in batch.items()}
        logits, calls = logits_and_weights(task, batch)
        wanted, base_calls = logits_and_weights(base, batch)
        distance += float(prediction_distance(logits, wanted).sum())
        sequences += len(logits)
        for call, other in zip(calls, base_calls, strict=True) if weights else ():
            divergence += float(weight_divergence(call.weights, other.weights, other.real)) * len(logits)
            parts += len(logits)
    return distance / max(sequences, 1), divergence / max(parts, 1) if weights else None


@torch.no_grad()
def _accuracy(task: ClassificationTask, batches: Any) -> float:
    hits = [task(batch).argmax(-1) == batch["labels"] for batch in batches]
    return float(torch.cat(hits).float().mean())
