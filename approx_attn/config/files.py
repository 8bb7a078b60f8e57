"""Where the YAML files are, in a checkout as well as in an installed package."""

from __future__ import annotations

from pathlib import Path

FOLDERS: list[Path] = []
"""Folders with further YAML files, of packages that a person trusts."""


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"configs: no train.yaml in {package.parent / 'configs'} or {package / 'configs'}.")


def available_choices(group: str) -> list[str]:
    """Names of the YAML files of a group such as `attention`."""
    return sorted(path.stem for folder in (config_dir(), *FOLDERS) for path in (folder / group).glob("*.yaml"))


def config_file(group: str, choice: str) -> Path | None:
    """The YAML file of a choice, or None where it has none."""
    paths = (folder / group / f"{choice}.yaml" for folder in (config_dir(), *FOLDERS))
    return next((path for path in paths if path.is_file()), None)


def config_groups() -> list[str]:
    """Names of the groups."""
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())
