"""Tables for people: whole numbers on a narrow terminal, nothing cut where there is no edge."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from approx_attn.output import print_table

LAYER = "model.encoder.layer.11.attention.self"


def printed(width: int | None, capsys: pytest.CaptureFixture[str]) -> str:
    table = Table(title="errors", caption="nothing fine-tuned")
    table.add_column("layer")
    for column in range(12):
        table.add_column(f"column {column}", justify="right")
    table.add_row(LAYER, *(f"{column}.12345" for column in range(12)))
    if width is None:
        print_table(table)
        return capsys.readouterr().out
    file = io.StringIO()
    print_table(table, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_numbers_stay_whole_on_a_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(width, capsys)
    assert all(f" {column}.12345 " in text and f"column {column} " in text for column in range(12))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("errors") == text.count("nothing fine-tuned") == 1
    assert width < 60 or LAYER in text


def test_nothing_is_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (row,) = [line for line in printed(None, capsys).splitlines() if LAYER in line]
    assert all(f"{column}.12345" in row for column in range(12))
