"""What a command is refused, warned, ended or stopped with, each one line, and the checks on options that refuse."""

from __future__ import annotations

import difflib
import functools
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

REPLACED = {"eigen_block": "eigen_cluster"}
"""Mechanisms of earlier versions, which records and checkpoints still name, and what has replaced them."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence that names the key."""


class Unsuccessful(Exception):
    """A command came to its end without the result that it is for; the message is one sentence."""


class Stopped(SystemExit):
    """A signal stopped the run, which is not a failure; uncaught it ends the process with code 128 + signal.

    Args:
        signum: the signal.
        message: one sentence: where the run stands, and what continues it.
        main_process: whether this process speaks for the run. Others end with code 0, because the launcher would
            take the first process that ends with another code for a crash.
    """

    def __init__(self, signum: int, message: str, main_process: bool = True) -> None:
        super().__init__(128 + signum if main_process else 0)
        self.signum = signum
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigWarning(UserWarning):
    """A configuration that can be run and is likely a mistake; the message is one sentence that names the key."""


@functools.cache  # layers are many, and a comparison reads its data many times
def warn(text: str) -> None:
    """Warn once of a likely mistake; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(text, ConfigWarning, stacklevel=2)


def suggestion(got: str, accepted: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: what was probably meant or has replaced it, and what is accepted."""
    accepted = sorted(accepted)
    if REPLACED.get(got) in accepted:
        return f"; {REPLACED[got]} has replaced it."
    close = difflib.get_close_matches(got, accepted, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"{meant} Accepted: {', '.join(accepted) or 'none'}."


# -- checks on options: each names the key, what it got and what it accepts ----------------------------


def require_count(key: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}.")
    return value


def require_weight(key: str, value: Any) -> float:
    """`value` as a finite float of at least 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < math.inf:
        raise ValueError(f"{key} must be a number of at least 0, got {value!r}.")
    return float(value)


def require_one_of(key: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}.")
    return value
