"""Pathfinder: are two marked ends on the same dashed contour? Generated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from approx_attn.data.base import DataSpec, require_count_or_none, require_positive_number
from approx_attn.data.cache import GeneratedData
from approx_attn.data.generators.pathfinder_images import Setting, random_scenes
from approx_attn.data.packing import BYTE_VOCAB_SIZE
from approx_attn.data.shards import generate_shards

SHARD_SIZE = 500


@dataclass(kw_only=True, eq=False, repr=False)
class PathfinderData(GeneratedData):
    """Square grey images read row by row, one token per pixel (its grey value + 1); 2 classes.

    The definition stands in `pathfinder_images`. The default images are those of the Long Range Arena's 32 × 32
    task, of which it has 160000/20000/20000; smaller ones hold shorter contours. Options given as None follow the
    resolution: at 32, 24 and 16 pixels contours have 14, 8 and 4 dashes and start 7, 5 and 3 pixels apart.

    Args:
        resolution: side of the images in pixels, at least 12; a sequence has resolution² tokens.
        contour_length: dashes of the two long contours; None: 14 · (resolution / 32)^1.75.
        distractor_length: dashes of the short contours; None: a third of `contour_length`, at least 2.
        num_distractors: short contours; None: as many as make 20 · (resolution / 32)² dashes.
        seed_distance: pixels between the starts of the two long contours; None: 7 · resolution / 32.
        paddle_length, paddle_thickness: of a dash, in pixels.
        margin: pixels that a dash keeps from others.
        marker_radius: of the marks, in pixels.
        continuity: the larger, the straighter the contours.
        num_proc: processes that generate; all cores if None. Does not change the data.

    Other options: see `GeneratedData` and `SequenceDataModule`.
    """

    batch_size: int = 64
    eval_batch_size: int = 128
    resolution: int = 32
    contour_length: int | None = None
    distractor_length: int | None = None
    num_distractors: int | None = None
    seed_distance: int | None = None
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    margin: int = 1
    marker_radius: float = 1.5
    continuity: float = 1.0
    train_size: int = 16_000
    num_proc: int | None = None

    cache_name = "pathfinder"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(resolution=12)
        scale = self.resolution / 32
        if self.contour_length is None:
            self.contour_length = max(round(14 * scale**1.75), 2)
        self.require_counts(contour_length=2)
        if self.distractor_length is None:
            self.distractor_length = max(self.contour_length // 3, 2)
        self.require_counts(distractor_length=1)
        if self.num_distractors is None:
            self.num_distractors = int(20 * scale**2) // self.distractor_length
        if self.seed_distance is None:
            self.seed_distance = math.floor(7 * scale)
        self.require_counts(num_distractors=0, seed_distance=1, paddle_length=1, margin=1)
        for name in ("paddle_thickness", "marker_radius", "continuity"):
            setattr(self, name, require_positive_number(f"data.{name}", getattr(self, name)))
        if 2 * self.seed_distance > self.resolution - 4:
            raise ValueError(
                f"data.seed_distance must be at most {self.resolution // 2 - 2} at data.resolution={self.resolution}, "
                f"got {self.seed_distance}."
            )
        require_count_or_none("data.num_proc", self.num_proc)
        of_images = {field.name for field in fields(Setting)} & {field.name for field in fields(self)}
        self.setting = Setting(**{name: getattr(self, name) for name in of_images})

    def decides(self) -> dict[str, Any]:
        return asdict(self.setting)

    def make_spec(self) -> DataSpec:
        side = self.setting.resolution
        return DataSpec(
            kind="classification",
            vocab_size=BYTE_VOCAB_SIZE,
            num_classes=2,
            max_length=side * side,
            causal=False,
            describe=f"are two ends on one contour of {self.setting.contour_length} dashes, {side} × {side} pixels",
        )

    def generate(self, work: Path) -> dict[str, datasets.Dataset]:
        everything = generate_shards(
            partial(make_shard, setting=self.setting),
            range(math.ceil(sum(self.sizes.values()) / SHARD_SIZE)),
            seed=self.data_seed,
            folder=work,
            num_proc=self.num_proc,
            describe="generating pathfinder",
        )
        return self.cut(everything)


def make_shard(rng: np.random.Generator, setting: Setting) -> datasets.Dataset:
    """`SHARD_SIZE` random images with columns `tokens` (bytes, row by row) and `label`."""
    scenes = random_scenes(rng, SHARD_SIZE, setting)
    tokens = pa.array([image.tobytes() for image in scenes.images], pa.binary())
    return datasets.Dataset(InMemoryTable(pa.table({"tokens": tokens, "label": pa.array(scenes.labels)})))
