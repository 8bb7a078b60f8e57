"""The console command: `approx-attn <verb> [key=value ...]`."""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from approx_attn.config.files import config_dir, config_file
from approx_attn.config.trust import take_plugins
from approx_attn.errors import ConfigError, ConfigWarning, suggestion

# verb -> (function that takes the arguments and returns the exit code, what it does); imported when used
VERBS: dict[str, tuple[str, str]] = {
    "train": ("approx_attn.run.verbs:train_main", "train and test one model: data=digits attention=eigen_row seed=1"),
    "evaluate": ("approx_attn.run.verbs:evaluate_main", "test a checkpoint: checkpoint=<file>"),
    "predict": (
        "approx_attn.run.verbs:predict_main",
        "classes of new texts or images: checkpoint=<file> data=<file or folder> output=<file.csv>",
    ),
    "compare": (
        "approx_attn.comparison.command:main",
        "train what is missing, print one table: attention=[exact,topk]",
    ),
    "calibrate": ("approx_attn.diagnosis.calibrate:main", "fit bases on a live model and its data"),
    "reconstruct": (
        "approx_attn.diagnosis.calibrate:reconstruct_main",
        "error of the attention output by mechanism, budget and layer: model=<...> data=<text file>",
    ),
    "allocate": (
        "approx_attn.diagnosis.allocate:main",
        "budgets by layer and head from a target: model=<...> data=<text file> mean_share=0.125",
    ),
    "perplexity": (
        "approx_attn.diagnosis.perplexity:main",
        "perplexity and bits per byte by mechanism and budget: model=<causal model> data=<text file>",
    ),
    "embed": (
        "approx_attn.diagnosis.embed:main",
        "how far text embeddings move with other attention: model=<encoder> calibration=<texts> data=[<texts>]",
    ),
    "analyze": (
        "approx_attn.diagnosis.analysis.command:main",
        "spectra, overlaps, reconstruction, norms of a model",
    ),
    "benchmark": ("approx_attn.diagnosis.benchmark.command:main", "time, memory and error of mechanisms side by side"),
    "estimate": (
        "approx_attn.diagnosis.estimate:main",
        "memory and time of a run before it is started: data=listops trainer=ddp",
    ),
    "runs": ("approx_attn.comparison.listing:main", "list, filter and prune runs: status=failed optimizer.lr=0.004"),
    "results": (
        "approx_attn.comparison.document:main",
        "write RESULTS.md anew from records of comparisons: publish=[listops,mqar]",
    ),
    "list": ("approx_attn.cli:list_mechanisms", "the mechanisms: what they can do, what they cost"),
}


COMPOSED_BY_HYDRA = ("train", "evaluate")  # whose help shows what the words beside it give
CLOSED_PIPE = 141  # what a shell says of a command that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, *rest = arguments
    if verb not in VERBS and verb != "--version":
        print(f"error: {verb!r} is not a verb{suggestion(verb, VERBS)}", file=sys.stderr)
        return 2
    return run_verb(verb, rest)


def run_verb(verb: str, arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the scripts are doors to this."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _print_what_can_be_printed()
    if "--version" in (verb, *arguments):
        from approx_attn import __version__

        print(f"approx-attn {__version__}")
        return 0
    keys = config_dir() / f"{verb}.yaml"
    if {"-h", "--help"} & set(arguments) and verb not in COMPOSED_BY_HYDRA and keys.is_file():
        print(keys.read_text(encoding="utf-8"), end="")
        return 0
    try:
        arguments = take_plugins(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    module, _, function = VERBS[verb][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
            code = run(arguments)
        sys.stdout.flush()
    except OSError as error:  # of the standard output; verbs report all other errors themselves
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail at exit again
        if isinstance(error, BrokenPipeError):  # nobody reads any more, as after `| head`
            return CLOSED_PIPE
        print(f"error: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1
    return code


def _print_what_can_be_printed() -> None:
    """A terminal or pipe without Unicode gets a question mark in place of what it cannot show, not an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """Print what this package warns of as one line, without the line of code that says so."""
    if issubclass(category, ConfigWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        otherwise(message, category, *rest)


def usage() -> str:
    """The help page."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in VERBS]
    return "\n".join(
        [
            "usage: approx-attn <verb> [key=value ...]",
            "",
            *lines,
            "",
            "approx-attn <verb> --help shows the keys of a verb; -m sweeps over a=1,2; --version tells the version.",
            "plugins=[my_package] imports code of your own for any verb: mechanisms, models, data, metrics, callbacks.",
            "exit codes: 0 done; 1 failed, or a run of several did, or a figure is not finite, or no run was found;",
            "            2 refused before anything was written; 128 + n stopped by signal n, and can be continued.",
        ]
    )


CAPABILITIES = {
    "causal": "causal",
    "cross": "cross",
    "padding_mask": "padding",
    "arbitrary_mask": "any mask",
    "variable_length": "any length",
    "returns_weights": "weights",
}


def list_mechanisms(arguments: Sequence[str] = ()) -> int:
    """`approx-attn list`: the registry as a table; `approx-attn list <name>`: the options of one mechanism."""
    if {"-h", "--help"} & set(arguments):
        print("usage: approx-attn list [<name> ...]: the mechanisms, or the options of some")
        return 0
    from approx_attn.attention import available_attention

    for name in arguments:
        if name not in available_attention():
            print(f"error: attention={name} is unknown{suggestion(name, available_attention())}", file=sys.stderr)
            return 2
    for name in arguments:
        _print_options(name)
    if not arguments:
        _print_registry()
    return 0


def _print_registry() -> None:
    from rich.table import Table

    from approx_attn.attention import attention_class, available_attention
    from approx_attn.output import print_table

    table = Table(title="Attention mechanisms", title_justify="left", caption_justify="left")
    table.caption = (
        "cost: multiply-adds of one head; n queries and keys, d head dimension.\n"
        "learned: has parameters of its own.\n"
        f"cannot: of {', '.join(CAPABILITIES.values())};\n"
        "asking for it is an error. approx-attn list <name> shows options."
    )
    table.add_column("attention=", no_wrap=True)
    table.add_column("cost of scores", overflow="fold")
    table.add_column("learned", justify="center")
    table.add_column("cannot")
    for name in available_attention():
        cls = attention_class(name)
        cannot = [word for key, word in CAPABILITIES.items() if not getattr(cls.capabilities, key)]
        learned = "✓" if cls.capabilities.has_parameters else ""
        table.add_row(name, cls.cost_formula, learned, ", ".join(cannot) or "–")
    print_table(table)


def _print_options(name: str) -> None:
    import inspect

    from rich.table import Table
    from rich.text import Text

    from approx_attn.attention import attention_class, attention_options
    from approx_attn.config.help import meanings
    from approx_attn.output import print_table

    described = config_file("attention", name)
    said = meanings(described) if described else {}
    summary = inspect.cleandoc(attention_class(name).__doc__ or "").split("\n\n")[0]
    table = Table(title=f"attention={name}", title_justify="left", caption=summary, caption_justify="left")
    table.add_column("option", no_wrap=True)
    table.add_column("default")
    table.add_column("meaning")
    for option, parameter in attention_options(name).items():
        default = "null" if parameter.default is None else str(parameter.default).lower()
        table.add_row(f"attention.{option}", default, Text(said.get(option, "")))
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
