"""metrics.csv of runs that are continued: every step once, whatever a killed run left of it."""

import csv
from pathlib import Path

import pytest

from approx_attn.run.loggers import RunCSVLogger


def logger(folder: Path, resume_step: int = 0) -> RunCSVLogger:
    made = RunCSVLogger(folder)
    made.resume_step = resume_step
    return made


def log(folder: Path, steps: range, resume_step: int = 0, name: str = "loss") -> None:
    made = logger(folder, resume_step)
    for step in steps:
        made.log_metrics({name: step / 10}, step)
        made.save()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    log(tmp_path, range(3))
    log(tmp_path, range(2))
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1"]


def test_a_continued_run_keeps_what_was_before_its_checkpoint_and_logs_the_rest_again(tmp_path: Path) -> None:
    log(tmp_path, range(6))
    whole = rows(tmp_path)
    log(tmp_path, range(4, 6), resume_step=4)
    assert rows(tmp_path) == whole


@pytest.mark.parametrize("torn", ["0.3", "0.3,", "\x00\x00\x00", '"0.3'])
def test_a_row_that_was_cut_off_goes(tmp_path: Path, torn: str) -> None:
    log(tmp_path, range(3))
    whole = rows(tmp_path)
    with (tmp_path / "metrics.csv").open("a", newline="") as file:
        file.write(torn)
    logger(tmp_path, 10).experiment.save()
    assert rows(tmp_path) == whole


def test_figures_that_come_later_get_a_column_of_their_own(tmp_path: Path) -> None:
    log(tmp_path, range(2))
    made = logger(tmp_path, 2)
    made.log_metrics({"accuracy": 0.5}, 2)
    made.save()
    made.log_metrics({"loss": 0.25, "accuracy": 0.75}, 3)
    made.save()
    assert [(row["loss"], row["accuracy"]) for row in rows(tmp_path)] == [
        ("0.0", ""),
        ("0.1", ""),
        ("", "0.5"),
        ("0.25", "0.75"),
    ]
