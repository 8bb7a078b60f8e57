"""Packages whose classes a configuration may name: this one, two of its libraries, and those that a person named.

`plugins=[my_package]` on the command line of any verb, or `trust("my_package")` in Python, imports a package of one's
own. Its mechanisms and metrics are then registered, its classes may stand in a `_target_`, and the YAML files in its
folder `configs` are found beside those of this project. Nothing else imports code: a checkpoint, a run's folder or a
file of the configuration that names a package is refused.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from approx_attn.config.files import FOLDERS, config_dir
from approx_attn.errors import ConfigError

OWN_PACKAGES = ("approx_attn", "torch.optim", "pytorch_lightning")

_plugins: list[str] = []

PLUGINS = "plugins"  # the word of the command line
CONFIGS = "configs"  # the folder of a package's own YAML files


def trust(*packages: str) -> None:
    """Import packages, or modules, of one's own, whose code may be used from now on in this process.

    Args:
        packages: names as `import` takes them; they lie in the current folder or are installed.

    Raises:
        ConfigError: one that cannot be imported, or has a YAML file of a name that is taken.
    """
    for name in packages:
        if name in _plugins:
            continue
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"plugins must be names of packages, got {name!r}.")
        _search_current_folder()
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever its code raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(
                f"plugins: {name!r} cannot be imported ({reason}); it must lie in the current folder or be installed."
            ) from error
        for folder in getattr(module, "__path__", ()):
            if (Path(folder) / CONFIGS).is_dir():
                refuse_taken_names(f"plugins: {name}", Path(folder) / CONFIGS)
                FOLDERS.append(Path(folder) / CONFIGS)
        _plugins.append(name)


def plugins() -> tuple[str, ...]:
    """The packages that have been trusted, in their order."""
    return tuple(_plugins)


def plugin_words() -> list[str]:
    """The word of the command line that trusts them again; none where none are."""
    return [f"{PLUGINS}=[{','.join(_plugins)}]"] if _plugins else []


def take_plugins(arguments: Sequence[str]) -> list[str]:
    """A command line without its words `plugins=[...]`, whose packages have been trusted.

    Raises:
        ConfigError: as `trust`.
    """
    words = [word for word in arguments if word.startswith(f"{PLUGINS}=")]
    for word in words:
        trust(*(name.strip() for name in word.partition("=")[2].strip("[]").split(",") if name.strip()))
    return [word for word in arguments if word not in words]


def refuse_plugins(config: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration that asks for code.

    Args:
        config: from anywhere but the command line.
        source: what it is, for the message.

    Raises:
        ConfigError: it has the key `plugins`.
    """
    if PLUGINS in config:
        names = config[PLUGINS]
        asked = ",".join(map(str, names)) if isinstance(names, list | tuple) else str(names)
        raise ConfigError(f"{source} must not name {PLUGINS}; {how_to_trust(asked)}.")


def refuse_taken_names(source: str, folder: Path) -> None:
    """Refuse a folder of YAML files that has one of a name that is taken.

    Raises:
        ConfigError: names the file.
    """
    for path in sorted(folder.rglob("*.yaml")):
        if any((other / path.relative_to(folder)).exists() for other in (config_dir(), *FOLDERS)):
            raise ConfigError(f"{source}: {path} has the name of a file that is there already, give it another one.")


def how_to_trust(package: str) -> str:
    """The end of a sentence about code that is not trusted."""
    return f"if you trust that code, add plugins=[{package}] to the command line, or call approx_attn.trust in Python"


def is_trusted(path: str) -> bool:
    """Whether a dotted path lies in a package whose classes may be used."""
    return any(path == package or path.startswith(f"{package}.") for package in (*OWN_PACKAGES, *_plugins))


def _search_current_folder() -> None:
    """Find modules in the current folder too, after all other places, so that a file there hides none of them."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
