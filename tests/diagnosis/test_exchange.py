"""An exchanged language: planted dictionaries, and words that are put back or taken from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from approx_attn.config.compose import compose_config
from approx_attn.data.generators.translation_languages import FULL_STOP, VOCABULARY_SIZE, language
from approx_attn.diagnosis.exchange import dictionary_accuracy, embedding, evaluate_with_words
from approx_attn.errors import ConfigError
from approx_attn.run.evaluate import evaluate, load_task
from approx_attn.run.train import train
from helpers import QUIET, SMALL_MODEL


def test_a_planted_dictionary_is_found() -> None:
    torch.manual_seed(0)
    old, concepts = torch.randn(VOCABULARY_SIZE, 32), torch.randn(84, 32)
    new, first, other = torch.randn(VOCABULARY_SIZE, 32), language(0), language(2)
    assert dictionary_accuracy(new, old, other, first) < 0.1
    for of, table in ((first, old), (other, new)):
        for index, words in enumerate(of.words):
            table[list(words)] = concepts[index] * torch.rand(len(words), 1)  # the length says nothing
    assert dictionary_accuracy(new, old, other, first) == 1.0
    wrong = other.words[0][0]
    new[wrong] = concepts[1]
    assert dictionary_accuracy(new, old, other, first) == pytest.approx(1 - 1 / (VOCABULARY_SIZE - FULL_STOP - 1))


def test_words_are_put_back(tmp_path: Path) -> None:
    sizes = ["data.max_clauses=1", "data.train_size=64", "data.val_size=8", "data.test_size=8"]
    small = ["data=translation", *QUIET, *SMALL_MODEL, *sizes, "trainer.max_epochs=1", "optimizer.lr=0.01"]
    small += [f"data.cache_dir={tmp_path}/cache"]
    train(compose_config([*small, f"paths.run_dir={tmp_path}/parent"]))
    parent, child = (tmp_path / name / "checkpoints" / "best.ckpt" for name in ("parent", "child"))
    exchange = ["data.source_language=2", "model.new_language=source", "model.train=embeddings_only"]
    train(compose_config([*small, *exchange, f"paths.run_dir={tmp_path}/child", f"init_from={parent}"]))
    cache = {"cache_dir": f"{tmp_path}/cache"}
    back = evaluate_with_words(child, {"source": parent}, data={"source_language": 0, **cache})
    assert back == pytest.approx(evaluate(parent, data=cache)), "only the words had changed"
    assert embedding(child, "target").equal(load_task(parent).model.decoder.token_embedding.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ConfigError, match="words must be of source or target, got 'middle'"):
        evaluate_with_words(child, {"middle": parent}, data={})
