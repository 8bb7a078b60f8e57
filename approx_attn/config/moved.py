"""Classes that have moved: records, checkpoints and configurations of earlier versions name their first places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.registry import REPLACED_OPTIONS

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

    Options that the class had then stand there, too.
    """
    if isinstance(node, Mapping):
        return _former_options(node.get("_target_")) | {
            key: _first_place(value) if key == "_target_" else with_first_places(value) for key, value in node.items()
        }
    return [with_first_places(item) for item in node] if isinstance(node, list) else node


def _former_options(target: Any) -> dict[str, Any]:
    """Options that a mechanism had when the first runs were recorded, at the values at which they play no part."""
    if not isinstance(target, str):
        return {}
    class_name = target.rpartition(".")[2]
    names = (name for name, cls in AttentionMechanism.registered.items() if cls.__name__ == class_name)
    replaced = REPLACED_OPTIONS.get(next(names, ""), {})
    return {option: neutral for option, (neutral, _) in replaced.items() if neutral is not None}


def _first_place(target: Any) -> Any:
    for new, old in MOVED.items():
        if isinstance(target, str) and target.startswith(f"{new}."):
            return old + target.removeprefix(new)
    return target
