"""Correspondence of point clouds: which point of a known shape is each point of a bent, turned and noisy copy?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from approx_attn.data.base import DataSpec
from approx_attn.data.cache import GeneratedData

BUMPS = 6  # of the template
WAVES = 4  # of a deformation


@dataclass(kw_only=True, eq=False, repr=False)
class PointCloudData(GeneratedData):
    """Copies of one template shape; the label of each point is the index of the template's point that it was.

    The template is a sphere with bumps: points p_i = (1 + Σ_k h_k exp(−‖u_i − c_k‖² / 2w²)) u_i for evenly spread
    directions u_i, with 6 bumps of random place c_k, height |h_k| ≤ 0.6 and width w = 0.4, moved and scaled to mean 0
    and root mean square radius 1. A copy of it is, in this order,

        bent      x + Σ_m a_m cos(w_m·x + φ_m), 4 waves with w_m ~ N(0, I), a_m ~ N(0, deformation²/4 · I), φ_m uniform
        turned    about an axis of uniform direction by an angle uniform from 0 to `max_angle`
        noisy     plus N(0, noise² · I) at every point
        shuffled  into an order that says nothing

    The task is in kind that of Riva, Raganato and Melzi (arXiv 2409.13291), who match human bodies in pairs; here the
    second shape of each pair is always the template, so that a label says it. Batches hold `coordinates`
    (b, num_points, 3), tokens are all alike. Each split has its own stream of `data_seed`.

    Args:
        num_points: n, also the number of classes.
        max_angle: degrees, 0 to 180.
        deformation: scale of the bending; the radius is 1.
        noise: standard deviation of the noise at each point, in each direction.

    Other options: see `GeneratedData` and `SequenceDataModule`.
    """

    batch_size: int = 32
    eval_batch_size: int = 250
    num_points: int = 48
    max_angle: float = 30.0
    deformation: float = 0.3
    noise: float = 0.02
    val_size: int = 250
    test_size: int = 1_000

    cache_name = "point_cloud"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(num_points=2)
        for option, most in (("max_angle", 180.0), ("deformation", float("inf")), ("noise", float("inf"))):
            setattr(self, option, _require_from_zero(f"data.{option}", getattr(self, option), most))

    def decides(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_points", "max_angle", "deformation", "noise")}

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="token_prediction",
            vocab_size=1,
            num_classes=self.num_points,
            max_length=self.num_points,
            causal=False,
            coordinate_dim=3,
            describe=f"correspondence of {self.num_points} points, turned up to {self.max_angle:g}°",
        )

    def generate(self, work: Path) -> dict[str, datasets.Dataset]:
        first, *streams = np.random.SeedSequence(self.data_seed).spawn(1 + len(self.sizes))
        shape = template(np.random.default_rng(first), self.num_points)
        options = {name: value for name, value in self.decides().items() if name != "num_points"}
        splits = {}
        for (name, size), stream in zip(self.sizes.items(), streams, strict=True):
            points, labels = copies(np.random.default_rng(stream), shape, size, **options)
            flat = points.astype(np.float32).reshape(size, -1)
            splits[name] = datasets.Dataset.from_dict({"points": flat, "labels": labels})
        return splits

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> PointClouds:
        return PointClouds(dataset, spec)


class PointClouds(Dataset):
    """One split; indexing a list of items gives a batch.

    Args:
        dataset: columns `points`, n·c numbers, and `labels`, n.
        spec: of the data, with `coordinate_dim`.
    """

    def __init__(self, dataset: datasets.Dataset, spec: DataSpec) -> None:
        columns = dataset.with_format("numpy")[:]
        assert spec.coordinate_dim is not None
        points = torch.from_numpy(np.stack(columns["points"]).astype(np.float32))
        self.points = points.unflatten(-1, (-1, spec.coordinate_dim))  # (N, n, c)
        self.labels = torch.from_numpy(np.stack(columns["labels"]).astype(np.int64))  # (N, n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One item, without a batch dimension."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these items."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        labels = self.labels[rows]
        return {
            "tokens": torch.zeros_like(labels),
            "keep": torch.ones_like(labels, dtype=torch.bool),
            "coordinates": self.points[rows],
            "labels": labels,
        }


def template(rng: np.random.Generator, num_points: int) -> np.ndarray:
    """(num_points, 3) points of a bumpy sphere; see `PointCloudData`."""
    steps = np.arange(num_points) + 0.5
    height, angle = 1.0 - 2.0 * steps / num_points, np.pi * (1.0 + 5.0**0.5) * steps  # along a golden spiral
    ring = np.sqrt(1.0 - height**2)
    directions = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)  # (n, 3)
    places = rng.standard_normal((BUMPS, 3))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    heights = rng.uniform(-0.6, 0.6, BUMPS)
    squared = np.square(directions[:, None] - places).sum(axis=-1)  # (n, bumps)
    points = (1.0 + np.exp(-squared / (2 * 0.4**2)) @ heights)[:, None] * directions
    points -= points.mean(axis=0)
    return points / np.sqrt(np.square(points).sum(axis=1).mean())


def copies(
    rng: np.random.Generator, shape: np.ndarray, count: int, *, max_angle: float, deformation: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Copies of a shape (n, 3): points (count, n, 3) and the index that each point has in the shape, (count, n)."""
    waves, amplitudes = (rng.standard_normal((count, WAVES, 3)) for _ in range(2))
    phases = rng.uniform(0.0, 2.0 * np.pi, (count, WAVES))
    bends = np.cos(np.einsum("smc,nc->snm", waves, shape) + phases[:, None])  # (count, n, waves)
    points = shape + deformation / 2.0 * bends @ amplitudes  # (count, n, 3)
    axes = rng.standard_normal((count, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = np.deg2rad(rng.uniform(0.0, max_angle, (count, 1)))
    points = points @ Rotation.from_rotvec(angles * axes).as_matrix().transpose(0, 2, 1)
    points += noise * rng.standard_normal(points.shape)
    labels = rng.permuted(np.tile(np.arange(len(shape)), (count, 1)), axis=1)
    return np.take_along_axis(points, labels[..., None], axis=1), labels


def _require_from_zero(key: str, value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= most or value == np.inf:
        bounds = f"from 0 to {most:g}" if most < np.inf else "of at least 0"
        raise ValueError(f"{key} must be a number {bounds}, got {value!r}.")
    return float(value)
