"""Generated data, made once and kept as Arrow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
from filelock import FileLock

from approx_attn.data.base import SPLITS, SequenceDataModule


@dataclass(kw_only=True, eq=False, repr=False)
class GeneratedData(SequenceDataModule):
    """Base of modules whose data is drawn at random.

    Args:
        train_size, val_size, test_size: items per split.
        data_seed: seed of the generator.
        cache_dir: where the generated data is kept; the `datasets` library's cache if None. An interrupted
            generation goes on where it stopped.

    Subclasses implement `make_spec`, `decides` and `generate`.
    """

    train_size: int = 20_000
    val_size: int = 2_000
    test_size: int = 2_000
    data_seed: int = 0
    cache_dir: str | None = None

    cache_name: ClassVar[str]
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(train_size=1, val_size=1, test_size=1, data_seed=0)
        self.sizes: dict[str, int] = {name: getattr(self, f"{name}_size") for name in SPLITS}

    def decides(self) -> dict[str, Any]:
        """What the data depends on besides the sizes and the seed, as plain JSON values."""
        raise NotImplementedError

    def generate(self, work: Path) -> dict[str, datasets.Dataset]:
        """Make the splits; `work` is a folder that outlives an interruption, for parts worth keeping."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        self.make_splits()

    def make_splits(self) -> dict[str, datasets.Dataset]:
        recipe = {**self.decides(), **self.sizes, "data_seed": self.data_seed, "version": self.version}
        return cached_splits(self.cache_name, recipe, self.generate, self.cache_dir)

    def cut(self, everything: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """The splits, one behind the other from the beginning."""
        splits, start = {}, 0
        for name, size in self.sizes.items():
            splits[name] = everything.select(range(start, start + size))
            start += size
        return splits


def cached_splits(
    name: str,
    options: dict[str, Any],
    build: Callable[[Path], dict[str, datasets.Dataset]],
    cache_dir: str | None,
) -> dict[str, datasets.Dataset]:
    """The splits that `build` makes, from the cache if they were made before with equal options.

    Args:
        name: the data set; a folder of the cache.
        options: everything that the data depends on, as plain JSON values; decides the cache entry.
        build: makes the splits. It gets a folder that outlives an interruption, for parts worth keeping.
        cache_dir: root of the cache; the `approx_attn` folder of the `datasets` library's cache if None.

    Several processes may ask at once: one builds, the others wait and read. An entry appears only when it
    is complete.
    """
    root = (
        Path(datasets.config.HF_DATASETS_CACHE) / "approx_attn" if cache_dir is None else Path(cache_dir).expanduser()
    )
    recipe = json.dumps(options, sort_keys=True, indent=2)
    entry = root / name / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir={str(root)!r} cannot be written ({error.strerror}).") from error
    with FileLock(f"{entry}.lock"):
        if not entry.exists():
            work, partial = Path(f"{entry}.work"), Path(f"{entry}.partial")
            work.mkdir(exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            with quiet_datasets():
                datasets.DatasetDict(build(work)).save_to_disk(partial)
            (partial / "options.json").write_text(recipe)
            os.replace(partial, entry)
            shutil.rmtree(work, ignore_errors=True)
    try:
        return dict(datasets.load_from_disk(str(entry)))
    except Exception as error:
        raise ValueError(
            f"data.cache_dir holds {str(entry)!r}, which cannot be read; delete it to make it anew."
        ) from error


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars and warnings of the `datasets` library, which would break up this project's own."""
    bars_were_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()
