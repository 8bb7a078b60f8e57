"""How much of a reference schedule a comparison ran: steps, sequences and tokens beside those of `experiment=lra_*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from approx_attn.config.compose import config_dir, load_config

REFERENCES = "lra_*.yaml"
# Parts of a configuration that a reader would want to know of where they differ from the reference.
COMPARED_PARTS = ("data", "model", "optimizer", "scheduler", "task")
# What decides nothing, what is said in another place, and what belongs to the mechanism.
NOT_COMPARED = frozenset(
    {"_target_", "attention", "path", "cache_dir", "num_proc", "num_workers", "seed", "eval_batch_size"}
    | {"batch_size", "min_length", "max_length", "resolution"}
)
UNSET = "folder"  # stands for what a reference leaves to the user, such as data.path


def reference_experiment(name: str) -> str | None:
    """The experiment with the published schedule of the data that a recipe is called after; None if there is none."""
    for path in sorted((config_dir() / "experiment").glob(REFERENCES)):
        content = yaml.safe_load(path.read_text())
        if name in (path.stem, content["defaults"][0]["override /data"]):
            return path.stem
    return None


def describe_schedule(config: Mapping[str, Any], spec: Mapping[str, Any], steps: list[int]) -> str:
    """What was trained, in words, and which share of the reference schedule that is.

    Args:
        config: resolved configuration of one of the runs.
        spec: the `DataSpec` of its data.
        steps: optimizer steps of every run.
    """
    batch, lengths = sequences_per_step(config), sequence_lengths(config, spec)
    experiment = reference_experiment(config["name"])
    items = f"{spec['num_items'][0]:,} training sequences of {lengths} tokens"
    if experiment is None:
        return f"{_range(steps)} steps of {batch} sequences; {items}. There is no reference schedule for this task."
    reference = load_reference(experiment)
    if config["name"] == experiment and max(steps) == reference["trainer"]["max_steps"]:
        return (
            f"{_range(steps)} steps of {batch} sequences; {items}: the reference schedule (`experiment={experiment}`)."
        )
    full_steps, full_batch = reference["trainer"]["max_steps"], sequences_per_step(reference)
    full_length = longest(reference["data"])
    sequences = max(steps) * batch / (full_steps * full_batch)
    tokens = sequences * spec["max_length"] / full_length
    batches = f"{batch}" if batch == full_batch else f"{batch} instead of {full_batch}"
    full_lengths = sequence_lengths(reference)
    return (
        f"{_range(steps)} of {full_steps:,} steps of {batches} sequences of "
        f"{lengths if lengths == full_lengths else f'{lengths} instead of {full_lengths}'} tokens: "
        f"{_percent(sequences)} of the sequences and {_percent(tokens)} of the token positions of the reference "
        f"schedule (`experiment={experiment}`).{_differences(config, reference)}"
    )


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


def longest(data: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence of a reference's data."""
    return data["resolution"] ** 2 if "resolution" in data else data["max_length"]


def sequence_lengths(config: Mapping[str, Any], spec: Mapping[str, Any] | None = None) -> str:
    """The lengths of sequences, in words."""
    data = config["data"]
    most = spec["max_length"] if spec else longest(data)
    if "min_length" in data:
        return f"{data['min_length']:,}–{most:,}"
    if "resolution" in data or "num_pairs" in data:
        return f"{most:,}"
    return f"up to {most:,}"


def _differences(config: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """A sentence about settings other than those of the reference, the mechanism apart."""
    lines = []
    for part in COMPARED_PARTS:
        ours, theirs = config.get(part) or {}, reference.get(part) or {}
        for key in sorted(set(ours) & set(theirs) - NOT_COMPARED):
            if ours[key] != theirs[key]:
                lines.append(f"{part}.{key} {ours[key]} instead of {theirs[key]}")
    return f" Other settings: {', '.join(lines)}." if lines else ""


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"
