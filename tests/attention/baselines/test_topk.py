"""Top-k attention: the custom backward pass, its memory, and how many keys are kept."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, AttentionShape, build_attention
from approx_attn.attention.exact import ExactAttention
from approx_attn.run.measurement import peak_memory


def draw(n_q=12, n_k=12, heads=2, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    return [torch.randn(2, heads, n, dim, generator=generator, dtype=dtype).requires_grad_() for n in (n_q, n_k, n_k)]


def saved_sizes(function):
    """Numbers of elements of the tensors that a forward pass holds for its backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        function()
    return sizes


@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(causal=True)], ids=["full", "causal"])
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_gradients_by_finite_differences(mask, chunk_size):
    mechanism = build_attention("topk", num_heads=2, head_dim=2, keep=3, chunk_size=chunk_size)
    assert torch.autograd.gradcheck(lambda q, k, v: mechanism(q, k, v, mask)[0], draw(5, 5, dim=2))


@pytest.mark.parametrize("shape", [(1, 2, 5, 5), (2, 1, 1, 5), (5, 5)])
def test_gradient_reaches_an_additive_bias(shape):
    mechanism = build_attention("topk", num_heads=2, head_dim=2, keep=3, chunk_size=3)
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tensors = draw(5, 5, dim=2)
    assert torch.autograd.gradcheck(lambda b: mechanism(*tensors, AttentionMask(bias=b))[0], [bias])


def test_gradients_with_dropout_and_through_the_weights():
    mechanism = build_attention("topk", num_heads=2, head_dim=2, keep=3).train()

    def run(query, key, value):
        torch.manual_seed(0)
        output, weights = mechanism(query, key, value, dropout_p=0.3, need_weights=True)
        return output, weights

    assert torch.autograd.gradcheck(run, draw(5, 5, dim=2))


def test_holds_nothing_of_size_n_times_n():
    n, k = 96, 6
    mechanism = build_attention("topk", num_heads=2, head_dim=4, keep=k, chunk_size=16)
    query, key, value = draw(n, n)
    assert max(saved_sizes(lambda: mechanism(query, key, value))) <= 2 * 2 * n * k
    assert (
        max(saved_sizes(lambda: ExactAttention(AttentionShape(2, 4))(query, key, value, need_weights=True)))
        >= 2 * 2 * n * n
    )


def test_memory_of_a_training_pass_is_linear_in_the_length():
    def peak(n):
        mechanism = build_attention("topk", num_heads=2, head_dim=4, keep=16, chunk_size=16)
        tensors = draw(n, n, dtype=torch.float32)
        return peak_memory(lambda: mechanism(*tensors)[0].sum().backward())

    assert peak(2048) < 2.3 * peak(1024)


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_do_not_show(causal):
    tensors = draw(23, 23)
    whole, chunked = (
        build_attention("topk", num_heads=2, head_dim=4, chunk_size=size)(*tensors, AttentionMask(causal=causal))[0]
        for size in (64, 4)
    )
    torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keep", [0.25, 5, 1.0, 99])
def test_number_of_weights(causal, keep):
    mechanism = build_attention("topk", num_heads=2, head_dim=4, keep=keep)
    _, weights = mechanism(*draw(20, 20), AttentionMask(causal=causal), need_weights=True)
    per_row = (weights > 0).sum(-1)
    for i in range(20):
        usable = i + 1 if causal else 20
        expected = min(keep, usable) if isinstance(keep, int) else max(1, round(keep * usable))
        assert (per_row[:, :, i] == expected).all()
    assert mechanism.cost(20, causal=causal).exact_pairs * 2 == per_row.sum()


def test_keeps_the_largest():
    mechanism = build_attention("topk", num_heads=2, head_dim=4, keep=3)
    query, key, value = draw()
    _, weights = mechanism(query, key, value, need_weights=True)
    _, all_weights = ExactAttention(AttentionShape(2, 4))(query, key, value, need_weights=True)
    assert torch.equal((weights > 0).nonzero(), (all_weights >= all_weights.topk(3).values[..., -1:]).nonzero())


@pytest.mark.parametrize("causal", [False, True])
def test_cost_counts_the_products(causal):
    mechanism = build_attention("topk", num_heads=2, head_dim=4, chunk_size=5)
    tensors = [x[:1].detach() for x in draw(17, 17)]
    with FlopCounterMode(display=False) as counter:
        mechanism(*tensors, AttentionMask(causal=causal))
    assert 2 * mechanism.cost(17, causal=causal).multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize(("option", "value"), [("keep", 0.0), ("keep", 1.5), ("keep", 0), ("chunk_size", 0)])
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=rf"attention\.{option} must be"):
        build_attention("topk", num_heads=2, head_dim=4, **{option: value})
