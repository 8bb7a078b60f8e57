"""`eigen_block`: what it computes beyond the contract, which runs it against a naive reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.base import AttentionMechanism
from approx_attn.attention.eigen.block import automatic_block_size
from approx_attn.measurement import peak_memory

HEADS, DIM = 2, 8


def build(dtype: torch.dtype = torch.float64, **options) -> AttentionMechanism:
    settings = {"num_heads": HEADS, "head_dim": DIM, "block_size": 8, "rank": 4, "seed": 1, **options}
    return build_attention("eigen_block", **settings).to(dtype).eval()


def inputs(n_q: int, n_k: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (n_q, n_k or n_q, n_k or n_q)
    return [torch.randn(2, HEADS, n, DIM, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]


def exact(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    return build_attention("exact", num_heads=HEADS, head_dim=DIM)(query, key, value, AttentionMask(causal=causal))[0]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.norm())


def clustered(n: int, seed: int = 3) -> list[Tensor]:
    """Keys whose blocks of 8 hold a large part in common; queries and values without structure."""
    query, key, value = inputs(n, seed=seed)
    common = torch.randn(2, HEADS, n // 8, 1, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    key = 0.3 * key + common.expand(-1, -1, -1, 8, -1).reshape(key.shape)
    return [2 * query, key, value + key]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_size", "query_block_size"), [(1, 3), (5, None), (8, 16), (64, None), ("auto", 3)])
def test_all_blocks_exact_is_exact_attention(block_size, query_block_size, causal):
    mechanism = build(keep=1.0, block_size=block_size, query_block_size=query_block_size)
    query, key, value = inputs(37)
    output, _ = mechanism(query, key, value, AttentionMask(causal=causal))
    torch.testing.assert_close(output, exact(query, key, value, causal))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_blocks_of_one_key_have_nothing_to_approximate(order):
    query, key, value = inputs(20)
    output, _ = build(keep=2, block_size=1, order=order)(query, key, value)
    torch.testing.assert_close(output, exact(query, key, value))


def test_every_order_is_better_than_the_one_before():
    query, key, value = clustered(64)
    errors = [
        relative_error(build(keep=8, order=order, rank=DIM)(query, key, value)[0], exact(query, key, value))
        for order in (0, 1, 2)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_first_order_is_the_derivative_of_exact_attention():
    """With all d dimensions and deviations of size ε in a block, the error falls as ε² (order 0: as ε)."""
    query, key, value = clustered(64)
    middle = key.unflatten(2, (-1, 8)).mean(3, keepdim=True).expand(-1, -1, -1, 8, -1).flatten(2, 3)
    errors = {order: [] for order in (0, 1)}
    for epsilon in (0.02, 0.01):
        near = middle + epsilon * (key - middle)
        expected = exact(query, near, value)
        for order, found in errors.items():
            found.append(relative_error(build(keep=8, order=order, rank=DIM)(query, near, value)[0], expected))
    assert errors[0][0] / errors[0][1] == pytest.approx(2.0, rel=0.1)
    assert errors[1][0] / errors[1][1] == pytest.approx(4.0, rel=0.1)


def test_probes_find_the_block_that_holds_the_weight():
    query, key, value = inputs(64)
    query[:, :, :8] += 6.0  # the first block of queries asks for the block at 40..47
    key[:, :, 40:48] += 3.0
    mechanism = build(keep=16, order=0)
    error = relative_error(mechanism(query, key, value)[0][:, :, :8], exact(query, key, value)[:, :, :8])
    assert error < 1e-6


@pytest.mark.parametrize("options", [{}, {"order": 2, "query_block_size": 4}, {"neighbours": 1, "first_block": True}])
def test_causal_output_ignores_later_inputs_bit_for_bit(options):
    """Not only the gradient: also which blocks are exact must not follow from what comes later."""
    mechanism = build(keep=0.3, **options)
    query, key, value = inputs(61)
    other = [x.clone() for x in (query, key, value)]
    cut = 29  # inside a block
    for x in other:
        x[:, :, cut:] = 10 * torch.randn_like(x[:, :, cut:])
    mask = AttentionMask(causal=True)
    first, second = mechanism(query, key, value, mask)[0], mechanism(*other, mask)[0]
    assert torch.equal(first[:, :, :cut], second[:, :, :cut])
    assert not torch.allclose(first[:, :, cut:], second[:, :, cut:])


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_inputs_and_basis(order, causal):
    mechanism = build(keep=0.25, order=order, rank=2, block_size=4, num_key_value_heads=1).train()
    generator = torch.Generator().manual_seed(5)
    sizes = ((1, HEADS, 13, DIM), (1, 1, 13, DIM), (1, 1, 13, DIM))
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    keep = torch.arange(13) < 11
    mask = AttentionMask(causal=causal, key_keep=keep[None], query_keep=keep[None])
    parameters = [p for p in mechanism.parameters() if p.requires_grad]
    assert len(parameters) == (2 if order else 0)

    def run(*arguments: Tensor) -> Tensor:
        return mechanism(*arguments[:3], mask)[0] * keep[:, None]

    assert torch.autograd.gradcheck(run, (*tensors, *parameters), fast_mode=True)


def test_dropout_in_the_backward_pass_is_that_of_the_forward_pass():
    mechanism = build(keep=0.25).train()
    query, key, value = (x.requires_grad_() for x in inputs(24))
    torch.manual_seed(0)
    output = mechanism(query, key, value, dropout_p=0.5)[0]
    gradient = torch.autograd.grad(output.sum(), value)[0]
    torch.manual_seed(0)
    again = mechanism(query, key, 2 * value, dropout_p=0.5)[0]
    torch.testing.assert_close(again, 2 * output)  # the same pairs were dropped
    # The output is linear in the values, so the gradient tells the sum of the output.
    torch.testing.assert_close((gradient * value).sum(), output.sum())


def test_dropout_is_right_on_average():
    mechanism = build(keep=0.25, dtype=torch.float32).train()
    tensors = inputs(16, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([mechanism(*tensors, dropout_p=0.2)[0] for _ in range(400)]).mean(0)
        torch.testing.assert_close(mean, mechanism(*tensors)[0], rtol=0.0, atol=0.15)


def test_budget_in_keys_is_rounded_up_to_blocks():
    query, key, value = inputs(64)
    few, more = build(keep=9), build(keep=16)
    assert torch.equal(few(query, key, value)[0], more(query, key, value)[0])
    assert few.cost(64).exact_pairs == HEADS * 64 * 16


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [8, 61, 64])
def test_cost_counts_the_exact_pairs_that_the_weights_show(n, causal):
    """Where the basis sees nothing (order 0), weights within a far block are equal, exact ones are not."""
    mechanism = build(keep=0.25, order=0)
    query, key, value = inputs(n)
    _, weights = mechanism(query, key, value, AttentionMask(causal=causal), need_weights=True)
    missing = -n % 8
    blocks = torch.nn.functional.pad(weights, (0, missing), value=-1.0).unflatten(-1, (-1, 8))
    equal = (blocks - blocks[..., :1]).abs().masked_fill(blocks < 0, 0.0).amax(-1) < 1e-15
    open_pairs = (weights > 0).sum()
    far_pairs = ((blocks > 0) & equal[..., None]).sum()
    counted = int(open_pairs - far_pairs)
    stated = 2 * mechanism.cost(n, causal=causal).exact_pairs
    # A diagonal block with a single open key looks like a far one; the ragged last block counts as a full one.
    looks_far, ragged = 2 * HEADS * -(-n // 8) * causal, 2 * HEADS * n * missing * (not causal)
    assert stated - looks_far - ragged <= counted <= stated


def test_memory_grows_with_the_length_and_not_with_its_square():
    def peak(n: int) -> int:
        mechanism = build(torch.float32, keep=64, block_size=n // 16)
        tensors = [x.requires_grad_() for x in inputs(n, dtype=torch.float32)]
        return peak_memory(lambda: mechanism(*tensors)[0].sum().backward())

    # Below some thousand keys one chunk holds everything; from there on its size is bounded.
    assert peak(16384) < 4 * peak(4096)
    assert peak(4096) < 2 * HEADS * 4096 * 4096 * 4 / 8  # an eighth of one score matrix


def test_automatic_blocks_do_not_depend_on_padding_where_the_longest_input_is_known():
    mechanism = build(keep=0.25, block_size="auto", max_length=2048)
    query, key, value = inputs(600)
    keep = (torch.arange(600) < 250).expand(2, -1)
    padded = mechanism(query, key, value, AttentionMask(key_keep=keep, query_keep=keep))[0][:, :, :250]
    alone = mechanism(*(x[:, :, :250] for x in (query, key, value)))[0]
    torch.testing.assert_close(padded, alone)


def test_automatic_block_size():
    assert [automatic_block_size(n) for n in (1, 512, 1024, 4096)] == [16, 32, 64, 64]
    assert automatic_block_size(16384) == 128
    assert automatic_block_size(65536) == 512
    sizes = [automatic_block_size(n) for n in range(1, 70000, 999)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("samples", "n_q", "n_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_no_samples_queries_or_keys(samples, n_q, n_k):
    mechanism = build(num_key_value_heads=1)
    sizes = ((HEADS, n_q), (1, n_k), (1, n_k))
    tensors = [torch.randn(samples, h, n, DIM, dtype=torch.float64, requires_grad=True) for h, n in sizes]
    output, weights = mechanism(*tensors, need_weights=True)
    assert torch.equal(output, torch.zeros(samples, HEADS, n_q, DIM, dtype=torch.float64))
    assert weights.shape == (samples, HEADS, n_q, n_k)
    output.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "attention.keep must be a share"),
        ({"order": 3}, "attention.order must be one of 0, 1, 2, got 3"),
        ({"order": True}, "attention.order must be one of"),
        ({"block_size": 0}, "attention.block_size must be auto or a whole number"),
        ({"block_size": "large"}, "attention.block_size must be auto or a whole number"),
        ({"query_block_size": 0}, "attention.query_block_size must be a whole number"),
        ({"probes": 0}, "attention.probes must be a whole number"),
        ({"neighbours": -1}, "attention.neighbours must be a whole number"),
        ({"first_block": 1}, "attention.first_block must be true or false"),
        ({"rank": 0}, "attention.rank must be a whole number"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build(**options)


@pytest.mark.parametrize(("keep", "blocks", "exact"), [(0.15, 400, 60), (0.3, 170, 51), (0.125, 64, 8)])
def test_a_share_of_many_blocks_is_not_rounded_up_by_its_last_digit(keep, blocks, exact):
    mechanism = build_attention("eigen_block", num_heads=1, head_dim=2, keep=keep, block_size=2)
    assert mechanism.cost(2 * blocks).exact_pairs == exact * 2 * 2 * blocks
