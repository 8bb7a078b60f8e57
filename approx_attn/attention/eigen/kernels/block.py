"""Attention over exact key blocks and low-rank block moments under one softmax: forward and backward.

Works on sequences that are laid out in blocks already (`BlockInputs`); `block_attention` is differentiable in
every float input, and recomputes in the backward pass what it needs, so that it keeps nothing larger than its
inputs and its output. It processes one row (sample and head) and a few query blocks at a time: the working
set of such a chunk stays in the cache of a core.
"""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

SPREAD_LIMIT = 2.0
"""Largest logarithm of the factor that the variance of a block may add to its weight (order 2): a Gaussian tail
grows without bound, the mean of b keys is at most b times their average."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

CHUNK_NUMBERS = 1 << 20
"""Numbers in the largest intermediate array of a chunk, per thread.

Measured: at an eighth of it the overhead of the calls shows, at twice it the intermediates leave the cache.
"""


class BlockInputs(NamedTuple):
    """What a block-wise attention needs. R = batch · query heads rows, R_kv = batch · key heads.

    Attributes:
        query: (R, Q, b_q, d), Q blocks of b_q queries, multiplied by the scale.
        key: (R_kv, K, b_k, d), K blocks of b_k keys; row r of the queries uses row r // (R / R_kv).
        value: (R_kv, K, b_k, d_v).
        centre: (R_kv, K, d), mean key of each block.
        tilt: (R, Q, b_q, 1 + r): one, then the query's r coordinates (scaled).
        moments: (R, 1 + r, K, d_v): mean value of each block, then the covariance of each key coordinate
            with the values.
        spread: (R, K, r²), half the covariance of the key coordinates in each block; (R, K, 0) below order 2.
        log_count: (R, K), logarithm of the number of usable keys; lowest finite number for none.
        chosen: (R, Q, T) int64, the exact blocks of each query block; those that straddle its diagonal first.
        slot_open: (R, Q, T) bool, which of them count; None if all do.
        far_open: (R, Q, K) bool, blocks that enter by their moments.
        key_open: (R_kv, K, b_k) bool, usable keys; None if all are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    centre: Tensor
    tilt: Tensor
    moments: Tensor
    spread: Tensor
    log_count: Tensor
    chosen: Tensor
    slot_open: Tensor | None
    far_open: Tensor
    key_open: Tensor | None


class Causality(NamedTuple):
    """Query i stands at key position i + offset and uses no later key. `active` False switches it off."""

    active: bool
    offset: int


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


class _Scratch:
    """Arrays that chunks use one after the other.

    Measured: with new arrays for every chunk a third of the time went into pages that the system hands out and
    takes back.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.arrays: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An array of this shape with anything in it; the one of the same name before it is gone."""
        numbers = math.prod(shape)
        if name not in self.arrays or self.arrays[name].numel() < numbers:
            self.arrays[name] = self.like.new_empty(numbers)
        return self.arrays[name][:numbers].view(shape)


# -- one chunk: query blocks start..stop-1 of one row -----------------------------------------------------


class _Chunk(NamedTuple):
    """Intermediates of `stop - start` = c query blocks, which forward and backward both need."""

    row: int
    key_row: int
    blocks: slice
    slots: int  # T', exact blocks per query block that any of these can use
    limit: int  # K', key blocks before which all far blocks of these lie
    picked: Tensor  # (c · T',) int64, exact blocks in the row
    keys: Tensor  # (c, T'·b_k, d), their keys
    weights: Tensor  # (c, b_q, T'·b_k + K'), normalised
    dropped: Tensor | None  # the same with dropout applied, None without
    room: Tensor | None  # (c · b_q, K') bool, where the spread was below its limit; None below order 2

    @property
    def used(self) -> Tensor:
        return self.weights if self.dropped is None else self.dropped


def _chunks(inputs: BlockInputs, causality: Causality) -> list[tuple[int, slice, int, int]]:
    """(row, query blocks, T', K') of every chunk, in an order that walks through one row after the other."""
    rows, blocks, b_q, _ = inputs.query.shape
    _, key_blocks, b_k, _ = inputs.key.shape
    slots, rank = inputs.chosen.shape[-1], inputs.tilt.shape[-1]
    largest = max(slots * b_k + key_blocks, rank * key_blocks) * b_q + slots * b_k * inputs.key.shape[-1]
    step = max(1, CHUNK_NUMBERS * torch.get_num_threads() // largest)
    chunks = []
    for row in range(rows):
        for start in range(0, blocks, step):
            stop = min(start + step, blocks)
            seen = key_blocks
            if causality.active:
                last = stop * b_q - 1 + causality.offset
                seen = min(max(last // b_k + 1, 1), key_blocks)
            chunks.append((row, slice(start, stop), min(slots, seen), seen))
    return chunks


def _weigh(
    inputs: BlockInputs,
    causality: Causality,
    chunk: tuple[int, slice, int, int],
    dropout_p: float,
    seed: int,
    scratch: _Scratch,
) -> _Chunk:
    """The softmax over exact keys and far blocks of one chunk."""
    row, blocks, slots, limit = chunk
    query = inputs.query[row, blocks]  # (c, b_q, d)
    c, b_q, d = query.shape
    b_k = inputs.key.shape[2]
    key_row = row // (inputs.query.shape[0] // inputs.key.shape[0])
    index = inputs.chosen[row, blocks, :slots]  # (c, T')
    near = slots * b_k
    lowest = torch.finfo(query.dtype).min

    logits = scratch("logits", c, b_q, near + limit)
    scores, far = logits[..., :near], logits[..., near:]
    picked = index.reshape(-1)
    # One row of `key` is read for all its query blocks in turn, so this gather runs at the speed of the cache.
    keys = _gather(inputs.key[key_row], picked, scratch("keys", c, near, d))
    torch.bmm(query, keys.mT, out=scores)
    is_open = _open_keys(inputs, row, key_row, blocks, index)
    if is_open is not None:
        scores.masked_fill_(~is_open.reshape(c, 1, near), lowest)
    if causality.active:
        _close_future(scores, index, blocks, b_k, causality.offset, lowest)

    flat = query.reshape(c * b_q, d)
    far_logits = scratch("far_logits", c * b_q, limit)
    torch.addmm(inputs.log_count[row, :limit], flat, inputs.centre[key_row, :limit].mT, out=far_logits)
    room = None
    if inputs.spread.shape[-1] > 0:
        pairs = _pairs(inputs.tilt[row, blocks], scratch)
        bonus = torch.mm(pairs, inputs.spread[row, :limit].mT, out=scratch("bonus", c * b_q, limit))
        room = bonus < SPREAD_LIMIT
        far_logits += bonus.clamp_(max=SPREAD_LIMIT)
    closed = ~inputs.far_open[row, blocks, None, :limit]  # (c, 1, K')
    far.copy_(far_logits.view(c, b_q, limit)).masked_fill_(closed, lowest)

    weights = torch.softmax(logits, dim=-1, out=scratch("weights", *logits.shape))
    dropped = None
    if dropout_p > 0.0:
        generator = torch.Generator(weights.device)
        generator.manual_seed(seed + row * inputs.query.shape[1] + blocks.start)
        dropped = weights * torch.empty_like(weights).bernoulli_(1.0 - dropout_p, generator=generator)
        dropped /= 1.0 - dropout_p
    return _Chunk(row, key_row, blocks, slots, limit, picked, keys, weights, dropped, room)


def _open_keys(inputs: BlockInputs, row: int, key_row: int, blocks: slice, index: Tensor) -> Tensor | None:
    """(c, T', b_k) bool: keys of the exact blocks that are not padding, in slots that count; None if all are."""
    is_open = None if inputs.key_open is None else inputs.key_open[key_row][index]
    if inputs.slot_open is not None:
        slot_open = inputs.slot_open[row, blocks, : index.shape[-1], None].expand(-1, -1, inputs.key.shape[2])
        is_open = slot_open if is_open is None else is_open & slot_open
    return is_open


def _close_future(scores: Tensor, index: Tensor, blocks: slice, b_k: int, offset: int, lowest: float) -> None:
    """Fill, in place, the scores of keys behind their query; only the leading slots can hold any."""
    c, b_q, _ = scores.shape
    straddling = min(straddling_blocks(b_q, b_k, offset), index.shape[-1])
    device = scores.device
    keys = index[:, :straddling, None] * b_k + torch.arange(b_k, device=device)  # (c, s, b_k)
    queries = torch.arange(blocks.start * b_q, blocks.stop * b_q, device=device).view(c, b_q, 1) + offset
    leading = scores[..., : straddling * b_k]
    leading.masked_fill_(keys.view(c, 1, -1) > queries, lowest)


def straddling_blocks(b_q: int, b_k: int, offset: int) -> int:
    """The most key blocks that are neither wholly in the past nor wholly in the future of a query block."""
    if b_q % b_k == 0 and offset % b_k == 0:
        return b_q // b_k
    if b_k % b_q == 0 and offset % b_q == 0:
        return 1
    return (b_q + b_k - 2) // b_k + 1


def _gather(blocks: Tensor, picked: Tensor, out: Tensor) -> Tensor:
    """Copy blocks (K, b_k, d) into `out` (c, T'·b_k, d); as rows, which are copied whole."""
    torch.index_select(blocks.flatten(1), 0, picked, out=out.view(len(picked), -1))
    return out


def _pairs(tilt: Tensor, scratch: _Scratch) -> Tensor:
    """(c, b_q, 1 + r) -> (c · b_q, r²), products of the coordinates."""
    a = tilt[..., 1:].reshape(-1, tilt.shape[-1] - 1)
    return torch.mul(a[:, :, None], a[:, None, :], out=scratch("pairs", *a.shape, a.shape[1])).flatten(1)


def _tilted(tilt: Tensor, far_weights: Tensor, scratch: _Scratch) -> Tensor:
    """W ⊗ (1, a): (c, b_q, 1 + r), (c, b_q, K') -> (c · b_q, (1 + r)·K').

    With it all far blocks of all orders are one matrix product with the moments; a product per block would be
    too small to be fast.
    """
    shape = (*tilt.shape, far_weights.shape[-1])
    return torch.mul(tilt[..., None], far_weights[..., None, :], out=scratch("tilted", *shape)).view(
        -1, shape[2] * shape[3]
    )


def _forward_chunk(inputs: BlockInputs, chunk: _Chunk, scratch: _Scratch, output: Tensor) -> None:
    """Write the output of one chunk into `output` (c, b_q, d_v)."""
    c, b_q, _ = chunk.weights.shape
    near, d_v = chunk.slots * inputs.key.shape[2], inputs.value.shape[-1]
    values = _gather(inputs.value[chunk.key_row], chunk.picked, scratch("values", c, near, d_v))
    torch.bmm(chunk.used[..., :near], values, out=output)
    tilted = _tilted(inputs.tilt[chunk.row, chunk.blocks], chunk.used[..., near:], scratch)
    output.view(c * b_q, d_v).addmm_(tilted, inputs.moments[chunk.row, :, : chunk.limit].reshape(-1, d_v))


def _backward_chunk(
    inputs: BlockInputs, chunk: _Chunk, output: Tensor, grad: Tensor, grads: BlockInputs, scratch: _Scratch
) -> None:
    """Add the gradients of one chunk to `grads`; `output` and `grad` are (c, b_q, d_v)."""
    row, key_row, blocks, limit = chunk.row, chunk.key_row, chunk.blocks, chunk.limit
    c, b_q, d_v = grad.shape
    b_k, d = inputs.key.shape[2:]
    near = chunk.slots * b_k
    query, tilt = inputs.query[row, blocks], inputs.tilt[row, blocks]
    values = _gather(inputs.value[key_row], chunk.picked, scratch("values", c, near, d_v))
    moments = inputs.moments[row, :, :limit].reshape(-1, d_v)  # ((1 + r)·K', d_v)
    flat_grad = grad.reshape(c * b_q, d_v)
    used_far = chunk.used[..., near:].reshape(c * b_q, limit)

    # Values and moments.
    grad_values = torch.bmm(chunk.used[..., :near].mT, grad, out=scratch("gathered", c, near, d_v))
    grads.value[key_row].index_add_(0, chunk.picked, grad_values.view(-1, b_k, d_v))
    tilted = _tilted(tilt, chunk.used[..., near:], scratch)
    grads.moments[row, :, :limit] += (tilted.mT @ flat_grad).view(-1, limit, d_v)

    # Tilt, and the gradient of every (used) weight times that weight.
    product = torch.mm(flat_grad, moments.mT, out=scratch("tilted", c * b_q, moments.shape[0])).view(c * b_q, -1, limit)
    product *= used_far[:, None]  # (c · b_q, 1 + r, K')
    grads.tilt[row, blocks] = product.sum(-1).view(c, b_q, -1)
    flow = scratch("logits", *chunk.weights.shape)
    torch.bmm(grad, values.mT, out=flow[..., :near])
    flow[..., :near] *= chunk.used[..., :near]
    far_flow = torch.bmm(tilt.reshape(c * b_q, 1, -1), product)  # (c · b_q, 1, K')
    flow[..., near:] = far_flow.view(c, b_q, limit)

    # Through the softmax: dS = P∘(dP − Σ P dP), and Σ P dP = output · grad.
    delta = (output * grad).sum(-1, keepdim=True)  # (c, b_q, 1)
    flow.addcmul_(chunk.weights, delta, value=-1.0)
    score_flow, far_flow = flow[..., :near], flow[..., near:].reshape(c * b_q, limit)

    grad_query = torch.bmm(score_flow, chunk.keys)
    grad_keys = torch.bmm(score_flow.mT, query, out=scratch("gathered", c, near, d))
    grads.key[key_row].index_add_(0, chunk.picked, grad_keys.view(-1, b_k, d))
    flat_query = query.reshape(c * b_q, d)
    grads.centre[key_row, :limit] += far_flow.mT @ flat_query
    grads.query[row, blocks] = grad_query + (far_flow @ inputs.centre[key_row, :limit]).view(c, b_q, d)
    if chunk.room is not None:
        r = tilt.shape[-1] - 1
        bonus_flow = far_flow * chunk.room
        grads.spread[row, :limit] += bonus_flow.mT @ _pairs(tilt, scratch)
        grad_pairs = (bonus_flow @ inputs.spread[row, :limit]).view(-1, r, r)
        a = tilt[..., 1:].reshape(-1, r, 1)
        grads.tilt[row, blocks, :, 1:] += ((grad_pairs + grad_pairs.mT) @ a).view(c, b_q, r)


# -- as operators that torch.compile and autograd see as one step ---------------------------------------


def _run_forward(inputs: BlockInputs, causality: Causality, dropout_p: float, seed: int) -> Tensor:
    output = inputs.value.new_empty(*inputs.query.shape[:3], inputs.value.shape[-1])
    scratch = _Scratch(output)
    for part in _chunks(inputs, causality):
        chunk = _weigh(inputs, causality, part, dropout_p, seed, scratch)
        _forward_chunk(inputs, chunk, scratch, output[chunk.row, chunk.blocks])
    return output


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
    return _run_forward(inputs, Causality(causal, offset), dropout_p, seed)


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
    causality = Causality(causal, offset)
    floats = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[:7]]
    grads = inputs._replace(**dict(zip(BlockInputs._fields, floats, strict=False)))
    scratch = _Scratch(output)
    for part in _chunks(inputs, causality):
        row, blocks = part[0], part[1]
        chunk = _weigh(inputs, causality, part, dropout_p, seed, scratch)
        _backward_chunk(inputs, chunk, output[row, blocks], grad[row, blocks], grads, scratch)
    return floats


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
