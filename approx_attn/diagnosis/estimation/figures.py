"""What an estimate holds, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One line of an estimate.

    Attributes:
        name: what it is of.
        value: bytes, seconds or a number, as `unit` says.
        unit: `B`, `s`, `s/step`, or empty for a number.
        how: `computed`, `measured` or `extrapolated`, and from what.
    """

    name: str
    value: float
    unit: str
    how: str


@dataclass
class Estimate:
    """Memory and time of a run.

    Attributes:
        memory: what one device holds all the time, in bytes.
        training: what it holds besides while training.
        evaluation: what it holds besides while evaluating.
        time: parts of the time, in seconds, and the counts they come from.
        notes: what is not in them.
    """

    memory: list[Figure] = field(default_factory=list)
    training: list[Figure] = field(default_factory=list)
    evaluation: list[Figure] = field(default_factory=list)
    time: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> float:
        """Peak memory of one device."""
        held, *at_times = (sum(f.value for f in part) for part in (self.memory, self.training, self.evaluation))
        return held + max(at_times)

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return sum(figure.value for figure in self.time if figure.unit == "s")


def verdict(result: Estimate, gibibytes: float, batch_size: int) -> str:
    """Whether the run fits into a device, and the largest batch that does.

    Args:
        gibibytes: memory of the device.
        batch_size: sequences of the batch that was estimated.
    """
    activations = result.training[-1].value
    fixed = sum(figure.value for figure in (*result.memory, *result.training)) - activations
    largest = int((gibibytes * 2**30 - fixed) / max(activations / batch_size, 1.0))
    fits = "fits into" if result.peak_bytes <= gibibytes * 2**30 else "does not fit into"
    batch = f"the largest batch that does has about {largest:,} sequences" if largest > 0 else "no batch does"
    return f"The run {fits} {gibibytes:g} GiB; {batch}."


def as_table(result: Estimate, words: str) -> Table:
    """All figures, with how they came about."""
    table = Table(title=f"Estimate: {words or 'the defaults'}", title_justify="left")
    table.add_column("of one device")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how")
    for figure in (*result.memory, *result.training, *result.evaluation):
        table.add_row(figure.name, show(figure.value, figure.unit), figure.how)
    table.add_row(
        "[bold]peak memory",
        f"[bold]{show(result.peak_bytes, 'B')}",
        "the sum, of training or evaluation what is more",
        end_section=True,
    )
    for figure in result.time:
        table.add_row(figure.name, show(figure.value, figure.unit), figure.how)
    table.add_row("[bold]time", f"[bold]{show(result.seconds, 's')}", "their sum; start and data preparation not")
    return table


def show(value: float, unit: str) -> str:
    """A number for people, with its unit (see `Figure`)."""
    if unit == "B":
        for prefix, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.1f} {prefix}"
        return f"{value:.0f} B"
    if unit == "s":
        if value < 1:
            return f"{1000 * value:.3g} ms"
        if value < 120:
            return f"{value:.1f} s"
        return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    if unit == "s/step":
        return f"{1000 * value:.2f} ms"
    return f"{value:.3g}"
