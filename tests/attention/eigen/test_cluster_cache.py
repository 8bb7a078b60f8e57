"""Decoding with `eigen_cluster` from cached moments against one pass over all keys."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism, build_attention
from approx_attn.attention.eigen.kernels import native
from helpers import naive_reference

BATCH, HEADS, DIM, LENGTH, PROMPT = 2, 4, 8, 53, 17
SMALL = {"block_size": 8, "cluster_size": 2, "rank": 3, "keep": 11}

needs_compiler = pytest.mark.skipif(
    native.load() is None,
    reason="no C++ compiler was found (or the kernel is switched off), so the compiled step was not tested.",
)

CASES = {
    "number": {},
    "share": {"keep": 0.3},
    "order 0": {"order": 0},
    "order 2": {"order": 2, "keep": 0.4},
    "one map": {"share": "layer", "order": 2},
    "more budget than keys": {"keep": 30},
    "all exact": {"keep": 1.0},
    "uncut": {"cluster_size": 8, "keep": 9},
}


def build(key_heads: int = HEADS, dtype: torch.dtype = torch.float64, **options: object) -> AttentionMechanism:
    words = {"num_heads": HEADS, "head_dim": DIM, "num_key_value_heads": key_heads, "causal": True, "seed": 1}
    mechanism = build_attention("eigen_cluster", **words, **{**SMALL, **options})
    with torch.no_grad():  # maps that are not each other's
        maps = mechanism.basis.query_map
        maps.add_(0.3 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(2)))
    return mechanism.to(dtype).eval()


def inputs(key_heads: int = HEADS, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, key_heads, key_heads)
    return [torch.randn(BATCH, h, length, DIM, generator=generator, dtype=torch.float64).to(dtype) for h in heads]


def expected(mechanism: AttentionMechanism, tensors: list[Tensor], mask: AttentionMask) -> Tensor:
    """One pass over all, which the contract compares with the formula."""
    with torch.no_grad():
        return copy.deepcopy(mechanism).double()(*(x.double() for x in tensors), mask)[0]


@torch.no_grad()
def decode(cache, tensors: list[Tensor], mask: AttentionMask, steps: list[int], sliding: int | None = None) -> Tensor:
    """Outputs of queries that come in parts of some sizes, each in front of what is cached then."""
    query, key, value = tensors
    outputs, start = [], 0
    for size in steps:
        stop = start + size
        first = 0 if sliding is None else max(start - sliding + 1, 0)
        keep = None if mask.key_keep is None else mask.key_keep[:, first:stop]
        part = replace(mask, key_keep=keep, query_offset=start - first)
        words = {"first": first, "window": sliding}
        outputs.append(
            cache.attend(query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], part, **words)[0]
        )
        start = stop
    return torch.cat(outputs, dim=2)


ONE_BY_ONE = [PROMPT] + [1] * (LENGTH - PROMPT)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_one_pass(case, key_heads):
    mechanism, tensors, mask = build(key_heads, **CASES[case]), inputs(key_heads), AttentionMask(causal=True)
    got = decode(mechanism.start_cache(), tensors, mask, ONE_BY_ONE)
    torch.testing.assert_close(got, expected(mechanism, tensors, mask))


def test_a_step_is_the_formula():
    mechanism, (query, key, value) = build(order=2), [x[:1] for x in inputs()]
    mask = AttentionMask(causal=True, query_offset=LENGTH - 3)
    with torch.no_grad():
        got = mechanism.start_cache().attend(query[:, :, -3:], key, value, mask)[0]
        reference = naive_reference("eigen_cluster").naive(mechanism, query[:, :, -3:], key, value, mask, DIM**-0.5)
    torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("case", ["number", "share", "order 2", "more budget than keys"])
def test_padding_on_the_left_is_no_key(case):
    mechanism, tensors = build(2, **CASES[case]), inputs(2)
    keep = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    keep[1, :11] = False
    mask = AttentionMask(causal=True, key_keep=keep)
    reference = expected(mechanism, tensors, mask)
    for tensor in tensors[1:]:
        tensor[1, :, :11] = float("nan")
    got = decode(mechanism.start_cache(), tensors, mask, ONE_BY_ONE)
    torch.testing.assert_close(got[0], reference[0])
    torch.testing.assert_close(got[1, :, 11:], reference[1, :, 11:])


@pytest.mark.parametrize("sliding", [20, 16, 5])
def test_a_sliding_cache_that_drops_keys_changes_nothing(sliding):
    mechanism, tensors, mask = build(keep=6, order=2), inputs(), AttentionMask(causal=True, window=sliding)
    reference = expected(mechanism, tensors, mask)
    for steps in (ONE_BY_ONE, [PROMPT, 9, *[1] * 10, 12, 5]):
        got = decode(mechanism.start_cache(), tensors, mask, steps, sliding)
        torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["number", "order 0", "order 2", "one map"])
@pytest.mark.parametrize(
    "part", [{"softcap": 1.5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=["cap", "sinks"]
)
def test_steps_with_a_soft_cap_or_sinks(part, case, dtype, monkeypatch):
    mechanism, mask = build(2, dtype, **CASES[case]), AttentionMask(causal=True, **part)
    tensors = inputs(2, dtype=dtype)
    reference = expected(mechanism, tensors, mask)
    passes, attend = [], type(mechanism).attend
    monkeypatch.setattr(
        type(mechanism),
        "attend",
        lambda self, query, *rest: passes.append(query.shape[2]) or attend(self, query, *rest),
    )
    got = decode(mechanism.start_cache(), tensors, mask, ONE_BY_ONE)
    torch.testing.assert_close(got.double(), reference, rtol=1e-4, atol=1e-5)
    assert passes == [PROMPT]
    assert not torch.allclose(reference, expected(mechanism, tensors, AttentionMask(causal=True)), atol=1e-2)


def test_several_queries_a_step_and_across_runs():
    mechanism, tensors, mask = build(), inputs(), AttentionMask(causal=True)
    got = decode(mechanism.start_cache(), tensors, mask, [PROMPT, 5, 8, 1, 3, 12, 7])
    torch.testing.assert_close(got, expected(mechanism, tensors, mask))


def test_samples_are_reordered_and_repeated_and_keys_taken_back():
    mechanism, tensors, mask = build(), inputs(), AttentionMask(causal=True)
    cache = mechanism.start_cache()
    decode(cache, tensors, mask, [PROMPT, *[1] * 20])
    order = torch.tensor([1, 0, 0])
    cache.select(order)
    cache.crop(21)
    moved = [x[order] for x in tensors]
    moved[1][:, :, 21:] += 1.0  # other keys than those that were taken back
    query, key, value = moved
    with torch.no_grad():
        got = [
            cache.attend(
                query[:, :, i : i + 1],
                key[:, :, : i + 1],
                value[:, :, : i + 1],
                AttentionMask(causal=True, query_offset=i),
            )
            for i in range(21, LENGTH)
        ]
    reference = expected(mechanism, moved, mask)[:, :, 21:]
    torch.testing.assert_close(torch.cat([output for output, _ in got], dim=2), reference)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_step_equals_pytorchs(case, dtype):
    keep = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    keep[1, :11] = False
    for mask in (AttentionMask(causal=True), AttentionMask(causal=True, window=20, key_keep=keep)):
        tensors = inputs(2, dtype=dtype)
        wide = [x.double() for x in tensors]
        if mask.key_keep is not None:
            tensors[2][1, :, :11] = float("nan")
        mechanism = build(2, dtype=torch.float32, **CASES[case])
        reference = decode(copy.deepcopy(mechanism).double().start_cache(), wide, mask, [PROMPT, 5, *[1] * 31])
        got = decode(mechanism.start_cache(), tensors, mask, [PROMPT, 5, *[1] * 31])
        error = (got.double() - reference)[:, :, PROMPT:].norm() / reference.norm()
        assert error < (2e-6 if dtype == torch.float32 else 5e-3)


def test_where_the_rest_is_dropped_nothing_is_kept_and_a_step_costs_a_pass():
    mechanism = build(rest="drop")
    assert mechanism.start_cache() is None
    assert mechanism.decoding_cost(LENGTH) == mechanism.cost(1, LENGTH, causal=True)
    assert build().decoding_cost(LENGTH).score_multiply_adds < mechanism.decoding_cost(LENGTH).score_multiply_adds
