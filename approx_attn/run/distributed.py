"""Training runs of several processes: who starts them, what they agree on, who writes.

`trainer=ddp trainer.devices=4` is one run of four processes. Where torchrun or Slurm has started them, each comes
through `training.train` and joins the others. Where nobody has, the process that was asked starts them on this
machine through `torch.distributed.launcher`, waits, and reads the record; so a sweep, a comparison and a notebook
start distributed runs like any other.

Only the first process decides on the folder, holds its lock and writes records.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from approx_attn.config.trust import plugins, trust
from approx_attn.errors import ConfigError, Stopped
from approx_attn.run.signals import handlers_restored

T = TypeVar("T")

JOIN_SECONDS = 900  # how long started processes wait for one another
STOP_SECONDS = 60  # how long they have for a checkpoint after a signal


class FullySharded(ModelParallelStrategy):
    """Parameters, gradients and optimizer state split over all processes (FSDP2), checkpoints in one file.

    `SequenceTask.configure_model` says which modules are gathered at a time.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class ProcessError(RuntimeError):
    """A process of a distributed run failed; the message is its own."""


def strategy_of(node: Mapping[str, Any]) -> str | Strategy:
    """The strategy that `trainer.strategy` names: Lightning's names, and `fsdp` for `FullySharded`.

    Raises:
        ConfigError: not a name.
    """
    name = node.get("strategy", "auto")
    if not isinstance(name, str):
        raise ConfigError(f"trainer.strategy must be a name such as auto, ddp or fsdp, got {name!r}.")
    return FullySharded() if name == "fsdp" else name


def is_started() -> bool:
    """Whether torchrun or Slurm has started this process as one of several."""
    return dist.is_torchelastic_launched() or int(os.environ.get("SLURM_NTASKS") or 1) > 1


def is_joined() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    """How many processes train together, this one among them."""
    return dist.get_world_size() if is_joined() else 1


def is_first() -> bool:
    """Whether this process writes records: the first of several, or the only one."""
    return not is_joined() or dist.get_rank() == 0


def must_start(trainer: pl.Trainer) -> bool:
    """Whether a trainer needs processes that nobody has started.

    Raises:
        ConfigError: a strategy that starts processes in ways of its own, or several machines without a scheduler.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
        return False
    if getattr(strategy, "_start_method", "popen") not in (None, "popen"):
        raise ConfigError(
            "trainer.strategy must be ddp or fsdp, whose processes are started here, not a spawn or fork."
        )
    environment = strategy.cluster_environment
    if environment is None or environment.creates_processes_externally:
        return False
    if trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} needs processes on every machine: "
            "start them with launcher=slurm, srun or torchrun."
        )
    return True


def start(run: Callable[[dict[str, Any]], T], config: dict[str, Any], processes: int) -> T:
    """Call a function in several new processes of this machine, joined as torchrun joins them.

    Args:
        run: importable function; called with `config` in every process.
        config: plain containers.
        processes: how many.

    Returns:
        What the first process returned.

    Raises:
        ProcessError: one of them failed; the others have been ended.
        Stopped: a signal ended the run.
    """
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_timeout=JOIN_SECONDS,
        local_addr="localhost",
        run_id=uuid.uuid4().hex,
        max_restarts=0,  # a run that is started again continues from its checkpoint
        start_method="spawn",
        shutdown_timeout=STOP_SECONDS,
    )
    with _hushed("torch.distributed.elastic"), _hushed("torch.multiprocessing"), handlers_restored():
        try:
            results: dict[int, T] = elastic_launch(settings, _in_process)(run, config, plugins())
        except ChildFailedError as error:
            raise ProcessError(_first_message(error)) from error
        except SignalException as error:  # which the processes got too, and had time to write a checkpoint
            name = signal.Signals(error.sigval).name
            raise Stopped(error.sigval, f"stopped by {name}; the same command with resume=true continues.") from error
    return results[0]


def _in_process(run: Callable[[dict[str, Any]], T], config: dict[str, Any], packages: tuple[str, ...]) -> T:
    trust(*packages)
    with _hushed("torch.distributed.elastic"):
        return run(config)


def _first_message(error: ChildFailedError) -> str:
    """What the process that failed first said."""
    rank, failure = error.get_first_failure()
    message: Any = failure.message
    with contextlib.suppress(ValueError, TypeError):
        message = json.loads(message)  # text in some versions of torch, a mapping in others
    while isinstance(message, dict):
        message = message.get("message")
    return f"{message} (process {rank} of the run)"


@contextlib.contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Without the messages of a logger: what failed is raised, and said once."""
    logger = logging.getLogger(name)
    level, disabled = logger.level, logger.disabled
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.disabled = disabled


@contextlib.contextmanager
def joined(trainer: pl.Trainer) -> Iterator[None]:
    """Be one of the processes of a distributed run until the end of the block; nothing for a run of one process."""
    if trainer.world_size == 1 or is_joined():
        yield
        return
    strategy = trainer.strategy
    assert isinstance(strategy, ParallelStrategy)
    strategy.connect(pl.LightningModule())  # some strategies ask for one
    strategy.setup_environment()
    try:
        yield
    finally:
        if is_joined():
            dist.destroy_process_group()


def agree(decide: Callable[[], T]) -> T:
    """What the first process decides, in all of them; what it raises, they raise."""
    if not is_joined():
        return decide()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def first_only(manager: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A context, such as a lock, that the first process holds for all: the others enter later and leave earlier."""
    if not is_joined():
        with manager():
            yield
        return
    with manager() if is_first() else contextlib.nullcontext():
        dist.barrier()
        yield
        dist.barrier()  # a process that raises does not get here, and the launcher ends the others


def load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """`load_state_dict` of whole weights into a module that may be split over processes."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def gathered(value: T) -> list[T]:
    """`value` of every process, in the order of their ranks, in all of them."""
    if not is_joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
