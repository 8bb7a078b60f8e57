"""What a table says in words, and how it reads in Markdown and CSV."""

import csv
import io
import math

import pytest

from approx_attn.comparison.statistics import paired_difference, summarise
from approx_attn.comparison.table import ComparisonRow, cells, comparison_csv
from approx_attn.metrics import METRICS
from approx_attn.output import to_markdown

ACCURACY, LOSS = METRICS["accuracy"], METRICS["loss"]


def row(values, reference, name="topk", **more):
    return ComparisonRow(name, summarise(values), paired_difference(values, reference, **more))


@pytest.mark.parametrize(
    ("compared", "verdict"),
    [
        (row([0.9, 0.91, 0.93], [0.8, 0.82, 0.82]), "better"),
        (row([0.7, 0.71, 0.73], [0.8, 0.82, 0.82]), "worse"),
        (row([0.81, 0.8, 0.83], [0.8, 0.82, 0.82]), "not distinguishable"),
        (row([0.82, 0.83], [0.8, 0.81]), "no spread: no verdict"),
        (row([0.82, 0.83], [0.8, 0.81], item_spread=0.01), "not distinguishable"),
        (row([0.8, 0.81], [0.8, 0.81]), "equal for every seed"),
        (row([0.9], [0.8]), "one seed: no verdict"),
        (ComparisonRow("exact", summarise([0.9]), is_reference=True), "reference"),
        (ComparisonRow("topk", summarise([0.9])), "nothing to compare with"),
        (ComparisonRow("topk"), "no finished run"),
    ],
)
def test_verdicts(compared, verdict):
    assert compared.verdict(ACCURACY) == verdict


def test_less_is_better_for_a_loss():
    assert row([0.7, 0.71, 0.73], [0.8, 0.82, 0.82]).verdict(LOSS) == "better"


def test_without_an_interval_the_table_shows_none():
    shown = to_markdown([cells(row([0.82, 0.83], [0.8, 0.81]), ACCURACY)]).splitlines()[2]
    assert "+2.00 |" in shown
    assert "nan" not in shown
    (line,) = csv.DictReader(io.StringIO(comparison_csv([row([0.82, 0.83], [0.8, 0.81])], ACCURACY)))
    assert (line["difference_low"], line["difference_high"], line["p_value"]) == ("", "", "")
    assert float(line["difference"]) == pytest.approx(0.02)
    assert not math.isnan(float(line["std"]))


def test_names_carry_mechanism_and_options():
    named = ComparisonRow("eigen_row keep=0.1 rank=null")
    assert named.mechanism == "eigen_row"
    assert named.settings == {"keep": "0.1", "rank": "null"}
    assert ComparisonRow("exact").settings == {}
