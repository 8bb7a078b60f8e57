"""`eigen_cluster` beyond the contract, which runs it against a naive reference: compiled operator, memory, building.

The operator runs on a CPU in float32 and bfloat16; the same mechanism in float64 takes PyTorch's operators, here the
reference.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from approx_attn.attention import AttentionMask, AttentionMechanism, build_attention
from approx_attn.attention.eigen.kernels import native
from approx_attn.run.measurement import peak_memory

HEADS = 4
SMALL = {"block_size": 16, "cluster_size": 4, "rank": 3, "keep": 12}

needs_compiler = pytest.mark.skipif(
    native.load() is None,
    reason="no C++ compiler was found (or the kernel is switched off), so the compiled kernel was not tested.",
)
needs_bfloat16_products = pytest.mark.skipif(
    not native.has_bfloat16_products(),
    reason="the processor has no AMX (or the kernel was not built), so products of bfloat16 were not tested.",
)


def build(dtype: torch.dtype = torch.float32, heads: int = HEADS, dim: int = 8, **options) -> AttentionMechanism:
    mechanism = build_attention("eigen_cluster", num_heads=heads, head_dim=dim, seed=1, **{**SMALL, **options})
    with torch.no_grad():  # as training might leave them: not each other's
        generator = torch.Generator().manual_seed(2)
        maps = mechanism.basis.query_map
        maps.add_(0.3 * torch.randn(maps.shape, generator=generator))
    return mechanism.to(dtype)


def inputs(
    n_q: int, n_k: int | None = None, dim: int = 8, value_dim: int = 8, heads: int = HEADS, key_heads: int | None = None
) -> list[Tensor]:
    """Queries, keys and values of two samples in float32, so that all paths start from the same numbers."""
    generator = torch.Generator().manual_seed(n_q + (n_k or 0))
    n_k, key_heads = n_k or n_q, key_heads or heads
    shapes = (heads, n_q, dim), (key_heads, n_k, dim), (key_heads, n_k, value_dim)
    return [torch.randn(2, *shape, generator=generator) for shape in shapes]


def solve(
    mechanism: AttentionMechanism,
    tensors: list[Tensor],
    mask: AttentionMask,
    dtype: torch.dtype | None = None,
    **words: float,
) -> dict[str, Tensor | None]:
    """Output and all gradients, in float64, computed from inputs of a type (of the mechanism's by default)."""
    dtype = dtype or mechanism.basis.key_map.dtype
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    sinks = None if mask.sinks is None else mask.sinks.to(dtype, copy=True).requires_grad_()
    output = mechanism(*leaves, replace(mask, sinks=sinks), **words)[0]
    generator = torch.Generator().manual_seed(3)
    output.backward(torch.randn(output.shape, generator=generator).bfloat16().to(dtype))  # the same number in all types
    maps = {name: getattr(mechanism.basis, name).grad for name in ("query_map", "key_map")}
    grads = dict(zip(("query", "key", "value"), (x.grad for x in leaves), strict=True))
    found = {"output": output.detach(), "sinks": None if sinks is None else sinks.grad, **grads, **maps}
    return {name: None if x is None else x.double() for name, x in found.items()}


def check_equal(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 5e-6) -> None:
    for name, reference in expected.items():
        mine = got[name]
        if reference is None or mine is None:
            assert mine is reference, name
        else:
            cancelled = (
                3.0 if name == "sinks" else 1.0
            )  # one number per head sums what all queries give, of either sign
            assert (mine - reference).norm() <= cancelled * tolerance * reference.norm(), name


# -- the compiled operator ---------------------------------------------------------------------------------

CASES = {
    "default": {"n_q": 150, "options": {"block_size": 64, "cluster_size": 8, "rank": 8, "keep": 0.25}},
    "order_0": {"n_q": 90, "options": {"order": 0}},
    "order_2": {"n_q": 90, "options": {"order": 2}},
    "causal": {"n_q": 90, "causal": True, "options": {"keep": 0.4}},
    "drop": {"n_q": 90, "padded": True, "options": {"rest": "drop", "order": 2}},
    "causal_drop": {"n_q": 90, "causal": True, "options": {"rest": "drop", "keep": 0.4}},
    "padded": {"n_q": 90, "padded": True, "options": {"keep": 0.4}},
    "padded_causal_grouped": {"n_q": 90, "causal": True, "padded": True, "key_heads": 2, "options": {"order": 2}},
    "one_key_head": {"n_q": 50, "key_heads": 1},
    "fewer_queries": {"n_q": 50, "n_k": 120, "causal": True, "offset": 70, "padded": True},
    "from_the_first_key": {"n_q": 50, "n_k": 120, "causal": True, "options": {"order": 0}},
    "before_the_first_key": {"n_q": 60, "n_k": 40, "causal": True, "offset": -20, "padded": True},
    "window": {"n_q": 110, "window": 40, "padded": True},
    "causal_window": {"n_q": 110, "window": 40, "causal": True, "options": {"order": 2}},
    "one_query": {"n_q": 1, "n_k": 100, "causal": True, "offset": 99},
    "all_exact": {"n_q": 70, "causal": True, "options": {"keep": 1.0, "order": 2}},
    "more_budget_than_keys": {"n_q": 40, "padded": True, "options": {"keep": 100}},
    "single_keys": {"n_q": 60, "options": {"cluster_size": 1, "order": 2}},
    "pairs": {"n_q": 60, "options": {"cluster_size": 2, "order": 2}},
    "uncut": {"n_q": 100, "causal": True, "options": {"cluster_size": 16, "keep": 20}},
    "wide_clusters": {"n_q": 200, "options": {"block_size": 64, "cluster_size": 32, "order": 2, "keep": 40}},
    "odd_clusters": {"n_q": 70, "options": {"block_size": 12, "cluster_size": 3, "order": 2}},
    "whole_vectors": {"n_q": 70, "dim": 16, "value_dim": 32, "options": {"rank": 16, "order": 2}},
    "wide_heads": {"n_q": 70, "dim": 128, "value_dim": 64, "options": {"rank": 8}},
    "uneven_heads": {"n_q": 70, "dim": 20, "value_dim": 12, "causal": True, "options": {"rank": 5, "order": 2}},
    "shared_basis": {"n_q": 70, "options": {"share": "layer"}},
    "sinks": {"n_q": 90, "padded": True, "sinks": True, "options": {"order": 2}},
    "causal_window_with_sinks": {"n_q": 110, "window": 40, "causal": True, "key_heads": 2, "sinks": True},
}


def problem(case: str) -> tuple[dict, list[Tensor], AttentionMask]:
    """Options, inputs and mask of a case."""
    words = dict(CASES[case])
    shape = {name: words.pop(name) for name in ("n_k", "dim", "value_dim", "key_heads") if name in words}
    n_q, window = words.pop("n_q"), words.pop("window", None)
    key_keep = None
    if words.pop("padded", False):
        key_keep = torch.rand(2, shape.get("n_k", n_q), generator=torch.Generator().manual_seed(4)) < 0.8
    causal, offset = words.pop("causal", False), words.pop("offset", 0)
    sinks = torch.linspace(-1.0, 3.0, HEADS) if words.pop("sinks", False) else None
    mask = AttentionMask(key_keep=key_keep, causal=causal, query_offset=offset, window=window, sinks=sinks)
    options = words.pop("options", {})
    options |= {"dim": shape.get("dim", 8), "value_dim": shape.get("value_dim", 8)}
    options["num_key_value_heads"] = shape.get("key_heads", HEADS)
    assert not words
    return options, inputs(n_q, **shape), mask


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_operator_equals_pytorchs(case):
    options, tensors, mask = problem(case)
    expected = solve(build(torch.float64, **options), tensors, mask)
    check_equal(solve(build(**options), tensors, mask), expected)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_compiled_operator_with_fewer_and_more_threads_than_heads(heads, threads):
    tensors, mask = inputs(150, heads=heads), AttentionMask(causal=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = solve(build(heads=heads, order=2), tensors, mask)
    finally:
        torch.set_num_threads(before)
    check_equal(got, solve(build(torch.float64, heads=heads, order=2), tensors, mask))


@needs_compiler
def test_equal_keys_are_cut_and_chosen_as_in_the_reference():
    """Every key stands in the input eight times, with values of its own."""
    query, key, value = inputs(128)
    tensors = [query, key[:, :, :16].repeat(1, 1, 8, 1), value]
    for mask in (AttentionMask(), AttentionMask(causal=True)):
        check_equal(solve(build(), tensors, mask), solve(build(torch.float64), tensors, mask))


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(number, which, causal):
    tensors, mask = inputs(70), AttentionMask(causal=causal)
    clean = solve(build(), [x[1:] for x in tensors], mask)
    tensors[which][0, :, 5:40:3] = number
    leaves = [x.requires_grad_() for x in tensors]
    output = build()(*leaves, mask)[0]
    assert not output[0].isfinite().all(), "nothing is hidden"
    torch.testing.assert_close(output[1].double(), clean["output"][0], rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    assert all(x.grad[1].isfinite().all() for x in leaves)


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 2])
def test_causal_output_ignores_later_inputs(order):
    """Not only the gradient: also cuts and choices must not follow from what comes later."""
    mechanism, tensors, mask = build(order=order, keep=0.3), inputs(90), AttentionMask(causal=True)
    others = [x.clone() for x in tensors]
    for x in others:
        x[:, :, 41:] = 10 * torch.randn_like(x[:, :, 41:])
    first, second = mechanism(*tensors, mask)[0], mechanism(*others, mask)[0]
    torch.testing.assert_close(first[:, :, :41], second[:, :, :41], rtol=1e-5, atol=1e-6)  # sums may be rounded apart
    assert not torch.allclose(first[:, :, 41:], second[:, :, 41:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 30])
def test_decoding_equals_the_rows_of_one_pass(dtype, window):
    mechanism = build(dtype, order=2).eval()
    query, key, value = (x.to(dtype) for x in inputs(66))
    whole = mechanism(query, key, value, AttentionMask(causal=True, window=window))[0]
    for i in (0, 15, 16, 31, 32, 47, 48, 65):  # blocks of 16 end and begin here
        mask = AttentionMask(causal=True, query_offset=i, window=window)
        row = mechanism(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], mask)[0]
        torch.testing.assert_close(row, whole[:, :, i : i + 1], rtol=1e-5, atol=1e-5)


# -- products of bfloat16 -----------------------------------------------------------------------------------------

BFLOAT16_ERROR = (
    1e-2  # that of scaled_dot_product_attention on normal inputs: 0.002 in outputs, 0.003 to 0.005 in gradients
)


@needs_bfloat16_products
@pytest.mark.parametrize("case", CASES)
def test_products_of_bfloat16_equal_the_reference(case):
    options, tensors, mask = problem(case)
    tensors = [x.bfloat16() for x in tensors]
    expected = solve(build(torch.float64, **options), tensors, mask)
    check_equal(solve(build(**options), tensors, mask, torch.bfloat16), expected, BFLOAT16_ERROR)


@needs_bfloat16_products
@pytest.mark.parametrize("causal", [False, True])
def test_products_of_bfloat16_are_as_exact_as_pytorchs(causal):
    tensors = [x.bfloat16() for x in inputs(130, dim=32, value_dim=32)]
    exact = build(heads=HEADS, dim=32, value_dim=32, keep=1.0)
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(tensors[0].shape, generator=generator).bfloat16()
    found = []
    for attend, dtype in (
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), torch.float64),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), torch.bfloat16),
        (lambda q, k, v: exact(q, k, v, AttentionMask(causal=causal))[0], torch.bfloat16),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        output = attend(*leaves)
        output.backward(gradient.to(dtype))
        found.append([x.double() for x in (output.detach(), *(x.grad for x in leaves))])
    for reference, pytorchs, ours in zip(*found, strict=True):
        assert (ours - reference).norm() <= 2.0 * (pytorchs - reference).norm()


@needs_bfloat16_products
def test_products_of_bfloat16_drop_what_those_of_float32_drop():
    options, tensors, mask = problem("causal")
    tensors = [x.bfloat16() for x in tensors]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(6)
        found.append(solve(build(**options), tensors, mask, dtype, dropout_p=0.4))
    check_equal(found[1], found[0], BFLOAT16_ERROR)
    assert not torch.equal(found[0]["output"], solve(build(**options), tensors, mask)["output"]), "some were dropped"


@needs_bfloat16_products
def test_a_sample_without_keys_is_zero_in_bfloat16_too():
    tensors = [x.bfloat16().requires_grad_() for x in inputs(50)]
    key_keep = torch.tensor([True, False])[:, None].expand(-1, 50)
    output = build()(*tensors, AttentionMask(key_keep=key_keep))[0]
    assert output.dtype == torch.bfloat16
    assert (output[1] == 0).all()
    assert (output[0] != 0).any()
    output.square().sum().backward()
    assert all(x.grad.isfinite().all() and (x.grad[1] == 0).all() for x in tensors)


# -- memory, gradients, wrappers ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [pytest.param("compiled", marks=needs_compiler), "pytorch"])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_of_training_grows_with_the_length_and_not_with_its_square(path, causal, monkeypatch):
    if path == "pytorch":
        monkeypatch.setattr(native, "load", lambda: None)
        monkeypatch.setattr("approx_attn.attention.eigen.kernels.cluster_torch.CHUNK_NUMBERS", 1 << 20)
    lengths = (2048, 8192) if path == "compiled" else (512, 2048)
    peaks = []
    for n in lengths:
        mechanism = build(heads=1, block_size=64, cluster_size=16, keep=64)
        tensors = [x[:1].requires_grad_() for x in inputs(n, heads=1)]
        mask = AttentionMask(causal=causal)
        peaks.append(peak_memory(lambda m=mechanism, t=tensors, mask=mask: m(*t, mask)[0].sum().backward()))
    assert peaks[1] < 5 * peaks[0], peaks


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_learns_where_it_is_used(order, dtype):
    mechanism = build(dtype, order=order)
    found = solve(mechanism, inputs(70), AttentionMask())
    assert all((found[name] is not None) == (order > 0) for name in ("query_map", "key_map"))
    assert all(p.requires_grad == (order > 0) for p in mechanism.parameters())
    if order > 0:
        assert found["query_map"].abs().sum() > 0
        assert found["key_map"].abs().sum() > 0


def test_gradients_by_finite_differences():
    mechanism = build(torch.float64, heads=2, block_size=8, cluster_size=2, rank=2, keep=4, order=2, dim=3, value_dim=2)
    tensors = [x[:1].double().requires_grad_() for x in inputs(14, dim=3, value_dim=2, heads=2)]
    parameters = list(mechanism.parameters())
    mask = AttentionMask(causal=True, key_keep=torch.arange(14)[None] != 5)
    assert torch.autograd.gradcheck(lambda q, k, v, *_: mechanism(q, k, v, mask)[0], (*tensors, *parameters))


def test_activation_checkpointing_changes_nothing():
    tensors, mask = inputs(70), AttentionMask(causal=True)
    results = []
    for wrapped in (False, True):
        mechanism, leaves = build(), [x.clone().requires_grad_() for x in tensors]

        def run(q: Tensor, k: Tensor, v: Tensor, mechanism: AttentionMechanism = mechanism) -> Tensor:
            return mechanism(q, k, v, mask)[0]

        output = checkpoint(run, *leaves, use_reentrant=False) if wrapped else run(*leaves)
        output.square().sum().backward()
        results.append([output.detach(), *(x.grad for x in leaves), *(p.grad for p in mechanism.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_autocast_changes_no_more_than_bfloat16_does():
    mechanism, mask = build(), AttentionMask()
    tensors = [x.bfloat16() for x in inputs(70)]
    expected = solve(build(torch.float64), tensors, mask)
    with torch.autocast("cpu", torch.bfloat16):
        check_equal(solve(mechanism, tensors, mask, torch.bfloat16), expected, BFLOAT16_ERROR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_one_graph_to_the_compiler(causal, dtype):
    torch._dynamo.reset()
    mechanism, mask = build(order=2), AttentionMask(causal=causal)
    tensors = [x.to(dtype) for x in inputs(70)]
    compiled = torch.compile(mechanism, backend="eager", fullgraph=True)
    gradients = []
    for function in (mechanism, compiled):
        leaves = [x.clone().requires_grad_() for x in tensors]
        function(*leaves, mask)[0].square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "attention.keep must be a share"),
        ({"keep": 1.5}, "attention.keep must be a share"),
        ({"order": 3}, "attention.order must be one of 0, 1, 2, got 3."),
        ({"order": True}, "attention.order must be one of 0, 1, 2, got True."),
        ({"block_size": 0}, "attention.block_size must be a whole number of at least 1, got 0"),
        ({"cluster_size": 0}, "attention.cluster_size must be a whole number of at least 1, got 0"),
        ({"cluster_size": 5}, "attention.cluster_size must be attention.block_size=16 or a half"),
        ({"cluster_size": 32}, "attention.cluster_size must be attention.block_size=16 or a half"),
        ({"block_size": 12, "cluster_size": 4}, "attention.cluster_size must be attention.block_size=12 or a half"),
        ({"rest": "mean"}, "attention.rest must be one of keep, drop, got 'mean'"),
        ({"rank": 0}, "attention.rank must be a whole number"),
        ({"share": "all"}, "attention.share"),
        ({"basis_init": "dct"}, "attention.basis_init"),
        ({"basis": "nowhere.safetensors"}, "attention.basis=nowhere.safetensors is not a file"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError) as refused:
        build(**options)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


# -- building the operator --------------------------------------------------------------------------------------


def test_without_a_compiler_pytorchs_operators_do_the_work_and_it_is_said_once(monkeypatch, tmp_path, caplog):
    tensors, mask = inputs(70), AttentionMask(causal=True)
    expected = solve(build(torch.float64), tensors, mask)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "missing")
    monkeypatch.setattr(native, "load", functools.cache(native.load.__wrapped__))
    for _ in range(2):
        check_equal(solve(build(), tensors, mask), expected)
    assert len(caplog.messages) == 1
    assert "no compiler 'missing' was found" in caplog.messages[0]
