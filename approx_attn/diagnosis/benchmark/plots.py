"""The two figures of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from approx_attn.diagnosis.benchmark.table import SDPA, Row, heading

MARKERS = "osD^v<>PX*"
COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
NO_ERROR = 1e-5  # below it an output is exact but for rounding


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """Time against length, both logarithmic, one panel per pass and causality."""
    rows = [row for row in rows if not row.reference]
    panels = list(dict.fromkeys((row.pass_name, row.causal) for row in rows))
    figure = Figure(figsize=(4.5 * len(panels) + 3, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    labels = _labels(rows)
    for axis, (pass_name, causal) in zip(axes, panels, strict=True):
        there = [row for row in rows if (row.pass_name, row.causal) == (pass_name, causal)]
        for label in labels:
            points = [row for row in there if row.label == label and row.seconds is not None]
            axis.loglog([r.length for r in points], [r.seconds or 0.0 for r in points], **_style(labels, label))
        lengths = sorted({row.length for row in rows})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.xaxis.minorticks_off()
        _mark(axis.yaxis)
        title = f"{pass_name}, causal" if causal else pass_name
        axis.set(title=title, xlabel="length (tokens)", ylabel="time (s)")
        axis.grid(alpha=0.3)
    _legend(figure, axes)
    figure.savefig(path, dpi=150)


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Relative output error against speed-up over SDPA, both logarithmic; the best trade-offs are joined by a line.

    One column of panels per length, one line of panels per pass and causality. Exact attention stands at the bottom
    edge, since its error has no place on a logarithmic axis.
    """
    lengths = sorted({row.length for row in rows})
    lines = list(dict.fromkeys((row.pass_name, row.causal) for row in rows))
    lines.sort(key=lambda line: line[0])  # the causalities of a pass below one another
    size = (3.6 * len(lengths) + 3.6, 3.3 * len(lines) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lines), len(lengths), squeeze=False)
    labels = _labels(rows)
    for panels, (pass_name, causal) in zip(axes, lines, strict=True):
        for axis, length in zip(panels, lengths, strict=True):
            place = (length, causal, pass_name)
            _draw_frontier(axis, [row for row in rows if row.place == place], labels)
            axis.set(title=heading(*place), xlabel="speed-up over SDPA (×)", ylabel="relative error of the output")
            _mark(axis.xaxis)
            _mark(axis.yaxis)
            axis.grid(alpha=0.3)
    _legend(figure, list(axes.flat))
    figure.savefig(path, dpi=150)


def non_dominated(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in speed-up and error at once, slowest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (-(row.speedup or 0.0), row.error or 0.0)):
        if not best or (row.error or 0.0) < (best[-1].error or 0.0):
            best.append(row)
    return best[::-1]


def _draw_frontier(axis: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    drawn = [row for row in rows if row.speedup is not None and row.error is not None]
    approximate = [row for row in drawn if (row.error or 0.0) >= NO_ERROR]
    axis.set_xscale("log")
    if approximate:
        axis.set_yscale("log")
    for row in drawn:
        is_exact = row not in approximate
        axis.plot(
            [row.speedup or 0.0],
            [0.03 if is_exact else row.error or 0.0],
            linestyle="",
            clip_on=False,
            zorder=3,
            transform=axis.get_xaxis_transform() if is_exact else axis.transData,
            **_style(labels, row.shown_label),
        )
    axis.axvline(1.0, color="black", linestyle=":", linewidth=1)
    beyond = [row for row in non_dominated(drawn) if row in approximate]
    if len(beyond) > 1:
        points = [(row.speedup or 0.0, row.error or 0.0) for row in beyond]
        axis.plot(*zip(*points, strict=True), color="grey", linewidth=1, label="best trade-offs", zorder=2)


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.shown_label for row in rows))


def _style(labels: Sequence[str], label: str) -> dict[str, Any]:
    """The same marker and colour for a mechanism in every panel; SDPA is a black star."""
    if label == SDPA:
        return {"marker": "*", "markersize": 11, "color": "black", "label": "sdpa (exact)"}
    index = [other for other in labels if other != SDPA].index(label)
    colour = COLOURS[index % len(COLOURS)]
    return {
        "marker": MARKERS[(index + index // len(COLOURS)) % (len(MARKERS) - 1)],
        "color": colour,
        "label": label,
        "markerfacecolor": colour if "measured at" not in label else "none",
    }


def _mark(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, several of them also where it spans less than a factor of ten."""
    if axis.get_scale() != "log":  # nothing was drawn
        return
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if high > 8 * low else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, beside them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(list(entries.values()), list(entries), fontsize="small", loc="outside right center")
