"""What a benchmark is asked to measure: its keys checked, its mechanisms as entries of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from approx_attn.attention import build_attention
from approx_attn.command import as_list, mechanism_spec, require_counts, settings
from approx_attn.config.compose import available_choices, config_dir
from approx_attn.config.instantiate import suggestion
from approx_attn.errors import ConfigError

PASSES = ("forward", "train", "decode")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
DEVICES = ("auto", "cpu", "cuda")
PLACES = ("length", "causal")


@dataclass(frozen=True)
class Entry:
    """One mechanism of the table.

    Attributes:
        options: its name and options.
        only: the lengths, and of False and True the causalities, at which it is measured; everywhere if absent.
        can_be_causal: whether it can run under a causal mask with these options.
    """

    options: dict[str, Any]
    only: dict[str, list[Any]]
    can_be_causal: bool

    @property
    def label(self) -> str:
        return label_of(self.options)

    def is_asked_for(self, length: int, causal: bool) -> bool:
        """Whether it is to be measured there."""
        return length in self.only.get("length", [length]) and causal in self.only.get("causal", [causal])


def label_of(options: Mapping[str, Any]) -> str:
    """What the table calls a mechanism with its options."""
    return " ".join([options["name"], *(f"{key}={value}" for key, value in options.items() if key != "name")])


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """`configs/benchmark.yaml`, the keys of `table=<name>` on top, and those of the command line on top of these.

    Raises:
        ConfigError: an argument that cannot be read, an unknown key or table.
    """
    cfg = settings("benchmark", arguments)
    if cfg["table"] is None:
        return cfg
    tables = available_choices("benchmark")
    if cfg["table"] not in tables:
        raise ConfigError(f"table={cfg['table']} is unknown{suggestion(str(cfg['table']), tables)}")
    given = {argument.partition("=")[0].partition(".")[0] for argument in arguments}
    table = OmegaConf.to_container(OmegaConf.load(config_dir() / "benchmark" / f"{cfg['table']}.yaml"))
    assert isinstance(table, dict)
    return {**cfg, **{str(key): value for key, value in table.items() if key not in given}}


def check(cfg: Mapping[str, Any]) -> list[Entry]:
    """The mechanisms that a configuration names.

    Raises:
        ConfigError: an unknown name or option, or a value that nothing can be done with.
    """
    for key, accepted in (("pass", PASSES), ("dtype", tuple(DTYPES)), ("device", DEVICES)):
        for value in as_list(cfg[key]):
            if value not in accepted:
                raise ConfigError(f"{key} must be among {', '.join(accepted)}, got {value!r}.")
    for key in ("attention", "length", "pass"):
        if not isinstance(cfg[key], list) or not cfg[key]:
            raise ConfigError(f"{key} must be a list such as {key}=[...], got {cfg[key]!r}.")
    counts = ("length", "batch_size", "num_heads", "head_dim", "repeats", "sequences", "error_queries")
    require_counts({key: cfg[key] for key in counts})
    _check_causal("causal", cfg["causal"])
    if "decode" in cfg["pass"] and as_list(cfg["causal"]) != [True]:
        raise ConfigError(f"pass=[decode] is of causal attention and takes causal=true, got causal={cfg['causal']!r}.")
    if cfg["reference"] is not None and not isinstance(cfg["reference"], list):
        raise ConfigError(f"reference must be null or a list of files such as [table.csv], got {cfg['reference']!r}.")
    for path in cfg["reference"] or []:
        if not Path(str(path)).is_file():
            raise ConfigError(f"reference={path} is not a file; give the table.csv of another benchmark.")
    entries = [_entry(part) for part in cfg["attention"]]
    for entry in entries:
        asked = {causal for causal in as_list(cfg["causal"]) if causal in entry.only.get("causal", [causal])}
        if asked == {True} and not entry.can_be_causal:
            raise ConfigError(
                f"attention={entry.label} does not support causal=true; causal=[false,true] leaves it out there."
            )
    return entries


def _entry(part: Any) -> Entry:
    only = part.get("only", {}) if isinstance(part, dict) else {}
    options = mechanism_spec({k: v for k, v in part.items() if k != "only"} if isinstance(part, dict) else part)
    if not isinstance(only, dict) or not set(only) <= set(PLACES):
        raise ConfigError(f"attention.only of {options['name']} takes length and causal as lists, got {only!r}.")
    only = {key: as_list(value) for key, value in only.items()}
    require_counts({"attention.only.length": only.get("length", [])})
    _check_causal("attention.only.causal", only.get("causal", [False]))
    shape: dict[str, Any] = {"num_heads": 1, "head_dim": 8, "max_length": 16}
    try:
        build_attention(**options, **shape)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with suppress(ValueError):
        build_attention(**options, **shape, causal=True)
        return Entry(options, only, can_be_causal=True)
    return Entry(options, only, can_be_causal=False)


def _check_causal(key: str, values: Any) -> None:
    if not as_list(values) or not all(isinstance(value, bool) for value in as_list(values)):
        raise ConfigError(f"{key} must be true, false or [false,true], got {values!r}.")
