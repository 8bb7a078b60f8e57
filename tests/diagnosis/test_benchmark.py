"""The benchmark: what it measures and refuses. How fast anything is, is no matter of tests."""

from __future__ import annotations

import csv
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from approx_attn import cli
from approx_attn.attention import build_attention
from approx_attn.attention.eigen.cluster import EigenClusterAttention
from approx_attn.diagnosis.benchmark.command import benchmark, memory_of_one_pass, output_error
from approx_attn.diagnosis.benchmark.memory import OutOfMemory, fresh_process_memory, is_out_of_memory
from approx_attn.diagnosis.benchmark.plots import non_dominated, plot_frontier, plot_time
from approx_attn.diagnosis.benchmark.settings import check, read_settings
from approx_attn.diagnosis.benchmark.sources import LONGEST_BASIS, Source, StructuredInputs, load_inputs
from approx_attn.diagnosis.benchmark.table import Row
from approx_attn.errors import ConfigError
from helpers import save_tiny_bert

SMALL = ["length=[48]", "num_heads=2", "head_dim=8", "repeats=2", "warm_up=0", "sequences=2", "progress_bar=false"]


def config(*arguments: str) -> dict:
    return read_settings([*SMALL, "memory=false", *arguments])


def run(tmp_path: Path, *arguments: str) -> list[Row]:
    return benchmark(config(f"output={tmp_path}", *arguments))


def test_one_row_per_mechanism_length_and_pass_and_the_files(tmp_path):
    rows = run(
        tmp_path,
        "attention=[exact,{name: eigen_cluster, block_size: 8, keep: 0.25}]",
        "length=[24,48]",
        "pass=[forward,train]",
    )
    labels = ["sdpa", "exact", "eigen_cluster block_size=8 keep=0.25"]
    expected = [(label, n, part) for n in (24, 48) for part in ("forward", "train") for label in labels]
    assert [(row.label, row.length, row.pass_name) for row in rows] == expected
    for row in rows:
        assert row.seconds is not None
        assert row.seconds > 0
        assert row.multiply_adds is not None
        assert row.note == ""
    with (tmp_path / "table.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in written] == [row.seconds for row in rows]
    assert "2 rounds after 0 to warm up" in (tmp_path / "conditions.txt").read_text()
    for name in ("time.png", "frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_exact_has_no_error_and_its_cost_is_the_unit(tmp_path):
    attention = "attention=[exact,{name: eigen_cluster, block_size: 8, cluster_size: 4, keep: 0.2}]"
    sdpa, exact, cluster = run(tmp_path, attention, "pass=[forward]")
    assert sdpa.speedup == 1.0
    assert exact.error is not None
    assert exact.error < 1e-6
    assert exact.relative_multiply_adds == 1.0
    assert cluster.error is not None
    assert cluster.error > 1e-3
    assert cluster.exact_share is not None
    assert cluster.exact_share < 0.4


@pytest.mark.parametrize("causal", [False, True])
def test_error_of_a_window_is_that_of_the_definition(causal):
    cfg = config("source=random", f"causal={str(causal).lower()}", "error_queries=48")
    source = load_inputs(cfg, 48)
    layer = source.layers[0]
    got = output_error({"name": "sliding_window", "window": 3}, source, 48, cfg, torch.device("cpu"))
    distance = torch.arange(48) - torch.arange(48)[:, None]
    allowed = distance <= 0 if causal else torch.ones(48, 48, dtype=torch.bool)
    scores = (layer.query @ layer.key.mT).double() / 8**0.5
    outputs = [
        scores.masked_fill(~keep, float("-inf")).softmax(-1) @ layer.value.double()
        for keep in (allowed, allowed & (distance.abs() <= 3))
    ]
    expected = (outputs[1] - outputs[0]).norm(dim=(-2, -1)) / outputs[0].norm(dim=(-2, -1))
    assert got == pytest.approx(float(expected.mean()), rel=1e-4)


CALIBRATED = [
    {"name": "eigen_cluster", "block_size": 8, "keep": 8, "rank": 2, "cluster_size": 2},
    {"name": "eigen_row", "keep": 8, "rank": 2},
    {"name": "eigen_row", "keep": 8, "rank": 2, "window": 1},
    {"name": "low_rank_topk", "keep": 8, "rank": 2},
    {"name": "mean"},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", CALIBRATED, ids=str)
def test_what_can_be_calibrated_is_fitted_to_the_source(spec, causal):
    """Keys vary mostly in a few directions, and neighbours are alike: what was fitted to that errs less."""
    cfg = {**config("source=structured", "sequences=8", "error_queries=48"), "causal": causal}
    source = load_inputs(cfg, 48, [spec])
    cpu = torch.device("cpu")
    assert output_error(spec, source, 48, cfg, cpu) < output_error(spec, Source(source.layers), 48, cfg, cpu)


def test_what_q_and_k_cannot_calibrate_is_named_in_its_row(tmp_path):
    rows = run(tmp_path, "attention=[eigen_linear,gaussian,eigen_cluster,topk]", "pass=[forward]")
    named = ["not calibrated, only training fits its parameters"] * 2
    assert [row.note for row in rows] == ["", *named, "", ""]


@pytest.mark.parametrize("others", [[], [{"name": "eigen_cluster"}]], ids=["alone", "beside eigen_cluster"])
@pytest.mark.parametrize(("name", "kind"), [("eigen_row", "absolute"), ("eigen_matrix", "matrix")])
def test_bases_over_positions_end_where_they_would_take_minutes(monkeypatch, others, name, kind):
    spec, cfg = {"name": name}, config()
    (layer,) = load_inputs(cfg, 24, [spec]).layers
    mechanism = build_attention(name, num_heads=2, head_dim=8, max_length=24)
    assert load_inputs(cfg, 24, [spec, *others]).calibrate(mechanism, name, layer.index) == ""
    monkeypatch.setitem(LONGEST_BASIS, kind, 16)
    note = load_inputs(cfg, 24, [spec, *others]).calibrate(mechanism, name, layer.index)
    assert note == "not calibrated, bases over positions are fitted up to 16 tokens"


def test_scores_computed_are_told_from_exact_pairs_used(tmp_path):
    sdpa, topk, window = run(
        tmp_path, "attention=[{name: topk, keep: 12},{name: sliding_window, window: 4}]", "pass=[forward]"
    )
    assert (sdpa.exact_share, sdpa.computed_share) == (1.0, 1.0)
    assert (topk.exact_share, topk.computed_share) == (0.25, 1.0)
    assert window.exact_share is not None
    assert window.computed_share is not None
    assert window.exact_share < window.computed_share < 1.0


def test_one_command_measures_both_causalities_and_leaves_out_what_is_not_causal(tmp_path, capsys):
    rows = run(tmp_path, "attention=[mra,topk]", "causal=[false,true]", "pass=[forward]")
    assert [(row.label, row.causal) for row in rows] == [
        *(("sdpa", False), ("mra", False), ("topk", False)),
        *(("sdpa", True), ("topk", True)),
    ]
    assert rows[3].multiply_adds == pytest.approx(0.5 * (rows[0].multiply_adds or 0), rel=0.05)
    said = capsys.readouterr().out
    assert "Not causal, so without causal rows: mra." in said
    assert "; not causal and causal; " in said
    with (tmp_path / "table.csv").open() as file:
        assert [line["causal"] for line in csv.DictReader(file)] == ["False"] * 3 + ["True"] * 2


def test_options_of_an_entry_hold_where_it_says(tmp_path):
    entries = ["{name: topk, keep: 4, only: {length: [24]}}", "{name: topk, keep: 8, only: {length: 48, causal: true}}"]
    rows = run(tmp_path, f"attention=[{','.join(entries)}]", "length=[24,48]", "causal=[false,true]", "pass=[forward]")
    expected = [("topk keep=4", 24, False), ("topk keep=4", 24, True), ("topk keep=8", 48, True)]
    assert [(row.label, row.length, row.causal) for row in rows if row.label != "sdpa"] == expected


def test_the_speed_table_can_be_measured_and_yields_to_the_command_line():
    cfg = read_settings(["table=speed", "length=[1024]"])
    entries = check(cfg)
    assert cfg["length"] == [1024]
    assert cfg["causal"] == [False, True]
    asked = {
        (length, causal): [entry.label for entry in entries if entry.is_asked_for(length, causal)]
        for length in (1024, 4096, 16384)
        for causal in (False, True)
    }
    assert all(any(label.startswith("eigen_cluster") for label in labels) for labels in asked.values())
    assert "topk" in asked[4096, True]
    assert "topk" not in asked[16384, True]


def test_rows_of_another_run_join_the_table_the_file_and_the_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("approx_attn.diagnosis.benchmark.command.source_commit", lambda: "abc123")
    run(tmp_path / "a", "attention=[{name: topk, keep: 4}]", "pass=[forward]", "length=[24,48]")
    first = tmp_path / "a" / "table.csv"
    earlier = tmp_path / "earlier.csv"  # of a version without some of the columns
    earlier.write_text(
        "label,length,pass_name,seconds,speedup,error\nmra,48,forward,1.0,0.5,0.3\nsdpa,48,forward,2,1,0\n"
    )
    rows = run(tmp_path / "b", "attention=[exact]", "pass=[forward]", f"reference=[{first},{earlier}]")
    labels = ["sdpa", "exact", "topk keep=4 (measured at abc123)", f"mra (measured at {earlier})"]
    assert [row.shown_label for row in rows] == labels
    assert (rows[3].speedup, rows[3].error, rows[3].seconds) == (0.5, 0.3, None)
    assert "topk keep=4 (measured at abc123)" in capsys.readouterr().out
    with (tmp_path / "b" / "table.csv").open() as file:
        assert [line["reference"] for line in csv.DictReader(file)] == ["", "", "abc123", str(earlier)]


def test_rows_of_another_run_that_fit_nowhere_are_not_passed_over(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("label,length,pass_name,speedup\nmra,96,forward,0.5\n")
    rows = run(tmp_path / "b", "attention=[exact]", "pass=[forward]", f"reference=[{tmp_path / 'a.csv'}]")
    assert len(rows) == 2
    assert "No row of reference has a length, causality and pass that were measured here." in capsys.readouterr().out


def test_what_ran_in_a_compiled_operator_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EigenClusterAttention, "runs_compiled", lambda *place: True)
    run(tmp_path, "attention=[eigen_cluster,topk]", "pass=[forward]")
    said = capsys.readouterr().out
    assert "In a compiled operator of this package: eigen_cluster; in PyTorch's operators: topk;" in said
    assert said.splitlines()[-3] in (tmp_path / "conditions.txt").read_text()


@pytest.mark.parametrize(("load", "warns"), [(0.61, True), (0.4, False)])
def test_a_machine_that_is_not_quiet_is_warned_of(tmp_path, monkeypatch, recwarn, load, warns):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    run(tmp_path, "attention=[exact]", "pass=[forward]", "device=cpu")
    assert [str(warning.message) for warning in recwarn if "not quiet (load" in str(warning.message)] == (
        [f"the machine is not quiet (load {load} before the start), so times and ratios are less certain."] * warns
    )
    assert f"load {load:.2f} before the start" in (tmp_path / "conditions.txt").read_text()


def test_the_frontier_is_what_nothing_beats_in_both():
    points = {"sdpa": (1.0, 0.0), "slow": (0.5, 0.1), "close": (2.0, 0.1), "beaten": (1.5, 0.2), "fast": (4.0, 0.3)}
    rows = [Row(name, 64, "forward", speedup=speedup, error=error) for name, (speedup, error) in points.items()]
    assert [row.label for row in non_dominated(rows)] == ["sdpa", "close", "fast"]


def test_structured_inputs_have_the_structure_they_claim():
    generator = torch.Generator().manual_seed(0)
    draw = StructuredInputs(2, 16, generator)
    query, key, value = draw(2, 2, 512, 16, generator)
    assert query.shape == key.shape == value.shape == (2, 2, 512, 16)
    scores = query @ key.mT / 4
    assert 1.0 < float(scores.std()) < 4.0
    neighbours = torch.nn.functional.cosine_similarity(key[:, :, 1:], key[:, :, :-1], dim=-1).mean()
    strangers = torch.nn.functional.cosine_similarity(key[:, :, 256:], key[:, :, :-256], dim=-1).mean()
    assert neighbours > 0.3
    assert strangers < 0.2
    variances = torch.linalg.svdvals(key[0, 0] - key[0, 0].mean(0)).square()
    assert variances[:4].sum() > 0.5 * variances.sum()


def test_captured_inputs_come_from_every_layer_of_a_model(tmp_path):
    pytest.importorskip("transformers")
    save_tiny_bert(tmp_path, "abcd", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text("a b c d a c b d d a " * 100)
    arguments = (f"source={tmp_path}", f"data={tmp_path / 'text.txt'}", "pass=[forward]", "sequences=2")
    source = load_inputs(config(*arguments), 24)
    assert [layer.query.shape for layer in source.layers] == [(1, 2, 24, 8)] * 3
    assert len(load_inputs(config(*arguments, "layers=[1]"), 24).layers) == 1
    rows = run(
        tmp_path / "out", *arguments, "length=[24]", "attention=[{name: eigen_cluster, block_size: 4, cluster_size: 2}]"
    )
    assert rows[1].error is not None
    with pytest.raises(ConfigError, match="layers must be among 0 to 2, got 3"):
        load_inputs(config(*arguments, "layers=[3]"), 24)


@pytest.mark.slow
def test_memory_of_a_fresh_process_is_that_of_the_pass():
    """Weights of exact attention with an array of all pairs would take 64 MiB at this size."""
    cfg = config("num_heads=1", "head_dim=8", "threads=1")
    peak = fresh_process_memory(
        memory_of_one_pass, {"name": "topk", "keep": 1.0, "chunk_size": 4096}, 4096, "forward", cfg
    )
    assert peak > 64 * 2**20
    assert fresh_process_memory(memory_of_one_pass, {"name": "exact"}, 4096, "forward", cfg) < 32 * 2**20


def test_out_of_memory_is_a_row_that_says_so(tmp_path, monkeypatch):
    def refuse(measure, spec, *arguments):
        if spec["name"] == "topk":
            raise OutOfMemory("attention=topk")
        return 1000

    monkeypatch.setattr("approx_attn.diagnosis.benchmark.command.fresh_process_memory", refuse)
    rows = benchmark({**config("attention=[topk]", "pass=[forward]"), "memory": True, "output": str(tmp_path)})
    assert [row.note for row in rows] == ["", "out of memory"]
    assert rows[1].seconds is None
    assert rows[0].peak_bytes == 1000


@pytest.mark.slow
def test_a_limit_on_memory_stops_the_pass_and_not_the_run():
    cfg = config("num_heads=1", "head_dim=8", "threads=1", "memory_limit=0.5")
    with pytest.raises(OutOfMemory):
        fresh_process_memory(
            memory_of_one_pass, {"name": "topk", "keep": 1.0, "chunk_size": 1 << 20}, 20000, "forward", cfg
        )
    assert not multiprocessing.active_children()


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("attention=[no_such]", "attention='no_such' is unknown"),
        ("attention=[{name: topk, kep: 1}]", "attention.kep is not an option of topk"),
        ("attention=[{keep: 1}]", "an entry with options needs a name"),
        ("attention=topk", "attention must be a list"),
        ("pass=[backward]", "pass must be among forward, train, decode, got 'backward'"),
        ("dtype=float8", "dtype must be among"),
        ("length=[0]", "length must be a whole number of at least 1, got 0"),
        ("repeats=0", "repeats must be a whole number of at least 1"),
        ("causal=maybe", "causal must be true, false or [false,true], got 'maybe'"),
        ("attention=[{name: topk, only: {lenght: [1]}}]", "attention.only of topk takes length and causal as lists"),
        ("attention=[{name: topk, only: {length: [0]}}]", "attention.only.length must be a whole number"),
        ("reference=[no.csv]", "reference=no.csv is not a file"),
        ("table=spede", "table=spede is unknown; did you mean 'speed'?"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(argument, message):
    with pytest.raises(ConfigError) as caught:
        check(config(argument))
    assert message in str(caught.value)


def test_causal_alone_is_refused_for_what_cannot_be_causal():
    with pytest.raises(ConfigError, match=r"attention=mra does not support causal=true; causal=\[false,true\] leaves"):
        check({**config("attention=[mra]"), "causal": True})


def test_a_reference_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"reference=.*other\.csv must be the table\.csv of a benchmark"):
        run(tmp_path, f"reference=[{tmp_path / 'other.csv'}]", "attention=[exact]")


def test_the_verb_reports_errors_in_one_sentence(capsys):
    assert cli.main(["benchmark", "lenght=[24]"]) == 2
    assert "lenght is not a key of benchmark; did you mean 'length'?" in capsys.readouterr().err
    assert cli.main(["benchmark", "--help"]) == 0
    assert "warm_up" in capsys.readouterr().out


def test_axes_of_time_have_numbers_within_one_decade(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    rows = [Row("sdpa", length, "forward", seconds=length * 1e-5, error=0.1) for length in (1024, 2048)]
    plot_time(rows, tmp_path)
    plot_frontier([replace(row, speedup=1.0 + row.length / 1024) for row in rows], tmp_path)
    assert len(figures) == 2
    times = [axis.yaxis for axis in figures[0].axes] + [axis.xaxis for axis in figures[1].axes]
    for axis in times:
        low, high = axis.get_view_interval()
        marks = [mark for mark in axis.get_majorticklocs() if low <= mark <= high]
        assert len(marks) >= (2 if high > 2 * low else 1)


def test_steps_of_decoding_have_a_time_an_error_and_the_cost_of_one(tmp_path):
    cluster = "{name: eigen_cluster, block_size: 8, cluster_size: 4, rank: 2, keep: 12}"
    options = [f"attention=[exact,{cluster},topk]", "length=[100]", "causal=true", "pass=[decode]"]
    sdpa, exact, cluster, topk = run(tmp_path, *options)
    assert (sdpa.error, sdpa.multiply_adds, exact.multiply_adds) == (0.0, 2 * 100 * 16, sdpa.multiply_adds)
    assert exact.error is not None
    assert exact.error < 1e-6
    for row in (cluster, topk):
        assert row.error is not None
        assert 1e-3 < row.error < 0.5
        assert row.seconds is not None
    # The last query is the fourth of its run: four near keys and a cluster exactly, and the moments of 12 runs.
    assert cluster.exact_share == 8 / 100
    pairs, moments, new = 8 * 16, 24 * (8 + 3 + 8), 2 * 2 * 8 + 3
    assert cluster.multiply_adds == 2 * (pairs + moments + new)


def test_decoding_is_causal():
    with pytest.raises(ConfigError, match=r"pass=\[decode\] is of causal attention and takes causal=true, got"):
        check(config("pass=[forward,decode]", "causal=[false,true]"))
