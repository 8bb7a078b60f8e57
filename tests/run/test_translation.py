"""Translation as a task: its metrics against independent values, and a run from training to figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from approx_attn.config.compose import compose_config
from approx_attn.data.translation import END
from approx_attn.errors import ConfigError
from approx_attn.run.evaluate import evaluate, load_task
from approx_attn.run.tasks.translation import sentence_figures, words
from approx_attn.run.train import check_run, train
from helpers import QUIET, SMALL_MODEL


def test_sentences_are_scored_word_by_word() -> None:
    reference = words([5, 6, 7, 8, 9, END, 3, 3])
    assert reference == "5 6 7 8 9"
    found = sentence_figures([(reference, reference), ("5 6 7 8 10", reference)])
    # 9 of 10 words, 7 of 8 pairs, 5 of 6 triples and 3 of 4 fours are right, and the lengths are equal.
    assert found["bleu"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    assert found["exact_match"] == 0.5
    assert sentence_figures([("", reference)]) == {"exact_match": 0.0, "bleu": 0.0}


def test_a_run_learns_to_translate_and_says_how_well(tmp_path: Path) -> None:
    small = ["data.max_clauses=1", "data.train_size=64", "data.val_size=8", "data.test_size=8", "data.batch_size=16"]
    folders = [f"data.cache_dir={tmp_path}/cache", f"paths.runs={tmp_path}/runs"]
    longer = ["trainer.max_epochs=4", "optimizer.lr=0.01"]
    result = train(compose_config(["data=translation", *QUIET, *SMALL_MODEL, *small, *folders, *longer]))
    losses = [loss for _, loss in result.record["history"]["val/loss"]]
    assert losses[-1] < losses[0]
    figures = {key: result.metrics[f"test/{key}"] for key in ("accuracy", "exact_match", "bleu")}
    assert all(0.0 <= value <= 1.0 for value in figures.values())
    assert figures["accuracy"] > 2 / 103  # the full stop and the end at least are known
    checkpoint = result.run_dir / "checkpoints" / "best.ckpt"
    again = evaluate(checkpoint, data={"cache_dir": f"{tmp_path}/cache"})
    assert {key: again[f"test/{key}"] for key in figures} == pytest.approx(figures)
    assert result.data is not None
    batch = next(iter(result.data.test_dataloader()))
    with torch.no_grad():
        written = load_task(checkpoint).translate(batch)  # type: ignore[operator]
    assert written.shape == (8, 13)


def test_what_does_not_go_with_translation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics: bleu is for translation, not for classification data\."):
        check_run(compose_config(["data=digits", "metrics=[bleu]", *QUIET]))
    with pytest.raises(ConfigError, match="EncoderDecoder cannot be used with data of kind classification"):
        check_run(compose_config(["data=digits", "model=encoder_decoder", *QUIET]))
    with pytest.raises(ConfigError, match=r"LanguageModel .* kind translation; choose encoder_decoder"):
        check_run(compose_config(["data=translation", "model=language_model", *QUIET]))
