"""Warnings about what can be run and was hardly meant; the command line shows each as one line."""

from __future__ import annotations

import functools
import os
import warnings


class ConfigWarning(UserWarning):
    """A configuration that can be run and was hardly meant; the message is one sentence that names the key."""


@functools.cache  # layers are many, and a comparison reads its data many times
def warn(text: str) -> None:
    """Warn once of what was hardly meant; the first of several processes speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(text, ConfigWarning, stacklevel=2)
