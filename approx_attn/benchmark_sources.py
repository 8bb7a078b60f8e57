"""Queries, keys and values to benchmark on: random, synthetic with structure, or captured from a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx_attn.attention import AttentionMask
from approx_attn.calibration.moments import ContentMoments
from approx_attn.instantiation import ConfigError

SYNTHETIC = ("random", "structured")
TOPICS = 24
SEGMENT = 48  # mean tokens for which a topic lasts
DRIFT = 0.95  # correlation of the slow part of neighbouring tokens


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one attention layer.

    Attributes:
        query: (b, h, n, d). key: (b, h_kv, n, d). value: (b, h_kv, n, d_v).
        scale: factor on query-key products; None for 1/√d.
        moments: statistics of other inputs of the same layer, for bases; None if there are none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    moments: ContentMoments | None

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerInputs:
        """The same tensors elsewhere."""
        query, key, value = (x.to(device, dtype) for x in (self.query, self.key, self.value))
        return LayerInputs(query, key, value, self.scale, self.moments)


@dataclass(frozen=True)
class Source:
    """The layers that errors are averaged over; times are measured on the first."""

    layers: list[LayerInputs]


def load_inputs(cfg: Mapping[str, Any], length: int) -> Source:
    """Inputs of a length from `cfg["source"]`.

    Raises:
        ConfigError: a model or text that is not there, or a length that the model cannot take.
    """
    if cfg["source"] not in SYNTHETIC:
        return _captured(cfg, length)
    generator = torch.Generator().manual_seed(int(cfg["seed"]))
    shape = (int(cfg["num_heads"]), length, int(cfg["head_dim"]))
    draw = random_inputs if cfg["source"] == "random" else StructuredInputs(*shape[::2], generator)
    moments = ContentMoments()
    for _ in range(int(cfg["sequences"])):
        query, key, _ = draw(1, *shape, generator)
        moments.update(query, key, AttentionMask())
    query, key, value = draw(int(cfg["batch_size"]), *shape, generator)
    return Source([LayerInputs(query, key, value, None, moments)])


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


def _captured(cfg: Mapping[str, Any], length: int) -> Source:
    """What a model's attention layers get on text: one half calibrates, the other is measured."""
    from approx_attn.adapters.capture import capture_attention_inputs
    from approx_attn.calibration.sources import load_source

    sizes = {"length": length, "sequences": int(cfg["sequences"]), "test_sequences": int(cfg["batch_size"])}
    try:
        source = load_source(str(cfg["source"]), cfg["data"], batch_size=int(cfg["batch_size"]), **sizes)
    except ConfigError as error:  # which calls by its own name what is `source` here
        raise ConfigError(re.sub("^model=", "source=", str(error))) from error
    limit = getattr(getattr(source.model, "config", None), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(f"length={length} is more than the {limit} positions of source={cfg['source']}.")
    moments: dict[str, ContentMoments] = {}
    tensors: dict[str, LayerInputs] = {}

    def calibrate(name: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        moments.setdefault(name, ContentMoments()).update(query, key, mask)

    def keep(name: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        tensors[name] = LayerInputs(query.clone(), key.clone(), value.clone(), scale, moments[name])

    for batches, callback in ((source.first, calibrate), (source.second, keep)):
        with torch.no_grad(), capture_attention_inputs(source.model, callback):
            for batch in batches:
                source.model(**batch)
    layers = list(tensors.values())
    if cfg["layers"] is not None:
        beyond = [index for index in cfg["layers"] if not 0 <= index < len(layers)]
        if beyond:
            raise ConfigError(f"layers must be among 0 to {len(layers) - 1}, got {beyond[0]}.")
        layers = [layers[index] for index in cfg["layers"]]
    return Source(layers)
