"""Figures of a comparison, made to be printed: labelled axes, units, readable in grey."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from approx_attn.comparison.statistics import pareto_frontier
from approx_attn.comparison.table import ComparisonRow
from approx_attn.metrics import Metric
from approx_attn.run.record import open_atomically

Cost = Callable[[ComparisonRow], float | None]

# Told apart by shape first, so that a grey print loses nothing. Colours: Okabe and Ito's colour-blind safe set.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d")
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")

FAR = 5.0  # times the distance from the best to the median
BEYOND = " (beyond the scale)"

UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class Curve:
    """Rows of a table that belong together in a figure: a mechanism, or one at several budgets.

    Attributes:
        label: name of the mechanism, with the options that all its rows have.
        option: the option that sets the budget; empty for a single row.
        rows: in the order of the table; all have a figure.
    """

    label: str
    option: str
    rows: tuple[ComparisonRow, ...]


def curves(rows: Sequence[ComparisonRow]) -> list[Curve]:
    """The rows with a figure, those of one mechanism that differ in one option taken together.

    Where a mechanism was swept over several options, the one with the most values sets the budget, and every
    setting of the others has a curve of its own.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[ComparisonRow]] = {}
    for row in rows:
        if row.figure is not None:
            groups.setdefault((row.mechanism, tuple(row.settings)), []).append(row)
    found = []
    for (mechanism, options), members in groups.items():
        values = {option: {row.settings[option] for row in members} for option in options}
        swept = max(options, key=lambda option: len(values[option]), default="")
        if not swept or len(values[swept]) == 1:
            found += [Curve(row.name, "", (row,)) for row in members]
            continue
        by_others: dict[str, list[ComparisonRow]] = {}
        for row in members:
            others = [f"{option}={value}" for option, value in row.settings.items() if option != swept]
            by_others.setdefault(" ".join([mechanism, *others]), []).append(row)
        found += [Curve(label, swept, tuple(members)) for label, members in by_others.items()]
    return found


def comparison_figure(rows: Sequence[ComparisonRow], metric: Metric, title: str) -> Figure:
    """Test figure against measured step time, multiply-adds and memory, with the frontier drawn through.

    Mechanisms without a finished run are left out, and costs that are known of none. A loss far above the others is
    not drawn, and its mechanism marked so, or nobody could tell the others apart.
    """
    panels: list[tuple[str, Cost]] = [
        ("training step time, relative to the reference", lambda r: r.step_time),
        ("attention multiply-adds, relative to the reference", lambda r: r.multiply_adds),
        ("peak memory of a training step, MiB", lambda r: None if r.memory is None else r.memory / 2**20),
    ]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in rows)] or panels[1:2]
    figure, axes = _panels(panels, metric, f"{title} (mean over seeds; bars: standard deviation; dashed: frontier)")
    levels = {row.name: _level(row, metric) for row in rows if row.figure is not None}
    beyond = far_worse({name: level for name, (level, _) in levels.items()}, metric)
    for axis, (_, cost) in zip(axes, panels, strict=True):
        for index, curve in enumerate(curves(rows)):
            far = any(row.name in beyond for row in curve.rows)
            _draw(axis, replace(curve, label=curve.label + BEYOND) if far else curve, cost, metric, index, line=False)
        _draw_frontier(axis, rows, cost, metric)
    if beyond:
        near = [level for name, level in levels.items() if name not in beyond]
        _show(axes[0], [level + side * spread for level, spread in near for side in (-1.0, 1.0)])
    _add_legend(figure, axes)
    return figure


def budget_figure(rows: Sequence[ComparisonRow], metric: Metric, title: str) -> Figure | None:
    """Test figure against the budget, one curve per mechanism that was run at several; None if none was.

    Args:
        rows: the table. Mechanisms with one budget are single points; the reference is a line across, in a band of
            one standard deviation.
    """
    if not any(curve.option for curve in curves(rows)):
        return None
    panels: list[tuple[str, Cost]] = [
        ("pairs with an exact score, %", lambda r: None if r.exact_share is None else 100 * r.exact_share),
        ("attention multiply-adds, relative to the reference", lambda r: r.multiply_adds),
    ]
    figure, axes = _panels(panels, metric, f"{title} by budget (mean over seeds; bars: standard deviation)")
    for axis, (_, cost) in zip(axes, panels, strict=True):
        for index, curve in enumerate(curves(rows)):
            if curve.rows[0].is_reference and not curve.option:
                _draw_level(axis, curve.rows[0], metric)
            else:
                _draw(axis, curve, cost, metric, index, line=True)
        budgets = [cost(row) for curve in curves(rows) if curve.option for row in curve.rows]
        _scale(axis, [cost(row) for row in rows if row.figure is not None], budgets)
    _add_legend(figure, axes)
    return figure


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[int, float]]],
    metric: Metric,
    step_seconds: Mapping[str, float] | None = None,
) -> Figure | None:
    """Validation figure against training step or time, one curve per mechanism; None without any.

    Args:
        runs: mechanism -> for every seed, step -> figure; steps that not all seeds have are left out.
        metric: the figure.
        step_seconds: mechanism -> time of a step; the curves of these are drawn against time.

    A loss that ends far above the others is not drawn, as in `comparison_figure`.
    """
    if step_seconds is not None:
        runs = {name: by_seed for name, by_seed in runs.items() if name in step_seconds}
        ends = [max(curve) * step_seconds[name] for name, by_seed in runs.items() for curve in by_seed if curve]
        unit, unit_seconds = next((pair for pair in UNITS if max(ends, default=0.0) >= 10 * pair[1]), UNITS[-1])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    found = {name: shared for name, by_seed in runs.items() if (shared := _shared_steps(by_seed, metric)) is not None}
    beyond = far_worse({name: float(values[:, -1].mean()) for name, (_, values) in found.items()}, metric)
    for index, name in enumerate(runs):
        if name not in found:
            continue
        steps, values = found[name]
        places = np.array(steps) * (1.0 if step_seconds is None else step_seconds[name] / unit_seconds)
        style = ("-", "--", "-.", ":")[(index + index // len(COLOURS)) % 4]  # no two alike among 32
        colour = COLOURS[index % len(COLOURS)]
        marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
        label = plain_text(name) + (BEYOND if name in beyond else "")
        axis.plot(places, values.mean(axis=0), style, marker=marker, color=colour, label=label)
        axis.fill_between(places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    if not axis.lines:
        return None
    if beyond:
        near = [values.ravel() for name, (_, values) in found.items() if name not in beyond]
        _show(axis, np.concatenate(near).tolist())
    axis.xaxis.set_major_locator(MaxNLocator(integer=step_seconds is None))
    axis.set_xlabel("training step" if step_seconds is None else f"training time, {unit}")
    axis.set_xlim(left=0.0)
    axis.set_ylabel(f"validation {metric.header}")
    axis.grid(True, color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    _add_legend(figure, [axis])
    return figure


def _shared_steps(
    by_seed: Sequence[Mapping[int, float]], metric: Metric
) -> tuple[list[int], NDArray[np.float64]] | None:
    """The steps at which all seeds have a figure, and (seeds, steps) figures as they are drawn; None without any."""
    seeds = [curve for curve in by_seed if curve]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    return (steps, metric.factor * np.array([[curve[step] for step in steps] for curve in seeds])) if steps else None


def far_worse(levels: Mapping[str, float], metric: Metric) -> set[str]:
    """Names whose loss is further above the best than `FAR` times the median is: drawn, they would hide the others."""
    if metric.higher_is_better or not levels:  # shares of 100% have a scale of their own
        return set()
    best, median = min(levels.values()), float(np.median(list(levels.values())))
    return {name for name, level in levels.items() if median > best and level > best + FAR * (median - best)}


def _show(axis: Axes, values: Sequence[float]) -> None:
    """Let the axis span these values."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low)
    axis.set_ylim(low - margin, high + margin)


def _panels(panels: Sequence[tuple[str, Cost]], metric: Metric, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per cost beside one another, titled and labelled, still empty."""
    figure = Figure(figsize=(4.5 * len(panels), 4.6) if len(panels) > 2 else (11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for axis, (label, _) in zip(axes, panels, strict=True):
        axis.set_xlabel(label)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"test {metric.header}")
    figure.suptitle(plain_text(title), fontsize=11)
    return figure, axes


def plain_text(text: str) -> str:
    """Text that matplotlib shows as it is, instead of reading mathematics between dollars."""
    return text.replace("$", r"\$")


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not handles:
        return
    width, height = figure.get_size_inches()
    entry = 0.6 + 0.09 * max(map(len, handles))  # inches: its marker, and letters of 10 points
    columns = max(1, min(len(handles), 6, int(width / entry)))
    rows = math.ceil(len(handles) / columns)
    figure.set_size_inches(width, height + 0.22 * max(rows - 2, 0))  # a long legend takes no room from the panels
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _draw(axis: Axes, curve: Curve, cost: Cost, metric: Metric, index: int, line: bool) -> None:
    """Points with error bars, in the order of their cost; `line` joins them."""
    points = sorted((x, *_level(row, metric)) for row in curve.rows if (x := cost(row)) is not None)
    if not points:
        return
    costs, figures, spreads = zip(*points, strict=True)
    axis.errorbar(
        costs,
        figures,
        yerr=spreads if any(spreads) else None,
        fmt=MARKERS[index % len(MARKERS)],
        linestyle=("-", "--", "-.", ":")[index % 4] if line else "none",
        color=COLOURS[index % len(COLOURS)],
        markersize=6 if line else 8,
        capsize=3,
        linewidth=1.2,
        label=plain_text(curve.label),
    )


def _draw_level(axis: Axes, row: ComparisonRow, metric: Metric) -> None:
    level, spread = _level(row, metric)
    axis.axhline(level, color="0.35", linewidth=1.0, linestyle=(0, (6, 3)), label=plain_text(row.name), zorder=1)
    axis.axhspan(level - spread, level + spread, color="0.92", linewidth=0, zorder=0)


def _level(row: ComparisonRow, metric: Metric) -> tuple[float, float]:
    """Mean and standard deviation over seeds as they are drawn; 0 where one seed has none."""
    assert row.figure is not None
    return metric.factor * row.figure.mean, 0.0 if math.isnan(row.figure.std) else metric.factor * row.figure.std


def _draw_frontier(axis: Axes, rows: Sequence[ComparisonRow], cost: Cost, metric: Metric) -> None:
    """A dashed line through the points that no other beats."""
    points = [(x, _level(row, metric)[0]) for row in rows if row.figure is not None and (x := cost(row)) is not None]
    gains = [figure if metric.higher_is_better else -figure for _, figure in points]
    unbeaten = pareto_frontier([x for x, _ in points], gains)
    frontier = sorted(point for point, best in zip(points, unbeaten, strict=True) if best)
    if len(frontier) > 1:
        axis.plot(*zip(*frontier, strict=True), color="0.6", linewidth=1.0, linestyle="--", zorder=0)


def _scale(axis: Axes, costs: Sequence[float | None], budgets: Sequence[float | None]) -> None:
    """A logarithmic axis marked at the budgets, where they span more than a factor of four and no cost is zero."""
    known = sorted({budget for budget in budgets if budget})
    if not known or known[-1] <= 4 * known[0] or 0.0 in costs:
        return
    axis.set_xscale("log")
    axis.minorticks_off()
    if len(known) <= 8:
        axis.set_xticks(known)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG at 160 dots per inch, whole or not at all."""
    with open_atomically(path) as file:
        figure.savefig(file, dpi=160, format="png")
