"""The removal of runs: only folders that were made for a run, and in them only files that runs write."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from approx_attn.run import checkpoints, record
from approx_attn.run.stored_metrics import PREDICTIONS_FILE

# Beside the checkpoints that the configuration names; `*` stands for any characters but `/`, `**` for any.
WRITTEN_BY_RUNS = (
    record.MARKER,
    record.LOCK_FILE,
    record.RESULT_FILE,
    record.CONFIG_FILE,
    "metrics.csv",
    "hparams.yaml",
    PREDICTIONS_FILE,
    "events.out.tfevents.*",
    f".*{record.UNFINISHED}",
    f"{checkpoints.FOLDER}/.*{record.UNFINISHED}",
    f"{checkpoints.FOLDER}/{checkpoints.LAST}",
    f"{checkpoints.FOLDER}/{checkpoints.PREVIOUS}",
    "mlflow.db",
    "mlflow/**",
    "wandb/run-**",
    "wandb/offline-run-**",
    "wandb/latest-run",
    "wandb/debug*.log",
    "wandb/wandb-resume.json",
)


@dataclass(frozen=True)
class RunFiles:
    """What lies in the folder of a run.

    Attributes:
        folder: the folder.
        own: paths of files that runs write.
        foreign: paths of all others; they stay.
        size: bytes of its own files.
    """

    folder: Path
    own: tuple[Path, ...]
    foreign: tuple[Path, ...]
    size: int


def files_of(folder: Path, config: Mapping[str, Any]) -> RunFiles:
    """Tell the files that a run with this configuration writes from others."""
    escaped = map(re.escape, (*WRITTEN_BY_RUNS, *_checkpoints(config)))
    written = re.compile("|".join(p.replace(r"\*\*", ".*").replace(r"\*", "[^/]*") for p in escaped))
    own: list[Path] = []
    foreign: list[Path] = []
    for parent, subfolders, files in os.walk(folder):
        links = [name for name in subfolders if os.path.islink(os.path.join(parent, name))]
        for path in (Path(parent, name) for name in sorted([*files, *links])):
            name = path.relative_to(folder).as_posix()
            (own if written.fullmatch(name) else foreign).append(path)
    return RunFiles(folder, tuple(own), tuple(foreign), sum(path.lstat().st_size for path in own))


def _checkpoints(config: Mapping[str, Any]) -> list[str]:
    """Patterns of the files that the callbacks of a configuration keep."""
    nodes = [node for node in (config.get("callbacks") or {}).values() if isinstance(node, Mapping)]
    names = [node.get("filename") or "{epoch}-{step}" for node in nodes if "Checkpoint" in str(node.get("_target_"))]
    # {figure:format} becomes figure=number.
    return [f"{checkpoints.FOLDER}/{re.sub(r'{.*?}', '*', str(name))}.ckpt" for name in names]


def why_kept(folder: Path, root: Path) -> str | None:
    """Why a run may not be deleted, in a few words; None if it may."""
    if not record.is_marked(folder):
        return f"has no {record.MARKER}, so no run of this version made it"
    if folder.is_symlink():
        return "is a link"
    if folder.resolve() == root.resolve():
        return "is the folder that is searched"
    return None


def delete(runs: Iterable[RunFiles], root: Path) -> int:
    """Delete the runs' own files, and the folders below `root` that this leaves empty.

    Returns:
        How many runs were deleted; one that a process has taken meanwhile stays.
    """
    return sum(_delete(run, root) for run in runs)


def _delete(run: RunFiles, root: Path) -> bool:
    with open(run.folder / record.LOCK_FILE, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # The marker goes last: what a broken deletion leaves can still be deleted.
        marker = run.folder / record.MARKER
        for path in [*(path for path in run.own if path != marker), run.folder / record.LOCK_FILE, marker]:
            path.unlink(missing_ok=True)
    for parent, _, _ in os.walk(run.folder, topdown=False):
        _remove_if_empty(Path(parent))
    for folder in run.folder.parents:
        if folder == root or not folder.is_relative_to(root):
            break
        _remove_if_empty(folder)
    return True


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # such as that it is not empty
        folder.rmdir()
