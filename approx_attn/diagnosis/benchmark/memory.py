"""Peak memory of one pass on a CPU: the high-water mark of a process that does nothing else."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

Growth = Callable[[Callable[[], object]], int]  # bytes that a call takes
MemoryOfOnePass = Callable[[dict[str, Any], int, str, dict[str, Any], Growth], int]


class OutOfMemory(Exception):
    """A pass needs more memory than there is."""


def fresh_process_memory(
    measure: MemoryOfOnePass, spec: Mapping[str, Any], length: int, pass_name: str, cfg: Mapping[str, Any]
) -> int:
    """Bytes by which the resident memory of a new process grows at most during one pass.

    Args:
        measure: builds the inputs, makes the pass and returns the bytes that it took; a function of a module, which
            the new process imports.
        spec: `name` and options of the mechanism.
        length: tokens.
        pass_name: `forward`, `train` or `decode`.
        cfg: the configuration of the benchmark.

    Raises:
        OutOfMemory: the process could not get the memory, or was killed for it.
        RuntimeError: anything else went wrong in it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_here, args=(measure, dict(spec), length, pass_name, dict(cfg), sender))
    process.start()
    sender.close()  # else a child that was killed would be waited for forever
    try:
        kind, value = receiver.recv()
    except EOFError:
        kind, value = "killed", None
    process.join()
    if kind == "bytes":
        return int(value)
    if kind in ("memory", "killed"):
        raise OutOfMemory(f"attention={spec['name']} at {length} tokens")
    raise (ValueError if kind == "value" else RuntimeError)(value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the ways in which torch and Python say it."""
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "not enough memory" in text or "can't allocate memory" in text or "out of memory" in text


def _measure_here(
    measure: MemoryOfOnePass,
    spec: dict[str, Any],
    length: int,
    pass_name: str,
    cfg: dict[str, Any],
    sender: Connection,
) -> None:
    """What the new process does."""
    try:
        limit = cfg["memory_limit"]
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        allowed = int(limit * 2**30) if limit is not None else free
        # An allocation beyond it fails with a clean error; without it the system might kill whom it likes.
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        if cfg["threads"] is not None:
            torch.set_num_threads(int(cfg["threads"]))
        sender.send(("bytes", measure(spec, length, pass_name, cfg, _growth)))
    except Exception as error:
        kind = "memory" if is_out_of_memory(error) else "value" if isinstance(error, ValueError) else "error"
        sender.send((kind, f"{type(error).__name__}: {error}" if kind == "error" else str(error)))


def _growth(run: Callable[[], object]) -> int:
    """Bytes from the resident memory before a call to the high-water mark after it."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: forget the high-water mark that building the inputs left
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    """A field of /proc/self/status in bytes; elsewhere the high-water mark stands for both."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
