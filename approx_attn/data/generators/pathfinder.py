"""Pathfinder: are two marked ends on the same dashed contour? Generated."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from approx_attn.data.base import (
    DataSpec,
    SequenceDataModule,
    require_count,
    require_count_or_none,
    require_positive_number,
)
from approx_attn.data.cache import cached_splits
from approx_attn.data.generators.pathfinder_images import Setting, random_scenes
from approx_attn.data.packing import BYTE_VOCAB_SIZE
from approx_attn.data.shards import generate_shards

SHARD_SIZE = 500


class PathfinderData(SequenceDataModule):
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
        train_size, val_size, test_size: images per split.
        data_seed: seed of the generator.
        num_proc: processes that generate; all cores if None. Does not change the data.
        cache_dir: where the generated data is kept; the `datasets` library's cache if None. An interrupted
            generation goes on where it stopped.
        batch_size, eval_batch_size, num_workers, seed: see `SequenceDataModule`.

    YAML:
        _target_: approx_attn.data.generators.pathfinder.PathfinderData
        batch_size: 64
        eval_batch_size: 128
        num_workers: 0
        seed: 0
        resolution: 32
        contour_length: null
        distractor_length: null
        num_distractors: null
        seed_distance: null
        paddle_length: 2
        paddle_thickness: 0.5
        margin: 1
        marker_radius: 1.5
        continuity: 1.0
        train_size: 16000
        val_size: 2000
        test_size: 2000
        data_seed: 0
        num_proc: null
        cache_dir: null
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int | None = 128,
        num_workers: int = 0,
        seed: int = 0,
        resolution: int = 32,
        contour_length: int | None = None,
        distractor_length: int | None = None,
        num_distractors: int | None = None,
        seed_distance: int | None = None,
        paddle_length: int = 2,
        paddle_thickness: float = 0.5,
        margin: int = 1,
        marker_radius: float = 1.5,
        continuity: float = 1.0,
        train_size: int = 16_000,
        val_size: int = 2_000,
        test_size: int = 2_000,
        data_seed: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        scale = require_count("data.resolution", resolution, least=12) / 32
        if contour_length is None:
            contour_length = max(round(14 * scale**1.75), 2)
        if distractor_length is None:
            distractor_length = max(require_count("data.contour_length", contour_length) // 3, 2)
        if num_distractors is None:
            num_distractors = int(20 * scale**2) // require_count("data.distractor_length", distractor_length)
        if seed_distance is None:
            seed_distance = math.floor(7 * scale)
        self.setting = Setting(
            resolution=resolution,
            contour_length=require_count("data.contour_length", contour_length, least=2),
            distractor_length=require_count("data.distractor_length", distractor_length),
            num_distractors=require_count("data.num_distractors", num_distractors, least=0),
            seed_distance=require_count("data.seed_distance", seed_distance),
            paddle_length=require_count("data.paddle_length", paddle_length),
            paddle_thickness=require_positive_number("data.paddle_thickness", paddle_thickness),
            margin=require_count("data.margin", margin),
            marker_radius=require_positive_number("data.marker_radius", marker_radius),
            continuity=require_positive_number("data.continuity", continuity),
        )
        if 2 * seed_distance > resolution - 4:
            raise ValueError(
                f"data.seed_distance must be at most {resolution // 2 - 2} at data.resolution={resolution}, "
                f"got {seed_distance}."
            )
        self.sizes = {
            "train": require_count("data.train_size", train_size),
            "val": require_count("data.val_size", val_size),
            "test": require_count("data.test_size", test_size),
        }
        self.data_seed = require_count("data.data_seed", data_seed, least=0)
        self.num_proc = require_count_or_none("data.num_proc", num_proc)
        self.cache_dir = cache_dir

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

    def prepare_data(self) -> None:
        self.make_splits()

    def make_splits(self) -> dict[str, datasets.Dataset]:
        recipe = {**asdict(self.setting), **self.sizes, "data_seed": self.data_seed, "version": 1}
        return cached_splits("pathfinder", recipe, self._generate, self.cache_dir)

    def _generate(self, work: Path) -> dict[str, datasets.Dataset]:
        everything = generate_shards(
            partial(make_shard, setting=self.setting),
            range(math.ceil(sum(self.sizes.values()) / SHARD_SIZE)),
            seed=self.data_seed,
            folder=work,
            num_proc=self.num_proc,
            describe="generating pathfinder",
        )
        splits, start = {}, 0
        for name, size in self.sizes.items():
            splits[name] = everything.select(range(start, start + size))
            start += size
        return splits


def make_shard(rng: np.random.Generator, setting: Setting) -> datasets.Dataset:
    """`SHARD_SIZE` random images with columns `tokens` (bytes, row by row) and `label`."""
    scenes = random_scenes(rng, SHARD_SIZE, setting)
    tokens = pa.array([image.tobytes() for image in scenes.images], pa.binary())
    return datasets.Dataset(InMemoryTable(pa.table({"tokens": tokens, "label": pa.array(scenes.labels)})))
