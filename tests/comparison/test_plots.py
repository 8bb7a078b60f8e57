"""Figures of a comparison: which rows make a curve, and what is drawn of them."""

import pytest

from approx_attn.comparison.plots import budget_figure, comparison_figure, curves, learning_curves, save_figure
from approx_attn.comparison.statistics import summarise
from approx_attn.comparison.table import ComparisonRow
from approx_attn.metrics import METRICS

ACCURACY = METRICS["accuracy"]


def row(name, level=0.5, share=0.25, **more):
    figure = None if level is None else summarise([level - 0.01, level, level + 0.01])
    return ComparisonRow(name, figure, exact_share=share, multiply_adds=share, **more)


SWEEP = [
    row("exact", 0.9, 1.0, is_reference=True),
    row("topk keep=0.5", 0.8, 0.5),
    row("topk keep=0.05", 0.6, 0.05),
    row("topk keep=0.25", None, 0.25),
    row("eigen_row keep=0.1 rank=4", 0.7, 0.1),
    row("eigen_row keep=0.5 rank=4", 0.8, 0.5),
    row("eigen_row keep=0.9 rank=4", 0.85, 0.9),
    row("eigen_row keep=0.1 rank=8", 0.75, 0.1),
    row("linformer", 0.65, 0.0),
]


def test_rows_that_differ_in_one_option_make_a_curve_and_rows_without_runs_none():
    found = {curve.label: (curve.option, [row.name for row in curve.rows]) for curve in curves(SWEEP)}
    assert found == {
        "exact": ("", ["exact"]),
        "topk": ("keep", ["topk keep=0.5", "topk keep=0.05"]),
        "eigen_row rank=4": ("keep", [f"eigen_row keep={keep} rank=4" for keep in (0.1, 0.5, 0.9)]),
        "eigen_row rank=8": ("keep", ["eigen_row keep=0.1 rank=8"]),
        "linformer": ("", ["linformer"]),
    }


def test_entries_with_options_of_their_own_are_points():
    rows = [row("topk keep=3"), row("eigen_row rank=4"), row("eigen_row keep=0.5")]
    assert [(curve.label, curve.option) for curve in curves(rows)] == [(each.name, "") for each in rows]
    assert budget_figure(rows, ACCURACY, "no budgets") is None


def test_a_curve_goes_through_its_budgets_in_their_order_with_error_bars():
    pairs, multiply_adds = budget_figure(SWEEP, ACCURACY, "budgets").axes
    drawn = {container.get_label(): container for container in pairs.containers}
    line, caps, _ = drawn["topk"]
    assert list(line.get_xdata()) == pytest.approx([5.0, 50.0])
    assert list(line.get_ydata()) == pytest.approx([60.0, 80.0])
    assert line.get_linestyle() != "None"
    assert [list(cap.get_ydata()) for cap in caps] == [pytest.approx([59.0, 79.0]), pytest.approx([61.0, 81.0])]
    assert "exact" not in drawn  # a level across, not a point
    (level,) = (line for line in pairs.lines if line.get_label() == "exact")
    assert list(level.get_ydata()) == pytest.approx([90.0, 90.0])
    assert pairs.get_xscale() == "linear"  # linformer computes no pair exactly
    assert len(multiply_adds.containers) == len(drawn)


def test_wide_budgets_have_a_logarithmic_axis_marked_at_them():
    pairs, _ = budget_figure(SWEEP[:3], ACCURACY, "budgets").axes
    assert pairs.get_xscale() == "log"
    assert [label.get_text() for label in pairs.get_xticklabels()] == ["5", "50"]


def test_the_frontier_leaves_out_what_is_beaten(tmp_path):
    figure = comparison_figure([row("a", 0.8, 0.5), row("b", 0.7, 0.6), row("c", 0.6, 0.1)], ACCURACY, "frontier")
    (multiply_adds,) = figure.axes
    (frontier,) = (line for line in multiply_adds.lines if line.get_linestyle() == "--")
    assert list(zip(frontier.get_xdata(), frontier.get_ydata(), strict=True)) == [
        pytest.approx((0.1, 60.0)),
        pytest.approx((0.5, 80.0)),
    ]
    save_figure(figure, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_legend_lies_within_the_figure_and_costs_of_nobody_have_no_panel():
    rows = [row("exact", is_reference=True), *(row(f"mechanism_number_{n} keep=0.125 block_size=8") for n in range(30))]
    figure = comparison_figure(rows, ACCURACY, "many")
    assert [axis.get_xlabel() for axis in figure.axes] == ["attention multiply-adds, relative to the reference"]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert figure.axes[0].get_window_extent().height > 0.4 * page.height
    looks = {(line.get_marker(), line.get_color()) for line, _, _ in figure.axes[0].containers}
    assert len(looks) == len(rows)


def test_learning_curves_stand_over_steps_or_over_the_time_that_steps_take():
    runs = {"exact": [{100: 0.2, 200: 0.4}, {100: 0.4, 200: 0.6}], "topk": [{100: 0.1}], "unmeasured": [{100: 0.9}]}
    (axis,) = learning_curves(runs, ACCURACY).axes
    assert [list(line.get_xdata()) for line in axis.lines] == [[100, 200], [100], [100]]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([30.0, 50.0])
    (axis,) = learning_curves(runs, ACCURACY, {"exact": 6.0, "topk": 3.0}).axes
    assert axis.get_xlabel() == "training time, minutes"
    assert [list(line.get_xdata()) for line in axis.lines] == [[10.0, 20.0], [5.0]]
    assert learning_curves(runs, ACCURACY, {}) is None


def test_a_loss_far_above_the_others_does_not_hide_them():
    losses = {"exact": 1.80, "topk": 1.82, "eigen_row": 1.81, "moba": 1.85, "linear": 2.5}
    axis = comparison_figure([row(name, level) for name, level in losses.items()], METRICS["loss"], "losses").axes[0]
    assert axis.get_ylim()[1] < 2.0
    assert [container.get_label() for container in axis.containers if "beyond" in container.get_label()] == [
        "linear (beyond the scale)"
    ]
    runs = {name: [{10: level + 0.3, 20: level}] for name, level in losses.items()}
    (over_steps,) = learning_curves(runs, METRICS["loss"]).axes
    assert 1.85 + 0.3 <= over_steps.get_ylim()[1] < 2.5  # what came before the end of the others is shown
    assert [line.get_label() for line in over_steps.lines][-1] == "linear (beyond the scale)"
    everything = comparison_figure([row(name, 0.1 * level) for name, level in losses.items()], ACCURACY, "accuracies")
    assert not any("beyond" in container.get_label() for container in everything.axes[0].containers)
