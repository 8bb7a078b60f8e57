"""Is attention explanation? What the experiments around a trained classifier train, and what they measure.

After Wiegreffe and Pinter, *Attention is not not Explanation*, EMNLP 2019 (arXiv 1908.04626). The runs that are made
of these parts are in `explanation_runs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.exact import ExactAttention, exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.run.evaluate import load_task
from approx_attn.run.tasks.classification import ClassificationTask


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


class GuidedTask(BesideBaseTask):
    """Learns an `AttentionPooling` whose weights are those that a trained model gives the tokens, its `token_weights`.

    Arguments as `BesideBaseTask`; `base` is the model that guides.
    """

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        _, calls = logits_and_weights(self.base, batch)
        (mechanism,) = self.mechanisms
        assert isinstance(mechanism, ObservedAttention)
        mechanism.imposed = token_weights(calls[-1])
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


def token_weights(call: AttentionCall) -> Tensor:
    """(b, h, 1, n_k): the weight of every token in a call, mean over the real queries.

    A mean over the outputs of the last layer is the mean of its values under these weights.
    """
    real = call.real[:, None, :, None]
    return call.weights.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)


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
