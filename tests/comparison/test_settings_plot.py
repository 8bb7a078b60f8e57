"""The figure of settings swept over budgets: its panels, its lines and its intervals."""

import pytest
from scipy import stats

from approx_attn.comparison.settings_plot import settings_figure
from approx_attn.comparison.statistics import summarise
from approx_attn.comparison.table import ComparisonRow
from approx_attn.metrics import METRICS

ACCURACY = METRICS["accuracy"]
VALUES = (0.5, 0.6, 0.64)


def row(name, share, **more):
    return ComparisonRow(name, summarise(VALUES), exact_share=share, **more)


def sweep(name, options):
    return [row(f"{name} {options} keep={share}", share) for share in (0.5, 0.05)]


def test_a_panel_per_mechanism_and_a_line_with_intervals_per_setting():
    rows = [row("exact", 1.0, is_reference=True), row("topk keep=0.5", 0.5)]
    rows += sweep("eigen_row", "rank=4 basis=a/b.safetensors") + sweep("eigen_row", "rank=4 basis_init=random")
    (panel,) = settings_figure(rows, ACCURACY, "starts").axes
    drawn = {container.get_label(): container for container in panel.containers}
    assert list(drawn) == ["basis=b.safetensors", "basis_init=random"]
    line, (low, high), _ = drawn["basis_init=random"]
    assert list(line.get_xdata()) == pytest.approx([5.0, 50.0])
    expected = stats.t.interval(0.95, 2, loc=58.0, scale=100 * stats.sem(VALUES))
    assert (low.get_ydata()[0], high.get_ydata()[0]) == pytest.approx(expected)
    assert "exact" in [line.get_label() for line in panel.lines]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["5", "50"]


def test_one_setting_per_mechanism_needs_no_such_figure():
    assert settings_figure(sweep("eigen_row", "rank=4") + sweep("topk", "window=2"), ACCURACY, "one") is None
