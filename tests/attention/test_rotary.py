"""Rotary positions in `approx_attn.MultiheadAttention`."""

import math

import pytest
import torch
from torch import nn

from approx_attn import MultiheadAttention, convert

DIM, HEADS, LENGTH = 16, 2, 7


def layer_and_input(attention="exact", **options):
    torch.manual_seed(0)
    layer = MultiheadAttention(DIM, HEADS, batch_first=True, attention=attention, rotary=True, **options).double()
    return layer.eval(), torch.randn(3, LENGTH, DIM, dtype=torch.float64)


def naive(layer, x, causal):
    """Each pair on its own, turned as a complex number."""
    d = DIM // HEADS
    q, k, v = (nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)).chunk(3, -1)
    output = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            for i in range(x.shape[1]):
                scores = []
                for j in range(i + 1 if causal else x.shape[1]):
                    score = 0.0
                    for pair in range(d // 2):
                        one = torch.complex(q[b, i, part][pair], q[b, i, part][pair + d // 2])
                        other = torch.complex(k[b, j, part][pair], k[b, j, part][pair + d // 2])
                        angle = torch.tensor((i - j) * 10_000.0 ** (-2 * pair / d), dtype=torch.float64)
                        score += (one * other.conj() * torch.polar(torch.ones_like(angle), angle)).real
                    scores.append(score / math.sqrt(d))
                weights = torch.stack(scores).softmax(0)
                output[b, i, part] = weights @ v[b, : len(scores), part]
    return layer.out_proj(output)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention", ["exact", {"name": "topk", "keep": 1.0}])
def test_scores_are_those_of_turned_queries_and_keys(attention, causal) -> None:
    layer, x = layer_and_input(attention)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    output, _ = layer(x, x, x, attn_mask=future, is_causal=causal, need_weights=False)
    # Angles are computed in float32, as everywhere: the last digits of float64 differ.
    torch.testing.assert_close(output, naive(layer, x, causal), atol=1e-6, rtol=1e-6)


def test_only_distances_count() -> None:
    layer, x = layer_and_input()
    padded = torch.cat([torch.randn(3, 4, DIM, dtype=torch.float64), x], 1)
    padding = torch.arange(4 + LENGTH).expand(3, -1) < 4
    shifted, _ = layer(padded, padded, padded, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(shifted[:, 4:], layer(x, x, x)[0], atol=1e-6, rtol=1e-6)


def test_conversion_keeps_them() -> None:
    layer, x = layer_and_input()
    model = nn.ModuleDict({"attention": layer})
    expected = layer(x, x, x)[0]
    convert(model, {"name": "topk", "keep": 1.0})
    assert model["attention"].attention.name == "topk"
    torch.testing.assert_close(model["attention"](x, x, x)[0], expected)


def test_what_has_no_meaning_is_refused() -> None:
    layer, x = layer_and_input()
    with pytest.raises(ValueError, match="self-attention alone"):
        layer(x, x.clone(), x)
    with pytest.raises(ValueError, match="no form in plain PyTorch"):
        layer.to_torch()
    with pytest.raises(ValueError, match="add_bias_kv"):
        MultiheadAttention(DIM, HEADS, rotary=True, add_bias_kv=True)
