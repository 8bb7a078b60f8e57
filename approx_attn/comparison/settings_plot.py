"""A figure of mechanisms that were swept over budgets under several settings: a panel each, a line per setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from approx_attn.comparison.plots import COLOURS, MARKERS, Curve, curves, plain_text
from approx_attn.comparison.statistics import mean_interval
from approx_attn.comparison.table import ComparisonRow
from approx_attn.metrics import Metric


def settings_figure(rows: Sequence[ComparisonRow], metric: Metric, title: str) -> Figure | None:
    """Test figure against the share of exact pairs with 95% intervals of the mean over seeds.

    Args:
        rows: the table; the reference is a line across every panel.

    Returns:
        None unless a mechanism was run at several budgets under more than one setting of its other options.
    """
    by_mechanism: dict[str, list[Curve]] = {}
    for curve in curves(rows):
        if curve.option:
            by_mechanism.setdefault(curve.rows[0].mechanism, []).append(curve)
    panels = {name: found for name, found in by_mechanism.items() if len(found) > 1}
    if not panels:
        return None
    figure = Figure(figsize=(max(5.5 * len(panels), 7.0), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(axes, panels.items(), strict=True):
        axis.set_title(plain_text(name), fontsize=11)
        for row in rows:
            if row.is_reference and row.figure is not None:
                level = metric.factor * row.figure.mean
                axis.axhline(level, color="0.35", linewidth=1.0, linestyle=(0, (6, 3)), label=plain_text(row.name))
        for index, (label, curve) in enumerate(zip(_labels(found), found, strict=True)):
            _draw(axis, curve, label, metric, index)
        _finish(axis, found)
    axes[0].set_ylabel(f"test {metric.header}")
    figure.suptitle(plain_text(f"{title} (mean over seeds; bars: 95% interval of the mean)"), fontsize=11)
    return figure


def _labels(found: Sequence[Curve]) -> list[str]:
    """The options in which curves of one mechanism differ, paths by the name of their file."""
    settings = [{k: v for k, v in curve.rows[0].settings.items() if k != curve.option} for curve in found]
    shared = [k for k in settings[0] if all(each.get(k) == settings[0][k] for each in settings)]
    return [" ".join(f"{k}={Path(v).name}" for k, v in each.items() if k not in shared) or "–" for each in settings]


def _draw(axis: Axes, curve: Curve, label: str, metric: Metric, index: int) -> None:
    points = []
    for row in curve.rows:
        if row.figure is not None and row.exact_share is not None:
            half = metric.factor * mean_interval(row.figure)
            points.append((100 * row.exact_share, metric.factor * row.figure.mean, half))
    if not points:
        return
    shares, figures, halves = zip(*sorted(points), strict=True)
    axis.errorbar(
        shares,
        figures,
        yerr=halves,
        fmt=MARKERS[index % len(MARKERS)],
        linestyle=("-", "--", "-.", ":")[index % 4],
        color=COLOURS[index % len(COLOURS)],
        markersize=6,
        capsize=3,
        linewidth=1.2,
        label=plain_text(label),
    )


def _finish(axis: Axes, found: Sequence[Curve]) -> None:
    """A logarithmic axis marked at the shares of the first curve, and a legend below."""
    shares = sorted({100 * row.exact_share for row in found[0].rows if row.exact_share})
    if shares and shares[-1] > 4 * shares[0]:
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(shares)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_xlabel("pairs with an exact score, %")
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
