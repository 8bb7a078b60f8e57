"""What happens to a run that a signal stops: it ends with the code that schedulers expect, and can be continued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping


def signals_to_watch(environment: Mapping[str, str] = os.environ) -> list[signal.Signals]:
    """Signals after which a run stops at the end of its step.

    SIGTERM and SIGINT always; SIGUSR1 and SIGUSR2 in a job of Slurm, which sends them as a warning some time
    before the end if the job asks for it (`#SBATCH --signal=SIGUSR1@90`).
    """
    warnings = [signal.SIGUSR1, signal.SIGUSR2] if "SLURM_JOB_ID" in environment else []
    return [signal.SIGTERM, signal.SIGINT, *warnings]


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Put back the handlers of signals that a library replaces for the rest of the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    before = {signum: signal.getsignal(signum) for signum in watched}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if handler is not None:  # None: set outside Python
                signal.signal(signum, handler)


def was_requeued(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Slurm started this very job before: then its run is to be continued, not begun again."""
    return environment.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def requeue(environment: Mapping[str, str] = os.environ) -> None:
    """Ask Slurm to start this job again; says so if that cannot be done."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        print(f"job {job} could not be requeued: {' '.join(str(detail).split())}", file=sys.stderr)
