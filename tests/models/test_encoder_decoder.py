"""The encoder-decoder: what sees what, how it decodes, what its layers are called and which mechanisms it takes."""

from __future__ import annotations

import pytest
import torch

from approx_attn.attention import available_attention
from approx_attn.attention.registry import attention_class, build_attention
from approx_attn.conversion.capture import attention_observed
from approx_attn.diagnosis.analysis.collect import layer_labels
from approx_attn.models import EncoderDecoder, LanguageModel
from approx_attn.models.encoder_decoder import greedy_decode

SMALL = {"dim": 16, "num_heads": 2, "feed_forward_dim": 16, "dropout": 0.0}
ABLE = [
    name
    for name in available_attention()
    for can in [attention_class(name).capabilities]
    if can.causal and can.independent_queries
]
BEGIN, END, PAD = 1, 2, 0


def model_with(attention: str = "exact", depth: int = 1) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(20, 30, 12, attention=attention, depth=depth, **SMALL).eval()


def sentences() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.arange(10) < torch.tensor([[10], [6]])
    keep_b = torch.arange(12) < torch.tensor([[9], [12]])
    tokens, tokens_b = (torch.randint(3, 20, (2, n), generator=generator) for n in (10, 12))
    return {"tokens": tokens, "keep": keep, "tokens_b": tokens_b, "keep_b": keep_b}


@pytest.mark.parametrize("name", ABLE)
def test_a_word_sees_the_source_and_what_was_written_before_it(name: str) -> None:
    model, batch = model_with(name), sentences()
    logits = model(**batch)
    assert logits.shape == (2, 12, 30)
    later, padded, source = (dict(batch) for _ in range(3))
    later["tokens_b"] = torch.where(torch.arange(12) > 4, 19 - batch["tokens_b"] % 4, batch["tokens_b"])
    padded["tokens"] = batch["tokens"].masked_fill(~batch["keep"], 7)
    source["tokens"] = batch["tokens"].clone()
    source["tokens"][:, 2] = 3 + (batch["tokens"][:, 2] + 1) % 17
    torch.testing.assert_close(model(**later)[:, :5], logits[:, :5], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**padded), logits, atol=1e-5, rtol=1e-4)
    assert (model(**source) - logits).abs().amax(dim=(1, 2)).min() > 1e-6


def test_greedy_words_are_those_of_the_whole_output() -> None:
    model, batch = model_with(depth=2), sentences()
    with torch.no_grad():
        model.decoder.token_embedding.weight *= 20.0  # otherwise one word follows another for ever
    written = greedy_decode(model, batch["tokens"], batch["keep"], 12, BEGIN, END, PAD)
    given = torch.cat([torch.full((2, 1), BEGIN), written[:, :-1]], dim=1)
    best = model(batch["tokens"], given, batch["keep"]).argmax(-1)
    for row, expected in zip(written.tolist(), best.tolist(), strict=True):
        length = row.index(END) + 1 if END in row else 12
        assert row[:length] == expected[:length]
        assert row[length:] == [PAD] * (12 - length)


def test_capture_sees_all_three_kinds_of_attention() -> None:
    seen: dict[str, tuple[int, int]] = {}

    def note(name, query, key, value, mask, scale) -> None:  # type: ignore[no-untyped-def]
        seen[name] = query.shape[-2], key.shape[-2]

    model = model_with("topk", depth=2)
    with attention_observed(model, note):
        model(**sentences())
    labels = dict(zip(layer_labels(list(seen)), seen.values(), strict=True))
    assert labels == {
        **{f"encoder {i}": (10, 10) for i in range(2)},
        **{f"decoder {i}": (12, 12) for i in range(2)},
        **{f"cross {i}": (12, 10) for i in range(2)},
    }
    assert [mechanism.layer_index for mechanism in model.mechanisms] == list(range(6))


def test_layers_of_a_kind_share_a_basis_where_options_say_so() -> None:
    model = EncoderDecoder(20, 30, 12, attention={"name": "eigen_row", "share": "model"}, depth=2, **SMALL)
    parameters = [{id(p) for p in mechanism.parameters()} for mechanism in model.mechanisms]
    assert parameters[0] == parameters[1]
    assert parameters[0].isdisjoint(parameters[2])
    assert parameters[4] == parameters[5]


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nystromformer does not support causal"):
        model_with("nystromformer")
    with pytest.raises(ValueError, match="eigen_matrix does not support the cross-attention of a causal decoder"):
        model_with("eigen_matrix")
    with pytest.raises(ValueError, match="each layer needs its own mechanism"):
        model_with(build_attention("topk", num_heads=2, head_dim=8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"13 tokens is longer than model\.max_length=12"):
        model_with()(torch.full((1, 13), 3), torch.full((1, 4), 3))


def test_the_body_of_other_models_is_as_it_was() -> None:
    torch.manual_seed(0)
    names = list(LanguageModel(20, 12, depth=1, **SMALL).state_dict())
    assert not [name for name in names if "cross" in name]
