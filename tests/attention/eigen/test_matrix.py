"""eigen_matrix against least squares over the observed pairs, in float64."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.eigen.matrix import EigenMatrixAttention

B, H, D = 2, 2, 4

spec = importlib.util.spec_from_file_location("naive_matrix", Path(__file__).parents[1] / "naive" / "eigen_matrix.py")
naive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(naive)


def build(max_length: int = 8, dtype: torch.dtype = torch.float64, **options) -> EigenMatrixAttention:
    mechanism = build_attention("eigen_matrix", num_heads=H, head_dim=D, max_length=max_length, **options)
    assert isinstance(mechanism, EigenMatrixAttention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    mechanism.select_greedily()
    return mechanism.to(dtype)


def qkv(n_q: int, n_k: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    n_k = n_q if n_k is None else n_k
    return tuple(torch.randn(B, H, n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (n_q, n_k, n_k))


def padding(n: int) -> Tensor:
    keep = torch.ones(B, n, dtype=torch.bool)
    keep[0, n - 2 :] = False
    keep[1, 0] = False
    return keep


@pytest.mark.parametrize("selection", ["rows_and_columns", "random", "greedy"])
@pytest.mark.parametrize("share", ["head", "layer"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_reference(selection: str, share: str, causal: bool, padded: bool) -> None:
    mechanism = build(selection=selection, share=share, keep=0.4, rank=3, factor_rank=2)
    query, key, value = qkv(8)
    keep = padding(8) if padded else None
    mask = AttentionMask(key_keep=keep, query_keep=keep, causal=causal)
    if padded:
        # Padded queries are cleared like keys; nobody reads what comes out for them.
        query, key, value = (x.masked_fill(~keep[:, None, :, None], 0.0) for x in (query, key, value))
    expected = naive.naive(mechanism, query, key, value, mask, 1 / math.sqrt(D))
    output, weights = mechanism(query, key, value, mask, need_weights=True)
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(weights @ value, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("n_q", "n_k", "offset"), [(3, 8, 0), (3, 8, 5), (8, 3, 0), (11, 11, 0), (2, 12, 10), (1, 1, 0)]
)
@pytest.mark.parametrize("selection", ["rows_and_columns", "random"])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_other_than_learned(n_q: int, n_k: int, offset: int, selection: str, causal: bool) -> None:
    mechanism = build(selection=selection, keep=0.4, rank=3)
    query, key, value = qkv(n_q, n_k)
    mask = AttentionMask(causal=causal, query_offset=offset)
    expected = naive.naive(mechanism, query, key, value, mask, 1 / math.sqrt(D))
    torch.testing.assert_close(mechanism(query, key, value, mask)[0], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [1, 5, 8, 15])
@pytest.mark.parametrize("selection", ["rows_and_columns", "random", "greedy"])
def test_interpolation_stretches_basis_and_pairs(n: int, selection: str) -> None:
    mechanism = build(lengths="interpolate", selection=selection, rank=2)
    table, _ = mechanism._components(n, n, 0, torch.float64)
    learned, _ = mechanism._components(8, 8, 0, torch.float64)
    torch.testing.assert_close(table[:, 0, 0], learned[:, 0, 0])
    if n > 1:
        torch.testing.assert_close(table[:, -1, -1], learned[:, -1, -1])
        assert mechanism.observed(n, n)[-1, -1] == mechanism.observed(8, 8)[-1, -1]
    if n == 15:
        torch.testing.assert_close(table[:, ::2, ::2], learned)
    assert bool(mechanism(*qkv(n))[0].isfinite().all())


@pytest.mark.parametrize("selection", ["rows_and_columns", "random", "greedy"])
@pytest.mark.parametrize("causal", [False, True])
def test_all_pairs_observed_is_exact(selection: str, causal: bool) -> None:
    exact = build_attention("exact", num_heads=H, head_dim=D)
    for keep in (1.0, 8):
        mechanism = build(selection=selection, keep=keep)
        for n in (8, 5, 11):
            mask = AttentionMask(causal=causal, key_keep=padding(n))
            torch.testing.assert_close(mechanism(*qkv(n), mask)[0], exact(*qkv(n), mask)[0])


def test_planted_matrix_is_recovered() -> None:
    """Scores in the span of the components, plus a free offset per row, are found as the noise goes to zero."""
    n = 8
    mechanism = build(max_length=n, rank=2, keep=0.3, factor_rank=1, share="layer")
    with torch.no_grad():
        mechanism.log_noise.fill_(math.log(1e-10))
        mechanism.left[:, -1] = 0.0  # no mean
    components = torch.einsum("rip,rjp->rij", mechanism.left[0, :-1], mechanism.right[0, :-1]).detach()
    offsets = torch.randn(B, H, n, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scores = torch.einsum("bhr,rij->bhij", torch.tensor([[[1.0, -2.0], [0.5, 1.0]]] * B).double(), components) + offsets
    key = math.sqrt(n) * torch.eye(n, dtype=torch.float64).expand(B, H, n, n)
    wide = build_attention(
        "eigen_matrix", num_heads=H, head_dim=n, max_length=n, rank=2, keep=0.3, factor_rank=1
    ).double()
    wide.load_state_dict(mechanism.state_dict())
    value = torch.randn(B, H, n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = F.scaled_dot_product_attention(scores, key, value)  # head_dim = n: scores come out as planted
    torch.testing.assert_close(wide(scores, key, value)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradients(causal: bool, rank: int) -> None:
    mechanism = build(max_length=5, rank=rank, factor_rank=2, keep=0.5)
    named = {name: p.detach().clone().requires_grad_() for name, p in mechanism.named_parameters() if p.numel()}
    mask = AttentionMask(causal=causal, key_keep=padding(5))
    inputs = [x.requires_grad_() for x in qkv(5)]

    def run(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mechanism, dict(zip(named, values, strict=True)), (query, key, value, mask))[
            0
        ]

    assert torch.autograd.gradcheck(run, (*inputs, *named.values()), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_every_parameter_learns_from_its_start(causal: bool) -> None:
    mechanism = build_attention("eigen_matrix", num_heads=H, head_dim=D, max_length=16).double()
    mechanism(*qkv(16), AttentionMask(causal=causal))[0].square().sum().backward()
    for name, parameter in mechanism.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("selection", ["rows_and_columns", "random"])
def test_no_gradient_from_the_future(selection: str) -> None:
    mechanism = build(selection=selection, causal=True)
    query, key, value = (x.requires_grad_() for x in qkv(8))
    output, _ = mechanism(query, key, value, AttentionMask(causal=True))
    for i in range(8):
        gradients = torch.autograd.grad(output[:, :, i].sum(), (query, key, value), retain_graph=True)
        assert all(bool((g[:, :, i + 1 :] == 0).all()) for g in gradients)


@pytest.mark.parametrize("selection", ["rows_and_columns", "random", "greedy"])
def test_share_of_pairs(selection: str) -> None:
    for n, keep in ((40, 0.25), (40, 0.1), (40, 10)):
        mechanism = build_attention(
            "eigen_matrix", num_heads=H, head_dim=D, max_length=n, selection=selection, keep=keep, rank=2
        )
        share = keep if isinstance(keep, float) else keep / n
        assert float(mechanism.observed(n, n).float().mean()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_kept_gives_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    mechanism = build(dtype=torch.float32)
    tensors = [x.requires_grad_() for x in qkv(8, dtype=dtype)]
    key_keep = torch.ones(B, 8, dtype=torch.bool)
    key_keep[0] = False
    output, _ = mechanism(*tensors, AttentionMask(key_keep=key_keep))
    assert bool((output[0] == 0).all())
    output.float().square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (*tensors, *mechanism.parameters()))


def test_low_precision_stays_near_the_reference() -> None:
    expected, _ = build(max_length=32)(*qkv(32))
    single = build(max_length=32, dtype=torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        output, _ = single(*qkv(32, dtype=dtype))
        assert (output.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("options", [{}, {"selection": "random"}, {"share": "head", "rank": 0}])
@pytest.mark.parametrize("causal", [False, True])
def test_cost_counts_what_is_multiplied(options: dict, causal: bool) -> None:
    n = 32
    mechanism = build_attention("eigen_matrix", num_heads=H, head_dim=D, max_length=n, causal=causal, **options)
    with FlopCounterMode(display=False) as counter:
        mechanism(*qkv(n, dtype=torch.float32), AttentionMask(causal=causal))
    cost = mechanism.cost(n)
    # The counter sees a batch of B; what does not depend on the input is done once for it.
    once = mechanism.left.shape[0] * n * n * ((mechanism.rank + 1) * 4 + mechanism.rank + mechanism.rank**2)
    solves = mechanism.left.shape[0] * mechanism.rank**3 * (n if causal else 1)
    assert counter.get_total_flops() / 2 == pytest.approx(B * (cost.multiply_adds - once - solves) + once, rel=0.01)
    pairs = mechanism.observed(n, n)
    assert cost.exact_pairs == H * int((pairs.tril() if causal else pairs).sum())


def test_greedy_pairs_travel_with_the_state() -> None:
    source = build(selection="greedy")
    target = build_attention("eigen_matrix", num_heads=H, head_dim=D, max_length=8, selection="greedy").double()
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(*qkv(8))[0], source(*qkv(8))[0])


def test_sharing() -> None:
    first, second = build(share="model"), build(share="model")
    second.tie_to(first)
    assert second.left is first.left
    third = build(share="layer")
    third.tie_to(first)
    assert third.left is not first.left
    with pytest.raises(ValueError, match=r"attention\.share=model"):
        build(share="model", rank=2).tie_to(first)
    assert build(share="head").left.shape[0] == H
    assert not any(p.requires_grad for p in build(train_basis=False).parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": 0.0}, "attention.keep"),
        ({"rank": -1}, "attention.rank"),
        ({"rank": 30, "keep": 0.25}, r"attention.rank=30 .*16 pairs.*attention.keep"),
        ({"factor_rank": 0}, "attention.factor_rank"),
        ({"selection": "strided"}, r"attention.selection .*rows_and_columns, random, greedy"),
        ({"share": "none"}, "attention.share"),
        ({"lengths": "pad"}, "attention.lengths"),
        ({"max_length": None}, "max_length"),
    ],
)
def test_bad_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_attention("eigen_matrix", **{"num_heads": H, "head_dim": D, "max_length": 8, **options})


@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_defaults_fit_any_length(max_length: int) -> None:
    mechanism = build_attention("eigen_matrix", num_heads=H, head_dim=D, max_length=max_length).double()
    assert bool(mechanism(*qkv(max_length))[0].isfinite().all())


@pytest.mark.parametrize("selection", ["rows_and_columns", "random"])
def test_compiles(selection: str) -> None:
    mechanism = build(selection=selection)
    compiled = torch.compile(mechanism, backend="eager", fullgraph=True)
    mask = AttentionMask(causal=True)
    torch.testing.assert_close(compiled(*qkv(8), mask)[0], mechanism(*qkv(8), mask)[0])
