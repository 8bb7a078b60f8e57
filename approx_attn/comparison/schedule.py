"""How much of a reference schedule a comparison ran: steps, sequences and tokens beside those of `experiment=lra_*`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from approx_attn.config.compose import config_dir, load_config

REFERENCES = "lra_*.yaml"
# Parts of a configuration that a reader would want to know of where they differ from the reference.
COMPARED_PARTS = ("data", "model", "optimizer", "scheduler", "task")
# Keys that do not change the outcome, that the sentence states elsewhere, or that belong to the mechanism.
NOT_COMPARED = frozenset(
    {"_target_", "attention", "path", "cache_dir", "num_proc", "num_workers", "seed", "eval_batch_size"}
    | {"batch_size", "min_length", "max_length", "resolution"}
)
UNSET = "folder"  # stands for what a reference leaves to the user, such as data.path


def describe_schedule(config: Mapping[str, Any], spec: Mapping[str, Any], steps: Sequence[int]) -> str:
    """What was trained, in words, and which share of the reference schedule that is.

    Args:
        config: resolved configuration of one of the runs.
        spec: the `DataSpec` of its data.
        steps: optimizer steps of every run.
    """
    batch, length = sequences_per_step(config), spec["max_length"]
    lengths = _lengths(config["data"], length)
    made = f"{min(steps):,}–{max(steps):,}" if min(steps) < max(steps) else f"{max(steps):,}"
    whole = f"{made} steps of {batch} sequences; {spec['num_items'][0]:,} training sequences of {lengths} tokens"
    experiment = reference_experiment(config["name"])
    if experiment is None:
        return f"{whole}. There is no reference schedule for this task."
    reference = load_reference(experiment)
    full_steps, full_batch, data = reference["trainer"]["max_steps"], sequences_per_step(reference), reference["data"]
    if config["name"] == experiment and max(steps) == full_steps:
        return f"{whole}: the reference schedule (`experiment={experiment}`)."
    full_length = data["resolution"] ** 2 if "resolution" in data else data["max_length"]
    sequences = max(steps) * batch / (full_steps * full_batch)
    return (
        f"{made} of {full_steps:,} steps of {_instead(batch, full_batch)} sequences of "
        f"{_instead(lengths, _lengths(data, full_length))} tokens: {_percent(sequences)} of the sequences and "
        f"{_percent(sequences * length / full_length)} of the token positions of the reference schedule "
        f"(`experiment={experiment}`).{_other_settings(config, reference)}"
    )


def reference_experiment(name: str) -> str | None:
    """The experiment with the published schedule of the data that a recipe is called after; None if there is none."""
    for path in sorted((config_dir() / "experiment").glob(REFERENCES)):
        if name in (path.stem, yaml.safe_load(path.read_text())["defaults"][0]["override /data"]):
            return path.stem
    return None


def load_reference(experiment: str) -> dict[str, Any]:
    """The configuration of a reference experiment."""
    content = yaml.safe_load((config_dir() / "experiment" / f"{experiment}.yaml").read_text())
    needed = [f"data.{key}={UNSET}" for key, value in content["data"].items() if value == "???"]
    return load_config([f"experiment={experiment}", *needed])


def sequences_per_step(config: Mapping[str, Any]) -> int:
    """Sequences (or pairs) behind one optimizer step."""
    trainer = config["trainer"]
    devices = trainer.get("devices", 1)
    processes = (devices if isinstance(devices, int) else 1) * trainer.get("num_nodes", 1)
    return config["data"]["batch_size"] * trainer.get("accumulate_grad_batches", 1) * processes


def _lengths(data: Mapping[str, Any], most: int) -> str:
    """The lengths of sequences, in words."""
    if "min_length" in data:
        return f"{data['min_length']:,}–{most:,}"
    return f"{most:,}" if "resolution" in data or "num_pairs" in data else f"up to {most:,}"


def _instead(ours: Any, theirs: Any) -> str:
    return f"{ours}" if ours == theirs else f"{ours} instead of {theirs}"


def _other_settings(config: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """A sentence about settings other than those of the reference, the mechanism apart."""
    lines = []
    for part in COMPARED_PARTS:
        ours, theirs = config.get(part) or {}, reference.get(part) or {}
        different = (key for key in sorted(set(ours) & set(theirs) - NOT_COMPARED) if ours[key] != theirs[key])
        lines += [f"{part}.{key} {_instead(ours[key], theirs[key])}" for key in different]
    return f" Other settings: {', '.join(lines)}." if lines else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"
