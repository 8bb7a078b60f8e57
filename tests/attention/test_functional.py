"""`approx_attn.scaled_dot_product_attention` beside PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from approx_attn import Capabilities, register_attention, scaled_dot_product_attention
from approx_attn.attention import AttentionShape, registry
from helpers import MechanismPath

BATCH, HEADS, N_QUERY, N_KEY, DIM, VALUE_DIM = 2, 4, 5, 7, 8, 6


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The mechanism above, and one that says it has parameters, under names of their own for one test."""
    monkeypatch.setattr(registry, "_MECHANISMS", dict(registry._MECHANISMS))
    register_attention("mechanism_path")(MechanismPath)
    learned = type("Learned", (MechanismPath,), {"capabilities": Capabilities(has_parameters=True)})
    register_attention("learned")(learned)


def make_inputs(*leading, heads_kv=HEADS):
    return (
        torch.randn(*leading, HEADS, N_QUERY, DIM, requires_grad=True),
        torch.randn(*leading, heads_kv, N_KEY, DIM, requires_grad=True),
        torch.randn(*leading, heads_kv, N_KEY, VALUE_DIM, requires_grad=True),
    )


def open_pattern(*shape):
    keep = torch.rand(shape) < 0.6
    keep[..., 1] = True  # no query without a key: PyTorch's result there depends on its kernel
    return keep


ARGUMENTS = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": 0.3},
    "bool": lambda: {"attn_mask": open_pattern(N_QUERY, N_KEY)},
    "bool_per_head": lambda: {"attn_mask": open_pattern(BATCH, HEADS, N_QUERY, N_KEY)},
    "bool_padding": lambda: {"attn_mask": open_pattern(BATCH, 1, 1, N_KEY)},
    "float": lambda: {"attn_mask": torch.randn(BATCH, 1, N_QUERY, N_KEY)},
    "float_closed": lambda: {"attn_mask": torch.zeros(N_QUERY, N_KEY).masked_fill(~open_pattern(N_KEY), -torch.inf)},
}


def outputs_and_gradients(function, inputs, **arguments):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*inputs, **arguments)
    output.square().sum().backward()
    return output, [x.grad for x in inputs]


@pytest.mark.parametrize("attention", ["exact", {"name": "exact"}, "mechanism_path", {"name": "mechanism_path"}])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_equals_torch(attention, case):
    torch.manual_seed(0)
    inputs, arguments = make_inputs(BATCH), ARGUMENTS[case]()
    expected = outputs_and_gradients(F.scaled_dot_product_attention, inputs, **arguments)
    got = outputs_and_gradients(scaled_dot_product_attention, inputs, attention=attention, **arguments)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("attention", ["exact", "mechanism_path"])
@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 3)], ids=str)
def test_other_ranks_equal_torch(attention, leading):
    torch.manual_seed(0)
    inputs = make_inputs(*leading)
    for arguments in ({}, {"attn_mask": open_pattern(*leading, 1, N_QUERY, N_KEY)}):
        expected = F.scaled_dot_product_attention(*inputs, **arguments)
        torch.testing.assert_close(scaled_dot_product_attention(*inputs, attention=attention, **arguments), expected)


def test_two_axes_are_one_head():
    query, key, value = torch.randn(N_QUERY, DIM), torch.randn(N_KEY, DIM), torch.randn(N_KEY, VALUE_DIM)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value, attention="mechanism_path"), expected)


@pytest.mark.parametrize("attention", ["exact", "mechanism_path"])
def test_grouped_queries_equal_torch(attention):
    torch.manual_seed(0)
    inputs = make_inputs(BATCH, heads_kv=2)
    expected = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    torch.testing.assert_close(scaled_dot_product_attention(*inputs, enable_gqa=True, attention=attention), expected)


@pytest.mark.parametrize("attention", ["exact", "mechanism_path"])
def test_dropout_always_acts(attention):
    inputs = make_inputs(BATCH)
    dropped = scaled_dot_product_attention(*inputs, dropout_p=0.5, attention=attention)
    assert not torch.allclose(dropped, scaled_dot_product_attention(*inputs, attention=attention))


def test_exact_drops_the_same_weights_as_torch():
    inputs = make_inputs(BATCH)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(scaled_dot_product_attention(*inputs, dropout_p=0.5), expected, rtol=0, atol=0)


def test_built_mechanism_is_used_and_sees_structure():
    mechanism = MechanismPath(AttentionShape(HEADS, DIM, VALUE_DIM))
    query, key, value = make_inputs(BATCH)
    keep = torch.ones(BATCH, 1, N_QUERY, N_KEY, dtype=torch.bool)
    keep[0, :, :, -2:] = False
    scaled_dot_product_attention(query, key, value, attn_mask=keep, attention=mechanism)
    assert mechanism.seen.is_structured
    assert torch.equal(mechanism.seen.key_keep, keep[:, 0, 0])
    scaled_dot_product_attention(query, key, value, is_causal=True, attention=mechanism)
    assert mechanism.seen.causal
    assert mechanism.seen.query_offset == 0


def call(attention="mechanism_path", **arguments):
    return scaled_dot_product_attention(*make_inputs(BATCH), attention=attention, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "learned"}, r"build it once with build_attention\('learned', num_heads=4, head_dim=8"),
        ({"attention": "mechanism_pat"}, "did you mean 'mechanism_path'"),
        ({"attention": {"name": "mechanism_path", "keep": 2}}, "attention.keep is not an option"),
        ({"attention": {"keep": 2}}, "must have the key 'name'"),
        ({"attention": MechanismPath(AttentionShape(2, DIM))}, r"query must be \(batch, 2, length, 8\)"),
        ({"is_causal": True, "attn_mask": torch.ones(N_QUERY, N_KEY, dtype=torch.bool)}, "must be None"),
        ({"attn_mask": torch.ones(N_QUERY, N_KEY, dtype=torch.int64)}, "must be boolean"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_fewer_key_heads_need_enable_gqa():
    with pytest.raises(ValueError, match="enable_gqa must be True"):
        scaled_dot_product_attention(*make_inputs(BATCH, heads_kv=2), attention="mechanism_path")
