"""Rows of a table from records of runs."""

import pytest

from approx_attn.comparison.aggregate import comparison_rows
from approx_attn.metrics import METRICS


def finished_run(exact_pairs: int, multiply_adds: int) -> dict:
    parts = {"score_multiply_adds": multiply_adds, "value_multiply_adds": 0}
    return {
        "status": "finished",
        "metrics": {"test/accuracy": 0.5},
        "cost": {"exact_pairs": exact_pairs, "total_pairs": 100, **parts},
        "parameters": 1,
        "steps": 1,
    }


def test_costs_that_differ_by_seed_are_averaged():
    """As those of a mechanism that learns which pairs it computes; a run that failed has no part."""
    records = {
        "exact": {0: finished_run(100, 1000), 1: finished_run(100, 1000), 2: finished_run(100, 1000)},
        "gates": {0: finished_run(20, 400), 1: finished_run(40, 800), 2: {"status": "failed", "error": "no memory"}},
    }
    exact, gates = comparison_rows(records, "exact", METRICS["accuracy"], {})
    assert exact.exact_share == exact.multiply_adds == 1.0
    assert gates.exact_share == pytest.approx(0.3)
    assert gates.multiply_adds == pytest.approx(0.6)
    assert gates.missing == {2: "no memory"}
