"""Is attention explanation? Four experiments around one trained classifier.

After Wiegreffe and Pinter, *Attention is not not Explanation*, EMNLP 2019 (arXiv 1908.04626), for transformers:

- uniform weights: does the task need attention at all?
- seeds: how far do weights and predictions of the same model differ by chance?
- imposed weights: a model whose weights are those of the base model, frozen, learns the rest anew. If it beats one
  with uniform weights, the weights carry what the task needs, for a model that had no part in making them.
- adversary: a model trained to predict as the base model does with weights as different as possible,
  loss = TVD(predictions) − λ·JSD(weights). If it stays close in predictions at a divergence that seeds do not
  reach, the weights did not decide the predictions.

Every experiment is a run of the training framework with the configuration of the base model's checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.exact import ExactAttention, exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.attention.registry import attention_class
from approx_attn.config.instantiate import build
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError
from approx_attn.run.evaluate import load_task
from approx_attn.run.record import read_json, write_json_atomically
from approx_attn.run.tasks.classification import ClassificationTask
from approx_attn.run.train import make_splits, train

MEASURES_FILE = "explanation.json"


@dataclass(frozen=True)
class Outcome:
    """One trained model beside the base model, on the test split.

    Attributes:
        experiment: base, seed, uniform, imposed or adversary.
        seed: of the run.
        divergence_weight: λ of an adversary.
        accuracy: on the test split.
        prediction_distance: mean total variation between its class probabilities and the base model's.
        weight_divergence: mean Jensen-Shannon divergence of its attention weights from the base model's, in nats, at
            most log 2; None where weights are not its own.
    """

    experiment: str
    seed: int
    divergence_weight: float | None
    accuracy: float
    prediction_distance: float
    weight_divergence: float | None


class ObservedAttention(AttentionMechanism):
    """Exact attention that keeps its weights, with their gradient, or uses weights that were set from outside.

    Attributes:
        weights: (b, h, n_q, n_k) of the last call.
        imposed: (b, h, n_q, n_k) to use at the next call instead of its own; None to compute them.
    """

    name = "observed"
    capabilities = Capabilities(window=True)
    cost_formula = "n²·d"
    weights: Tensor | None = None
    imposed: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        if self.imposed is not None:
            weights = self.imposed.to(value.dtype)
        else:
            _, weights = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        self.weights = weights
        return apply_dropout(weights, dropout_p) @ value, weights if need_weights else None

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        return ExactAttention.cost(self, query_length, key_length, causal=causal)  # type: ignore[arg-type]


class BesideBaseTask(ClassificationTask):
    """A classification task that runs a trained base model on every batch.

    Args:
        config, spec, label_smoothing, auxiliary_weight: as `SequenceTask`.
        base: checkpoint of the base model.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        spec: Mapping[str, Any],
        *,
        base: str,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 1.0,
    ) -> None:
        super().__init__(config, spec, label_smoothing=label_smoothing, auxiliary_weight=auxiliary_weight)
        self._base = (load_task(base),)  # in a tuple, so that it is no submodule: neither trained nor saved

    @property
    def base(self) -> ClassificationTask:
        """The base model's task, on the device of this one, in evaluation mode."""
        return self._base[0].to(self.device).eval()  # type: ignore[return-value]


class ImposedWeightsTask(BesideBaseTask):
    """Learns a classifier whose attention weights are those of the base model; arguments as `BesideBaseTask`."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        observed = [m for m in self.mechanisms if isinstance(m, ObservedAttention)]
        _, calls = logits_and_weights(self.base, batch)
        for mechanism, call in zip(observed, calls, strict=True):
            mechanism.imposed = call.weights
        return super().forward(batch)


class AdversarialTask(BesideBaseTask):
    """Learns to predict as the base model does, with attention weights as different as possible.

    The loss of a batch is the mean TVD between class probabilities − λ · the mean JSD between weights.

    Args:
        config, spec, base, label_smoothing, auxiliary_weight: as `BesideBaseTask`; the last two are not used.
        divergence_weight: λ, at least 0.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        spec: Mapping[str, Any],
        *,
        base: str,
        divergence_weight: float = 1.0,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 1.0,
    ) -> None:
        super().__init__(config, spec, base=base, label_smoothing=label_smoothing, auxiliary_weight=auxiliary_weight)
        self.divergence_weight = float(divergence_weight)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        logits = self(batch)
        wanted, calls = logits_and_weights(self.base, batch)
        own = [m.weights for m in self.mechanisms if isinstance(m, ObservedAttention)]
        divergence = torch.stack(
            [
                weight_divergence(weights, call.weights, call.real)
                for weights, call in zip(own, calls, strict=True)
                if weights is not None
            ]
        ).mean()
        distance = prediction_distance(logits, wanted).mean()
        loss = distance - self.divergence_weight * divergence
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        self.log_dict(
            {"train/loss": loss.detach(), "train/accuracy": accuracy, "train/divergence": divergence.detach()},
            batch_size=len(logits),
        )
        return loss


# -- measures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """Weights (b, h, n_q, n_k) of one attention call, and which queries (b, n_q) are real."""

    weights: Tensor
    real: Tensor


def logits_and_weights(task: ClassificationTask, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[AttentionCall]]:
    """Class logits of a model with exact attention, and the weights of its calls in order; without gradient."""
    calls: list[AttentionCall] = []

    def record(layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        real, used = used_tokens(mask, query, key)
        key = key.masked_fill(~used[:, None, :, None], 0.0)
        _, weights = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        calls.append(AttentionCall(weights, real))

    with torch.no_grad(), capture_attention_inputs(task.model, record):
        logits = task(batch)
    return logits, calls


def prediction_distance(logits: Tensor, others: Tensor) -> Tensor:
    """(b, classes) twice to (b,): total variation between the class probabilities."""
    return (logits.softmax(-1) - others.softmax(-1)).abs().sum(-1) / 2


def weight_divergence(weights: Tensor, others: Tensor, real: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of rows of weights over heads and real queries, in nats.

    Args:
        weights, others: (b, h, n_q, n_k), rows that sum to one.
        real: (b, n_q) bool.
    """
    middle = (weights + others) / 2
    rows = (_relative_entropy(weights, middle) + _relative_entropy(others, middle)) / 2  # (b, h, n_q)
    used = real[:, None].expand(rows.shape)
    return rows.masked_fill(~used, 0.0).sum() / used.sum().clamp_min(1)


def _relative_entropy(a: Tensor, b: Tensor) -> Tensor:
    tiny = torch.finfo(a.dtype).tiny
    return (a * (a.clamp_min(tiny).log() - b.clamp_min(tiny).log())).sum(-1)


@torch.no_grad()
def compare_with_base(task: ClassificationTask, base: ClassificationTask, batches: Any) -> tuple[float, float]:
    """(mean prediction distance, mean weight divergence) of a model from the base model."""
    task, base = task.eval(), base.to(task.device).eval()
    distance = divergence = 0.0
    sequences = parts = 0
    for batch in batches:
        batch = {key: part.to(task.device) for key, part in batch.items()}
        logits, calls = logits_and_weights(task, batch)
        wanted, base_calls = logits_and_weights(base, batch)
        distance += float(prediction_distance(logits, wanted).sum())
        sequences += len(logits)
        for call, other in zip(calls, base_calls, strict=True):
            divergence += float(weight_divergence(call.weights, other.weights, other.real)) * len(logits)
            parts += len(logits)
    return distance / max(sequences, 1), divergence / max(parts, 1)


# -- the experiments -----------------------------------------------------------------------------------


def run_experiments(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    seeds: int = 3,
    divergence_weights: Sequence[float] = (0.05, 0.2),
    progress: bool = True,
) -> list[Outcome]:
    """Train what the experiments need, each as a run below `folder`, and measure it on the test split.

    What ran to its end before is not run again.

    Args:
        checkpoint: the base model, a classifier with exact attention that training wrote.
        folder: where the runs go.
        seeds: further seeds of the base configuration.
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
    source = str(Path(checkpoint).resolve())
    seed = int(config["seed"])
    runs: list[tuple[str, int, float | None, dict[str, Any]]] = [("base", seed, None, config)]
    runs += [("seed", seed + i, None, {**config, "seed": seed + i}) for i in range(1, seeds + 1)]
    runs.append(("uniform", seed, None, _with(config, attention_class("uniform"))))
    runs.append(("imposed", seed, None, _with(config, ObservedAttention, ImposedWeightsTask, base=source)))
    for weight in divergence_weights:
        options = {"base": source, "divergence_weight": float(weight)}
        adversary = _with(config, ObservedAttention, AdversarialTask, **options)
        # Its validation loss says nothing about the divergence it is after: the last weights count.
        kept = ("step_timer", "finite_loss")
        adversary["callbacks"] = {k: v for k, v in (adversary.get("callbacks") or {}).items() if k in kept}
        runs.append(("adversary", seed, float(weight), adversary))
    return [
        _outcome(Path(folder) / run_name(kind, number, weight), kind, number, weight, options, base)
        for kind, number, weight, options in runs
    ]


def run_name(kind: str, seed: int, weight: float | None) -> str:
    """Folder of an experiment's run."""
    return f"{kind}-seed{seed}" + ("" if weight is None else f"-weight{weight:g}")


def _with(
    config: dict[str, Any], mechanism: type[nn.Module], task: type[nn.Module] | None = None, **options: Any
) -> dict[str, Any]:
    """The configuration with another mechanism, and with another task if one is given."""
    attention = {"_target_": f"{mechanism.__module__}.{mechanism.__qualname__}", "_partial_": True}
    changed = {**config, "attention": attention, "model": {**config["model"], "attention": attention}}
    if task is not None:
        changed["task"] = {**config["task"], "_target_": f"{task.__module__}.{task.__qualname__}", **options}
    return changed


def _outcome(
    folder: Path, kind: str, seed: int, weight: float | None, config: dict[str, Any], base: ClassificationTask
) -> Outcome:
    """Train, measure and keep the outcome; one that is there already is read."""
    known = read_json(folder / MEASURES_FILE)
    if known is not None:
        return Outcome(**known)
    if kind == "base":
        task, data, metrics = base, None, {}
    else:
        run_dir = folder / "run"
        result = train({**config, "paths": {**config["paths"], "run_dir": str(run_dir)}, "resume": False})
        assert isinstance(result.task, ClassificationTask)
        task, data, metrics = result.task, result.data, result.metrics
    if data is None:
        data = build(config["data"], "data", SequenceDataModule)
        make_splits(data)
    distance, divergence = compare_with_base(task, base, data.test_dataloader())
    accuracy = metrics.get("test/accuracy")
    if accuracy is None:
        accuracy = _accuracy(task, data.test_dataloader())
    own_weights = kind not in ("imposed", "uniform")
    outcome = Outcome(kind, seed, weight, float(accuracy), distance, divergence if own_weights else None)
    write_json_atomically(folder / MEASURES_FILE, asdict(outcome))
    return outcome


@torch.no_grad()
def _accuracy(task: ClassificationTask, batches: Any) -> float:
    hits = [task(batch).argmax(-1) == batch["labels"] for batch in batches]
    return float(torch.cat(hits).float().mean())
