"""Perplexity of causal models: equal to the definition, exact at full budget, for both kinds of models."""

import csv
import math

import pytest
import torch
from torch.nn import functional as F

from approx_attn import compose_config, train
from approx_attn.diagnosis.allocate import main as allocate_main
from approx_attn.diagnosis.perplexity import main
from helpers import TINY, save_tiny_bert

transformers = pytest.importorskip("transformers")
WORDS = ["one", "zwei", "drei", "vier", "fünf", "six"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in torch.randint(6, (700,), generator=generator)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = save_tiny_bert(tmp_path_factory.mktemp("model"), WORDS)
    torch.manual_seed(0)
    shape = {"vocab_size": 10, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def measure(tmp_path, **words):
    path = tmp_path / "table.csv"
    given = {"sequences": 4, "progress_bar": "false", "output": path} | words
    code = main([f"{key}={value}" for key, value in given.items()])
    return code, {row["label"]: row for row in csv.DictReader(path.open())} if path.exists() else {}


def test_perplexity_and_bits_per_byte_are_those_of_the_definition(gpt2, text, tmp_path, capsys):
    words = {"model": gpt2, "data": text, "length": 16, "rank": 2, "keep": "[1.0,0.25]", "batch_size": 3}
    code, rows = measure(tmp_path, attention="[eigen_topk,topk]", **words)
    assert code == 0
    whole = text.read_text(encoding="utf-8")
    half = whole[len(whole) // 2 :]
    encoded = transformers.AutoTokenizer.from_pretrained(gpt2)(
        half, add_special_tokens=False, return_offsets_mapping=True
    )
    ids, count = torch.tensor(encoded["input_ids"]), (len(encoded["input_ids"]) - 1) // 16
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    with torch.no_grad():
        logits = model(ids[: 16 * count].view(count, 16)).logits
    nats = float(F.cross_entropy(logits.flatten(0, 1), ids[1 : 16 * count + 1], reduction="sum"))
    (_, start), (_, end) = (encoded["offset_mapping"][i] for i in (0, 16 * count))
    assert float(rows["exact"]["perplexity"]) == pytest.approx(math.exp(nats / (16 * count)), rel=1e-4)
    size = len(half[start:end].encode())
    assert float(rows["exact"]["bits_per_byte"]) == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    for label in ("eigen_topk keep=1", "topk keep=1"):
        assert float(rows[label]["perplexity"]) == pytest.approx(float(rows["exact"]["perplexity"]), rel=1e-4)
    assert float(rows["topk keep=0.25"]["perplexity"]) != pytest.approx(float(rows["exact"]["perplexity"]), rel=1e-3)
    assert float(rows["topk keep=0.25"]["exact_share"]) < 0.4
    assert float(rows["exact"]["relative_time"]) == 1.0
    assert "bits per byte" in capsys.readouterr().out


def test_budgets_of_the_headless_model_make_a_row(gpt2, text, tmp_path):
    budgets = tmp_path / "budgets.json"
    words = {"model": gpt2, "data": text, "length": 16, "sequences": 4, "progress_bar": "false"}
    mechanism = "{name: eigen_topk, rank: 2}"
    given = words | {"mean_share": 0.4, "output": budgets, "attention": mechanism}
    assert allocate_main([f"{key}={value}" for key, value in given.items()]) == 0
    code, rows = measure(tmp_path, **words, attention="eigen_topk", keep=0.25, rank=2, budgets=budgets, refine=1)
    assert code == 0
    assert list(rows)[-2:] == ["budgets=budgets.json", "budgets=budgets.json, refined"]
    assert float(rows["budgets=budgets.json"]["exact_share"]) <= 0.4


def test_a_checkpoint_of_bytes_is_measured_at_its_length(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["data=text_lm", f"data.path={text}", "data.max_length=32"]
    result = train(compose_config([*TINY, *data, "attention=exact"]))
    path = result.run_dir / "checkpoints" / "last.ckpt"
    code, rows = measure(tmp_path, model=path, data=text, attention="[{name: eigen_topk}]", keep="[1.0,0.25]", rank=2)
    assert code == 0
    exact, full, part = rows.values()
    assert float(exact["bits_per_byte"]) == pytest.approx(math.log2(float(exact["perplexity"])), rel=1e-6)
    assert float(full["perplexity"]) == pytest.approx(float(exact["perplexity"]), rel=1e-4)
    assert float(part["exact_share"]) < 0.5
    assert "windows of 32 tokens" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": "nothing.txt"}, "data=nothing.txt is not a file"),
        ({"test_sequences": 900}, "of 900 windows of 16 tokens per half"),
        ({"budgets": "nothing.json"}, "budgets=nothing.json is not a file"),
        ({"sequences": 0}, "sequences must be a whole number of at least 1, got 0"),
        ({"attention": "mra"}, "attention=mra does not support causal attention"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(gpt2, text, tmp_path, capsys, wrong, message):
    given = {"model": gpt2, "data": text, "length": 16, "attention": "topk", "keep": 0.25}
    code, rows = measure(tmp_path, **given | wrong)
    assert (code, rows) == (2, {})
    assert message in capsys.readouterr().err
