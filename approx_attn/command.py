"""How verbs of the command line run, with Hydra and without: everything is checked first, errors are one sentence."""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from approx_attn.config.compose import compose_config, config_dir, further_files, parse_overrides, plain
from approx_attn.config.help import help_page
from approx_attn.config.trust import plugins, refuse_taken_names, trust
from approx_attn.errors import ConfigError, Stopped, Unsuccessful, require_count, suggestion

WRONG_INPUT = 2  # exit code of a command that was refused
FAILED = 1  # ... of one that started and failed
INTERRUPTED = 130


def require_finite(figures: Mapping[str, float]) -> None:
    """Raise `Unsuccessful`, naming the first figure that is NaN or infinite."""
    for key, value in figures.items():
        if not math.isfinite(value):
            raise Unsuccessful(f"{key} is {value}, so there is no result.")


def run_command(
    config_name: str,
    run: Callable[[DictConfig], None],
    arguments: Sequence[str],
    check: Callable[[DictConfig], object] | None = None,
) -> int:
    """Run a function on the configuration that a command line gives, with Hydra's flags (`-m`, `--cfg job`, `--help`).

    Args:
        config_name: file in the folder of configurations, without ending.
        run: called with each configuration, in this process.
        arguments: the command line after the verb.
        check: called with every configuration of a sweep (`-m`) before the first is run; raises `ConfigError`.

    Returns:
        The exit code; errors have been printed to the standard error stream.
    """
    verbose = any(argument.lower() == "verbose=true" for argument in arguments)
    codes, named = [0], plugins()

    def run_job(config: DictConfig) -> None:
        # Hydra would print a page of its own about an error; and one failed job must not end a sweep.
        try:
            trust(*named)  # a launcher may have taken the job to another process
            run(config)
        except Exception as error:
            codes.append(_report(error, verbose))
            if os.getpid() != this_process:
                # A launcher took the job elsewhere: there is nobody here to read the code.
                error.__dict__["shown_on"] = _error_stream()
                raise

    def compose_and_run() -> None:
        flags, words = read_flags(config_name, arguments)
        further = further_files(*([] if flags.config_dir is None else [flags.config_dir]))
        if flags.help:
            print(help_page(flags.config_name or config_name, [*further, *flags.overrides]))
            return
        if not (flags.hydra_help or flags.info or flags.shell_completion):
            jobs = [compose_config([*further, *job], flags.config_name or config_name) for job in sweep_jobs(flags)]
            if check is not None and flags.multirun:
                for config in jobs:
                    check(config)
        with _hydra_started_as([*words, *further_files()]):
            decorate = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)
            decorate(run_job)()  # Hydra composes and passes the configuration

    this_process = os.getpid()
    return exit_code(compose_and_run, verbose) or max(codes)


def read_flags(verb: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags of a command line, and its arguments in the order in which Hydra reads them: flags first.

    Raises:
        ConfigError: an unknown flag, flags that exclude each other, or a folder of further files that is not there
            or has a file of a name that this command has already.
    """

    def refuse(message: str) -> None:
        raise ConfigError(f"{verb}: {' '.join(message.split())}.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign, assignment]
    flags = parser.parse_intermixed_args(list(arguments))
    if flags.config_path is not None:
        refuse("--config-path would take away the files that belong to this command, use --config-dir to add a folder")
    chosen = {"-m": flags.multirun, "--run": flags.run, "--cfg": flags.cfg, "--info": flags.info}
    together = [flag for flag, given in (chosen | {"--shell-completion": flags.shell_completion}).items() if given]
    if len(together) > 1:
        refuse(f"{' and '.join(together)} cannot be given together, use one of them")
    if flags.resolve and not flags.cfg:
        refuse("--resolve goes with --cfg job")
    if flags.config_dir is not None:
        folder = Path(flags.config_dir).absolute()
        if not folder.is_dir():
            refuse(f"--config-dir={folder} is not a folder")
        refuse_taken_names(f"{verb}: --config-dir", folder)
        flags.config_dir = str(folder)
    return flags, [*(word for word in arguments if word not in flags.overrides), *flags.overrides]


def run_plain(name: str, run: Callable[[], object], arguments: Sequence[str]) -> int:
    """Run a verb whose arguments Hydra does not compose.

    Args:
        name: of the verb and its file in the folder of configurations.
        run: called without arguments; errors are one sentence, after a traceback with `verbose=true`.
        arguments: the command line after the verb.

    Returns:
        The exit code.
    """

    def run_without_flags() -> None:
        for argument in arguments:
            if argument.startswith("-"):
                raise ConfigError(
                    f"{name} takes key=value and --help, got {argument!r}; flags of Hydra, such as -m and --cfg job, "
                    "are those of train and evaluate."
                )
        run()

    return exit_code(run_without_flags, verbose="verbose=true" in arguments)


def settings(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`configs/<name>.yaml` with `key=value` arguments on top.

    Not composed by Hydra, to which `model=` and `data=` would be configurations for training.

    Raises:
        ConfigError: an argument that cannot be read, an unknown key, or a missing value.
    """
    config = OmegaConf.load(config_dir() / f"{name}.yaml")
    accepted = [str(key) for key in config]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"argument {argument!r} cannot be read; write key=value.")
        if key not in accepted:
            raise ConfigError(f"{key} is not a key of {name}{suggestion(key, accepted)}")
    try:
        return plain(OmegaConf.merge(config, OmegaConf.from_dotlist(list(arguments))))  # type: ignore[arg-type]
    except YAMLError as error:
        raise ConfigError(f"arguments cannot be read: {' '.join(str(error).split())}") from error


def as_list(value: Any) -> list[Any]:
    """A list as it is; a single value as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def require_counts(values: Mapping[str, Any], least: int = 1) -> None:
    """Refuse values by key, or lists of them, that are not all whole numbers of at least `least`.

    Raises:
        ConfigError: the first that is not.
    """
    try:
        for key, value in values.items():
            for count in as_list(value):
                require_count(key, count, least)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def require_shares(key: str, values: Sequence[Any]) -> None:
    """Refuse values that are not all floats in (0, 1].

    Raises:
        ConfigError: the first that is not.
    """
    for value in values:
        if not isinstance(value, float) or not 0.0 < value <= 1.0:
            raise ConfigError(f"{key} must list shares in (0, 1], got {value!r}.")


def mechanism_spec(entry: Any) -> dict[str, Any]:
    """`{"name": ..., **options}` of an entry of `attention=[...]`, which is a name or such a mapping.

    Raises:
        ConfigError: neither of both, or an unknown name or option.
    """
    from approx_attn.attention.registry import attention_options  # torch, which not every verb needs

    spec = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"attention: an entry with options needs a name, got {entry!r}.")
    try:
        known = attention_options(spec["name"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for option in spec:
        if option not in (*known, "name"):
            raise ConfigError(f"attention.{option} is not an option of {spec['name']}{suggestion(str(option), known)}")
    return {str(key): value for key, value in spec.items()}


def exit_code(run: Callable[[], object], verbose: bool = False) -> int:
    """Call a function; what it raises becomes one sentence on the standard error stream and an exit code."""
    try:
        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Stopped as stop:
        return _report_stop(stop)
    except Exception as error:
        return _report(error, verbose)
    return 0


def sweep_jobs(flags: argparse.Namespace) -> list[list[str]]:
    """The override lists of the jobs that a command line starts: one, or a sweep's product.

    Raises:
        ConfigError: an override that cannot be read, a sweep (`a=1,2`) without `-m`, or one over nothing.
    """
    parsed = parse_overrides(flags.overrides, flags.config_dir)
    for override, text in zip(parsed, flags.overrides, strict=True):
        if override.is_sweep_override() and not flags.multirun:
            raise ConfigError(f"{text}: several values for one key are a sweep; add -m to run one after the other.")
    if not flags.multirun:
        return [list(flags.overrides)]
    for override, text in zip(parsed, flags.overrides, strict=True):
        if override.is_sweep_override() and not list(override.sweep_string_iterator()):
            raise ConfigError(f"{text} means no value at all.")
    return list(BasicSweeper.split_arguments(parsed, max_batch_size=None)[0])


@contextmanager
def _hydra_started_as(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`, and raises errors as they are (instead of printing its own page) if told so."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _report_stop(stop: Stopped) -> int:
    """Print where a stopped run stands and return the exit code that says which signal it was."""
    print(stop.message, file=sys.stderr)
    return int(stop.code or 0)


def _report(error: Exception, verbose: bool) -> int:
    """Print an error as one line (after its traceback if `verbose`) and return the exit code that it means."""
    code = WRONG_INPUT if isinstance(error, ConfigError) else FAILED
    if getattr(error, "shown_on", None) == _error_stream():
        return code  # the process that it comes from has said so, in the same place
    if verbose:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConfigError | Unsuccessful):
        print(f"error: {text}", file=sys.stderr)
        return code
    hint = "" if verbose else " (verbose=true shows where)"
    print(f"error: {type(error).__name__}: {text}{hint}", file=sys.stderr)
    return code


def _error_stream() -> tuple[int, int]:
    """What the standard error stream of this process is connected to."""
    status = os.fstat(2)
    return status.st_dev, status.st_ino
