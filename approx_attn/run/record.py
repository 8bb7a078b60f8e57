"""The record of a run: where it lives, what it is called, how it is written.

A run is addressed by what decides its outcome: the resolved configuration and the seed. Two runs of the same
configuration and seed are the same run, wherever they were started; anything else never shares a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from approx_attn.config.moved import with_first_places
from approx_attn.config.trust import plugins
from approx_attn.errors import ConfigError
from approx_attn.metrics import metric_direction

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
MARKER = ".approx-attn-run"  # says that a folder was made for a run; nothing is deleted without it

# Parts of a configuration that say where and how a run is watched, not what it computes.
OBSERVING_KEYS = frozenset({"paths", "logger", "launcher", "resume", "verbose", "progress_bar", "metrics"})

OBSERVING_CALLBACKS = frozenset({"resumable"})

# Options of data modules that say how batches are made, not what is in them.
SERVING_DATA = frozenset({"num_workers", "num_proc", "cache_dir"})

# Keys that are younger than records of runs, with the values at which a run is what it was without them.
NEUTRAL = {"init_from": None, "extend": None, "compile": False}
NEUTRAL_DATA = {"test_share": None}

PACKAGES = ("approx-attn", "torch", "pytorch-lightning", "hydra-core", "datasets", "numpy", "transformers")


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what a run computes, its seed left out.

    Args:
        config: plain containers, as `OmegaConf.to_container(cfg, resolve=True)` gives them.
    """
    part = {key: value for key, value in config.items() if key not in OBSERVING_KEYS and key != "seed"}
    part = with_first_places(part)
    part = _without(NEUTRAL, part)
    if "init_from" in part:
        part["init_from"] = _content(part["init_from"])
    if isinstance(part.get("callbacks"), Mapping):
        callbacks = {key: value for key, value in part["callbacks"].items() if key not in OBSERVING_CALLBACKS}
        part["callbacks"] = {key: _with_mode(node) for key, node in callbacks.items()}
    if isinstance(part.get("data"), Mapping):
        data = {key: value for key, value in part["data"].items() if key not in SERVING_DATA}
        part["data"] = _without(NEUTRAL_DATA, data)
    return part


def _without(neutral: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in neutral or value != neutral[key]}


def _content(init_from: Any) -> Any:
    """What the weights are, wherever they lie: the checksum of the file, or the one that was noted."""
    if isinstance(init_from, Mapping):
        return init_from.get("sha256")
    return file_digest(init_from) if Path(str(init_from)).is_file() else init_from


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    status = os.stat(path)
    return _file_digest(str(path), status.st_mtime_ns, status.st_size)


@functools.cache
def _file_digest(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_mode(node: Any) -> Any:
    """A callback's node with the direction of the figure that it watches written out."""
    if isinstance(node, Mapping) and node.get("monitor") is not None and node.get("mode") is None:
        with contextlib.suppress(ConfigError):  # an unknown figure is refused where callbacks are built
            return {**node, "mode": metric_direction(str(node["monitor"]))}
    return node


def config_hash(config: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that identify a resolved configuration, its seed left out.

    Args:
        config: plain containers, as `OmegaConf.to_container(cfg, resolve=True)` gives them.
    """
    return hashlib.sha256(_canonical(deciding(config)).encode()).hexdigest()[:10]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two configurations are those of different runs: dotted key, stored value, asked value."""
    ours, theirs = ({"seed": config.get("seed"), **deciding(config)} for config in (stored, asked))
    return list(_differences(ours, theirs, ""))


def _differences(stored: Any, asked: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(stored, Mapping) and isinstance(asked, Mapping)):
        if _canonical(stored) != _canonical(asked):
            yield key, stored, asked
        return
    for name in [*stored, *(name for name in asked if name not in stored)]:
        yield from _differences(stored.get(name), asked.get(name), f"{key}.{name}" if key else str(name))


def run_folder(root: str | Path, config: Mapping[str, Any], *, data: str, attention: str) -> Path:
    """`<root>/<data>/<attention>/<config hash>-seed<seed>`; `data` and `attention` are for people's eyes."""
    return Path(root) / data / attention / f"{config_hash(config)}-seed{config['seed']}"


class DiskFullError(OSError):
    """No space is left where something is to be written; what was written before is whole.

    Args:
        path: the file that could not be written.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(
            f"No space left on the disk of {path}; nothing that was written before is lost: free some space and "
            "run again (a training run with resume=true goes on from its last checkpoint)."
        )
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def disk_full_named(path: str | Path) -> Iterator[None]:
    """Raise `DiskFullError` with the path where the system only says that there is no space, or no quota."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(path) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a limit on files, is behind an error; libraries wrap what the system says."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


UNFINISHED = ".part"  # ending of files that are being written


@contextlib.contextmanager
def open_atomically(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its place when the block ends well.

    A reader, or a run killed in between, sees the old file or the new one, never half.

    Args:
        path: where the file goes; folders are made.
        previous: where the file that stood there before is kept.

    Raises:
        DiskFullError: no space is left; the old file stands.
    """
    path = Path(path)
    temporary = ""
    try:
        with disk_full_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if previous is not None and path.is_file():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | Path) -> None:
    """Remove files below a folder that a killed process left half written; the caller holds the folder's lock."""
    for path in Path(folder).rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a file so that a reader, or a run killed in between, sees the old one or the new one, never half."""
    with open_atomically(path) as file:
        file.write(text.encode("utf-8"))


def write_json_atomically(path: str | Path, data: Any) -> None:
    """`write_text_atomically` of indented JSON."""
    write_text_atomically(path, json.dumps(data, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if it is missing or was damaged."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def read_result(folder: str | Path) -> dict[str, Any] | None:
    """The result of a run that ended (`status` finished or failed), or None if it has not."""
    return read_json(Path(folder) / RESULT_FILE)


def is_finished(folder: str | Path) -> bool:
    """True when a run has ended well and its result can be read."""
    result = read_result(folder)
    return result is not None and result.get("status") == "finished"


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # written in C where it is built


def stored_config(folder: str | Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder; None where no run has written one, whatever else lies there."""
    config = (read_result(folder) or {}).get("config")
    if not config:
        try:
            config = yaml.load((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"), _Loader)
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return None
    # Files of that name are common; these keys together are of this package's runs.
    is_of_a_run = isinstance(config, dict) and {"name", "seed"} <= config.keys()
    return config if is_of_a_run and isinstance(config.get("attention"), dict) else None


def mark_run(folder: str | Path) -> None:
    """Mark a folder as made for a run."""
    write_text_atomically(
        Path(folder) / MARKER, "A run of approx_attn, which `approx-attn runs prune=true` may delete.\n"
    )


def is_marked(folder: str | Path) -> bool:
    """Whether a folder was made for a run; those of runs before there was a marker are not marked."""
    return (Path(folder) / MARKER).is_file()


def holds_run(folder: str | Path) -> bool:
    """Whether a run was begun in a folder, be it before there was a marker."""
    return is_marked(folder) or stored_config(folder) is not None


def is_foreign(folder: str | Path) -> bool:
    """Whether something lies at a place, or in a folder, that no run has put there."""
    folder = Path(folder)
    if not folder.is_dir():
        return os.path.lexists(folder)
    others = (path.name for path in folder.iterdir() if path.name != LOCK_FILE and path.suffix != UNFINISHED)
    return next(others, None) is not None and not holds_run(folder)


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder: a second process that wants the same run waits for the first to end.

    The lock belongs to the process, so it is gone with it however it dies.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def environment() -> dict[str, Any]:
    """What a reader needs to judge a figure: versions, commit, processor, threads, accelerator."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "plugins": list(plugins()),
        "commit": source_commit(),
        "processor": _processor_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def source_commit(package: Path = PACKAGE) -> str | None:
    """Commit of the checkout that a package runs from, "-dirty" if files were changed; None without a checkout."""
    # An installed package may lie inside the checkout of something else, which does not track it.
    for command in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty", "--exclude=*"]):
        try:
            done = subprocess.run(["git", *command], cwd=package, capture_output=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return None
    return done.stdout.decode().strip()


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
