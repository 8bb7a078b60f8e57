"""The verbs train, evaluate and predict: what they print. Lightning is imported once there is something to run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from approx_attn.command import require_finite, run_command, run_plain, settings
from approx_attn.config.compose import plain
from approx_attn.errors import ConfigError, suggestion
from approx_attn.output import require_file

EVALUATE_KEYS = ("checkpoint", "split", "metrics", "convert", "data", "trainer", "progress_bar", "verbose")


def train_main(arguments: Sequence[str]) -> int:
    """`approx-attn train`: run what the command line says and print where the results are."""
    return run_command("train", _train_and_report, arguments, check=_check_run)


def _check_run(config: DictConfig) -> None:
    from approx_attn.run.train import check_run

    check_run(config)


def _train_and_report(config: DictConfig) -> None:
    from approx_attn.metrics import metric_names
    from approx_attn.run.stored_metrics import how_to_get, lacking
    from approx_attn.run.train import train

    result = train(config)
    asked = metric_names(config.get("metrics"))
    of_asked = (key for key in result.metrics if key.startswith(tuple(f"test/{name}" for name in asked)))
    shown = dict.fromkeys(("test/accuracy", "test/loss", *of_asked))
    figures = ", ".join(f"{key} {result.metrics[key]:.4f}" for key in shown if key in result.metrics)
    begun = "extended" if result.record.get("extends") else "trained"
    known = "finished before" if result.task is None else ("continued" if result.resumed else begun)
    if result.record.get("tested_weights") == "last":
        known = f"{known} (tested: the last weights)"
    label = f"{result.record['name']} · {result.record['attention']} · seed {result.record['seed']}"
    print(f"{label}: {known}, {figures}\n  {result.run_dir}")
    for name in lacking(result.record, asked):
        print(f"  {name}: {how_to_get(name, result.run_dir)}")
    require_finite({key: value for key, value in result.metrics.items() if key.startswith("test/")})


def evaluate_main(arguments: Sequence[str]) -> int:
    """`approx-attn evaluate`: print the figures of a checkpoint."""
    # The file of the verb cannot know what options the data and the trainer of a checkpoint have.
    added = [f"+{word}" if word.startswith(("data.", "trainer.")) else word for word in arguments]
    return run_command("evaluate", _evaluate_and_report, added, check=_check_evaluation)


def _check_evaluation(config: DictConfig) -> dict[str, Any]:
    """The configuration of the verb as plain containers; refuses unknown keys, and a checkpoint that is not there."""
    options = plain(config)
    for key in options:
        if key not in EVALUATE_KEYS:
            raise ConfigError(f"{key} is not a key{suggestion(key, EVALUATE_KEYS)}")
    if not Path(str(options["checkpoint"])).is_file():
        raise ConfigError(f"checkpoint={str(options['checkpoint'])!r} is not a file.")
    return options


def _evaluate_and_report(config: DictConfig) -> None:
    options = _check_evaluation(config)
    from rich.console import Console
    from rich.table import Table

    from approx_attn.run.evaluate import evaluate

    metrics = evaluate(**options)
    print(options["checkpoint"])
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        table.add_row(key, f"{value:.6f}")
    Console().print(table)
    require_finite(metrics)


def predict_main(arguments: Sequence[str]) -> int:
    """`approx-attn predict`: write the class of every input to a file."""
    return run_plain("predict", lambda: _predict_and_write(settings("predict", arguments)), arguments)


def _predict_and_write(options: dict[str, Any]) -> None:
    output, data = require_file("output", options["output"]), options["data"]
    if output in [Path(str(item)) for item in ([data] if isinstance(data, str) else data)]:
        raise ConfigError(f"output={output} must be a file of its own, not what is read.")
    from dataclasses import astuple, fields

    from approx_attn.run.predict import Prediction, predict
    from approx_attn.run.record import write_text_atomically

    predictions = predict(
        options["checkpoint"], data, text_column=options["text_column"], batch_size=options["batch_size"]
    )
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(field.name for field in fields(Prediction))
    writer.writerows(astuple(prediction) for prediction in predictions)
    write_text_atomically(output, table.getvalue())
    print(f"Written: {output}, {len(predictions)} predictions")
