"""Generating a data set in parallel, in parts that survive an interruption."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from approx_attn.data.cache import quiet_datasets

MakeShard = Callable[[np.random.Generator], datasets.Dataset]
ShardTask = tuple[MakeShard, int, int, Path]

SECONDS_BEFORE_PARALLEL = 2.0
"""Work that ends sooner is not worth starting processes for."""


def generate_shards(
    make: MakeShard, indices: Iterable[int], *, seed: int, folder: Path, num_proc: int | None, describe: str
) -> datasets.Dataset:
    """The shards with these indices, joined in their order.

    Shard i is `make(generator)` with a generator that depends on (seed, i) alone, so the result does not depend
    on the number of processes, and shards already in `folder` are not made again.

    Args:
        make: draws one shard; must be picklable.
        folder: where shards are kept.
        num_proc: processes; the cores this process may use if None.
        describe: a few words for the progress bar.
    """
    paths = {index: folder / f"shard-{index:05d}" for index in indices}
    missing = [(make, seed, index, path) for index, path in paths.items() if not path.exists()]
    with progress_bar(describe, len(paths), done=len(paths) - len(missing)) as advance:
        began = time.monotonic()
        while missing and (len(missing) == 1 or time.monotonic() - began < SECONDS_BEFORE_PARALLEL):
            write_shard(*missing.pop(0))
            advance()
        if missing:
            write_in_parallel(missing, min(num_proc or available_cores(), len(missing)), advance)
    return datasets.concatenate_datasets([datasets.load_from_disk(str(path)) for path in paths.values()])


def write_in_parallel(tasks: list[ShardTask], workers: int, advance: Callable[[], None]) -> None:
    """Write the shards from several processes, calling `advance` after each."""
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        futures = [pool.submit(write_shard, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def end_with_parent() -> None:
    """Called in a new worker: let it end when its parent is killed, where it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def write_shard(make: MakeShard, seed: int, index: int, path: Path) -> None:
    """Make one shard and put it at `path`, complete or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_datasets():
        make(np.random.default_rng([seed, index])).save_to_disk(str(partial))
    os.replace(partial, path)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def progress_bar(describe: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show progress over `total` parts on the error stream; yields the function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=total <= 1) as progress:
        task = progress.add_task(describe, total=total, completed=done)
        yield lambda: progress.advance(task)
