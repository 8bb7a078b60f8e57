"""`block_attention` by PyTorch operators, a few query blocks of one row (sample and head) at a time.

The path of the CPU where the compiled kernel (block_cpu.cpp) cannot be used, with dropout, and in float64. The working
set of a chunk stays in the cache of a core.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from approx_attn.attention.eigen.kernels.block_inputs import SPREAD_LIMIT, BlockInputs, Causality, straddling_blocks

CHUNK_NUMBERS = 1 << 20
"""Numbers in the largest intermediate array of a chunk, per thread.

Measured: at an eighth of it the overhead of the calls shows, at twice it the intermediates leave the cache.
"""

PROBE_NUMBERS = 1 << 21
"""Numbers in the largest array of the weighing of mean queries, over all samples and heads."""


def forward(inputs: BlockInputs, causality: Causality, dropout_p: float, seed: int) -> Tensor:
    """Output (R, Q, b_q, d_v) of `block_attention`; `seed` decides what dropout drops."""
    output = inputs.value.new_empty(*inputs.query.shape[:3], inputs.value.shape[-1])
    scratch = _Scratch(output)
    for part in _chunks(inputs, causality, dropout_p):
        chunk = _weigh(inputs, causality, part, dropout_p, seed, scratch)
        _forward_chunk(inputs, chunk, scratch, output[chunk.row, chunk.blocks])
    return output


def backward(
    inputs: BlockInputs, causality: Causality, dropout_p: float, seed: int, output: Tensor, grad: Tensor
) -> list[Tensor]:
    """Gradients of query, key, value, centre, tilt, moments and spread, from the output and its gradient."""
    floats = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[:7]]
    grads = inputs._replace(**dict(zip(BlockInputs._fields, floats, strict=False)))
    scratch = _Scratch(output)
    for part in _chunks(inputs, causality, dropout_p):
        row, blocks = part[0], part[1]
        chunk = _weigh(inputs, causality, part, dropout_p, seed, scratch)
        _backward_chunk(inputs, chunk, output[row, blocks], grad[row, blocks], grads, scratch)
    return floats


def probe_mass(probes: Tensor, key: Tensor, key_open: Tensor | None, far_open: Tensor) -> Tensor:
    """See `kernels.block.probe_mass`."""
    b, h, rows, g, _ = probes.shape
    heads, columns, b_k = key.shape[1:4]
    flat_key = key.flatten(2, 3)  # (b, h_kv, n_k, d)
    usable = far_open[..., None]  # (b | 1, Q | 1, K, 1)
    if key_open is not None:
        usable = usable & key_open[:, None]  # (b | 1, Q | 1, K, b_k)
    step = max(1, PROBE_NUMBERS // (b * h * g * columns * b_k))
    parts = []
    for begin in range(0, rows, step):
        part = probes[:, :, begin : begin + step].unflatten(1, (heads, h // heads))  # (b, h_kv, m, c, g, d)
        c = part.shape[3]
        scores = part.flatten(2, 4) @ flat_key.mT  # (b, h_kv, m·c·g, n_k)
        scores = scores.view(b, h, c, g, columns, b_k)
        closed = ~(usable if usable.shape[1] == 1 else usable[:, begin : begin + step])[:, None, :, None]
        weights = scores.masked_fill(closed, torch.finfo(scores.dtype).min).flatten(-2).softmax(-1)
        # As a product with ones: a sum over a short last axis is several times slower on a CPU.
        parts.append(weights.unflatten(-1, (columns, b_k)) @ weights.new_ones(b_k))  # (b, h, c, g, K)
    return torch.cat(parts, dim=2)


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


def _chunks(inputs: BlockInputs, causality: Causality, dropout_p: float) -> list[tuple[int, slice, int, int]]:
    """(row, query blocks, T', K') of every chunk, in an order that walks through one row after the other."""
    # Dropout draws by chunk: what it drops must not depend on the number of threads.
    threads = 1 if dropout_p > 0.0 else torch.get_num_threads()
    rows, blocks, b_q, _ = inputs.query.shape
    _, key_blocks, b_k, _ = inputs.key.shape
    slots, rank = inputs.chosen.shape[-1], inputs.tilt.shape[-1]
    largest = max(slots * b_k + key_blocks, rank * key_blocks) * b_q + slots * b_k * inputs.key.shape[-1]
    step = max(1, CHUNK_NUMBERS * threads // largest)
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
