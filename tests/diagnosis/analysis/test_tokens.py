"""Categories of tokens, random tokens and decoder inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from approx_attn.diagnosis.analysis.tokens import (
    CLS,
    COMMA,
    OTHER,
    PERIOD,
    PUNCTUATION,
    SEP,
    SPECIAL,
    TokenCategories,
    is_punctuation,
    random_tokens,
    with_decoder_inputs,
)

VOCABULARY = {"[CLS]": 0, "[SEP]": 1, ".": 2, "##,": 3, "Ġ(": 4, "▁word": 5, "don't": 6, "##": 7, "[PAD]": 8, ":": 9}


class Tokenizer:
    """What is asked of a tokenizer."""

    all_special_ids = (0, 1, 8)
    cls_token_id, sep_token_id = 0, 1

    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY

    def __len__(self) -> int:
        return len(VOCABULARY)


@pytest.mark.parametrize(("token", "expected"), [(".", True), ("##,", True), ("Ġ(", True), ("▁—", True), ("$", True)])
@pytest.mark.parametrize("negative", ["a.", "1", "Ġ", "##s", "", "▁"])
def test_punctuation(token: str, expected: bool, negative: str) -> None:
    assert is_punctuation(token) is expected
    assert not is_punctuation(negative)


def test_categories_of_the_tokens_that_are_keys() -> None:
    categories = TokenCategories(Tokenizer())
    source, target = torch.tensor([[0, 5, 2, 3, 9, 1, 8]]), torch.tensor([[4, 6]])
    batch = {"input_ids": source, "decoder_input_ids": target}
    of_source = [[CLS, OTHER, PERIOD, COMMA, PUNCTUATION, SEP, SPECIAL]]
    assert categories("encoder.layer.0.attention", {"input_ids": source}, 1, 7).tolist() == of_source
    assert categories("decoder.block.0.layer.1.EncDecAttention", batch, 1, 7).tolist() == of_source
    assert categories("decoder.layers.0.encoder_attn", batch, 1, 7).tolist() == of_source
    assert categories("decoder.layers.0.self_attn", batch, 1, 2).tolist() == [[PUNCTUATION, OTHER]]


def test_categories_where_little_is_known() -> None:
    image = TokenCategories()("layer", {"pixel_values": torch.zeros(2, 3, 8, 8)}, 2, 5)
    assert image.tolist() == [[CLS, OTHER, OTHER, OTHER, OTHER]] * 2
    registers = TokenCategories()("layer", {"pixel_values": torch.zeros(1, 3, 8, 8)}, 1, 7)
    assert registers.tolist() == [[CLS, SPECIAL, SPECIAL, OTHER, OTHER, OTHER, OTHER]]
    assert TokenCategories()("layer", torch.zeros(1, 3), 1, 3).tolist() == [[OTHER] * 3]
    assert TokenCategories()("layer", {"tokens": torch.zeros(1, 3)}, 1, 3).tolist() == [[OTHER] * 3]


def test_random_tokens_replace_ordinary_ones_only() -> None:
    batch = {"input_ids": torch.tensor([[0, 5, 6, 5, 6, 5, 1, 9]]), "attention_mask": torch.ones(1, 8)}
    ordinary = torch.tensor([2, 3, 4, 5, 6])
    drawn = [random_tokens(batch, ordinary, torch.Generator().manual_seed(seed))["input_ids"] for seed in (0, 0, 1)]
    assert drawn[0][0, [0, 6, 7]].tolist() == [0, 1, 9]
    assert torch.isin(drawn[0][0, 1:6], ordinary).all()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert batch["input_ids"][0, 1] == 5


def test_decoder_inputs_are_the_text_shifted() -> None:
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=9, pad_token_id=0)
    model = SimpleNamespace(config=config)
    batch = with_decoder_inputs(model, {"input_ids": torch.tensor([[5, 6, 7]])})  # type: ignore[arg-type]
    assert batch["decoder_input_ids"].tolist() == [[9, 5, 6]]
    config.is_encoder_decoder = False
    assert "decoder_input_ids" not in with_decoder_inputs(model, {"input_ids": torch.ones(1, 2)})  # type: ignore[arg-type]
