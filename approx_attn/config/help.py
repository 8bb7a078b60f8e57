"""What options mean: the comments of the YAML files, read for pages of help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from approx_attn.config.compose import compose_config
from approx_attn.config.files import FOLDERS, available_choices, config_dir, config_groups

KEY_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w/]+):(?P<value>[^#]*)(?:# (?P<meaning>.*))?$")
LONGEST_SETTING = 44  # characters of `key=value` beside which its meaning still stands


def meanings(path: Path) -> dict[str, str]:
    """Dotted key -> its one-line meaning, of the keys of a YAML file that say one."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # indent and key of the nodes around a line
    for line in path.read_text(encoding="utf-8").splitlines():
        match = KEY_LINE.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        parents = [parent for parent in parents if parent[0] < indent] + [(indent, match["key"])]
        if match["meaning"]:
            found[".".join(key for _, key in parents)] = match["meaning"].strip()
    return found


def help_page(config_name: str, overrides: Sequence[str]) -> str:
    """Every key of a composed configuration with its value and meaning, and what every group can be.

    Raises:
        ConfigError: overrides that cannot be composed.
    """
    config = compose_config(overrides, config_name, choices=True)
    choices: Mapping[str, Any] = config.hydra.runtime.choices
    known = _known_meanings(config_name, choices)
    lines = [(config_dir() / f"{config_name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")]
    groups = [group for group in config_groups() if group in choices]
    if groups:
        lines += ["", "One word chooses a file of a group:"]
        for group in groups:
            chosen = f"  {group}={choices[group] or 'null'}"
            lines.append(f"{chosen:<32}of {', '.join(available_choices(group))}")
    lines += ["", "Keys, with the values that these words give:"]
    composed = OmegaConf.to_container(config)
    assert isinstance(composed, dict)
    del composed["hydra"]
    for key, value in _leaves(composed):
        setting = f"  {key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
        meaning = known.get(key, "")
        lines.append(f"{setting:<{LONGEST_SETTING}} # {meaning}" if meaning else setting)
    flags = "-m sweeps over a=1,2; --cfg job prints the configuration; --config-dir adds a folder of YAML files; "
    return "\n".join([*lines, "", f"{flags}--hydra-help shows more."])


def _known_meanings(config_name: str, choices: Mapping[str, Any]) -> dict[str, str]:
    """What the files say that a configuration was composed of; recipes speak of keys of other files last."""
    known = meanings(config_dir() / f"{config_name}.yaml")
    for group, choice in choices.items():
        for path in [path for folder in (config_dir(), *FOLDERS) for path in (folder / group).glob("*.yaml")]:
            if path.stem not in (choice, "default"):
                continue
            everywhere = path.read_text(encoding="utf-8").startswith("# @package _global_")
            said = meanings(path)
            for key, meaning in said.items():
                full = key if everywhere else f"{group}.{key}"
                if full not in known or (path.stem == choice and not everywhere):
                    known[full] = meaning
    return known


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values below a node, directives left out; an empty node is a value."""
    for key, value in node.items():
        if str(key).startswith("_"):
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
