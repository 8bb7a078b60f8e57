"""Planted truth for the statistics: known gaps, known noise, known answers."""

import math

import numpy as np
import pytest
from scipy import stats

from approx_attn.comparison.statistics import (
    detectable_gap,
    disagreement,
    holm_adjust,
    item_spread,
    mcnemar,
    paired_difference,
    pareto_frontier,
    power,
    summarise,
)


def test_summary_is_the_sample_mean_and_deviation():
    summary = summarise([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.std == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert math.isnan(summarise([1.0]).std)
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_interval_and_p_value_equal_scipys_paired_test():
    a, b = [0.91, 0.93, 0.90, 0.95], [0.90, 0.90, 0.91, 0.91]
    ours, theirs = paired_difference(a, b), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equal_mechanisms_are_called_indistinguishable(seeds):
    rng = np.random.default_rng(seeds)
    draws = rng.normal(0.9, 0.01, size=(2, 2000, seeds))
    found = [paired_difference(list(a), list(b)).distinguishable for a, b in zip(*draws, strict=True)]
    assert 1 - np.mean(found) >= 0.93


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_real_gap_is_found_as_often_as_the_stated_power(seeds):
    rng = np.random.default_rng(seeds)
    gap, std = 0.02, 0.01
    reference = rng.normal(0.90, std / math.sqrt(2), size=(2000, seeds))
    better = rng.normal(0.90 + gap, std / math.sqrt(2), size=(2000, seeds))
    found = [paired_difference(list(a), list(b)).distinguishable for a, b in zip(better, reference, strict=True)]
    assert np.mean(found) == pytest.approx(power(gap, std, seeds), abs=0.03)


def differ_in_items(rng, chance, other_chance, seeds):
    """A comparison of two mechanisms, each of which gets an item right with a chance of its own for that item."""
    ours, theirs = (rng.random((seeds, len(chance))) < c for c in (chance, other_chance))
    spread = math.sqrt(np.mean([item_spread(disagreement(a, b)) ** 2 for a, b in zip(ours, theirs, strict=True)]))
    return paired_difference(list(ours.mean(axis=1)), list(theirs.mean(axis=1)), spread)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("open_items", [6, 60])
def test_equal_mechanisms_are_indistinguishable_where_accuracies_are_steps(seeds, open_items):
    rng = np.random.default_rng(seeds)
    chance = np.where(np.arange(360) < open_items, 0.5, 1.0)  # all other items are easy
    found = [differ_in_items(rng, chance, chance, seeds) for _ in range(2000)]
    if seeds == 2:  # where the t-test alone would call more than one in twenty different
        assert np.mean([d.spread_of_items and d.mean != 0.0 for d in found]) > (0.05 if open_items == 6 else 0.0)
    assert 1 - np.mean([difference.distinguishable for difference in found]) >= 0.93


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_gap_of_two_points_in_items_is_found_with_the_stated_power(seeds):
    rng = np.random.default_rng(seeds)
    chance = rng.beta(3.0, 0.3, size=1000)
    weaker = chance * (1 - 0.02 / chance.mean())
    found = [differ_in_items(rng, weaker, chance, seeds) for _ in range(1500)]
    spread = np.std([difference.mean for difference in found]) * math.sqrt(seeds)
    expected = power(0.02, spread, seeds)
    assert 0.3 < expected < 0.99
    assert np.mean([difference.distinguishable for difference in found]) == pytest.approx(expected, abs=0.03)


def test_the_same_difference_for_every_seed_is_no_proof():
    steps = paired_difference([0.52, 0.62, 0.72], [0.50, 0.60, 0.70], item_spread=0.02)
    assert steps.spread_of_items
    assert not steps.distinguishable
    half = stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    assert (steps.low, steps.high) == pytest.approx((0.02 - half, 0.02 + half))
    unknown = paired_difference([0.52, 0.62, 0.72], [0.50, 0.60, 0.70])
    assert not unknown.has_interval
    assert math.isnan(unknown.p_value)
    assert not unknown.distinguishable
    assert paired_difference([0.5, 0.6], [0.5, 0.6]).p_value == 1.0


@pytest.mark.parametrize("items", [360, 1797, 100_003])
def test_rounding_of_figures_is_no_spread(items):
    rng = np.random.default_rng(items)
    right = rng.integers(items // 2, items - 10, size=3)
    ours, theirs = ([float(np.float32(k / items)) for k in counts] for counts in (right + 3, right))
    difference = paired_difference(ours, theirs)
    assert not difference.has_interval
    assert not difference.distinguishable
    one_more = [float(np.float32(k / items)) for k in right + np.array([3, 3, 4])]
    assert paired_difference(one_more, theirs).has_interval


def test_the_spread_of_items_is_that_of_other_test_sets():
    rng = np.random.default_rng(0)
    chances = rng.random((2, 4000))
    pools = rng.random((2, 4000)) < chances
    drawn = [rng.integers(4000, size=300) for _ in range(4000)]
    differences = [pools[0, items].mean() - pools[1, items].mean() for items in drawn]
    assert item_spread(disagreement(pools[0, drawn[0]], pools[1, drawn[0]])) == pytest.approx(
        np.std(differences), rel=0.1
    )


def test_detectable_gap_inverts_power():
    gap = detectable_gap(0.01, 5, 0.8)
    assert power(gap, 0.01, 5) == pytest.approx(0.8, abs=1e-6)
    assert detectable_gap(0.01, 1) == math.inf


def test_a_figure_that_is_no_number_spoils_the_statistics_and_not_the_comparison():
    difference = paired_difference([math.nan, 0.5, 0.6], [0.5, 0.5, 0.5])
    assert not difference.distinguishable
    assert math.isnan(difference.p_value)
    assert math.isnan(detectable_gap(math.nan, 3))


def test_one_pair_gives_no_interval_and_no_verdict():
    difference = paired_difference([0.9], [0.8])
    assert difference.mean == pytest.approx(0.1)
    assert math.isnan(difference.low)
    assert not difference.distinguishable


def test_holm_adjustment():
    assert holm_adjust([0.01, 0.04, math.nan, 0.03])[:2] == pytest.approx([0.03, 0.06])
    assert math.isnan(holm_adjust([0.01, math.nan])[1])


def test_mcnemar_counts_only_discordant_items():
    a = np.array([True] * 90 + [False] * 10)
    assert mcnemar(disagreement(a, a)) == 1.0
    b = a.copy()
    b[:8] = False
    assert mcnemar(disagreement(a, b)) == pytest.approx(2 * 0.5**8)


def test_pareto_frontier_keeps_the_unbeaten():
    assert pareto_frontier([1, 2, 3, 2], [0.5, 0.9, 0.8, 0.7]) == [True, True, False, False]


def test_pareto_frontier_leaves_out_what_is_no_number():
    nan = float("nan")
    assert pareto_frontier([1, 2, nan, 3], [0.5, nan, 0.9, 0.7]) == [True, False, False, True]
