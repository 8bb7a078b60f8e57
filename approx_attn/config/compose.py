"""Configurations composed by Hydra.

What Hydra and OmegaConf say about a wrong command line becomes one sentence that names the key and what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from approx_attn.config.files import FOLDERS, available_choices, config_dir, config_groups
from approx_attn.errors import ConfigError, suggestion

HYDRA_GROUPS = "hydra"


def compose_config(overrides: Iterable[str] = (), config_name: str = "train", *, choices: bool = False) -> DictConfig:
    """The configuration that a command line gives.

    Args:
        overrides: as on the command line, such as `["data=digits", "attention=topk", "attention.keep=0.25"]`.
        config_name: file in the folder of configurations, without ending.
        choices: keep Hydra's own node, whose `hydra.runtime.choices` says which file each group took.

    Raises:
        ConfigError: an unknown word or an unreadable override; the message names it and what is accepted.

    Works inside a program that Hydra started too, and leaves its state as it was.
    """
    overrides = list(overrides)
    try:
        return _compose(overrides, config_name, choices)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(_explain(error, overrides, config_name)) from error


def load_config(overrides: Iterable[str] = (), config_name: str = "train") -> dict[str, Any]:
    """`compose_config` as plain containers."""
    return plain(compose_config(overrides, config_name))


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain containers with everything resolved.

    Raises:
        ConfigError: a value that is still missing (`???`), or a reference to nothing.
    """
    container = config if isinstance(config, DictConfig | ListConfig) else OmegaConf.create(dict(config))
    try:
        resolved = OmegaConf.to_container(container, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_value(error)) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if key != HYDRA_GROUPS}


def _compose(overrides: Sequence[str], config_name: str, choices: bool = False) -> DictConfig:
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(config_name, overrides=[*further_files(), *overrides], return_hydra_config=choices)
    finally:
        GlobalHydra.instance().hydra = outer


def further_files(*folders: str) -> list[str]:
    """The override by which YAML files of other folders are found, those of trusted packages among them."""
    places = [*FOLDERS, *folders]
    return [f"hydra.searchpath={[f'file://{place}' for place in places]}"] if places else []


# -- what went wrong, in one sentence --------------------------------------------------------------------


def _explain(error: Exception, overrides: Sequence[str], config_name: str) -> str:
    # The innermost message is the one about the key; the outer ones say where Hydra was.
    messages = [" ".join(str(e).split()) for e in _chain(error)]
    text = " ".join(messages)
    choice = re.search(r"Could not find '([\w/]+)/([^'/]+)'", text)
    if choice and choice[1] in config_groups():
        return f"{choice[1]}={choice[2]!s} is unknown{suggestion(choice[2], available_choices(choice[1]))}"
    plugin = re.search(r"Could not find 'hydra/launcher/(joblib|submitit_\w+)'", text)
    if plugin:
        package = f"hydra-{plugin[1].partition('_')[0]}-launcher"
        return f"launcher: {plugin[1]} needs the package {package}; pip install approx-attn[launch]."
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _explain_unknown_key(unknown[1], overrides, config_name)
    present = re.search(r"Could not append to config\. An item is already at '([^']+)'", text)
    if present:
        return f"{present[1]} is in the configuration already; set it without the leading '+'."
    for override in overrides:
        key, _, value = override.partition("=")
        if key in config_groups() and (value in ("null", "") or value.startswith(("[", "{"))):
            return f"{override}: {key} takes one of {', '.join(available_choices(key))}; ~{key} leaves it out."
        unreadable = why_unreadable(override)
        if unreadable:
            return unreadable
    return _explain_value(error)


def why_unreadable(override: str) -> str | None:
    """What is wrong with the grammar of an override, in one sentence; None if it can be read."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        return f"override {override!r} cannot be read ({reason}); write key=value, and quote values with spaces."
    return None


def parse_overrides(overrides: Sequence[str], folder: str | None = None) -> list[Override]:
    """The overrides of a command line, read.

    Args:
        overrides: `key=value` words; a `glob()` among them is of the names of files.
        folder: of further YAML files.

    Raises:
        ConfigError: one of them cannot be read.
    """
    for override in overrides:
        unreadable = why_unreadable(override)
        if unreadable:
            raise ConfigError(unreadable)
    return list(OverridesParser.create(_config_loader(folder)).parse_overrides(list(overrides)))


def _config_loader(folder: str | None) -> ConfigLoader:
    search_path = create_config_search_path(str(config_dir()))
    for further in (*FOLDERS, *([] if folder is None else [folder])):
        search_path.append("command-line", f"file://{further}")
    return ConfigLoaderImpl(config_search_path=search_path)


def _explain_unknown_key(key: str, overrides: Sequence[str], config_name: str) -> str:
    """About a key that no configuration has: what its neighbours are called."""
    parent, _, name = key.rpartition(".")
    groups = config_groups()
    try:
        node = _compose([o for o in overrides if o.lstrip("+~").partition("=")[0] in groups], config_name, choices=True)
        siblings = OmegaConf.select(node, parent) if parent else node
    except (HydraException, OmegaConfBaseException):
        return f"{key} is unknown."
    if not isinstance(siblings, DictConfig):  # the parent is wrong already
        return _explain_unknown_key(parent, overrides, config_name)
    accepted = {str(k) for k in siblings if not str(k).startswith("_") and str(k) != HYDRA_GROUPS}
    if not parent:
        accepted |= set(groups)
    if not accepted:
        return f"{key} replaces nothing here; write +{key}=... to add it."
    choice = OmegaConf.select(node, f"hydra.runtime.choices.{parent}") if parent else None
    owner = f" of {parent}={choice}" if choice else ""
    return f"{key} is not a key{owner}{suggestion(name, accepted)}"


def _explain_value(error: BaseException) -> str:
    full_key = getattr(error, "full_key", None)
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "Missing mandatory value" in first_line and full_key:
        return f"{full_key} must be set; it has no default."
    return f"{full_key}: {first_line}" if full_key and str(full_key) not in first_line else first_line


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
