"""The benchmark: what it measures and refuses. How fast anything is, is no matter of tests."""

from __future__ import annotations

import csv
import multiprocessing
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from approx_attn import cli
from approx_attn.benchmark import Row, benchmark, check, output_error
from approx_attn.benchmark_memory import OutOfMemory, fresh_process_memory, is_out_of_memory
from approx_attn.benchmark_plots import plot_error, plot_time
from approx_attn.benchmark_sources import StructuredInputs, load_inputs
from approx_attn.command import settings
from approx_attn.instantiation import ConfigError

SMALL = ["length=[48]", "num_heads=2", "head_dim=8", "repeats=2", "warm_up=0", "sequences=2", "progress_bar=false"]


def config(*arguments: str) -> dict:
    return settings("benchmark", [*SMALL, "memory=false", *arguments])


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
    for name in ("time.png", "error.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_exact_has_no_error_and_its_cost_is_the_unit(tmp_path):
    sdpa, exact, cluster = run(
        tmp_path, "attention=[exact,{name: eigen_cluster, block_size: 8, cluster_size: 4, keep: 0.2}]", "pass=[forward]"
    )
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


def test_content_bases_are_fitted_to_the_source():
    """Keys vary mostly in a few directions: a fitted basis of rank 2 sees more of them than a random one."""
    cfg = config("source=structured")
    source = load_inputs(cfg, 48)
    errors = {}
    for start in ("fitted", "random"):
        layers = source.layers if start == "fitted" else [_without_moments(layer) for layer in source.layers]
        spec = {"name": "eigen_cluster", "block_size": 8, "keep": 8, "rank": 2, "order": 1}
        errors[start] = output_error(spec, type(source)(layers), 48, cfg, torch.device("cpu"))
    assert errors["fitted"] < errors["random"]


def _without_moments(layer):
    return type(layer)(layer.query, layer.key, layer.value, layer.scale, None)


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
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model_config = transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=32)
    transformers.BertModel(model_config).save_pretrained(tmp_path)
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
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


def test_memory_of_a_fresh_process_is_that_of_the_pass():
    """Weights of exact attention with an array of all pairs would take 64 MiB at this size."""
    cfg = config("num_heads=1", "head_dim=8", "threads=1")
    peak = fresh_process_memory({"name": "topk", "keep": 1.0, "chunk_size": 4096}, 4096, "forward", cfg)
    assert peak > 64 * 2**20
    assert fresh_process_memory({"name": "exact"}, 4096, "forward", cfg) < 32 * 2**20


def test_out_of_memory_is_a_row_that_says_so(tmp_path, monkeypatch):
    def refuse(spec, *arguments):
        if spec["name"] == "topk":
            raise OutOfMemory("attention=topk")
        return 1000

    monkeypatch.setattr("approx_attn.benchmark.fresh_process_memory", refuse)
    rows = benchmark({**config("attention=[topk]", "pass=[forward]"), "memory": True, "output": str(tmp_path)})
    assert [row.note for row in rows] == ["", "out of memory"]
    assert rows[1].seconds is None
    assert rows[0].peak_bytes == 1000


def test_a_limit_on_memory_stops_the_pass_and_not_the_run():
    cfg = config("num_heads=1", "head_dim=8", "threads=1", "memory_limit=0.5")
    with pytest.raises(OutOfMemory):
        fresh_process_memory({"name": "topk", "keep": 1.0, "chunk_size": 1 << 20}, 20000, "forward", cfg)
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
        ("pass=[backward]", "pass must be among forward, train, got 'backward'"),
        ("dtype=float8", "dtype must be among"),
        ("length=[0]", "length must be a whole number of at least 1, got 0"),
        ("repeats=0", "repeats must be a whole number of at least 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(argument, message):
    with pytest.raises(ConfigError) as caught:
        check(config(argument))
    assert message in str(caught.value)


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
    plot_error(rows, tmp_path)
    assert len(figures) == 2
    times = [axis.yaxis for axis in figures[0].axes] + [axis.xaxis for axis in figures[1].axes]
    for axis in times:
        low, high = axis.get_view_interval()
        marks = [mark for mark in axis.get_majorticklocs() if low <= mark <= high]
        assert len(marks) >= (2 if high > 2 * low else 1)
