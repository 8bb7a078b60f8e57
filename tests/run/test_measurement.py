"""Time and memory of a callable: what is counted, in which order, and what is refused."""

import pytest
import torch

from approx_attn.run.measurement import Timing, peak_memory, time_alternately

MEGABYTE = 2**20


def test_peak_counts_what_is_alive_at_once_not_the_sum() -> None:
    def function() -> None:
        for _ in range(5):
            torch.empty(MEGABYTE, dtype=torch.uint8)
        first = torch.empty(3 * MEGABYTE, dtype=torch.uint8)
        second = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first, second

    assert peak_memory(function) == pytest.approx(5 * MEGABYTE, rel=0.01)


def test_what_was_held_before_does_not_count() -> None:
    held = [torch.empty(8 * MEGABYTE, dtype=torch.uint8)]

    def function() -> torch.Tensor:
        held.clear()
        return torch.empty(MEGABYTE, dtype=torch.uint8)

    assert peak_memory(function) == pytest.approx(MEGABYTE, rel=0.01)


def test_peak_includes_the_backward_pass() -> None:
    x = torch.randn(MEGABYTE // 4, requires_grad=True)  # 1 MiB

    def train() -> None:
        (x.exp() * x.sin()).sum().backward()

    # exp, sin and their product before the backward pass, the gradient of x after it.
    assert 3 * MEGABYTE <= peak_memory(train) <= 8 * MEGABYTE


def test_callables_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    timings = time_alternately({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warm_up=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert list(timings) == ["a", "b"]
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_timing_summarises_by_median_and_quartiles() -> None:
    timing = Timing.from_samples([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.median == 3.0
    assert timing.spread == 2.0
    assert Timing.from_samples([2.0]).spread == 0.0


def test_ratio_is_taken_round_by_round() -> None:
    # Every round twice as slow as the other's, on a machine that slows down by ten between rounds.
    slow, fast = Timing.from_samples([2.0, 20.0, 200.0]), Timing.from_samples([1.0, 10.0, 100.0])
    assert slow.relative_to(fast) == 2.0


@pytest.mark.parametrize(("repeats", "warm_up"), [(0, 0), (1, -1)])
def test_impossible_counts_are_refused(repeats: int, warm_up: int) -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        time_alternately({"a": lambda: None}, repeats=repeats, warm_up=warm_up)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="callables not empty"):
        time_alternately({}, repeats=1)
    with pytest.raises(ValueError, match="at least one measured time"):
        Timing.from_samples([])
