"""Inputs to benchmark on: random, synthetic with structure, or captured from a model; one part calibrates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, build_attention
from approx_attn.attention.calibrated import BasisMechanism, ObservingMechanism
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.conversion.calibration.fitting import StatisticsCollector, largest_rank, needed_statistics
from approx_attn.diagnosis.benchmark.settings import label_of
from approx_attn.errors import ConfigError

SYNTHETIC = ("random", "structured")
TOPICS = 24
SEGMENT = 48  # mean tokens for which a topic lasts
# Tokens: an eigenbasis over positions takes n³ operations and n² numbers per head, one of matrices r·n² numbers.
LONGEST_BASIS = {"absolute": 2048, "matrix": 512}
ROWS = 64  # of scores per calibration sequence, for position bases
DRIFT = 0.95  # correlation of the slow part of neighbouring tokens


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one attention layer.

    Attributes:
        query: (b, h, n, d). key: (b, h_kv, n, d). value: (b, h_kv, n, d_v).
        scale: factor on query-key products; None for 1/√d.
        index: which layer of the source it is.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    index: int = 0

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerInputs:
        """The same tensors elsewhere."""
        query, key, value = (x.to(device, dtype) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


@dataclass(frozen=True)
class Source:
    """The layers that errors are averaged over (times are measured on the first), and what fits mechanisms to them.

    Attributes:
        layers: inputs to measure on.
        calibration: bases fitted to other inputs of the same layers; None where no mechanism needs one.
        observed: by label and layer, mechanisms that were fitted by observing those inputs.
    """

    layers: list[LayerInputs]
    calibration: Calibration | None = None
    observed: dict[tuple[str, int], ObservingMechanism] = field(default_factory=dict)

    def calibrate(self, mechanism: AttentionMechanism, label: str, layer: int) -> str:
        """Fit a mechanism to the calibration part of a layer; returns what a reader must know if it cannot be.

        Raises:
            ValueError: a basis that does not fit the mechanism.
        """
        if (label, layer) in self.observed:
            mechanism.load_state_dict(self.observed[label, layer].state_dict())
            return ""
        if isinstance(mechanism, BasisMechanism):
            found = self.calibration
            if found is not None and set(needed_statistics(mechanism)) <= set(found.statistics):
                found.load_into(mechanism, layer)
                return ""
            longest = LONGEST_BASIS.get(mechanism.basis_kind)
            limit = "" if longest is None else f", bases over positions are fitted up to {longest:,} tokens"
            return f"not calibrated{limit}"
        learns = any(parameter.requires_grad for parameter in mechanism.parameters())
        if learns or mechanism.capabilities.needs_calibration:
            return "not calibrated, only training fits its parameters"
        return ""


def build(options: Mapping[str, Any], query: Tensor, key: Tensor, causal: bool) -> AttentionMechanism:
    """A mechanism by name and options in the shape of some inputs."""
    return build_attention(
        **options,
        num_heads=query.shape[1],
        head_dim=query.shape[-1],
        num_key_value_heads=key.shape[1],
        max_length=key.shape[-2],
        causal=causal,
    )


def load_inputs(cfg: Mapping[str, Any], length: int, mechanisms: Sequence[Mapping[str, Any]] = ()) -> Source:
    """Inputs of a length from `cfg["source"]`, under the causality `cfg["causal"]`.

    Args:
        mechanisms: names and options of those that the calibration part must fit.

    Raises:
        ConfigError: a model or text that is not there, or a length that the model cannot take.
    """
    calibrator = _Calibrator(mechanisms, bool(cfg["causal"]), int(cfg["seed"]))
    if cfg["source"] not in SYNTHETIC:
        layers = _captured(cfg, length, calibrator)
    else:
        generator = torch.Generator().manual_seed(int(cfg["seed"]))
        shape = (int(cfg["num_heads"]), length, int(cfg["head_dim"]))
        draw = random_inputs if cfg["source"] == "random" else StructuredInputs(*shape[::2], generator)
        for _ in range(int(cfg["sequences"])):
            calibrator(cfg["source"], *draw(1, *shape, generator), AttentionMask(), shape[-1] ** -0.5)
        layers = [LayerInputs(*draw(int(cfg["batch_size"]), *shape, generator), None)]
    return Source(layers, *calibrator.fit())


class _Calibrator:
    """Callback of a capture: collects what fits mechanisms, each under the causality that it is measured at."""

    def __init__(self, mechanisms: Sequence[Mapping[str, Any]], causal: bool, seed: int) -> None:
        self.mechanisms, self.causal, self.seed = mechanisms, causal, seed
        self.layers: list[str] = []
        self.observed: dict[tuple[str, int], ObservingMechanism] = {}
        self.collector: StatisticsCollector | None = None

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        if layer not in self.layers:
            self.layers.append(layer)
            self._start(layer, query, key)
        assert self.collector is not None
        # Content bases are of single tokens, all of which are used under a causal mask, too; its n² places need not be.
        by_pair = bool(self.observed) or self.collector.statistics != ["content"]
        self.collector(layer, query, key, value, replace(mask, causal=self.causal and by_pair), scale)

    def _start(self, layer: str, query: Tensor, key: Tensor) -> None:
        """Find out from the mechanisms in the shape of a layer what they need."""
        needing = nn.ModuleList()
        if self.collector is None:
            self.collector = StatisticsCollector([], ROWS, self.seed, max_rank=1)
        for options in self.mechanisms:
            with suppress(ValueError):  # its row says why it cannot be built
                mechanism = build(options, query, key, self.causal)
                if isinstance(mechanism, BasisMechanism):
                    needing.append(mechanism)
                elif isinstance(mechanism, ObservingMechanism):
                    self.observed[label_of(options), len(self.layers) - 1] = mechanism
                    self.collector.observers[f"{layer}.{label_of(options)}"] = mechanism
        wanted = needed_statistics(needing) if len(needing) else []
        self.collector.statistics = [name for name in wanted if key.shape[-2] <= LONGEST_BASIS.get(name, math.inf)]
        self.collector.max_rank = largest_rank(needing)

    def fit(self) -> tuple[Calibration | None, dict[tuple[str, int], ObservingMechanism]]:
        """The bases, if any are needed, and the mechanisms that observed."""
        for mechanism in self.observed.values():
            mechanism.fit()
        if self.collector is None or not self.collector.statistics:
            return None, self.observed
        longest = max(shape.length for shape in self.collector.shapes.values())
        return self.collector.fit(self.layers, longest), self.observed


def random_inputs(
    batch: int, heads: int, length: int, dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent normal numbers: nothing to exploit, attention is nearly uniform."""
    query, key, value = (torch.randn(batch, heads, length, dim, generator=generator) for _ in range(3))
    return query, key, value


class StructuredInputs:
    """Synthetic inputs with the structure that attention of trained models shows; not a trained model.

    A sequence is cut into segments, each about one of `TOPICS` topics. The key of a token is a topic vector plus a
    slowly drifting part plus noise, a query likewise about the topic of its own segment (half of the tokens) or
    any other, and all lie mostly in a few directions: the standard deviation of direction i falls as 1/√i. Scores
    have a standard deviation of about 2. Values follow topic and drift of their token, with noise.
    """

    def __init__(self, heads: int, dim: int, generator: torch.Generator) -> None:
        spectrum = torch.arange(1, dim + 1).rsqrt()
        mixing = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
        self.shape = spectrum[:, None] * mixing  # (h, d, d), rows of falling length
        self.topics = torch.randn(heads, TOPICS, dim, generator=generator)
        self.value_map = torch.randn(heads, dim, dim, generator=generator) / dim**0.5

    def __call__(
        self, batch: int, heads: int, length: int, dim: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (batch, heads, length, dim)."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        borders = torch.rand(batch, length, generator=generator) < 1.0 / SEGMENT
        segment = borders.cumsum(-1)  # (b, n)
        order = torch.randint(TOPICS, (batch, int(segment.max()) + 1), generator=generator)
        topic = order.gather(-1, segment)
        wanted = torch.where(torch.rand(batch, length, generator=generator) < 0.5, topic, topic.flip(-1))
        drift = _slow(normal(batch, heads, length, dim))
        content = self.topics[:, topic].transpose(0, 1) + drift  # (b, h, n, d)
        asked = self.topics[:, wanted].transpose(0, 1) + drift
        key = (content + 0.7 * normal(batch, heads, length, dim)) @ self.shape
        query = (asked + 0.7 * normal(batch, heads, length, dim)) @ self.shape
        value = content @ self.value_map + normal(batch, heads, length, dim)
        scores = query[:, :, :256] @ key[:, :, -256:].mT / dim**0.5
        return query * (2.0 / scores.std()), key, value


def _slow(noise: Tensor) -> Tensor:
    """A stationary process of correlation `DRIFT` between neighbours, of variance one."""
    steps = 256
    weights = DRIFT ** torch.arange(steps, dtype=noise.dtype)
    weights = (weights / weights.norm()).flip(0)
    flat = noise.transpose(-2, -1).reshape(-1, 1, noise.shape[-2])
    slow = torch.nn.functional.conv1d(torch.nn.functional.pad(flat, (steps - 1, 0)), weights.view(1, 1, -1))
    return slow.view(*noise.shape[:2], noise.shape[3], noise.shape[2]).transpose(-2, -1).contiguous()


def _captured(cfg: Mapping[str, Any], length: int, calibrator: _Calibrator) -> list[LayerInputs]:
    """What a model's attention layers get on text: one half calibrates, the other is measured."""
    from approx_attn.conversion.capture import capture_attention_inputs
    from approx_attn.diagnosis.inputs import load_source

    sizes = {"length": length, "sequences": int(cfg["sequences"]), "test_sequences": int(cfg["batch_size"])}
    try:
        source = load_source(str(cfg["source"]), cfg["data"], batch_size=int(cfg["batch_size"]), **sizes)
    except ConfigError as error:  # which calls by its own name what is `source` here
        raise ConfigError(re.sub("^model=", "source=", str(error))) from error
    limit = getattr(getattr(source.model, "config", None), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(f"length={length} is more than the {limit} positions of source={cfg['source']}.")
    tensors: dict[str, LayerInputs] = {}

    def keep(name: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        tensors[name] = LayerInputs(query.clone(), key.clone(), value.clone(), scale, calibrator.layers.index(name))

    for batches, callback in ((source.first, calibrator), (source.second, keep)):
        with torch.no_grad(), capture_attention_inputs(source.model, callback):
            for batch in batches:
                source.model(**batch)
    layers = list(tensors.values())
    if cfg["layers"] is not None:
        beyond = [index for index in cfg["layers"] if not 0 <= index < len(layers)]
        if beyond:
            raise ConfigError(f"layers must be among 0 to {len(layers) - 1}, got {beyond[0]}.")
        layers = [layers[index] for index in cfg["layers"]]
    return layers
