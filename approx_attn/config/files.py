"""Where the YAML files are, in a checkout as well as in an installed package."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"configs: no train.yaml in {package.parent / 'configs'} or {package / 'configs'}.")


def available_choices(group: str) -> list[str]:
    """Names of the YAML files of a group such as `attention`."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def config_groups() -> list[str]:
    """Names of the groups."""
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())
