"""Reports hold what was put in, in one file, and let nothing through as markup."""

import re

from matplotlib.figure import Figure

from approx_attn.comparison.aggregate import comparison_rows
from approx_attn.comparison.comparison_report import write_comparison
from approx_attn.comparison.report import Report
from approx_attn.comparison.table import cells
from approx_attn.metrics import METRICS


def page() -> str:
    report = Report("A <b>title</b>", "sub")
    section = report.section("Section")
    section.text("para & graph").table(
        [{"name": "<script>alert(1)</script>", "value": 1.5}, {"name": "b", "value": None}], "cap"
    )
    figure = Figure()
    figure.subplots().plot([0, 1])
    section.figure(figure, "a figure").details("config", "key: '<i>'")
    return report.html()


def test_everything_is_escaped():
    html = page()
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "A &lt;b&gt;title" in html
    assert "key: &#39;&lt;i&gt;&#39;" in html


def test_the_page_needs_nothing_from_outside():
    html = page()
    assert html.count("<img") == 1
    assert "data:image/png;base64," in html
    assert "http" not in html.split("data:image")[0]
    assert "<link" not in html


def test_missing_cells_are_empty_and_number_columns_align_right(tmp_path):
    html = page()
    assert '<td class="number"></td>' in html
    assert '<th scope="col">name</th>' in html
    assert Report("t").save(tmp_path / "deep" / "report.html").read_text().startswith("<!doctype html>")


HOSTILE = "<img src=x onerror=alert(1)>|`a`${$"


ACCURACY = METRICS["accuracy"]


def finished_run(folder, **changes):
    return {
        "status": "finished",
        "metrics": {"test/accuracy": 0.5},
        "cost": dict.fromkeys(["exact_pairs", "total_pairs", "score_multiply_adds", "value_multiply_adds"], 1),
        "parameters": 1,
        "steps": 1,
        "spec": {},
        "environment": {"processor": HOSTILE, "torch_threads": 1, "packages": {}},
        "config": {"name": HOSTILE, HOSTILE: HOSTILE},
        "run_dir": str(folder / HOSTILE.replace("/", "")),
        "command": HOSTILE,
        **changes,
    }


def test_a_comparison_shows_hostile_names_and_errors_as_text(tmp_path):
    run = finished_run(tmp_path)
    failed = {**run, "status": "failed", "error": HOSTILE}
    records = {"exact": {1: run, 2: run}, f"topk a={HOSTILE}": {1: run, 2: failed}, f"topk a={HOSTILE}2": {1: run}}
    rows = comparison_rows(records, "exact", ACCURACY, {})
    write_comparison(tmp_path, rows, records, ACCURACY, HOSTILE, HOSTILE, "exact")
    html = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") > 10
    line = next(line for line in (tmp_path / "table.md").read_text().splitlines() if "topk" in line)
    assert "<img" not in line
    assert len(re.findall(r"(?<!\\)\|", line)) == len(cells(rows[0], ACCURACY)) + 1
    assert (tmp_path / "budgets.png").exists()


def test_runs_of_different_commits_are_said_to_be(tmp_path):
    def caption(*commits):
        environment = {"processor": "p", "torch_threads": 1, "packages": {}}
        runs = {n: finished_run(tmp_path, environment={**environment, "commit": c}) for n, c in enumerate(commits)}
        rows = comparison_rows({"exact": runs}, "exact", ACCURACY, {})
        return write_comparison(tmp_path, rows, {"exact": runs}, ACCURACY, "n", "c", "exact")

    assert "commits" not in caption("abc", "abc")
    assert "different commits: abc (2 runs), unknown (1 runs)" in caption("abc", None, "abc")
