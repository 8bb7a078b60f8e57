"""Time and memory of a callable, measured so that ratios mean something on a machine that is not quiet.

Two things spoil comparisons of speed: callables timed one after the other meet different machines (turbo,
neighbours, thermal state), and a mean is set by its worst sample. Here all callables of a comparison take
turns in one process, and medians are compared.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Timing:
    """Repeated wall-clock times of one callable.

    Attributes:
        median: seconds.
        spread: interquartile range in seconds: half of the samples lie within it. 0 for one sample.
        samples: seconds, in the order measured.
    """

    median: float
    spread: float
    samples: tuple[float, ...]

    @classmethod
    def from_samples(cls, samples: list[float] | tuple[float, ...]) -> Timing:
        """Summarise measured times.

        Raises:
            ValueError: no samples.
        """
        if not samples:
            raise ValueError("samples must hold at least one measured time, got none.")
        spread = 0.0
        if len(samples) > 1:
            quartiles = statistics.quantiles(samples, n=4, method="inclusive")
            spread = quartiles[2] - quartiles[0]
        return cls(statistics.median(samples), spread, tuple(samples))

    def divided_by(self, parts: int) -> Timing:
        """The time of one of so many equal parts of what was timed."""
        return Timing.from_samples([sample / parts for sample in self.samples])

    def relative_to(self, other: Timing) -> float:
        """Median over rounds of this time divided by the other's of the same round.

        For timings of one `time_alternately`: what slows a whole round cancels.
        """
        return statistics.median(self._ratios(other))

    def spread_relative_to(self, other: Timing) -> float:
        """Interquartile range of the ratios whose median is `relative_to`."""
        return Timing.from_samples(self._ratios(other)).spread

    def _ratios(self, other: Timing) -> list[float]:
        return [mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)]


def time_alternately(
    callables: Mapping[str, Callable[[], Any]], repeats: int = 10, warm_up: int = 2
) -> dict[str, Timing]:
    """Time several callables in turns: a b c, c b a, a b c, ...

    Args:
        callables: name -> function without arguments. Work that it queues on a CUDA device is waited for.
        repeats: measured rounds, at least 1.
        warm_up: unmeasured rounds before them (allocator, caches, compilation), at least 0.

    Returns:
        name -> `Timing` with `repeats` samples, in the order of `callables`.

    Raises:
        ValueError: `repeats` or `warm_up` too small, or nothing to time.
    """
    if repeats < 1 or warm_up < 0 or not callables:
        raise ValueError(
            f"repeats must be at least 1, warm_up at least 0 and callables not empty, "
            f"got {repeats}, {warm_up} and {len(callables)} callables."
        )
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    for turn in range(-warm_up, repeats):
        for name in order:
            seconds = _seconds(callables[name])
            if turn >= 0:
                samples[name].append(seconds)
        order.reverse()  # nobody always runs in the wake of the same neighbour
    return {name: Timing.from_samples(times) for name, times in samples.items()}


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes that torch held at once during a call, not counting what it held before.

    On CUDA this is the allocator's own peak above the start. On a CPU it is the peak of the running sum of
    allocations made, and freed again, during the call, as torch's profiler reports them; the profiler slows
    the call, so never time inside it.

    Args:
        function: called once; its result is dropped.
        device: where it computes.
    """
    device = torch.device(device)
    gc.collect()  # what an earlier call left behind must not be freed during this one
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device) - start, 0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile writes lines of its own to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    level = peak = 0
    for change in _memory_changes(record):
        level += change
        peak = max(peak, level)
    return peak


def _memory_changes(record: profile) -> list[int]:
    """Bytes of every allocation (positive) and free (negative) on the CPU, in order of time."""
    events: list[Any] = list(record.profiler.kineto_results.events())  # type: ignore[union-attr]
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    return [nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])]


def _seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, including the CUDA work that it queued."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for what has been queued on a CUDA device, if one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
