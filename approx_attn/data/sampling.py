"""The order in which training sees the data, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from approx_attn.data.packing import IGNORE


class EpochSampler(DistributedSampler):
    """Item order as a function of (seed, epoch) alone, split over processes if there are several.

    A `DistributedSampler`, so Lightning keeps it as it is and tells it the epoch; with one process it is an
    ordinary shuffled or sequential sampler. Together the processes see at step t the items that one process
    with the joint batch size sees. Where the number of items is not divisible by the number of processes,
    training drops the rest (`drop_last`) and evaluation repeats a few, so that no process waits for another; the
    labels of what is repeated become `IGNORE`, so nothing is counted twice.

    Args:
        num_items: size of the data set.
        shuffle: a new order every epoch, else the order of the data.
        seed: seed of the order.
        drop_last: drop what does not divide evenly among processes instead of repeating items.
        joint: every process sees all items.
    """

    def __init__(self, num_items: int, *, shuffle: bool, seed: int, drop_last: bool, joint: bool = False) -> None:
        distributed = dist.is_available() and dist.is_initialized() and not joint
        super().__init__(
            range(num_items),  # type: ignore[arg-type]
            num_replicas=dist.get_world_size() if distributed else 1,
            rank=dist.get_rank() if distributed else 0,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.num_items = num_items
        self.skip = 0
        """Items to leave out at the start of the next iteration, because they were seen before a restart."""

    @property
    def ends_with_a_repeated_item(self) -> bool:
        """Whether another process has the last item too, because there are not enough for all."""
        return self.rank + self.num_replicas * (self.num_samples - 1) >= self.num_items

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return iter(list(super().__iter__())[skip:])


class ResumableLoader(DataLoader):
    """A `DataLoader` over an `EpochSampler` whose `state_dict` says how far into which epoch it is.

    Lightning stores the state with a checkpoint and loads it before it iterates again. `__iter__` is a
    generator on purpose: Lightning asks for the iterator first and sets the epoch of the sampler afterwards.
    `StatefulDataLoader` of torchdata fixes the order when it is asked for the iterator, so under Lightning it starts,
    and resumes, every epoch in the order of another one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = 0
        self._batches_seen = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = getattr(self.sampler, "epoch", 0)
        resume, self._resume = self._resume, None
        seen = resume["batches_seen"] if resume is not None and resume["epoch"] == epoch else 0
        if seen >= len(self):  # the epoch was complete when the state was taken
            seen = 0
        if seen and isinstance(self.sampler, EpochSampler):
            self.sampler.skip = seen * int(self.batch_size or 1)
        if hasattr(self.dataset, "epoch"):  # data that is drawn anew in every epoch
            self.dataset.epoch = epoch
        self._epoch, self._batches_seen = epoch, seen
        repeats = isinstance(self.sampler, EpochSampler) and self.sampler.ends_with_a_repeated_item
        for batch in super().__iter__():
            self._batches_seen += 1
            if repeats and self._batches_seen == len(self):
                batch["labels"][-1] = IGNORE
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of batches handed out in it."""
        return {"epoch": self._epoch, "batches_seen": self._batches_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the batches seen, if the next epoch iterated is the one that the state names."""
        self._resume = {"epoch": int(state["epoch"]), "batches_seen": int(state["batches_seen"])}
