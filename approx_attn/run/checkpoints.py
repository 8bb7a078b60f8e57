"""Checkpoint files: written whole or not at all, checked before they are trusted, the one before kept.

Lightning's own writer puts the file together in the system's folder for temporary files and copies it from
there, so a run killed at the wrong moment leaves half of one; and `torch.load` does not look at the checksums
in a file, so a flipped bit becomes a wrong weight. Hence both are done here.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from approx_attn.run import record

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "last.previous.ckpt"

NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there; of `last.ckpt` the one before is kept.

    Attributes:
        damaged: files that are replaced without being kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.damaged: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        keep = path.name == LAST and path not in self.damaged
        with record.open_atomically(path, path.with_name(PREVIOUS) if keep else None) as file:
            torch.save(checkpoint, file)
        self.damaged.discard(path)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """A checkpoint; the files beside it that it counts on are found where it lies now."""
        checkpoint = super().load_checkpoint(path, *args, **options)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and "dirpath" in state:
                _move(state, Path(path).resolve().parent)
        return checkpoint


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        path: checkpoint to continue from; None: from scratch.
        step: optimizer steps made there.
        damaged: checkpoints that were passed over.
    """

    path: Path | None = None
    step: int = 0
    damaged: frozenset[Path] = field(default_factory=frozenset)


def find_resume_point(folder: Path) -> ResumePoint:
    """The newest undamaged checkpoint of a run; a warning of one sentence says if that is not the last one."""
    reasons: dict[Path, str] = {}
    for path in (folder / FOLDER / LAST, folder / FOLDER / PREVIOUS):
        if not path.is_file():
            continue
        reason, step = _examine(path)
        if reason is None:
            if reasons:
                log.warning("%s; continuing from the checkpoint before, %s (step %d).", _told(reasons), path, step)
            return ResumePoint(path, step, frozenset(reasons))
        reasons[path] = reason
    if reasons:
        log.warning("%s; there is no other checkpoint, so the run starts from scratch.", _told(reasons))
    return ResumePoint(damaged=frozenset(reasons))


def saved_weights(path: str | Path) -> dict[str, Any]:
    """The weights in a checkpoint, by name.

    Raises:
        ValueError: in a few words, why they cannot be had.
    """
    reason = damage(path)
    if reason is not None:
        raise ValueError(reason)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except Exception as error:  # files that are not checkpoints fail in many ways
        raise ValueError(f"cannot be read ({' '.join(str(error).split())[:200]})") from error


def copy_to_extend(start: ResumePoint, folder: Path) -> ResumePoint:
    """Copy what a longer run needs of a finished one into its folder; early stopping counts anew there.

    Args:
        start: the checkpoint of the finished run.
        folder: of the longer run.

    Raises:
        DiskFullError: no space; nothing counts as copied.
    """
    assert start.path is not None
    saved = torch.load(start.path, map_location="cpu", weights_only=True)
    for best in _best_files(saved["callbacks"], start.path.parent):
        with record.open_atomically(folder / FOLDER / best.name) as file:
            file.write(best.read_bytes())
    saved["callbacks"] = {
        key: state for key, state in saved["callbacks"].items() if not key.startswith("EarlyStopping")
    }
    loop = saved["loops"]["fit_loop"]
    progress = loop["epoch_progress"]
    within = not loop["epoch_loop.batch_progress"]["is_last_batch"]
    if within and progress["total"]["completed"] != progress["total"]["processed"]:
        # The end of the run broke the epoch off, which counts as over there and goes on here.
        for part in ("total", "current"):
            progress[part]["processed"] -= 1
    path = folder / FOLDER / LAST
    with record.open_atomically(path) as file:
        torch.save(saved, file)
    return ResumePoint(path, start.step)


def _move(state: dict[str, Any], folder: Path) -> None:
    """Put another folder into the paths in the state of a callback that keeps checkpoints."""
    state["dirpath"] = str(folder)
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if state.get(key):
            state[key] = str(folder / Path(state[key]).name)
    state["best_k_models"] = {str(folder / Path(k).name): v for k, v in state.get("best_k_models", {}).items()}


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, in a few words; None if its checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except FileNotFoundError:
        return "is missing"
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        return f"is damaged ({' '.join(str(error).split())})"
    return None if broken is None else f"is damaged (wrong checksum of {broken})"


def _examine(path: Path) -> tuple[str | None, int]:
    """Why a run cannot continue from a checkpoint, None if it can; and the step of the checkpoint."""
    reason = damage(path)
    if reason is not None:
        return f"{path} {reason}", 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = [key for key in NEEDED if key not in saved]
        if missing:
            return f"{path} holds no {', '.join(missing)}", 0
        for best in _best_files(saved["callbacks"], path.parent):
            reason = damage(best)
            if reason is not None:  # its weights cannot be had again by training on from here
                return f"{best}, which {path.name} counts on, {reason}", 0
        return None, int(saved["global_step"])
    except Exception as error:  # files that are not checkpoints fail in many ways
        return f"{path} cannot be read ({' '.join(str(error).split())[:200]})", 0


def _best_files(callbacks: Mapping[str, Any], folder: Path) -> list[Path]:
    """The files in a folder that hold the best weights so far, according to the callbacks that watch a figure."""
    states = [state for state in callbacks.values() if isinstance(state, Mapping) and state.get("monitor")]
    return [folder / Path(state["best_model_path"]).name for state in states if state.get("best_model_path")]


def _told(reasons: Mapping[Path, str]) -> str:
    return " and ".join(dict.fromkeys(reasons.values()))
