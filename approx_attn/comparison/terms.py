"""On which terms mechanisms are compared: what is equal for all, and how each came to its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from approx_attn.metrics import metric_direction
from approx_attn.output import shown_seconds


@dataclass(frozen=True)
class Tuning:
    """Learning rates that were tried, the same for every mechanism, and what came of them.

    Attributes:
        grid: the learning rates.
        monitor: the validation figure that chooses, such as `val/accuracy`: the one the best checkpoint is kept by.
        seed: the only one that was trained with all of them.
        figures: label -> for every learning rate of the grid the best validation figure of its run; None where the
            run failed or came to no validation.
    """

    grid: tuple[float, ...]
    monitor: str
    seed: int
    figures: Mapping[str, tuple[float | None, ...]]

    def best(self, label: str) -> float | None:
        """The learning rate with the best figure, the first of equals; None if there is no figure."""
        known = [(figure, rate) for figure, rate in zip(self.figures[label], self.grid, strict=True) if _is_one(figure)]
        choose = min if metric_direction(self.monitor) == "min" else max
        return choose(known, key=lambda pair: pair[0], default=(None, None))[1]  # type: ignore[arg-type, return-value]

    def sentences(self) -> list[str]:
        """How the learning rates were chosen, and whose best is at the edge of the grid."""
        grid = ", ".join(f"{rate:g}" for rate in self.grid)
        found = [
            f"The learning rate of each mechanism is the one of {grid} with the best "
            f"{self.monitor} of seed {self.seed}, and is used for all seeds; no test figure had a part in it."
        ]
        edges = [
            f"{word} for {', '.join(labels)}"
            for word, edge in (("the smallest", min(self.grid)), ("the largest", max(self.grid)))
            if (labels := [label for label in self.figures if self.best(label) == edge])
        ]
        if edges and len(self.grid) > 1:
            found.append(f"The best is at the edge of the grid ({'; '.join(edges)}): a wider one may find a better.")
        return found


@dataclass(frozen=True)
class Terms:
    """What all mechanisms of a comparison were given.

    Attributes:
        equal: `steps` or `time`, what is the same for all.
        steps: of training that a run of the reference has at most; None where nothing depends on it.
        seconds: that these take, which at equal time is what each mechanism gets.
        tuning: how learning rates were chosen; None if all have the one of the configuration.
        reach: a validation figure; the table says after how many steps runs came to it. None: no such column.
    """

    equal: str = "steps"
    steps: int | None = None
    seconds: float | None = None
    tuning: Tuning | None = None
    reach: float | None = None

    def sentences(self, reference: str) -> list[str]:
        """For the caption of a table; none for equal steps and one learning rate."""
        found = []
        if self.equal == "time":
            assert self.seconds is not None
            found.append(
                f"Training time is equal: each mechanism makes as many steps as take it the time of the {self.steps:,} "
                f"steps of {reference} ({shown_seconds(self.seconds)}), by step times measured in turns before "
                "training; validation is not counted."
            )
        return found + (self.tuning.sentences() if self.tuning else [])

    def renamed(self, labels: Mapping[str, str]) -> Terms:
        """The same with other labels."""
        if self.tuning is None:
            return self
        figures = {labels[label]: each for label, each in self.tuning.figures.items()}
        return replace(self, tuning=replace(self.tuning, figures=figures))

    def facts(self) -> str:
        """In a few words, what was equal and how learning rates were chosen."""
        equal = "Equal training steps"
        if self.equal == "time":
            equal = f"Equal training time, {shown_seconds(self.seconds or 0.0)}"
        if self.tuning is None:
            return f"{equal}; one learning rate for all"
        grid = ", ".join(f"{rate:g}" for rate in self.tuning.grid)
        return f"{equal}; learning rates from {grid} by {self.tuning.monitor} of seed {self.tuning.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain containers, from which `from_json` makes the same."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Terms:
        """What `to_json` gave."""
        tuning = content["tuning"]
        if tuning is not None:
            figures = {label: tuple(each) for label, each in tuning["figures"].items()}
            tuning = Tuning(**{**tuning, "grid": tuple(tuning["grid"]), "figures": figures})
        return cls(**{**content, "tuning": tuning})


EQUAL_STEPS = Terms()


def _is_one(figure: float | None) -> bool:
    return figure is not None and math.isfinite(figure)
