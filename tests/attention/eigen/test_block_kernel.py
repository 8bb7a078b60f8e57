"""The kernels of `eigen_block` against the dense definition: in torch, and fused in Triton.

Without a CUDA device Triton's interpreter runs the fused kernel on the CPU; without Triton that test is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.eigen.kernels import block_chunked, native
from approx_attn.attention.eigen.kernels.block import block_attention, probe_mass
from approx_attn.attention.eigen.kernels.block_inputs import SPREAD_LIMIT, BlockInputs, Causality, straddling_blocks
from approx_attn.attention.eigen.kernels.block_reference import block_weights

CASES = {
    "plain": {"n_q": 32, "n_k": 32},
    "ragged": {"n_q": 29, "n_k": 43},
    "order_0": {"n_q": 32, "n_k": 32, "order": 0},
    "order_2": {"n_q": 32, "n_k": 40, "order": 2},
    "causal": {"n_q": 45, "n_k": 45, "causal": True},
    "causal_order_2_wide": {"n_q": 45, "n_k": 45, "causal": True, "order": 2, "query_block_size": 16},
    "offset": {"n_q": 11, "n_k": 45, "causal": True, "offset": 34},
    "padded": {"n_q": 40, "n_k": 40, "padded": True},
    "padded_causal": {"n_q": 40, "n_k": 40, "padded": True, "causal": True, "order": 2},
    "grouped": {"n_q": 32, "n_k": 32, "kv_heads": 1},
    # More far blocks, and blocks larger, than a tile of the interpreted kernels, which is 16.
    "many_blocks": {"n_q": 6, "n_k": 71, "causal": True, "offset": 65, "block_size": 4, "kv_heads": 1},
    "two_tiles": {"n_q": 21, "n_k": 43, "causal": True, "offset": 22, "order": 2, "block_size": 20, "kv_heads": 1},
    "large_blocks": {"n_q": 90, "n_k": 133, "order": 2, "block_size": 35, "query_block_size": 20, "kv_heads": 1},
    "large_causal": {"n_q": 140, "n_k": 140, "order": 2, "block_size": 35, "query_block_size": 20, "causal": True},
}


def prepared(
    dtype: torch.dtype,
    n_q: int,
    n_k: int,
    order: int = 1,
    causal: bool = False,
    offset: int = 0,
    padded: bool = False,
    kv_heads: int = 2,
    block_size: int = 8,
    query_block_size: int | None = None,
) -> tuple[BlockInputs, Tensor, Causality]:
    """What the mechanism hands to its kernels for some case, and the deviations that the definition needs."""
    mechanism = build_attention(
        "eigen_block",
        num_heads=2,
        head_dim=16,
        value_dim=12,
        num_key_value_heads=kv_heads,
        block_size=block_size,
        query_block_size=query_block_size,
        rank=3,
        order=order,
        keep=0.3,
        seed=0,
    ).to(dtype)
    generator = torch.Generator().manual_seed(n_q + n_k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key, value = draw(2, 2, n_q, 16), draw(2, kv_heads, n_k, 16), draw(2, kv_heads, n_k, 12)
    mask = AttentionMask(causal=causal, query_offset=offset)
    if padded:
        keep = torch.arange(n_k) < torch.tensor([[n_k], [n_k - 13]])
        mask = AttentionMask(key_keep=keep, query_keep=keep, causal=causal)
        key, value = (x * keep[:, None, :, None] for x in (key, value))
    layout = mechanism._lay_out(n_q, n_k, mask)
    with torch.no_grad():
        inputs, deviations = mechanism._prepare(query / 4, key, value, mask, layout)
    return inputs, deviations, Causality(causal, offset)


def defined(inputs: BlockInputs, deviations: Tensor, causality: Causality) -> Tensor:
    weights = block_weights(inputs, deviations, causality)
    groups = weights.shape[0] // inputs.value.shape[0]
    output = weights @ inputs.value.flatten(1, 2).repeat_interleave(groups, 0)
    return output.view(*inputs.query.shape[:3], -1)


@pytest.mark.parametrize("chunk_numbers", [1, 1 << 12, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_torch_kernel_is_the_definition(case, chunk_numbers, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(block_chunked, "CHUNK_NUMBERS", chunk_numbers)
    monkeypatch.setattr(block_chunked, "PROBE_NUMBERS", chunk_numbers)
    inputs, deviations, causality = prepared(torch.float64, **CASES[case])
    output, expected = block_attention(inputs, causality), defined(inputs, deviations, causality)
    n_q = CASES[case]["n_q"]
    torch.testing.assert_close(output.flatten(1, 2)[:, :n_q], expected.flatten(1, 2)[:, :n_q])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_definition(case):
    """The definition is differentiated by autograd; its moments depend on nothing, as the kernel sees them."""
    inputs, _, causality = prepared(torch.float64, **CASES[case])
    names = BlockInputs._fields[:7]
    leaves = [getattr(inputs, name).clone().requires_grad_() for name in names]
    inputs = inputs._replace(**dict(zip(names, leaves, strict=True)))
    torch.manual_seed(0)
    direction = torch.randn(*inputs.query.shape[:3], inputs.value.shape[-1], dtype=torch.float64)
    direction.flatten(1, 2)[:, CASES[case]["n_q"] :] = 0.0
    got = torch.autograd.grad((block_attention(inputs, causality) * direction).sum(), leaves)
    assert all(g.isfinite().all() for g in got)
    expected = torch.autograd.grad((from_moments(inputs, causality) * direction).sum(), leaves, allow_unused=True)
    for name, mine, other in zip(names, got, expected, strict=True):
        other = torch.zeros_like(mine) if other is None else other
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


MANY_SPANS = {
    "long": {"n_q": 1024, "n_k": 1000, "order": 2},
    "long_causal": {"n_q": 1003, "n_k": 1003, "causal": True, "order": 2},
    "long_grouped": {"n_q": 900, "n_k": 900, "kv_heads": 1},
    "long_padded": {"n_q": 900, "n_k": 900, "padded": True, "causal": True},
}
"""The compiled kernel cuts these into several pieces."""

needs_compiler = pytest.mark.skipif(
    native.load() is None,
    reason="no C++ compiler was found (or the kernel is switched off), so the compiled kernel was not tested.",
)


@needs_compiler
@pytest.mark.parametrize("case", [*CASES, *MANY_SPANS])
def test_compiled_kernel_is_the_definition(case):
    """In float32, with what was prepared and chosen in float64; with the gradients of the chunked form in float64."""
    settings = {**CASES, **MANY_SPANS}[case]
    inputs, deviations, causality = prepared(torch.float64, **settings)
    torch.manual_seed(0)
    direction = torch.randn(*inputs.query.shape[:3], inputs.value.shape[-1], dtype=torch.float64)
    direction.flatten(1, 2)[:, settings["n_q"] :] = 0.0
    results = []
    for dtype in (torch.float32, torch.float64):
        names = BlockInputs._fields[:7]
        leaves = [getattr(inputs, name).to(dtype, copy=True).requires_grad_() for name in names]
        given = inputs._replace(**dict(zip(names, leaves, strict=True)), log_count=inputs.log_count.to(dtype))
        output = block_attention(given, causality)
        grads = torch.autograd.grad((output * direction.to(dtype)).sum(), leaves)
        results.append(dict(zip(("output", *names), (output.detach(), *grads), strict=True)))
    fast, slow = results
    expected = defined(inputs, deviations, causality).flatten(1, 2)[:, : settings["n_q"]]
    torch.testing.assert_close(
        fast["output"].flatten(1, 2)[:, : settings["n_q"]].double(), expected, atol=2e-5, rtol=2e-5
    )
    for name in names:
        size = slow[name].abs().max().clamp_min(1e-3) if slow[name].numel() else 1.0
        error = (fast[name].double() - slow[name]).abs().max() if slow[name].numel() else 0.0
        assert error <= 1e-5 * size, name


@needs_compiler
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_probes_weigh_as_the_others_do(masked):
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(2, 4, 50, 2, 16, generator=generator)
    key = torch.randn(2, 2, 40, 8, 16, generator=generator)
    far = torch.ones(1, 1, 40, dtype=torch.bool)
    key_open = None
    if masked:
        far = torch.rand(2, 50, 40, generator=generator) < 0.7
        key_open = torch.rand(2, 40, 8, generator=generator) < 0.7
    expected = block_chunked.probe_mass(probes, key, key_open, far)
    torch.testing.assert_close(probe_mass(probes, key, key_open, far), expected, atol=1e-6, rtol=1e-5)


@needs_compiler
def test_compiled_kernel_is_exact_where_scores_are_far_apart():
    """Weights far below the largest are zero, not numbers so small that processors slow down."""
    inputs, deviations, causality = prepared(torch.float64, **CASES["order_2"])
    inputs = inputs._replace(query=inputs.query * 300)
    small = BlockInputs._make(x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x for x in inputs)
    expected = defined(inputs, deviations, causality)
    torch.testing.assert_close(block_attention(small, causality).double(), expected, atol=1e-3, rtol=1e-3)


@needs_compiler
def test_compiled_kernel_does_not_hide_a_key_that_is_not_a_number():
    inputs, _, causality = prepared(torch.float32, **CASES["plain"])
    key = inputs.key.clone()
    key[0, 0, 0, 0] = float("nan")
    output = block_attention(inputs._replace(key=key), causality)
    assert output[0][(inputs.chosen[0] == 0).any(-1)].isnan().all()


def test_the_compiled_kernel_can_be_switched_off(monkeypatch, caplog):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.load.__wrapped__() is None
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setenv("CXX", "no-such-compiler"), "no compiler 'no-such-compiler' was found"),
        (
            lambda m: m.setenv("CXX", "false"),
            "the compiler ended with status 1",
        ),  # a program that does nothing but fail
        (lambda m: m.setattr(native.sys, "platform", "darwin"), "it is built on Linux only"),
        (lambda m: m.setenv("TORCH_EXTENSIONS_DIR", __file__), "Not a directory"),  # where nothing can be written
        (lambda m: m.setattr(native, "SOURCE", Path("gone.cpp")), "No such file"),
    ],
    ids=["no_compiler", "failing_compiler", "other_system", "no_folder", "no_source"],
)
@needs_compiler
def test_what_keeps_the_compiled_kernel_from_being_built_is_told_in_one_sentence(
    change, reason, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    change(monkeypatch)
    assert native.load.__wrapped__() is None
    assert "was not built" in caplog.messages[-1]
    assert reason in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


def test_the_first_error_of_a_compiler_is_what_is_told():
    stderr = "In file included from a.h\nblock.cpp:1: error: no such header\ncompilation terminated."
    error = subprocess.CalledProcessError(1, "g++", stderr=stderr)
    assert native._first_error(error) == "block.cpp:1: error: no such header"


def from_moments(inputs: BlockInputs, causality: Causality) -> Tensor:
    """The formula of `block_attention`, dense, one row after the other."""
    groups = inputs.query.shape[0] // inputs.key.shape[0]
    rows = []
    for row in range(inputs.query.shape[0]):
        key_row = row // groups
        blocks = []
        for block in range(inputs.query.shape[1]):
            q, a = inputs.query[row, block], inputs.tilt[row, block]
            chosen = inputs.chosen[row, block]
            keys, values = inputs.key[key_row, chosen].flatten(0, 1), inputs.value[key_row, chosen].flatten(0, 1)
            b_q, b_k = len(q), inputs.key.shape[2]
            is_open = torch.ones(b_q, len(keys), dtype=torch.bool)
            if inputs.slot_open is not None:
                is_open &= inputs.slot_open[row, block].repeat_interleave(b_k)
            if inputs.key_open is not None:
                is_open &= inputs.key_open[key_row, chosen].flatten()
            if causality.active:
                position = (chosen[:, None] * b_k + torch.arange(b_k)).flatten()
                is_open &= position <= (block * b_q + torch.arange(b_q))[:, None] + causality.offset
            near = (q @ keys.T).masked_fill(~is_open, torch.finfo(q.dtype).min)
            far = q @ inputs.centre[key_row].T + inputs.log_count[row]
            if inputs.spread.shape[-1]:
                products = (a[:, 1:, None] * a[:, None, 1:]).flatten(1)
                far = far + (products @ inputs.spread[row].T).clamp(max=SPREAD_LIMIT)
            far = far.masked_fill(~inputs.far_open[row, block], torch.finfo(q.dtype).min)
            weights = torch.cat([near, far], -1).softmax(-1)
            mean_values = torch.einsum("qs,skv->qkv", a, inputs.moments[row])
            far_part = torch.einsum("qk,qkv->qv", weights[:, len(keys) :], mean_values)
            blocks.append(weights[:, : len(keys)] @ values + far_part)
        rows.append(torch.stack(blocks))
    return torch.stack(rows)


@pytest.mark.parametrize(("b_q", "b_k", "offset"), [(8, 8, 0), (8, 8, 3), (16, 8, 0), (4, 8, 0), (4, 8, 4), (3, 5, 2)])
def test_straddling_blocks_bounds_what_lies_on_a_diagonal(b_q, b_k, offset):
    counts = []
    for start in range(offset, offset + 20 * b_q, b_q):
        lefts = range(0, start + b_q, b_k)
        counts.append(sum(left + b_k > start + 1 and left <= start + b_q - 1 for left in lefts))
    assert max(counts) <= straddling_blocks(b_q, b_k, offset) <= max(counts) + 1


# -- the fused kernel ---------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed, so the fused kernels were not tested; pip install triton runs them interpreted.",
)


def fused(
    inputs: BlockInputs, causality: Causality, device: str, dropout_p: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Output of the fused kernels on their device, and the leaves that it is a function of."""
    from approx_attn.attention.eigen.kernels import block_triton

    inputs = BlockInputs(*(None if x is None else x.detach().to(device) for x in inputs))
    leaves = [x.requires_grad_() for x in inputs[:7]]
    assert block_triton.can_run(inputs)
    return block_triton.block_attention(inputs, causality, dropout_p), leaves


def run_fused(inputs: BlockInputs, causality: Causality, direction: Tensor, device: str, dropout_p: float = 0.0):
    """Output of the fused kernels and gradients of `direction` · output, on the CPU, in float64."""
    output, leaves = fused(inputs, causality, device, dropout_p)
    grads = torch.autograd.grad((output * direction.to(output)).sum(), leaves)
    return output.detach().cpu().double(), [grad.cpu().double() for grad in grads]


def check_fused(case: str, device: str, dtype: torch.dtype) -> None:
    """Output and gradients against the definition in float64."""
    inputs, _, causality = prepared(torch.float64, **CASES[case])
    n_q = CASES[case]["n_q"]
    # The types that the mechanism hands over: products in `dtype`, moments in float32.
    kinds = [dtype] * 3 + [torch.float32] * 5
    single = inputs._replace(
        **{name: x.to(kind) for name, x, kind in zip(BlockInputs._fields[:8], inputs[:8], kinds, strict=True)}
    )
    inputs = BlockInputs(*(x.double() if x is not None and x.is_floating_point() else x for x in single))
    leaves = [x.requires_grad_() for x in inputs[:7]]
    direction = torch.randn(*inputs.query.shape[:3], inputs.value.shape[-1], dtype=torch.float64)
    direction.flatten(1, 2)[:, n_q:] = 0.0
    expected = from_moments(inputs, causality)
    expected_grads = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True)
    output, grads = run_fused(single, causality, direction, device)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert error(output.flatten(1, 2)[:, :n_q], expected.detach().flatten(1, 2)[:, :n_q]) < tolerance, (case, "output")
    for name, mine, other in zip(BlockInputs._fields, grads, expected_grads, strict=False):
        other = torch.zeros_like(mine) if other is None else other
        assert error(mine, other) < tolerance, (case, dtype, name, error(mine, other))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12)) if got.numel() else 0.0


def check_dropout(device: str) -> None:
    """The same pairs are dropped in all kernels, about as many as asked for, and on average nothing changes."""
    inputs, _, causality = prepared(torch.float32, n_q=24, n_k=24, order=2, causal=True, kv_heads=1)
    direction = torch.randn(*inputs.query.shape[:3], inputs.value.shape[-1])

    def drop(inputs: BlockInputs) -> Tensor:
        torch.manual_seed(0)
        return fused(inputs, causality, device, 0.25)[0].detach().cpu().double()

    torch.manual_seed(0)
    output, grads = run_fused(inputs, causality, direction, device, 0.25)
    # The output is linear in values and moments together, so their gradients tell the sum of the output.
    told = (grads[2] * inputs.value).sum() + (grads[5] * inputs.moments).sum()
    torch.testing.assert_close(told, (output * direction).sum(), rtol=1e-4, atol=1e-4)
    # The derivative along a step of all inputs, by differences under the same seed.
    steps = [0.01 * torch.randn(x.shape) for x in inputs[:7]]
    ends = [
        drop(BlockInputs(*(x + sign * s for x, s in zip(inputs, steps, strict=False)), *inputs[7:])) for sign in (1, -1)
    ]
    expected = ((ends[0] - ends[1]) * direction).sum() / 2
    found = torch.stack([(grad * step).sum() for grad, step in zip(grads, steps, strict=True)]).sum()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    # With values of one, the output is the sum of the weights that are left.
    moments = torch.zeros_like(inputs.moments)
    moments[:, 0] = 1.0
    left = drop(inputs._replace(value=torch.ones_like(inputs.value), moments=moments))
    assert float(left.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(left.std()) > 0.1


def check_probes(device: str) -> None:
    """The mass that mean queries see in blocks, against the softmax over all keys in them."""
    from approx_attn.attention.eigen.kernels import block_triton

    probes, key = torch.randn(2, 4, 5, 3, 16), torch.randn(2, 2, 6, 20, 16)
    key_open, far_open = torch.rand(2, 6, 20) < 0.8, torch.rand(1, 5, 6) < 0.7
    far_open[..., 0] = True
    scores = torch.einsum("bhqgd,bhkjd->bhqgkj", probes.double(), key.double().repeat_interleave(2, 1))
    for usable in (None, key_open):
        keep = far_open[:, None, :, None, :, None].expand_as(scores)
        keep = keep if usable is None else keep & usable[:, None, None, None]
        expected = scores.masked_fill(~keep, float("-inf")).flatten(-2).softmax(-1).unflatten(-1, (6, 20)).sum(-1)
        arguments = (None if x is None else x.to(device) for x in (probes, key, usable, far_open))
        assert error(block_triton.probe_mass(*arguments).cpu().double(), expected) < 1e-5
    assert block_triton.can_weigh(probes.to(device), key.to(device))
    assert not block_triton.can_weigh(torch.zeros(1, 1, 1, 1, 256, device=device), key.to(device))


# The interpreter multiplies bfloat16 as if they were integers, so it gets the other half type.
HALF = "torch.bfloat16 if device == 'cuda' else torch.float16"
FUSED_CASES = ("order_0", "padded_causal", "many_blocks", "two_tiles")
LARGE_CASES = ("offset", "large_causal")
FUSED_CHECKS = {
    "small": f"for case in {FUSED_CASES}: tests.check_fused(case, device, torch.float32)\n"
    f"tests.check_fused('two_tiles', device, {HALF})",
    "dropout_and_probes": "tests.check_dropout(device)\ntests.check_probes(device)",
    "large": f"for case in {LARGE_CASES}: tests.check_fused(case, device, torch.float32)\n"
    f"for case in ('order_0', 'large_blocks'): tests.check_fused(case, device, {HALF})",
}
"""What runs in a process of its own: few processes, since each takes seconds to start."""


@needs_triton
@pytest.mark.parametrize(
    "check", [pytest.param(x, marks=pytest.mark.slow) if x == "large" else x for x in FUSED_CHECKS]
)
@pytest.mark.parametrize("where", ["cuda", "interpreter"])
def test_fused_kernels_are_the_definition(where, check):
    """Whether Triton interprets or compiles is settled when a kernel is defined, hence a fresh process for each."""
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device, so the fused kernels did not run compiled; the other test interprets them.")
    if where == "interpreter" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here: the compiled kernels are tested instead.")
    in_fresh_process(FUSED_CHECKS[check], "cuda" if where == "cuda" else "cpu", interpret=where == "interpreter")


HOPPER_SHARED_MEMORY = 227 * 1024  # bytes that a program may have there


def compile_for_hopper() -> None:
    """Every kernel goes through Triton's compiler for compute capability 9.0, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from approx_attn.attention.eigen.kernels import block_triton, block_triton_backward, block_triton_forward

    launch = block_triton._Launch(*prepared(torch.float32, **CASES["order_2"])[::2], 0.0, 0)
    options = {**launch.options, **launch.far_options, **launch.exact_options, "D": 64, "DV": 64, "DP": 64, "DVP": 64}
    options |= {"QUERY_SIZE": 64, "KEY_SIZE": 64, "RS": 4, "CAUSAL": True}
    special = {
        "chosen": "i64",
        "places": "i64",
        "begins": "i64",
        "slot": "i1",
        "far": "i1",
        "open": "i1",
        "used": "i32",
    }
    single = (
        "mass",
        "tilt",
        "log_count",
        "normaliser",
        "delta",
        "grad_tilt",
        "grad_centre",
        "grad_moments",
        "grad_spread",
    )
    special |= dict.fromkeys(single, "fp32")
    for kernel in (
        block_triton_forward.forward_kernel,
        block_triton_forward.probe_kernel,
        block_triton_backward.query_kernel,
        block_triton_backward.key_kernel,
        block_triton_backward.moment_kernel,
    ):
        tiles = {"BM": 64, "BN": 64, "TILE": block_triton.FAR_TILE}
        constants = {name: x for name, x in {**options, **tiles}.items() if name in kernel.arg_names}
        signature = {}
        for name in kernel.arg_names:
            pointer = name.removesuffix("_ptr")
            kind = "i64" if name == "seed" else "i32" if pointer == name else "*" + special.get(pointer, "bf16")
            signature[name] = "constexpr" if name in constants else kind
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "num_stages": 2})
        assert compiled.metadata.shared <= HOPPER_SHARED_MEMORY, (kernel, compiled.metadata.shared)
        assert "wgmma" in compiled.asm["ptx"], kernel  # the products run on the tensor cores of a warp group


@needs_triton
def test_fused_kernels_compile_for_hopper():
    in_fresh_process("tests.compile_for_hopper()", "cpu", interpret=False)


def in_fresh_process(statement: str, device: str, interpret: bool) -> None:
    path = Path(__file__)
    code = (
        f"import sys, torch; sys.path.insert(0, {str(path.parent)!r})\n"
        f"import {path.stem} as tests\n"
        f"device = {device!r}; torch.manual_seed(0)\n{statement}\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_dropout_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(block_chunked, "CHUNK_NUMBERS", 1 << 10)
    inputs, _, causality = prepared(torch.float32, **CASES["causal"])
    outputs = []
    for threads in (1, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outputs.append(block_chunked.forward(inputs, causality, 0.5, seed=3))
    torch.testing.assert_close(*outputs)
