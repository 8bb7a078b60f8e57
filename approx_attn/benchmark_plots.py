"""The two figures of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

if TYPE_CHECKING:
    from approx_attn.benchmark import Row

MARKERS = "osD^v<>PX*"


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """Time against length, both logarithmic, one panel per pass."""
    passes = list(dict.fromkeys(row.pass_name for row in rows))
    figure = Figure(figsize=(5.5 * len(passes), 4), layout="constrained")
    axes = figure.subplots(1, len(passes), squeeze=False)[0]
    labels = list(dict.fromkeys(row.label for row in rows))
    for axis, pass_name in zip(axes, passes, strict=True):
        for label in labels:
            points = [r for r in rows if (r.label, r.pass_name) == (label, pass_name) and r.seconds is not None]
            axis.loglog(
                [r.length for r in points],
                [float(r.seconds or 0.0) for r in points],
                marker=_marker(labels, label),
                color="black" if label == "sdpa" else None,
                label=label,
            )
        lengths = sorted({row.length for row in rows})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.xaxis.minorticks_off()
        _mark(axis.yaxis)
        axis.set(title=pass_name, xlabel="length (tokens)", ylabel="time (s)")
        axis.grid(alpha=0.3)
    _legend(axes[-1])
    figure.savefig(path, dpi=150)


def plot_error(rows: Sequence[Row], path: Path) -> None:
    """Relative output error against time, both logarithmic, one panel per length (of the first pass)."""
    first = rows[0].pass_name
    lengths = sorted({row.length for row in rows})
    figure = Figure(figsize=(4.5 * len(lengths) + 1, 4), layout="constrained")
    axes = figure.subplots(1, len(lengths), squeeze=False)[0]
    labels = list(dict.fromkeys(row.label for row in rows))
    for axis, length in zip(axes, lengths, strict=True):
        for label in labels:
            points = [r for r in rows if (r.label, r.length, r.pass_name) == (label, length, first)]
            for row in points:
                if row.error and row.seconds is not None:
                    axis.loglog(row.seconds, row.error, marker=_marker(labels, label), linestyle="", label=label)
        for row in rows:
            if (row.label, row.length, row.pass_name) == ("sdpa", length, first) and row.seconds is not None:
                axis.axvline(row.seconds, color="black", linestyle=":", label="time of sdpa")
        axis.set(title=f"{length} tokens, {first}", xlabel="time (s)", ylabel="relative error of the output")
        _mark(axis.xaxis)
        _mark(axis.yaxis)
        axis.grid(alpha=0.3)
    _legend(axes[-1])
    figure.savefig(path, dpi=150)


def _mark(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, several of them also where it spans less than a factor of ten."""
    if axis.get_scale() != "log":  # nothing was drawn
        return
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if high > 8 * low else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


def _marker(labels: Sequence[str], label: str) -> str:
    return MARKERS[labels.index(label) % len(MARKERS)]


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
