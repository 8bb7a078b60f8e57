"""Loggers that write into the folder of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from approx_attn.run import record


class RunCSVLogger(CSVLogger):
    """Lightning's `CSVLogger` whose `metrics.csv` goes on where a resumed run goes on.

    Lightning's own deletes the file of the run that it continues. Here the rows up to the checkpoint stay, and
    those after it, which the resumed run logs again, go: every step is in the file once.

    Args:
        save_dir, name, version: the file is `<save_dir>/<name>/<version>/metrics.csv`.
        prefix: put in front of the name of every figure.

    Attributes:
        resume_step: optimizer steps made before; set it before the trainer starts. 0: a new file.
    """

    def __init__(self, save_dir: str | Path, name: str = "", version: str = "", prefix: str = "") -> None:
        super().__init__(save_dir, name=name, version=version, prefix=prefix)
        self.resume_step = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> _Writer:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.resume_step)
        return self._experiment  # type: ignore[return-value]


class RunMLFlowLogger(MLFlowLogger):
    """Lightning's `MLFlowLogger`, which without an address keeps a database of its own in the folder of the run.

    Args:
        save_dir: the folder of the run.
        tracking_uri: address of a server; None: `mlflow.db` in `save_dir`.
        experiment_name, run_name, log_model: as of `MLFlowLogger`.
    """

    def __init__(
        self,
        save_dir: str | Path,
        tracking_uri: str | None = None,
        experiment_name: str = "approx-attn",
        run_name: str | None = None,
        log_model: bool = False,
    ) -> None:
        folder = Path(save_dir).resolve()
        address = tracking_uri or f"sqlite:///{folder / 'mlflow.db'}"
        super().__init__(
            experiment_name,
            run_name,
            tracking_uri=address,
            log_model=log_model,
            artifact_location=None if tracking_uri else str(folder / "mlflow"),
        )
        self._folder = None if tracking_uri else folder

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        return super().experiment


class _Writer(ExperimentWriter):
    """Writes the rows; a file is rewritten whole or not at all."""

    def __init__(self, log_dir: str, resume_step: int) -> None:
        self._resume_step = resume_step
        super().__init__(log_dir)

    def save(self) -> None:
        with record.disk_full_named(self.metrics_file_path):
            super().save()

    def _check_log_dir_exists(self) -> None:
        # Called where Lightning deletes an earlier file. Rows carry the number of steps made before theirs.
        path = Path(self.metrics_file_path)
        header, rows = _read(path) if self._resume_step and path.is_file() else ([], [])
        rows = [row for row in rows if int(row["step"]) < self._resume_step]
        if rows:
            self.metrics_keys = header
            _write(path, header, rows)
        else:
            path.unlink(missing_ok=True)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _read(path)[1])


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a file; a last row that was cut off is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    rows = [row for row in reader if None not in row.values() and None not in row and row.get("step", "").isdigit()]
    return list(reader.fieldnames or []), rows


def _write(path: Path, header: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, fieldnames=header, restval="")
    writer.writeheader()
    writer.writerows(rows)
    record.write_text_atomically(path, buffer.getvalue())
