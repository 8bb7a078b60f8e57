"""Attention over exact key blocks and low-rank block moments under one softmax, as one differentiable operator.

Works on sequences that are laid out in blocks already (`BlockInputs`), and is differentiable in every float input. It
recomputes in the backward pass what it needs, so that it keeps nothing larger than its inputs and its output. Where it
runs: fused Triton kernels (block_triton.py) on a GPU, a compiled kernel (block_cpu.cpp) on a CPU, PyTorch operators
(block_chunked.py) elsewhere.
"""

from __future__ import annotations

import importlib.util
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approx_attn.attention.eigen.kernels import block_chunked, native
from approx_attn.attention.eigen.kernels.block_inputs import BlockInputs, Causality

HAS_TRITON = importlib.util.find_spec("triton") is not None


def block_attention(
    inputs: BlockInputs, causality: Causality, dropout_p: float = 0.0, product_type: torch.dtype | None = None
) -> Tensor:
    """Output (R, Q, b_q, d_v); the row of a query without any open key holds finite numbers of no meaning.

    For a query q of block I, with the exact blocks E_I and the far blocks F_I:

        weight of key j in E_I:   w_j = exp(q·k_j)
        weight of block B in F_I: W_B = N_B exp(q·k̄_B + min(½ a Σ_B aᵀ, SPREAD_LIMIT)) (last term: order 2)
        output = (Σ_E w_j v_j + Σ_F W_B (v̄_B + a C_B)) / (Σ_E w_j + Σ_F W_B)

    v̄_B + a C_B is the mean of the values under weights 1 + a·(z_j − z̄_B), and for keys and values that are
    jointly Gaussian in a block, W_B and v̄_B + a C_B (order 2) are the exact weight and mean.

    Args:
        inputs: see `BlockInputs`.
        causality: whether and how queries stand among the keys.
        dropout_p: probability of dropping an exact pair or a whole far block.
        product_type: type of the operands of products in the fused kernels of a GPU, which accumulate in float32;
            None for that of the inputs. Elsewhere the type of the inputs is used throughout.
    """
    if HAS_TRITON and inputs.query.is_cuda:
        from approx_attn.attention.eigen.kernels import block_triton

        query, key, value = (x.to(product_type or x.dtype) for x in inputs[:3])
        fused = inputs._replace(query=query, key=key, value=value)
        if block_triton.can_run(fused):
            return block_triton.block_attention(fused, causality, dropout_p)
    seed = int(torch.randint(1 << 62, ())) if dropout_p > 0.0 else 0
    return _forward_op(*inputs, causality.active, causality.offset, dropout_p, seed)


def probe_mass(probes: Tensor, key: Tensor, key_open: Tensor | None, far_open: Tensor) -> Tensor:
    """Share of the weight that mean queries put on each block in `far_open`, not differentiable.

    Args:
        probes: (b, h, Q, g, d), g mean queries of each query block, multiplied by the scale.
        key: (b, h_kv, K, b_k, d).
        key_open: (b | 1, K, b_k) bool, usable keys; None if all are.
        far_open: (b | 1, Q | 1, K) bool, blocks that may have weight.

    Returns:
        (b, h, Q, g, K); rows without any usable key hold finite numbers of no meaning.
    """
    if HAS_TRITON and probes.is_cuda:
        from approx_attn.attention.eigen.kernels import block_triton

        if block_triton.can_weigh(probes, key):
            return block_triton.probe_mass(probes.detach(), key.detach(), key_open, far_open)
    return _probe_op(probes.detach().contiguous(), key.detach().contiguous(), key_open, far_open.contiguous())


# -- as operators that torch.compile and autograd see as one step ---------------------------------------


def _compiled(like: Tensor, dropout_p: float = 0.0) -> ModuleType | None:
    """The compiled kernel of the CPU, if it can do this."""
    if like.device.type != "cpu" or like.dtype != torch.float32 or dropout_p > 0.0:
        return None
    return native.load()


def _contiguous(inputs: BlockInputs) -> BlockInputs:
    return BlockInputs._make(None if x is None else x.contiguous() for x in inputs)


@torch.library.custom_op("approx_attn::block_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    tilt: Tensor,
    moments: Tensor,
    spread: Tensor,
    log_count: Tensor,
    chosen: Tensor,
    slot_open: Tensor | None,
    far_open: Tensor,
    key_open: Tensor | None,
    causal: bool,
    offset: int,
    dropout_p: float,
    seed: int,
) -> Tensor:
    inputs = BlockInputs(
        query, key, value, centre, tilt, moments, spread, log_count, chosen, slot_open, far_open, key_open
    )
    kernel = _compiled(inputs.query, dropout_p)
    if kernel is not None:
        return kernel.forward(*_contiguous(inputs), causal, offset)
    return block_chunked.forward(inputs, Causality(causal, offset), dropout_p, seed)


@_forward_op.register_fake
def _forward_shape(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return value.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("approx_attn::block_attention_backward", mutates_args=())
def _backward_op(
    output: Tensor,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    tilt: Tensor,
    moments: Tensor,
    spread: Tensor,
    log_count: Tensor,
    chosen: Tensor,
    slot_open: Tensor | None,
    far_open: Tensor,
    key_open: Tensor | None,
    causal: bool,
    offset: int,
    dropout_p: float,
    seed: int,
) -> list[Tensor]:
    """Gradients of query, key, value, centre, tilt, moments and spread."""
    inputs = BlockInputs(
        query, key, value, centre, tilt, moments, spread, log_count, chosen, slot_open, far_open, key_open
    )
    kernel = _compiled(inputs.query, dropout_p)
    if kernel is not None:
        return kernel.backward(output, grad, *_contiguous(inputs), causal, offset)
    return block_chunked.backward(inputs, Causality(causal, offset), dropout_p, seed, output, grad)


@_backward_op.register_fake
def _backward_shape(output: Tensor, grad: Tensor, *rest: object) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rest[:7]]  # type: ignore[arg-type]


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, causal, offset, dropout_p, seed = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.settings = (causal, offset, dropout_p, seed)  # type: ignore[attr-defined]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    output, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _backward_op(output, grad.contiguous(), *tensors, *ctx.settings)  # type: ignore[attr-defined]
    return (*grads, *(None for _ in range(9)))


_forward_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("approx_attn::block_probe_mass", mutates_args=())
def _probe_op(probes: Tensor, key: Tensor, key_open: Tensor | None, far_open: Tensor) -> Tensor:
    kernel = _compiled(probes)
    if kernel is not None:
        return kernel.probe_mass(probes, key, key_open, far_open)
    return block_chunked.probe_mass(probes, key, key_open, far_open)


@_probe_op.register_fake
def _probe_shape(probes: Tensor, key: Tensor, key_open: Tensor | None, far_open: Tensor) -> Tensor:
    return probes.new_empty(*probes.shape[:4], key.shape[2])


# -- their operations, for torch's counter ----------------------------------------------------------------


@register_flop_formula(torch.ops.approx_attn.block_attention)
def _forward_operations(query: tuple, key: tuple, value: tuple, *rest: object, **kwargs: object) -> int:
    return _products(query, key, value, *rest, of_scores=1, of_values=1)  # type: ignore[arg-type]


@register_flop_formula(torch.ops.approx_attn.block_attention_backward)
def _backward_operations(output: tuple, grad: tuple, *inputs: object, **kwargs: object) -> int:
    # Scores are computed again and differentiated by both factors; values likewise, but for their output.
    return _products(*inputs, of_scores=3, of_values=2)  # type: ignore[arg-type]


@register_flop_formula(torch.ops.approx_attn.block_probe_mass)
def _probe_operations(probes: tuple, key: tuple, *rest: object, **kwargs: object) -> int:
    return 2 * math.prod(probes) * key[2] * key[3]


def _products(
    query: tuple,
    key: tuple,
    value: tuple,
    centre: tuple,
    tilt: tuple,
    moments: tuple,
    spread: tuple,
    log_count: tuple,
    chosen: tuple,
    *rest: object,
    of_scores: int,
    of_values: int,
) -> int:
    """Floating point operations from the shapes of `BlockInputs`, each kind of product done so many times."""
    queries, d = math.prod(query[:3]), query[3]
    exact, blocks, d_v = chosen[2] * key[2], key[1], value[3]
    scores = exact * d + blocks * (d + spread[2])
    values = exact * d_v + blocks * tilt[3] * d_v
    return 2 * queries * (of_scores * scores + of_values * values)
