"""How soon runs reach a figure: what is counted, what is said of runs that never do."""

import math

import pytest

from approx_attn.comparison.aggregate import comparison_rows
from approx_attn.comparison.comparison_report import table_and_caption
from approx_attn.comparison.terms import Terms
from approx_attn.metrics import METRICS

CURVES = {
    "exact": {1: [(10, 0.5), (20, 0.9), (30, 0.8)], 2: [(10, 0.9), (20, 0.9)], 3: [(10, 0.1), (20, 0.2), (30, 0.95)]},
    "soon": {1: [(10, 0.92)], 2: [(10, 0.91)], 3: [(10, 0.3), (20, 0.93)]},
    "twice": {1: [(10, 0.95)], 2: [(10, 0.89)], 3: [(30, 0.9)]},
    "never": {seed: [(10, 0.1), (20, math.nan)] for seed in (1, 2, 3)},
}
COST = {"exact_pairs": 1, "total_pairs": 1, "score_multiply_adds": 1, "value_multiply_adds": 0}


def rows(metric, reach, curves=CURVES):
    name = f"val/{metric.name}"
    run = {"status": "finished", "metrics": {metric.key: 0.5}, "cost": COST, "parameters": 1, "steps": 30}
    run["environment"] = {"commit": "abc"}
    records = {
        label: {seed: {**run, "history": {name: [list(point) for point in curve]}} for seed, curve in by_seed.items()}
        for label, by_seed in curves.items()
    }
    return records, comparison_rows(records, "exact", metric, {}, reach)


def test_steps_are_those_to_the_first_figure_as_good():
    exact, soon, twice, never = (row.steps_to for row in rows(METRICS["accuracy"], 0.9)[1])
    assert (exact.steps.mean, exact.difference) == (20, None)
    assert soon.steps.mean == pytest.approx(40 / 3)
    assert soon.difference.mean == pytest.approx(-20 / 3)  # 10 less, none less, 10 less
    assert (twice.seeds, twice.runs, twice.steps.mean) == ((1, 3), 3, 20)
    assert twice.difference.mean == pytest.approx(-5)  # of the seeds that had it with both
    assert (never.seeds, never.steps, never.difference) == ((), None, None)


def test_a_loss_is_reached_from_above():
    fallen = {"exact": {1: [(10, 2.0), (20, 0.7)]}, "soon": {1: [(10, 0.5)]}}
    exact, soon = (row.steps_to.steps.mean for row in rows(METRICS["loss"], 0.7, fallen)[1])
    assert (exact, soon) == (20, 10)


def test_the_table_counts_the_runs_that_never_had_it():
    metric, terms = METRICS["accuracy"], Terms(reach=0.9)
    records, found = rows(metric, terms.reach)
    table, caption = table_and_caption(found, records, metric, "exact", terms)
    head, _, exact, _, twice, never = table.splitlines()
    assert "| steps to 90.00% | steps difference (95%) |" in head
    assert "| 20 ± 10 | – |" in exact
    assert "| 20 ± 14 (2 of 3) | -5 [" in twice
    assert "| – (0 of 3) | – |" in never
    assert "validation accuracy of 90.00%" in caption
    assert "steps to" not in table_and_caption(found, records, metric, "exact")[0]
