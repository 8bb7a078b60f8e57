"""Classes that have moved: records, checkpoints and configurations of earlier versions name their first places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.registry import ADDED_OPTIONS, REPLACED_OPTIONS

# Where classes of configurations lie now, and where they lay when the first runs were recorded.
MOVED = {
    "approx_attn.attention.baselines": "approx_attn.attention",
    "approx_attn.data.generators": "approx_attn.data",
    "approx_attn.run.callbacks": "approx_attn.callbacks",
    "approx_attn.run.loggers": "approx_attn.loggers",
    "approx_attn.run.schedules": "approx_attn.tasks.schedules",
    "approx_attn.run.tasks": "approx_attn.tasks",
}


def present_places(target: str) -> list[str]:
    """Dotted paths at which a class may lie now that a configuration names, its own first."""
    moved = [new + target.removeprefix(old) for new, old in MOVED.items() if target.startswith(f"{old}.")]
    return [target, *moved]


def with_first_places(node: Any) -> Any:
    """A configuration in which every `_target_` is the place that the class had first, so that a run's hash stays.

    Options that the class had then stand there, too; younger ones are left out where they change nothing.
    """
    if isinstance(node, Mapping):
        name = _mechanism(node.get("_target_"))
        added = ADDED_OPTIONS.get(name, {})
        return _former_options(name) | {
            key: _first_place(value) if key == "_target_" else with_first_places(value)
            for key, value in node.items()
            if key not in added or value != added[key]
        }
    return [with_first_places(item) for item in node] if isinstance(node, list) else node


def _mechanism(target: Any) -> str:
    """The name of the mechanism whose class a `_target_` is; empty for anything else."""
    class_name = target.rpartition(".")[2] if isinstance(target, str) else None
    return next((name for name, cls in AttentionMechanism.registered.items() if cls.__name__ == class_name), "")


def _former_options(name: str) -> dict[str, Any]:
    """Options that a mechanism had when the first runs were recorded, at the values at which they play no part."""
    replaced = REPLACED_OPTIONS.get(name, {})
    return {option: neutral for option, (neutral, _) in replaced.items() if neutral is not None}


def _first_place(target: Any) -> Any:
    for new, old in MOVED.items():
        if isinstance(target, str) and target.startswith(f"{new}."):
            return old + target.removeprefix(new)
    return target
