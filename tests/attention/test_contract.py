"""What every attention mechanism must keep, run over the whole registry.

A mechanism enters by existing; it must bring one file, `tests/attention/naive/<name>.py`, which holds

`naive(mechanism, query, key, value, mask, scale) -> output`
    The mechanism written straight from its formula, slow and plain. Gets the built mechanism in float64
    and eval mode (for its parameters and options), float64 tensors with key/value heads already repeated
    to (b, h, n, d) and padded keys and values zeroed, and the `AttentionMask` (never None;
    `mask.dense_keep(...)` gives the pairs). Returns (b, h, n_q, d_v), zeros for queries without any key.

and may hold

`CASES: dict[str, dict]`
    Sets of options by a short id. Default: `{"default": {}}`, the defaults of the mechanism. The first should be
    the defaults unless they make no sense at 24 tokens, d = 8: it meets every test, the others in the fast run
    those that do not follow from the comparison with `naive`, and in the whole run all.
`prepare(mechanism) -> None`
    Called after building, e.g. to give parameters that start at zero some random values (seeded already).
`EXTRA_MASKS = False`
    Leaves arbitrary masks and biases out of the comparison with `naive` (they are still tested elsewhere).
`POOLS_QUERIES = True`
    Neighbouring queries share a choice, so a query alone may come out otherwise than among its neighbours.
`BFLOAT16_TOLERANCE: float`
    Relative error allowed under bfloat16 autocast, 0.1 unless given.

A mechanism that lacks a capability must refuse it by name; that is tested in place of the capability.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import yaml
from torch import Tensor

from approx_attn.attention import (
    AttentionMask,
    AttentionMechanism,
    AttentionShape,
    attention_class,
    attention_options,
    available_attention,
    build_attention,
)
from approx_attn.attention.base import repeat_heads
from approx_attn.attention.exact import ExactAttention
from helpers import ROOT, clear_padding, naive_reference

BATCH, HEADS, DIM, MAX_LENGTH = 2, 2, 8, 24


# -- the cases ------------------------------------------------------------------------------------------


REFERENCES = {name: naive_reference(name) for name in available_attention()}
CASES = [(name, case) for name in available_attention() for case in getattr(REFERENCES[name], "CASES", {"default": {}})]


def names_with(capability: str | None, present: bool = True) -> list[str]:
    """Mechanisms that have (lack) a capability; all for None."""
    names = available_attention()
    return [n for n in names if capability is None or getattr(attention_class(n).capabilities, capability) == present]


def first_case(name: str) -> str:
    return next(case for other, case in CASES if other == name)


def every_case(capability: str | None = None) -> Callable:
    """Parametrise over (name, case) of the mechanisms that have a capability."""
    names = names_with(capability)
    chosen = [pytest.param(name, case, id=f"{name}-{case}") for name, case in CASES if name in names]
    return pytest.mark.parametrize(("name", "case"), chosen)


def each_case(capability: str | None = None) -> Callable:
    """The same for a property that also follows from the naive reference: all cases but the first are slow tests."""
    names = names_with(capability)
    chosen = [
        pytest.param(name, case, id=f"{name}-{case}", marks=() if case == first_case(name) else pytest.mark.slow)
        for name, case in CASES
        if name in names
    ]
    return pytest.mark.parametrize(("name", "case"), chosen)


def each_name(capability: str | None = None, present: bool = True) -> Callable:
    """Parametrise over the mechanisms that have (lack) a capability."""
    return pytest.mark.parametrize("name", names_with(capability, present))


def build(name: str, case: str = "default", dtype: torch.dtype = torch.float32, **shape) -> AttentionMechanism:
    """The mechanism in eval mode, the same at every call."""
    torch.manual_seed(zlib.crc32(f"{name}-{case}".encode()))
    reference = REFERENCES[name]
    options = getattr(reference, "CASES", {}).get(case, {})
    mechanism = build_attention(
        name, **{"num_heads": HEADS, "head_dim": DIM, "max_length": MAX_LENGTH, **shape, **options}
    )
    if hasattr(reference, "prepare"):
        reference.prepare(mechanism)
    return mechanism.to(dtype).eval()


def inputs(
    n_q: int, n_k: int | None = None, dtype: torch.dtype = torch.float32, *, batch: int = BATCH, kv_heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, the same at every call."""
    n_k = n_q if n_k is None else n_k
    generator = torch.Generator().manual_seed(1000 * n_q + n_k)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, DIM, generator=generator, dtype=torch.float64).to(dtype)

    return draw(HEADS, n_q), draw(kv_heads, n_k), draw(kv_heads, n_k)


def padding(length: int, kept: tuple[int, ...]) -> AttentionMask:
    """Right padding: the first `kept[b]` tokens of each sample are real."""
    keep = torch.arange(length) < torch.tensor(kept)[:, None]
    return AttentionMask(key_keep=keep, query_keep=keep)


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def call(mechanism: AttentionMechanism, *tensors: Tensor, mask: AttentionMask | None = None, **kwargs) -> Tensor:
    return mechanism(*tensors, mask, **kwargs)[0]


# -- what is there --------------------------------------------------------------------------------------


@each_name()
def test_brings_a_config_with_every_option(name):
    path = ROOT / "configs" / "attention" / f"{name}.yaml"
    assert path.exists(), f"{name} needs configs/attention/{name}.yaml"
    config = yaml.safe_load(path.read_text())
    cls = attention_class(name)
    assert config.pop("_target_") == f"{cls.__module__}.{cls.__qualname__}"
    assert config.pop("_partial_") is True
    options = attention_options(name)
    assert set(config) == set(options)
    for key, value in config.items():
        default = options[key].default
        assert value == (list(default) if isinstance(default, tuple) else default), (
            f"{key}: the class and the YAML differ"
        )
    build_attention(name, num_heads=HEADS, head_dim=DIM, max_length=MAX_LENGTH, **config)


@each_name()
def test_describes_itself(name):
    cls = attention_class(name)
    assert cls.__doc__
    assert cls.cost_formula


@every_case()
def test_cost_record_is_plausible(name, case):
    mechanism = build(name, case)
    for n_q, n_k, causal in ((17, 17, False), (64, 64, False), (64, 64, True), (5, 23, False)):
        if (causal and not mechanism.capabilities.causal) or (n_q != n_k and not mechanism.capabilities.cross):
            continue
        cost = mechanism.cost(n_q, n_k, causal=causal)
        assert 0 <= cost.exact_pairs <= cost.total_pairs
        pairs = n_q * (n_q + 1) // 2 if causal else n_q * n_k
        assert cost.total_pairs == HEADS * pairs
        assert cost.computed_share >= cost.exact_share
        assert cost.score_multiply_adds >= cost.exact_pairs  # at least one product per exact score
        assert cost.value_multiply_adds >= 0
        assert cost.state >= 0


# -- numbers --------------------------------------------------------------------------------------------


def naive_masks(name: str, n_q: int, n_k: int) -> dict[str, AttentionMask]:
    """Every kind of mask that the mechanism takes, by a short id."""
    can = attention_class(name).capabilities
    generator = torch.Generator().manual_seed(7)
    key_keep = torch.arange(n_k) < torch.tensor([n_k, max(n_k - 4, 1)])[:, None]
    query_keep = torch.arange(n_q) < torch.tensor([n_q, max(n_q - 4, 1)])[:, None]
    masks = {"none": AttentionMask()}
    if can.padding_mask:
        masks["padding"] = AttentionMask(key_keep=key_keep, query_keep=query_keep)
        masks["left padding"] = AttentionMask(key_keep=key_keep.flip(-1), query_keep=query_keep.flip(-1))
    if can.causal:
        masks["causal"] = AttentionMask(causal=True)
        masks["causal, lower right"] = AttentionMask(causal=True, query_offset=n_k - n_q)
    if can.causal and can.padding_mask:
        masks["causal and left padding"] = replace(masks["left padding"], causal=True)
        masks["causal and padding"] = AttentionMask(key_keep=key_keep, query_keep=query_keep, causal=True)
    if can.window:
        masks["window"] = AttentionMask(window=3)
        masks["window of queries behind the keys"] = AttentionMask(window=5, query_offset=n_k - n_q)
        if can.causal:
            masks["causal window"] = AttentionMask(causal=True, window=4)
        if can.causal and can.padding_mask:
            masks["causal window and left padding"] = replace(masks["left padding"], causal=True, window=6)
            masks["window and padding"] = replace(masks["padding"], window=6)
    if can.softcap:
        masks["softcap"] = AttentionMask(softcap=1.5)
        masks["causal softcap"] = replace(masks["causal and left padding"], softcap=0.7)
    if can.sinks:
        sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
        masks["sinks"] = AttentionMask(sinks=sinks)
        masks["causal with sinks"] = AttentionMask(causal=True, sinks=sinks)
        masks["padding with sinks"] = replace(masks["padding"], sinks=sinks)
        if can.window:
            masks["causal window with sinks"] = replace(masks["causal window"], sinks=sinks)
    if can.arbitrary_mask and getattr(REFERENCES[name], "EXTRA_MASKS", True):
        pairs = torch.rand(BATCH, 1, n_q, n_k, generator=generator) < 0.7
        bias = torch.randn(1, HEADS, n_q, n_k, generator=generator)
        masks["pairs"] = AttentionMask(pair_keep=pairs)
        masks["bias"] = AttentionMask(bias=bias.double().masked_fill(~pairs[:1], float("-inf")))
        if can.causal and can.padding_mask:
            masks["everything"] = AttentionMask(
                key_keep=key_keep, query_keep=query_keep, causal=True, pair_keep=pairs, bias=bias.double()
            )
            if can.window:
                masks["everything in a window"] = replace(masks["everything"], window=7)
            if can.softcap and can.sinks:
                masks["everything, soft cap and sinks"] = replace(masks["everything"], softcap=2.0, sinks=sinks)
    return masks


@every_case()
@pytest.mark.parametrize(
    ("n_q", "n_k"), [(17, 17), (1, 1), (9, 21), (27, 9), (27, 27), pytest.param(24, 24, marks=pytest.mark.slow)]
)
def test_equals_the_naive_reference(name, case, n_q, n_k):
    can = attention_class(name).capabilities
    if (n_q != n_k and not can.cross) or (n_k > MAX_LENGTH and not can.variable_length):
        pytest.skip("refuses such lengths, tested below")
    n_q = n_q if can.variable_length else min(n_q, MAX_LENGTH)
    mechanism = build(name, case, torch.float64)
    query, key, value = inputs(n_q, n_k, torch.float64)
    scale = DIM**-0.5
    masks = naive_masks(name, n_q, n_k)
    if n_q > MAX_LENGTH:  # the other masks were met at shorter lengths
        few = ["none", "causal and padding" if can.causal else "padding", "everything in a window"]
        few += ["causal, lower right"] if n_q > n_k else []
        masks = {label: mask for label, mask in masks.items() if label in few}
    for label, mask in masks.items():
        got = call(mechanism, query, key, value, mask=mask)
        with torch.no_grad():  # where some take another path
            torch.testing.assert_close(call(mechanism, query, key, value, mask=mask), got, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            clean = clear_padding((query, key, value), mask)
            expected = REFERENCES[name].naive(mechanism, *clean, mask, scale)
        if mask.query_keep is not None:  # nobody reads the rest
            got, expected = (x * mask.query_keep[:, None, :, None] for x in (got, expected))
        assert got.shape == (BATCH, HEADS, n_q, DIM)
        assert (got - expected).abs().max() < 1e-8, f"mask: {label}"


@every_case()
def test_float32_is_near_float64(name, case):
    expected = call(build(name, case, torch.float64), *inputs(19, dtype=torch.float64))
    got = call(build(name, case), *inputs(19))
    assert got.dtype == torch.float32
    assert relative_error(got, expected) < 1e-4


@each_case()
def test_bfloat16_and_autocast(name, case):
    tolerance = getattr(REFERENCES[name], "BFLOAT16_TOLERANCE", 0.1)
    mechanism = build(name, case)
    expected = call(mechanism, *inputs(19))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(call(mechanism, *inputs(19)), expected) < tolerance
    query, key, value = (x.requires_grad_() for x in inputs(19))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(mechanism.train(), query, key, value, mask=AttentionMask(causal=mechanism.capabilities.causal))
    output.float().square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (query, key, value, *mechanism.parameters()))
    low = call(build(name, case, torch.bfloat16), *inputs(19, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert relative_error(low, expected) < 2 * tolerance


@each_case()
@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_products_that_overflow_16_bits_before_the_scale(name, case, need_weights):
    """33·33·64 is more than float16 holds; the score, an eighth of it, is not."""
    if need_weights and not attention_class(name).capabilities.returns_weights:
        pytest.skip("returns no weights, tested below")
    mechanism = build(name, case, torch.float16, head_dim=64)
    signs = torch.ones(1, HEADS, 19, 1).masked_fill(torch.arange(19)[:, None] % 3 == 0, -1.0)
    loud = (33.0 * signs).expand(-1, -1, -1, 64).half()
    value = torch.randn(1, HEADS, 19, 64, generator=torch.Generator().manual_seed(0)).half()
    for training in (False, True):
        output = call(mechanism.train(training), loud, loud, value, need_weights=need_weights)
        assert output.isfinite().all(), f"training: {training}"


@each_name()
def test_full_budget_equals_exact(name):
    cls = attention_class(name)
    masks = {"none": AttentionMask()}
    if cls.capabilities.padding_mask:
        masks["padding"] = padding(17, (17, 11))
    if cls.capabilities.causal:
        masks["causal"] = AttentionMask(causal=True)
    if cls.capabilities.window:
        masks["window"] = AttentionMask(window=4)
        masks["causal window"] = AttentionMask(causal=cls.capabilities.causal, window=4)
    if cls.capabilities.softcap:
        masks["softcap"] = AttentionMask(causal=True, softcap=1.5)
    if cls.capabilities.sinks:
        masks["sinks"] = AttentionMask(sinks=torch.tensor([0.5, -1.0]))
    if cls.capabilities.arbitrary_mask:
        masks["pairs"] = AttentionMask(pair_keep=inputs(17)[0] @ inputs(17)[1].transpose(-2, -1) > -1.0)
    options = cls.full_budget(17, DIM)
    if options is None:
        pytest.skip("has no such setting")
    mechanism = build_attention(name, num_heads=HEADS, head_dim=DIM, max_length=17, **options).double().eval()
    query, key, value = inputs(17, dtype=torch.float64)
    for label, mask in masks.items():
        expected = call(ExactAttention(AttentionShape(HEADS, DIM)), query, key, value, mask=mask)
        got = call(mechanism, query, key, value, mask=mask)
        kept = torch.ones(BATCH, 17, dtype=torch.bool) if mask.query_keep is None else mask.query_keep
        error = ((got - expected) * kept[:, None, :, None]).abs().max()
        assert error < 1e-8, f"mask: {label}"


@every_case("returns_weights")
def test_weights_reproduce_the_output(name, case):
    mechanism = build(name, case, torch.float64)
    query, key, value = inputs(13, dtype=torch.float64)
    masks = naive_masks(name, 13, 13)
    for label, mask in masks.items():
        output, weights = mechanism(query, key, value, mask, need_weights=True)
        assert weights.shape == (BATCH, HEADS, 13, 13)
        keep = mask.dense_keep(13, 13, query.device)
        if keep is not None:
            assert (weights.masked_fill(keep, 0.0) == 0).all(), f"mask: {label}: weight on a closed pair"
        has_key = weights.abs().sum(-1) > 0
        if mask.sinks is None:
            torch.testing.assert_close(weights.sum(-1), has_key.double())
        else:
            assert (weights.sum(-1)[has_key] < 1.0).all()
        clean = value if mask.key_keep is None else value * mask.key_keep[:, None, :, None]
        torch.testing.assert_close(weights @ clean, output)
        torch.testing.assert_close(output, call(mechanism, query, key, value, mask=mask))


@every_case("returns_weights")
def test_weights_asked_for_have_a_gradient_and_leave_that_of_the_inputs_alone(name, case):
    mechanism = build(name, case, torch.float64)
    gradients = []
    for need_weights in (False, True):
        tensors = [x.requires_grad_() for x in inputs(13, dtype=torch.float64)]
        output, weights = mechanism(*tensors, need_weights=need_weights)
        target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        wanted = tensors if weights is None or not weights.requires_grad else [*tensors, weights]
        gradients.append(
            torch.autograd.grad((output * target).sum(), wanted, allow_unused=True, materialize_grads=True)
        )
    for fused, with_weights in zip(gradients[0], gradients[1], strict=False):
        torch.testing.assert_close(with_weights, fused)
    if len(gradients[1]) > len(gradients[0]):
        torch.testing.assert_close(gradients[1][-1], target @ tensors[2].mT)


# -- masks ----------------------------------------------------------------------------------------------


@each_case("padding_mask")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padded_equals_unpadded(name, case, causal):
    """Whatever stands in the padding: NaN in keys, values and queries."""
    if causal and not attention_class(name).capabilities.causal:
        pytest.skip("not causal")
    if case == "interpolated":
        pytest.skip("its axis is stretched to the keys given, padded or not, as its docstring says")
    mechanism = build(name, case)
    query, key, value = inputs(22)
    kept = (22, 13)
    mask = replace(padding(22, kept), causal=causal)
    garbage = ~mask.key_keep[:, None, :, None]
    together = call(mechanism, *(x.masked_fill(garbage, float("nan")) for x in (query, key, value)), mask=mask)
    for sample, length in enumerate(kept):
        alone = call(
            mechanism,
            *(x[sample : sample + 1, :, :length] for x in (query, key, value)),
            mask=AttentionMask(causal=causal),
        )
        assert_close(together[sample : sample + 1, :, :length], alone)


@each_case("padding_mask")
def test_padded_queries_count_for_nothing_where_only_keys_are_said_to_be_padded(name, case):
    """As self-attention arrives from callers that know a key padding mask and no other."""
    mechanism = build(name, case)
    query, key, value = inputs(22)
    mask = padding(22, (22, 13))
    padded = ~mask.query_keep[:, None, :, None]
    expected = call(mechanism, query, key, value, mask=mask)
    got = call(mechanism, query.masked_fill(padded, 7.0), key, value, mask=replace(mask, query_keep=None))
    assert_close(got.masked_fill(padded, 0.0), expected.masked_fill(padded, 0.0))


TIED_TO_POSITIONS = {  # mechanisms, or cases of theirs, and what they have that left padding moves tokens away from
    "dct": "a basis over positions",
    "differentiable_mask-absolute": "a gate per pair of positions",
    "eigen_cluster": "runs that start at fixed positions",
    "eigen_linear-six": "sections of fixed positions",
    "eigen_linear-random, shared": "sections of fixed positions",
    "eigen_linear-interpolated": "sections of fixed positions",
    "eigen_matrix": "a basis over positions",
    "eigen_row": "a basis over positions",
    "eigen_topk-absolute": "a prior score per position",
    "gaussian-grid": "a grid that starts at the first position",
    "linformer": "a column of the projections per position",
    "mean-default": "an average per pair of positions",
    "moba": "blocks that start at fixed positions",
    "mra": "blocks that start at fixed positions",
    "nsa": "blocks that start at fixed positions",
    "positional-default": "a score per pair of positions",
    "sliding_window-random": "random blocks that start at fixed positions",
}


@every_case("padding_mask")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_left_padded_equals_unpadded(name, case, causal):
    """As generation in batches pads."""
    mechanism = build(name, case)
    if causal and not mechanism.capabilities.causal:
        pytest.skip("not causal")
    for tied in (name, f"{name}-{case}"):
        if tied in TIED_TO_POSITIONS:
            pytest.skip(f"has {TIED_TO_POSITIONS[tied]}")
    query, key, value = inputs(22)
    kept = (22, 13)
    keep = padding(22, kept).key_keep.flip(-1)
    mask = AttentionMask(key_keep=keep, query_keep=keep, causal=causal)
    garbage = ~keep[:, None, :, None]
    together = call(mechanism, *(x.masked_fill(garbage, float("nan")) for x in (query, key, value)), mask=mask)
    for sample, length in enumerate(kept):
        alone = call(
            mechanism,
            *(x[sample : sample + 1, :, 22 - length :] for x in (query, key, value)),
            mask=AttentionMask(causal=causal),
        )
        assert_close(together[sample : sample + 1, :, 22 - length :], alone)


@each_case("padding_mask")
def test_padding_gets_no_gradient(name, case):
    mechanism = build(name, case).train()
    query, key, value = (x.requires_grad_() for x in inputs(18))
    mask = padding(18, (18, 10))
    output = call(mechanism, query, key, value, mask=mask)
    (output * mask.query_keep[:, None, :, None]).square().sum().backward()
    assert value.grad is not None
    for tensor in (key, value):
        if tensor.grad is not None:  # some look at no key
            assert tensor.grad.isfinite().all()
            assert (tensor.grad[1, :, 10:] == 0).all()


@each_case()
def test_batch_invariance(name, case):
    mechanism = build(name, case)
    query, key, value = inputs(15)
    louder = (torch.cat([x[:1], 50 * x[1:]]) for x in (query, key, value))  # the neighbour is of another scale
    together = call(mechanism, *louder)[:1]
    alone = call(mechanism, query[:1], key[:1], value[:1])
    assert_close(together, alone)


@every_case("causal")
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_no_causal_leak(name, case, padded):
    """The gradient of output i with respect to input j > i is exactly zero."""
    mechanism = build(name, case, causal=True).train()
    query, key, value = (x.requires_grad_() for x in inputs(20))
    mask = AttentionMask(causal=True)
    if padded and mechanism.capabilities.padding_mask:
        mask = replace(padding(20, (20, 12)), causal=True)
    output = call(mechanism, query, key, value, mask=mask)
    for i in (0, 7, 11):
        gradients = torch.autograd.grad(
            output[:, :, i].sum(), (query, key, value), retain_graph=True, allow_unused=True
        )
        for gradient in gradients:
            if gradient is not None:
                assert (gradient[:, :, i + 1 :] == 0).all()


@each_case("window")
@pytest.mark.parametrize("causal", [False, True])
def test_no_gradient_from_outside_a_window(name, case, causal):
    mechanism = build(name, case, causal=causal).train()
    query, key, value = (x.requires_grad_() for x in inputs(20))
    output = call(mechanism, query, key, value, mask=AttentionMask(causal=causal, window=4))
    for i in (0, 7, 19):
        gradients = torch.autograd.grad(output[:, :, i].sum(), (key, value), retain_graph=True, allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                outside = (torch.arange(20) - i).abs() >= 4
                assert (gradient[:, :, outside] == 0).all()


@each_case("causal")
def test_causal_output_does_not_depend_on_the_length(name, case):
    """The first tokens of a longer text come out as the shorter text alone: decoding equals one pass."""
    mechanism = build(name, case, causal=True)
    query, key, value = inputs(20)
    long = call(mechanism, query, key, value, mask=AttentionMask(causal=True))
    short = call(mechanism, *(x[:, :, :12] for x in (query, key, value)), mask=AttentionMask(causal=True))
    assert_close(long[:, :, :12], short)


@each_case("causal")
def test_queries_with_an_offset_stand_where_the_mask_says(name, case):
    """The last queries over all keys, lower-right aligned, as decoding with a cache asks."""
    mechanism = build(name, case, causal=True)
    if not mechanism.capabilities.cross:
        pytest.skip("refuses cross attention, tested below")
    if getattr(REFERENCES[name], "POOLS_QUERIES", False):
        pytest.skip("its choice of keys is shared by neighbouring queries")
    query, key, value = inputs(20)
    whole = call(mechanism, query, key, value, mask=AttentionMask(causal=True))
    for n_q in (1, 6):
        last = call(mechanism, query[:, :, -n_q:], key, value, mask=AttentionMask(causal=True, query_offset=20 - n_q))
        assert_close(last, whole[:, :, -n_q:])


@each_case("arbitrary_mask")
def test_biases_broadcast(name, case):
    mechanism = build(name, case)
    tensors = inputs(11)
    generator = torch.Generator().manual_seed(5)
    for shape in ((11, 11), (HEADS, 1, 11), (BATCH, 1, 1, 11), (1, HEADS, 11, 1), (1, 11)):
        bias = torch.randn(shape, generator=generator)
        expected = call(mechanism, *tensors, mask=AttentionMask(bias=bias.expand(BATCH, HEADS, 11, 11)))
        assert_close(call(mechanism, *tensors, mask=AttentionMask(bias=bias)), expected)


@each_case()
def test_query_without_a_key_gives_zeros(name, case):
    can = attention_class(name).capabilities
    mechanism = build(name, case).train()
    masks = {}
    if can.padding_mask:
        masks["padding"] = (AttentionMask(key_keep=torch.tensor([[True] * 14, [False] * 14])), (1, slice(None)))
    if can.arbitrary_mask:
        pairs = torch.ones(1, 1, 14, 14, dtype=torch.bool)
        pairs[:, :, 5] = False
        masks["pairs"] = (AttentionMask(pair_keep=pairs), (slice(None), 5))
        closed = torch.zeros(14, 14).masked_fill(~pairs[0, 0], float("-inf"))
        masks["bias"] = (AttentionMask(bias=closed[None, None]), (slice(None), 5))
    if can.window and can.cross:
        masks["window"] = (AttentionMask(window=2, query_offset=-3), (slice(None), slice(0, 2)))
    if can.causal and can.cross:
        masks["offset"] = (AttentionMask(causal=True, query_offset=-3), (slice(None), slice(0, 3)))
    for label, (mask, (sample, row)) in masks.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [x.requires_grad_() for x in inputs(14, dtype=dtype)]
            output = call(mechanism, *tensors, mask=mask)
            assert (output[sample, :, row] == 0).all(), label
            assert output.isfinite().all(), label
            output.float().square().sum().backward()
            for tensor in (*tensors, *mechanism.parameters()):
                assert tensor.grad is None or tensor.grad.isfinite().all(), label


# -- shapes ---------------------------------------------------------------------------------------------


@each_case("cross")
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 17), (17, 1), (5, 24), (24, 5), (16, 7)])
def test_different_query_and_key_lengths(name, case, n_q, n_k):
    output = call(build(name, case), *inputs(n_q, n_k))
    assert output.shape == (BATCH, HEADS, n_q, DIM)
    assert output.isfinite().all()


@each_name("cross")
@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(2, 0, 7), (2, 7, 0), (2, 0, 0), (0, 7, 7)])
def test_nothing_to_attend_from_or_to_gives_zeros(name, batch, n_q, n_k):
    query, key, value = (tensor.requires_grad_() for tensor in inputs(n_q, n_k, batch=batch))
    output = call(build(name, first_case(name)), query, key, value)
    assert output.shape == (batch, HEADS, n_q, DIM)
    assert not output.any()
    output.sum().backward()
    assert not query.grad.any()


@each_case("variable_length")
@pytest.mark.parametrize("length", [1, 2, 3, MAX_LENGTH - 1, MAX_LENGTH + 1, 2 * MAX_LENGTH + 3])
def test_shorter_and_longer_than_max_length(name, case, length):
    output = call(build(name, case), *inputs(length))
    assert output.shape == (BATCH, HEADS, length, DIM)
    assert output.isfinite().all()


@each_case()
def test_grouped_query_heads_equal_repeated_ones(name, case):
    torch.manual_seed(0)
    query, key, value = inputs(12, kv_heads=1)
    grouped = build(name, case, num_key_value_heads=1)
    output = call(grouped, query, key, value)
    assert output.shape == (BATCH, HEADS, 12, DIM)
    if not grouped.capabilities.has_parameters:
        repeated = call(build(name, case), query, repeat_heads(key, HEADS), repeat_heads(value, HEADS))
        assert_close(output, repeated)


@each_case()
def test_values_of_another_width_and_a_scale(name, case):
    mechanism = build(name, case, value_dim=5)
    query, key, value = inputs(12)
    output, _ = mechanism(query, key, value[..., :5], scale=0.2)
    assert output.shape == (BATCH, HEADS, 12, 5)


@each_case()
def test_input_that_is_not_contiguous(name, case):
    mechanism = build(name, case)
    query, key, value = inputs(12)
    shuffled = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    assert_close(call(mechanism, *shuffled), call(mechanism, query, key, value))


# -- training -------------------------------------------------------------------------------------------


NOTHING_ESTIMATED = {"eigen_cluster-single", "eigen_linear-all", "eigen_topk-drop"}
"""Cases in which a basis decides at most what is computed exactly, so that its gradient is zero."""


@each_case()
def test_gradients_are_finite_and_reach_every_parameter(name, case):
    mechanism = build(name, case).train()
    query, key, value = (x.requires_grad_() for x in inputs(16))
    output = call(mechanism, query, key, value)
    loss = output.square().mean()
    if mechanism.auxiliary_loss is not None:
        assert mechanism.auxiliary_loss.dim() == 0
        loss = loss + mechanism.auxiliary_loss
    loss.backward()
    assert value.grad is not None
    for tensor in (query, key, value):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    for label, parameter in mechanism.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, label
            assert parameter.grad.isfinite().all(), label
            assert f"{name}-{case}" in NOTHING_ESTIMATED or parameter.grad.abs().max() > 0, label


@every_case()
def test_gradients_are_those_of_the_output(name, case):
    """Of inputs and parameters, under every kind of mask: the derivative in a random direction, by differences."""
    mechanism = build(name, case, torch.float64)
    parameters = {label: p.detach().clone() for label, p in mechanism.named_parameters() if p.requires_grad}
    points = [x.requires_grad_() for x in (*inputs(11, dtype=torch.float64), *parameters.values())]
    torch.manual_seed(3)
    direction = torch.randn(BATCH, HEADS, 11, DIM, dtype=torch.float64)
    steps = [torch.randn_like(x) for x in points]
    for label, mask in naive_masks(name, 11, 11).items():

        def run(*at, mask=mask):
            state = dict(zip(parameters, at[3:], strict=True))
            output, _ = torch.func.functional_call(mechanism, state, (*at[:3], mask))
            return output if mask.query_keep is None else output * mask.query_keep[:, None, :, None]

        gradients = torch.autograd.grad(
            (run(*points) * direction).sum(), points, allow_unused=True, materialize_grads=True
        )
        analytic = sum((g * s).sum() for g, s in zip(gradients, steps, strict=True))
        epsilon = 1e-6
        with torch.no_grad():
            ahead, behind = (
                run(*(x + sign * epsilon * s for x, s in zip(points, steps, strict=True))) for sign in (1.0, -1.0)
            )
        numeric = ((ahead - behind) * direction).sum() / (2 * epsilon)
        torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-7, msg=lambda text, at=label: f"{at}: {text}")


@each_name("sinks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinks_and_inputs_beside_them_get_their_gradients(name, dtype):
    """In both types: some compute float32 by kernels of their own."""
    mechanism, direction = build(name, first_case(name), torch.float64), torch.randn(BATCH, HEADS, 17, DIM).double()

    def gradients(mechanism: AttentionMechanism, dtype: torch.dtype) -> tuple[Tensor, ...]:
        sinks = torch.tensor([0.5, -1.0], dtype=dtype, requires_grad=True)
        tensors = [x.requires_grad_() for x in inputs(17, dtype=dtype)]
        output = call(mechanism, *tensors, mask=AttentionMask(causal=True, sinks=sinks))
        return torch.autograd.grad((output * direction).sum(), (sinks, *tensors))

    found, epsilon = gradients(mechanism.to(dtype), dtype), 1e-6
    mechanism.double()
    around = (torch.tensor([0.5 + step, -1.0], dtype=torch.float64) for step in (epsilon, -epsilon))
    tensors = inputs(17, dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (call(mechanism, *tensors, mask=AttentionMask(causal=True, sinks=sinks)) for sinks in around)
    expected = float(((ahead - behind) * direction).sum() / (2 * epsilon))
    assert float(found[0][0]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for got, exact in zip(found, gradients(mechanism, torch.float64), strict=True):
        assert_close(got, exact, 1e-3)


@each_case()
def test_dropout_acts_in_training_only(name, case):
    mechanism = build(name, case)
    tensors = inputs(16)
    still = call(mechanism, *tensors)
    assert torch.equal(call(mechanism, *tensors, dropout_p=0.5), still)
    mechanism.train()
    torch.manual_seed(0)
    dropped = call(mechanism, *tensors, dropout_p=0.5)
    assert dropped.isfinite().all()
    assert not torch.allclose(dropped, still)


@each_case()
def test_state_dict_round_trip(name, case):
    first, second = build(name, case), build(name, case)
    for parameter in first.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    second.load_state_dict(first.state_dict())
    tensors = inputs(16)
    assert torch.equal(call(first, *tensors), call(second, *tensors))


@every_case()
def test_parameters_are_contiguous(name, case):
    """Others cannot be sharded over processes."""
    assert all(parameter.is_contiguous() for parameter in build(name, case).parameters())


@each_case()
def test_evaluation_is_deterministic(name, case):
    mechanism = build(name, case)
    tensors = inputs(16)
    assert torch.equal(call(mechanism, *tensors), call(mechanism, *tensors))
    assert torch.equal(call(build(name, case), *tensors), call(mechanism, *tensors))


def check_compiled(name: str, case: str, backend: str) -> None:
    torch._dynamo.reset()
    mechanism = build(name, case)
    causal = mechanism.capabilities.causal
    compiled = torch.compile(mechanism, backend=backend)
    plain_inputs, compiled_inputs = ([x.requires_grad_() for x in inputs(16)] for _ in range(2))
    expected = call(mechanism, *plain_inputs, mask=AttentionMask(causal=causal))
    got = compiled(*compiled_inputs, AttentionMask(causal=causal))[0]
    assert_close(got, expected, 1e-4)
    expected.square().sum().backward()
    got.square().sum().backward()
    for plain, other in zip(plain_inputs, compiled_inputs, strict=True):
        if plain.grad is not None:
            assert_close(other.grad, plain.grad, 1e-4)


@pytest.mark.slow
@each_name()
def test_compiles(name):
    check_compiled(name, first_case(name), "aot_eager")


@pytest.mark.slow
@each_name()
def test_compiles_to_kernels(name):
    check_compiled(name, first_case(name), "inductor")


# -- what is refused ------------------------------------------------------------------------------------


@each_name("causal", present=False)
def test_refuses_causal(name):
    with pytest.raises(ValueError, match=f"attention={name} "):
        build(name, first_case(name), causal=True)
    with pytest.raises(ValueError, match=f"attention={name} "):
        call(build(name, first_case(name)), *inputs(8), mask=AttentionMask(causal=True))


@each_name("cross", present=False)
def test_refuses_cross_attention(name):
    with pytest.raises(ValueError, match=f"attention={name} "):
        call(build(name, first_case(name)), *inputs(8, 9))


@each_name("padding_mask", present=False)
def test_refuses_padding(name):
    with pytest.raises(ValueError, match=f"attention={name} "):
        call(build(name, first_case(name)), *inputs(8), mask=padding(8, (8, 5)))


@each_name("arbitrary_mask", present=False)
def test_refuses_arbitrary_masks(name):
    mechanism = build(name, first_case(name))
    for mask in (
        AttentionMask(pair_keep=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        AttentionMask(bias=torch.zeros(1, 1, 8, 8)),
    ):
        with pytest.raises(ValueError, match=f"attention={name} "):
            call(mechanism, *inputs(8), mask=mask)


@each_name("window", present=False)
def test_refuses_windows(name):
    with pytest.raises(ValueError, match=f"attention={name} does not support a window of 3 keys in the mask"):
        call(build(name, first_case(name)), *inputs(8), mask=AttentionMask(window=3))


@each_name("softcap", present=False)
def test_refuses_soft_capped_scores(name):
    with pytest.raises(ValueError, match=f"attention={name} does not support scores that are soft-capped at 50"):
        call(build(name, first_case(name)), *inputs(8), mask=AttentionMask(softcap=50.0))


@each_name("sinks", present=False)
def test_refuses_sinks(name):
    with pytest.raises(ValueError, match=f"attention={name} does not support attention sinks"):
        call(build(name, first_case(name)), *inputs(8), mask=AttentionMask(sinks=torch.zeros(HEADS)))


@each_name("returns_weights", present=False)
def test_refuses_weights(name):
    with pytest.raises(ValueError, match=f"attention={name} "):
        call(build(name, first_case(name)), *inputs(8), need_weights=True)


@each_name("variable_length", present=False)
def test_refuses_more_than_max_length(name):
    with pytest.raises(ValueError, match=f"max_length={MAX_LENGTH}"):
        call(build(name, first_case(name)), *inputs(MAX_LENGTH + 1))


@each_name()
def test_refuses_wrong_shapes_and_misspelt_options(name):
    mechanism = build(name, first_case(name))
    query, key, value = inputs(8)
    with pytest.raises(ValueError, match="query must be"):
        call(mechanism, query[..., :-1], key, value)
    with pytest.raises(ValueError, match="lengths must be equal"):
        call(mechanism, query, key, value[:, :, :-1])
    with pytest.raises(ValueError, match=r"attention\.no_such_option"):
        build_attention(name, num_heads=HEADS, head_dim=DIM, no_such_option=1)
