"""The classifier with one attention over the tokens: padding, context, what it counts as its cost, refusals."""

from __future__ import annotations

import pytest
import torch

from approx_attn.models import AttentionPooling


def model(**options: object) -> AttentionPooling:
    torch.manual_seed(0)
    return AttentionPooling(20, 5, 12, dim=16, **options).eval()  # type: ignore[arg-type]


def tokens_and_keep() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 20, (3, 12), generator=generator), torch.arange(12) < torch.tensor([[12], [7], [1]])


@pytest.mark.parametrize("attention", ["exact", "uniform", "eigen_topk"])
@pytest.mark.parametrize("encoder", ["lstm", "affine"])
def test_padding_changes_nothing(encoder: str, attention: str) -> None:
    pooling = model(encoder=encoder, attention=attention)
    tokens, keep = tokens_and_keep()
    logits = pooling(tokens, keep)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(pooling(torch.where(keep, tokens, 3), keep), logits)
    if attention != "eigen_topk":  # whose budget is a share of the length
        torch.testing.assert_close(pooling(tokens[1:2, :7])[0], logits[1])


def test_only_an_lstm_sees_the_order_of_tokens() -> None:
    tokens, _ = tokens_and_keep()
    for encoder, sees in (("lstm", True), ("affine", False)):
        pooling = model(encoder=encoder)
        same = torch.allclose(pooling(tokens.flip(1)), pooling(tokens), atol=1e-6)
        assert same is not sees


def test_cost_is_of_one_query() -> None:
    (cost,) = model(num_heads=2).costs(12, causal=False)
    assert (cost.exact_pairs, cost.total_pairs) == (24, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "gru"}, "model.encoder must be"),
        ({"dim": 15}, "model.dim must be even with model.encoder=lstm, got 15"),
        ({"num_heads": 3}, "model.num_heads must divide model.dim=16, got 3"),
        ({"dropout": 1.5}, "model.dropout must be"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPooling(20, 5, 12, **{"dim": 16, **options})  # type: ignore[arg-type]
