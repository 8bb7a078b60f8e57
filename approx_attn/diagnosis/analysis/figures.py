"""Figures of the analysis, made to be printed: labelled axes, units, readable in grey, heat maps with scale.

Sizes are those of a page: at most 7.5 inches wide, with letters of 8 points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from approx_attn.comparison.plots import COLOURS, MARKERS
from approx_attn.diagnosis.analysis.overlap import RandomOverlap
from approx_attn.diagnosis.analysis.spectrum import Spectrum

HEAT = "cividis"  # its lightness grows with the value, so a grey print keeps the order
HATCHES = ("", "///", "...", "xxx")
ANNOTATED = 14  # heat maps up to this many rows and columns show their numbers
LEGEND_ROWS = 14


Parameters = ParamSpec("Parameters")
PRINT: Any = {  # matplotlib types its keys one by one
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "axes.linewidth": 0.7,
    "hatch.linewidth": 0.5,
}


def printed(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw with the letters and lines of a printed page."""

    @wraps(draw)
    def figure(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with rc_context(PRINT):
            return draw(*args, **kwargs)

    return figure


def new_figure(width: float, height: float) -> Figure:
    """A figure that can be saved without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@printed
def explained_variance(spectra: Mapping[str, Mapping[str, Spectrum]], sample: str) -> Figure:
    """Cumulative explained variance against the number of components, one panel per kind, one line per layer.

    Args:
        spectra: kind (such as "centred rows") to layer label to spectrum.
        sample: what one sample is, for the axis.
    """
    figure = new_figure(3.4 * len(spectra) + 0.7, 3.0)
    panels = figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
    for axis, (kind, layers) in zip(panels, spectra.items(), strict=True):
        longest = 1
        for index, (label, spectrum) in enumerate(layers.items()):
            explained = spectrum.explained
            components = np.arange(1, len(explained) + 1)
            longest = max(longest, len(components))
            axis.plot(components, explained, label=label, **_line(index, len(layers), components))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlim(1, longest)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("components")
        axis.set_title(kind)
        for share in (0.9, 0.95, 0.99):
            axis.axhline(share, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
        _tidy(axis)
    panels[0].set_ylabel(f"share of the variance of {sample}")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="layer",
        loc="outside right center",
        frameon=False,
        ncols=_columns(spectra),
    )
    return figure


@printed
def heat_map(
    values: ArrayLike,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    *,
    scale: str,
    limits: tuple[float | None, float | None] = (None, None),
    boundaries: Sequence[int] = (),
) -> Figure:
    """A matrix as shades with their scale; small ones show their numbers too.

    Args:
        values: (rows, columns); NaN is left white.
        rows, columns: title and labels of each axis.
        scale: title of the scale.
        limits: of the scale; from the values where None.
        boundaries: lines are drawn before these indices of both axes, such as where a layer's heads begin.
    """
    values = np.asarray(values, dtype=float)
    size = values.shape
    figure = new_figure(1.6 + min(5.2, max(1.6, 0.4 * size[1])), 0.9 + min(4.6, max(1.6, 0.3 * size[0])))
    axis = figure.subplots()
    low, high = limits
    image = axis.imshow(values, cmap=HEAT, vmin=low, vmax=high, aspect="auto")
    _label_ticks(axis, rows[1], columns[1])
    axis.set_xlabel(columns[0])
    axis.set_ylabel(rows[0])
    for boundary in boundaries:
        for line in (axis.axhline, axis.axvline):
            line(boundary - 0.5, color="white", linewidth=0.8)
    if max(size) <= ANNOTATED:
        for i, j in np.ndindex(*size):
            if np.isfinite(values[i, j]):
                dark = sum(image.cmap(image.norm(values[i, j]))[:3]) < 1.5
                text = f"{values[i, j]:.2f}" if abs(values[i, j]) < 10 else f"{values[i, j]:.0f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    figure.colorbar(image, ax=axis, label=scale)
    return figure


@printed
def overlap_by_rank(lines: Mapping[str, Mapping[int, Sequence[float]]], baselines: Sequence[RandomOverlap]) -> Figure:
    """Mean overlap against rank with the middle half of the pairs, and what random subspaces give.

    Args:
        lines: what is compared to rank to the overlaps of all pairs.
        baselines: one per rank.
    """
    figure = new_figure(6.4, 3.2)
    axis = figure.subplots()
    for index, (label, by_rank) in enumerate(lines.items()):
        ranks = sorted(by_rank)
        means = [float(np.mean(by_rank[rank])) for rank in ranks]
        colour = COLOURS[(index + 1) % len(COLOURS)]
        axis.plot(ranks, means, marker=MARKERS[index], color=colour, label=label)
        lows, highs = ([float(np.quantile(by_rank[rank], q)) for rank in ranks] for q in (0.25, 0.75))
        axis.fill_between(ranks, lows, highs, color=colour, alpha=0.12, linewidth=0)
    ranks = [baseline.rank for baseline in baselines]
    levels = np.array([baseline.mean for baseline in baselines])
    spread = 2 * np.array([baseline.std for baseline in baselines])
    axis.errorbar(
        ranks, levels, yerr=spread, color="0.4", linestyle="--", capsize=3, label="random subspaces (±2 s.d.)"
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("rank of both subspaces")
    axis.set_ylabel("mean squared cosine of principal angles")
    figure.legend(loc="outside right center", frameon=False)
    _tidy(axis)
    return figure


@printed
def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    x_title: str,
    y_title: str,
    top: float | None = None,
    dashed: Mapping[str, float] | None = None,
) -> Figure:
    """Bars side by side per group, told apart by shade and hatching; `dashed` are named levels across."""
    figure = new_figure(min(7.5, max(4.6, 0.62 * len(groups) + 1.0)), 2.9)
    axis = figure.subplots()
    width = 0.8 / len(series)
    shades = np.linspace(0.25, 0.85, len(series))
    for index, (label, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        axis.bar(
            places,
            np.nan_to_num(np.asarray(values, dtype=float)),
            width,
            label=label,
            color=str(shades[index]),
            edgecolor="black",
            linewidth=0.6,
            hatch=HATCHES[index % len(HATCHES)],
        )
    for label, level in (dashed or {}).items():
        axis.axhline(level, color="black", linewidth=1.0, linestyle="--", label=label)
    axis.set_xticks(range(len(groups)), groups, rotation=45 if max(map(len, groups)) > 4 else 0)
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)
    if top is not None:
        axis.set_ylim(0, top)
    figure.legend(loc="outside upper left", frameon=False, ncols=1 if max(map(len, series)) > 16 else len(series))
    _tidy(axis)
    return figure


@printed
def error_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """Errors against the share of exact pairs: one panel per kind of error, one line per mechanism.

    Args:
        panels: axis title to mechanism to (share, error) points.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = new_figure(2.5 * len(panels), 3.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        shares = [100 * share for points in lines.values() for share, _ in points]
        for index, name in enumerate(names):
            points = sorted(lines.get(name, ()))
            if points:
                xs, ys = zip(*points, strict=True)
                style = ("-", "--", "-.")[index // len(COLOURS) % 3]
                (handles[name],) = axis.plot(
                    [100 * x for x in xs],
                    ys,
                    linestyle=style,
                    marker=MARKERS[index % len(MARKERS)],
                    color=COLOURS[index % len(COLOURS)],
                )
        axis.set_xscale("log", base=2)
        ticks = _commonest(shares)
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("pairs computed exactly, %")
        axis.set_ylabel(title)
        _tidy(axis)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, len(names)),
        frameon=False,
    )
    return figure


@printed
def scatter(points: Mapping[str, Sequence[tuple[float, float]]], *, x_title: str, y_title: str) -> Figure:
    """Points of several groups, told apart by mark first; both axes begin at zero."""
    figure = new_figure(5.2, 3.0)
    axis = figure.subplots()
    for index, (label, pairs) in enumerate(points.items()):
        xs, ys = zip(*pairs, strict=True)
        marker, colour = MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]
        axis.plot(xs, ys, linestyle="", marker=marker, color=colour, markersize=6, label=label)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.margins(0.1)
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)
    figure.legend(loc="outside right center", frameon=False)
    _tidy(axis)
    return figure


@printed
def eigenvector_lines(bases: Mapping[str, ArrayLike], *, count: int = 3) -> Figure:
    """The leading principal axes over positions, a panel per layer; at most six layers, evenly chosen.

    Args:
        bases: layer label to (p, k) principal axes.
        count: axes drawn.
    """
    labels = list(bases)
    chosen = [labels[i] for i in np.unique(np.linspace(0, len(labels) - 1, min(6, len(labels))).round().astype(int))]
    columns = min(3, len(chosen))
    figure = new_figure(7.5, 0.5 + 1.6 * -(-len(chosen) // columns))
    axes = figure.subplots(-(-len(chosen) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axis, label in zip(axes.flat, chosen, strict=False):
        for component in range(count):
            line = np.asarray(bases[label], dtype=float)[:, component]
            style = {"color": ("black", "0.45", "0.7")[component % 3], "linestyle": ("-", "--", "-")[component % 3]}
            axis.plot(line, label=str(component + 1), linewidth=0.9, **style)
        axis.set_title(f"layer {label}")
        _tidy(axis)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("key position")
    for row in axes:
        row[0].set_ylabel("loading")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, title="component", loc="outside right center", frameon=False)
    return figure


def _line(index: int, count: int, components: np.ndarray) -> dict:
    """Style of a layer's line: shade by depth, marks and dashes by index."""
    marks = [int(2**power) - 1 for power in range(int(np.log2(max(len(components), 1))) + 1)]
    return {
        "color": colormaps[HEAT](0.88 * index / max(count - 1, 1)),
        "linestyle": ("-", "--", "-.", ":")[index % 4],
        "marker": MARKERS[index % len(MARKERS)],
        "markevery": marks,
    }


def _commonest(values: Sequence[float]) -> list[float]:
    """Values that stand for groups of nearly equal ones, ascending: mechanisms miss a budget by a little.

    At most seven, whose numbers have room beside one another on a logarithmic axis.
    """
    ticks: list[float] = []
    apart = max(1.15, (max(values) / min(values)) ** (1 / 6)) if values and min(values) > 0 else 1.15
    for value in sorted(values):
        if not ticks or value > apart * ticks[-1]:
            ticks.append(value)
        elif values.count(value) > values.count(ticks[-1]):
            ticks[-1] = value
    return [round(tick, 2) for tick in ticks]


def _columns(spectra: Mapping[str, Mapping[str, Spectrum]]) -> int:
    most = max((len(layers) for layers in spectra.values()), default=1)
    return 1 + most // (LEGEND_ROWS + 1)


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of different lengths as one array, NaN at their ends."""
    width = max(map(len, rows))
    return np.array([list(row) + [np.nan] * (width - len(row)) for row in rows])


def _label_ticks(axis: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    step_x, step_y = 1 + len(columns) // 25, 1 + len(rows) // 25
    turned = 45 if max((len(label) for label in columns), default=0) > 4 else 0
    axis.set_xticks(range(0, len(columns), step_x), columns[::step_x], rotation=turned)
    axis.set_yticks(range(0, len(rows), step_y), rows[::step_y])


def _tidy(axis: Axes) -> None:
    axis.grid(True, color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
