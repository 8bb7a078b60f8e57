"""Parallel text from two files or two columns: what words become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from approx_attn.config.compose import compose_config
from approx_attn.data import IGNORE
from approx_attn.data.parallel_text import UNKNOWN, ParallelTextData
from approx_attn.data.translation import BEGIN, END
from approx_attn.run.train import train
from helpers import QUIET, SMALL_MODEL

SOURCE = ["a b", "b c b", "a a d", "b", "a b c"] * 4
TARGET = [line.upper() for line in SOURCE]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, lines in (("text.en", SOURCE), ("text.de", TARGET)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(tmp_path / "text.en"), str(tmp_path / "text.de")


def read_back(data: ParallelTextData) -> list[tuple[str, str]]:
    """The training pairs as words."""
    pairs = []
    for batch in data.train_dataloader():
        for tokens, inputs, labels in zip(
            batch["tokens"].tolist(), batch["tokens_b"].tolist(), batch["labels"].tolist(), strict=True
        ):
            source, target = tokens[: tokens.index(END)], labels[: labels.index(END)]
            assert inputs[: len(target) + 1] == [BEGIN, *target]
            assert set(labels[len(target) + 1 :]) <= {IGNORE}
            pairs.append((as_words(data, "source", source), as_words(data, "target", target)))
    return pairs


def as_words(data: ParallelTextData, side: str, ids: list[int]) -> str:
    return " ".join(["?", *data.words[side]][token - UNKNOWN] for token in ids)


def test_two_files_are_read_line_by_line(files: tuple[str, str]) -> None:
    data = ParallelTextData(path=files[0], target_path=files[1], max_length=5, batch_size=4)
    assert data.spec.num_items == (16, 2, 2)
    assert (data.spec.vocab_size, data.spec.num_classes) == (8, 8)
    assert data.words["source"][:2] in (["a", "b"], ["b", "a"])
    pairs = read_back(data)
    assert len(pairs) == 16
    assert all(target == source.upper() and source in SOURCE for source, target in pairs)


def test_columns_of_a_folder_are_read_and_rare_words_are_unknown(tmp_path: Path) -> None:
    for split in ("train", "test"):
        Dataset.from_dict({"en": SOURCE, "de": TARGET}).to_parquet(str(tmp_path / f"{split}.parquet"))
    options = {"source_column": "en", "target_column": "de", "vocabulary_size": 6, "max_length": 5, "batch_size": 4}
    data = ParallelTextData(path=str(tmp_path), **options)  # type: ignore[arg-type]
    assert data.spec.vocab_size == 6
    assert sorted(data.words["target"]) == ["A", "B"]
    assert {word for _, target in read_back(data) for word in target.split()} == {"A", "B", "?"}


def test_a_model_is_trained_on_files(files: tuple[str, str], tmp_path: Path) -> None:
    words = ["data=parallel_text", f"data.path={files[0]}", f"data.target_path={files[1]}", "data.batch_size=8"]
    words += [*QUIET, *SMALL_MODEL, "data.max_length=5", "trainer.max_epochs=1", f"paths.runs={tmp_path}/runs"]
    result = train(compose_config(words))
    assert {"test/accuracy", "test/exact_match", "test/bleu"} <= set(result.metrics)


def test_files_that_do_not_go_together_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    Path(files[1]).write_text("A B\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.target_path=.* must have as many lines as .*, 20, got 1\."):
        ParallelTextData(path=files[0], target_path=files[1]).setup()
    with pytest.raises(ValueError, match=r"data\.target_path must be a text file"):
        ParallelTextData(path=files[0], target_path=str(tmp_path / "none")).setup()
    Dataset.from_dict({"en": SOURCE, "de": TARGET}).to_csv(str(table := tmp_path / "table.csv"))
    with pytest.raises(ValueError, match=r"data\.source_column='source' is not a column"):
        ParallelTextData(path=str(table)).setup()
    with pytest.raises(ValueError, match=r"data\.vocabulary_size must be a whole number of at least 5, got 3"):
        ParallelTextData(path=files[0], vocabulary_size=3)
