"""The forward pass of block-wise attention as one fused Triton kernel: exact and far blocks under a running maximum.

A program computes a tile of one query block. It reads the exact key blocks that the query block chose and every
moment once, and writes the output and the logarithm of the normaliser, from which the backward pass recomputes
all weights. Products take operands in the type of the keys and accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from approx_attn.attention.eigen.kernels.triton_tiles import (
    dropout_factors,
    far_scores,
    load_coordinates,
    load_rows,
    load_tilt,
    store_rows,
)

CLOSED = tl.constexpr(-1.0e30)  # score of a closed pair; finite, so that a query without a key gives no NaN


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    query_ptr,
    key_ptr,
    value_ptr,
    centre_ptr,
    tilt_ptr,
    moments_ptr,
    spread_ptr,
    log_count_ptr,
    chosen_ptr,
    slot_ptr,
    used_ptr,
    far_ptr,
    open_ptr,
    output_ptr,
    normaliser_ptr,
    groups,
    query_blocks,
    key_blocks,
    slots,
    b_q,
    b_k,
    offset,
    seed,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    LIMIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    RP: tl.constexpr,
    QUERY_SIZE: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE: tl.constexpr,
):
    tiles = tl.cdiv(b_q, BM)
    place = (tl.program_id(0) // tiles).to(tl.int64)  # index of this query block among all
    row, block = place // query_blocks, place % query_blocks
    if CAUSAL:
        block = query_blocks - 1 - block  # the last blocks have the most to do: they start first
        place = row * query_blocks + block
    key_row = row // groups
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)  # queries within the block
    x, y, p = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, RP)
    is_query, index = i < b_q, place * b_q + i
    positions = block * b_q + i + offset
    width = key_blocks * (b_k + 1)  # columns of dropout: all keys, then all far blocks

    query = load_rows(query_ptr, index, is_query, x, D)
    kind = query.dtype
    top = tl.full((BM,), CLOSED, tl.float32)  # running maximum of the logits
    total = tl.zeros((BM,), tl.float32)  # sum of weights relative to it
    result = tl.zeros((BM, DVP), tl.float32)

    # One flat loop over all tiles of all exact blocks, so that the loads of the next are under way during each.
    parts = tl.cdiv(b_k, BN)
    used = slots
    if HAS_SLOTS:
        used = tl.load(used_ptr + place)
    for step in range(0, used * parts):
        slot = step // parts
        column = tl.load(chosen_ptr + place * slots + slot)
        j = (step % parts) * BN + tl.arange(0, BN)
        at = (key_row * key_blocks + column) * b_k + j
        is_key = j < b_k
        key = load_rows(key_ptr, at, is_key, x, D)
        value = load_rows(value_ptr, at, is_key, y, DV)
        if HAS_SLOTS:
            is_key = is_key & (tl.load(slot_ptr + place * slots + slot) != 0)
        if HAS_PADDING:
            is_key = is_key & (tl.load(open_ptr + at, mask=j < b_k, other=0) != 0)
        keep = is_key[None, :] & is_query[:, None]
        if CAUSAL:
            keep = keep & ((column * b_k + j)[None, :] <= positions[:, None])
        scores = tl.where(keep, tl.dot(query, tl.trans(key), input_precision=PRECISION), CLOSED)  # (BM, BN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(keep, tl.exp(scores - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT > 0.0:
            weights *= dropout_factors(seed, index[:, None], (column * b_k + j)[None, :], width, DROPOUT)
        result = tl.dot(weights.to(kind), value, result * shrink[:, None], input_precision=PRECISION)
        top = new_top

    coordinates = load_coordinates(tilt_ptr, index, is_query, p, R).to(kind)
    past = key_blocks
    if CAUSAL:
        past = tl.minimum(tl.maximum((block * b_q + offset + 1) // b_k, 0), key_blocks)
    for first in range(0, past, TILE):
        far = first + tl.arange(0, TILE)
        exists = far < past
        logits, _ = far_scores(
            query, coordinates, tilt_ptr, centre_ptr, spread_ptr, log_count_ptr, index, is_query, row, key_row,
            far, exists, key_blocks, x, p, D, R, HAS_SPREAD, LIMIT, PRECISION,
        )  # fmt: skip
        is_far = tl.load(far_ptr + place * key_blocks + far, mask=exists, other=0) != 0
        keep = is_far[None, :] & is_query[:, None]
        logits = tl.where(keep, logits, CLOSED)
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.where(keep, tl.exp(logits - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT > 0.0:
            weights *= dropout_factors(seed, index[:, None], (key_blocks * b_k + far)[None, :], width, DROPOUT)
        result = result * shrink[:, None]
        # All orders accumulate into one result: a product per order, its weights scaled by a coordinate.
        for s in tl.static_range(1 + R):
            moment = load_rows(moments_ptr, (row * (1 + R) + s) * key_blocks + far, exists, y, DV)  # (TILE, DVP)
            a = load_tilt(tilt_ptr, index, is_query, s, R)
            result = tl.dot((weights * a[:, None]).to(kind), moment, result, input_precision=PRECISION)
        top = new_top

    has_key = total > 0.0
    total = tl.where(has_key, total, 1.0)
    store_rows(output_ptr, index, is_query, y, result / total[:, None], DV)
    tl.store(normaliser_ptr + index, tl.where(has_key, top + tl.log(total), 0.0), mask=is_query)


@triton.jit
def probe_kernel(  # type: ignore[no-untyped-def]
    probe_ptr,  # (R, P, d)
    key_ptr,  # (R_kv, K, b_k, d)
    open_ptr,  # (b, K, b_k)
    mass_ptr,  # (R, P, K) float32
    heads,
    groups,
    probes,
    key_blocks,
    b_k,
    D: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Logarithm of the weight of each key block for mean queries; a program per key block and tile of these."""
    tiles = tl.cdiv(probes, BM)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    x = tl.arange(0, DP)
    probe = load_rows(probe_ptr, row * probes + i, i < probes, x, D)
    top = tl.full((BM,), CLOSED, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, b_k, BN):
        j = first + tl.arange(0, BN)
        is_key = j < b_k
        key = load_rows(key_ptr, ((row // groups) * key_blocks + column) * b_k + j, is_key, x, D)
        if HAS_PADDING:
            at = ((row // heads) * key_blocks + column) * b_k + j
            is_key = is_key & (tl.load(open_ptr + at, mask=is_key, other=0) != 0)
        keep = is_key[None, :] & (i < probes)[:, None]
        scores = tl.where(keep, tl.dot(probe, tl.trans(key), input_precision=PRECISION), CLOSED)  # (BM, BN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.where(keep, tl.exp(scores - new_top[:, None]), 0.0), 1)
        top = new_top
    mass = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), CLOSED)
    tl.store(mass_ptr + (row * probes + i) * key_blocks + column, mass, mask=i < probes)
