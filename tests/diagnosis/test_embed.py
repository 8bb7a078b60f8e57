"""How far embeddings move with other attention: the measure, its limits, and the verb."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from approx_attn.diagnosis.embed import EmbeddingPreservation, embeddings, main, preserve_embeddings

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def encoder() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights large enough that attention is far from uniform, so that approximations differ.
    settings = transformers.BertConfig(**shape, vocab_size=45, max_position_embeddings=32, initializer_range=0.4)
    return transformers.BertModel(settings).eval()


def batches(seed: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.arange(20) < torch.tensor([[20], [13], [6]])
    return [
        {"input_ids": torch.randint(5, 45, (3, 20), generator=generator), "attention_mask": keep.long()}
        for _ in range(count)
    ]


def test_embedding_is_the_mean_over_real_tokens() -> None:
    model, (batch,) = encoder(), batches(0, 1)
    pooled = embeddings(model, [batch])
    alone = {key: value[1:2, :13] for key, value in batch.items()}
    expected = model(**alone).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(pooled[1:2].float(), expected, atol=1e-5, rtol=1e-4)


def test_full_budget_keeps_embeddings_and_the_model_stays() -> None:
    model = encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mechanisms = {
        "full": {"name": "eigen_topk", "rank": 16, "keep": 1.0},
        "estimate": {"name": "eigen_topk", "rank": 2, "keep": 0.25},
        "dropped": {"name": "eigen_topk", "rank": 2, "keep": 0.25, "rest": "drop"},
        "window": {"name": "sliding_window", "keep": 0.25},
    }
    results = preserve_embeddings(model, batches(1), {"a": batches(2), "b": batches(3)}, mechanisms, progress=False)
    assert [(r.label, r.data) for r in results] == [(label, data) for label in mechanisms for data in "ab"]
    found = {r.label: r for r in results if r.data == "a"}
    assert found["full"].cosine == pytest.approx(1.0, abs=1e-6)
    assert found["full"].exact_share == 1.0
    assert found["window"].lowest < found["window"].cosine < found["estimate"].cosine < 1.0
    assert found["estimate"].exact_share == 0.25
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_cosine_is_that_of_the_definition() -> None:
    from approx_attn import convert

    model, texts = encoder(), batches(2)
    (result,) = preserve_embeddings(model, batches(1), {"a": texts}, {"t": {"name": "topk", "keep": 3}}, progress=False)
    converted = convert(encoder(), "topk", keep=3)
    cosines = F.cosine_similarity(embeddings(model, texts), embeddings(converted, texts))
    assert result.cosine == pytest.approx(float(cosines.mean()))
    assert result.lowest == pytest.approx(float(cosines.min()))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    encoder().save_pretrained(tmp_path / "model")
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        texts = [" ".join(rng.choice(WORDS, rng.integers(3, 30))) for _ in range(12)]
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "texts" / f"{split}.parquet")
    return tmp_path / "model", tmp_path / "texts"


def test_verb_prints_and_writes_the_table(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, texts = folders
    small = ["length=16", "sequences=4", "test_sequences=5", "batch_size=2", "progress_bar=false", "keep=[0.25]"]
    one_file = texts / "test.parquet"  # which is no split by itself, and is measured whole
    words = [f"model={model}", f"calibration={texts}", f"data=[{texts},{one_file}]", "attention=[topk,eigen_topk]"]
    assert main([*words, "rank=4", *small, f"output={tmp_path / 'out.csv'}"]) == 0
    printed = capsys.readouterr().out
    assert "topk keep=0.25" in printed
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert {row["data"] for row in rows} == {"texts", "test.parquet"}
    assert all(0.0 < float(row["cosine"]) <= 1.0 for row in rows)


def test_a_file_calibrates_with_one_half_and_is_measured_on_the_other(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = folders
    file, drawn = folder / "train.parquet", []

    def measure_nothing(model: Any, taken: Any, texts: Any, *rest: Any, **options: Any) -> list[EmbeddingPreservation]:
        drawn.extend([taken, texts["train.parquet"]])
        return [EmbeddingPreservation("topk", "train.parquet", 1.0, 0.0, 1.0, 1.0, 1.0)]

    monkeypatch.setattr("approx_attn.diagnosis.embed.preserve_embeddings", measure_nothing)
    small = ["length=64", "sequences=6", "test_sequences=6", f"output={folder / 'out.csv'}"]
    assert main([f"model={model}", f"calibration={file}", f"data=[{file}]", *small]) == 0
    first, second = ({tuple(row.tolist()) for batch in half for row in batch["input_ids"]} for half in drawn)
    assert (len(first), len(second)) == (6, 6)
    assert not {tuple(t for t in row if t) for row in first} & {tuple(t for t in row if t) for row in second}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention=[nothing]"], "attention=nothing"),
        (["split=dev"], "split='dev' is not a split"),
        (["text_column=body"], "text_column='body' is not a column"),
        (["test_sequences=50"], "fewer than the 50"),
        (["model=/nowhere/at/all"], "model=/nowhere/at/all does not exist"),
        (["lenght=3"], "lenght is not a key of embed; did you mean 'length'?"),
        (["length=0"], "length must be"),
    ],
)
def test_wrong_words_are_one_sentence(
    words: list[str],
    message: str,
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, texts = folders
    small = ["sequences=4", "test_sequences=4"]
    assert main([f"model={model}", f"calibration={texts}", f"data=[{texts}]", *small, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
