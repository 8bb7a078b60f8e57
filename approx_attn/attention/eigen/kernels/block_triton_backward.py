"""The backward pass of block-wise attention as three fused Triton kernels, which recompute all weights.

- `query_kernel`: a program per tile of queries walks over what it attended to: gradients of queries and tilts.
- `key_kernel`: a program per tile of keys walks over the query blocks that chose its block, from a list sorted by
  key block: gradients of keys and values. Sorting a few thousand integers costs less than adding gradients
  atomically would, and the sums have one order, so that a step can be repeated bit for bit.
- `moment_kernel`: a program per few far blocks walks over a share of the query blocks: gradients of centres,
  moments and spreads, summed over the shares afterwards.

With weights P and dP = ∂/∂P, every logit gets P∘(dP − δ), δ = output · gradient of the output.
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


@triton.jit
def query_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
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
    grad_ptr,
    normaliser_ptr,
    delta_ptr,
    grad_query_ptr,
    grad_tilt_ptr,
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
    place = (tl.program_id(0) // tiles).to(tl.int64)
    row, block = place // query_blocks, place % query_blocks
    if CAUSAL:
        block = query_blocks - 1 - block  # the last blocks have the most to do: they start first
        place = row * query_blocks + block
    key_row = row // groups
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    x, y, p = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, RP)
    is_query, index = i < b_q, place * b_q + i
    positions = block * b_q + i + offset
    width = key_blocks * (b_k + 1)

    query = load_rows(query_ptr, index, is_query, x, D)
    grad = load_rows(grad_ptr, index, is_query, y, DV)
    kind = query.dtype
    normaliser = tl.load(normaliser_ptr + index, mask=is_query, other=0.0)
    delta = tl.load(delta_ptr + index, mask=is_query, other=0.0)
    grad_query = tl.zeros((BM, DP), tl.float32)

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
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (BM, BN)
        weights = tl.exp(tl.where(keep, scores - normaliser[:, None], float("-inf")))
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if DROPOUT > 0.0:
            grad_weights *= dropout_factors(seed, index[:, None], (column * b_k + j)[None, :], width, DROPOUT)
        flow = weights * (grad_weights - delta[:, None])
        grad_query = tl.dot(flow.to(kind), key, grad_query, input_precision=PRECISION)

    coordinates = load_coordinates(tilt_ptr, index, is_query, p, R).to(kind)
    grad_constant = tl.zeros((BM,), tl.float32)
    grad_tilt = tl.zeros((BM, RP), tl.float32)
    past = key_blocks
    if CAUSAL:
        past = tl.minimum(tl.maximum((block * b_q + offset + 1) // b_k, 0), key_blocks)
    for first in range(0, past, TILE):
        far = first + tl.arange(0, TILE)
        exists = far < past
        logits, room = far_scores(
            query, coordinates, tilt_ptr, centre_ptr, spread_ptr, log_count_ptr, index, is_query, row, key_row,
            far, exists, key_blocks, x, p, D, R, HAS_SPREAD, LIMIT, PRECISION,
        )  # fmt: skip
        is_far = tl.load(far_ptr + place * key_blocks + far, mask=exists, other=0) != 0
        keep = is_far[None, :] & is_query[:, None]
        weights = tl.exp(tl.where(keep, logits - normaliser[:, None], float("-inf")))  # (BM, TILE)
        applied = weights
        if DROPOUT > 0.0:
            factors = dropout_factors(seed, index[:, None], (key_blocks * b_k + far)[None, :], width, DROPOUT)
            applied = weights * factors
        grad_weights = tl.zeros_like(weights)
        for s in tl.static_range(1 + R):
            moment = load_rows(moments_ptr, (row * (1 + R) + s) * key_blocks + far, exists, y, DV)  # (TILE, DVP)
            product = tl.dot(grad, tl.trans(moment), input_precision=PRECISION)  # (BM, TILE)
            grad_weights += load_tilt(tilt_ptr, index, is_query, s, R)[:, None] * product
            through = tl.sum(applied * product, 1)  # (BM,)
            if s == 0:
                grad_constant += through
            else:
                grad_tilt += tl.where((p == s - 1)[None, :], through[:, None], 0.0)
        if DROPOUT > 0.0:
            grad_weights *= factors
        flow = weights * (grad_weights - delta[:, None])
        centre = load_rows(centre_ptr, key_row * key_blocks + far, exists, x, D)
        grad_query = tl.dot(flow.to(kind), centre, grad_query, input_precision=PRECISION)
        if HAS_SPREAD:
            flow = tl.where(room, flow, 0.0)
            for s in tl.static_range(R):
                spread = load_rows(spread_ptr, (row * key_blocks + far) * R + s, exists, p, R)  # (TILE, RP)
                # A spread is symmetric: ∂(a Σ aᵀ)/∂a = 2 a Σ.
                scaled = 2.0 * flow * load_tilt(tilt_ptr, index, is_query, 1 + s, R)[:, None]
                grad_tilt = tl.dot(scaled.to(kind), spread, grad_tilt, input_precision=PRECISION)

    store_rows(grad_query_ptr, index, is_query, x, grad_query, D)
    tl.store(grad_tilt_ptr + index * (1 + R), grad_constant, mask=is_query)
    inside = is_query[:, None] & (p < R)[None, :]
    tl.store(grad_tilt_ptr + index[:, None] * (1 + R) + 1 + p[None, :], grad_tilt, mask=inside)


@triton.jit
def key_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    places_ptr,  # query blocks sorted by the key block that they chose
    begins_ptr,  # (R_kv·K + 1,) where the list of each key block begins
    open_ptr,
    grad_ptr,
    normaliser_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_blocks,
    key_blocks,
    b_q,
    b_k,
    offset,
    seed,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    QUERY_SIZE: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(b_k, BN)
    own = (tl.program_id(0) // tiles).to(tl.int64)  # index of this key block among all
    j = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    x, y = tl.arange(0, DP), tl.arange(0, DVP)
    is_stored, at = j < b_k, own * b_k + j
    columns = (own % key_blocks) * b_k + j
    width = key_blocks * (b_k + 1)

    key = load_rows(key_ptr, at, is_stored, x, D)
    value = load_rows(value_ptr, at, is_stored, y, DV)
    kind = key.dtype
    is_key = is_stored
    if HAS_PADDING:
        is_key = is_key & (tl.load(open_ptr + at, mask=is_stored, other=0) != 0)
    grad_key = tl.zeros((BN, DP), tl.float32)
    grad_value = tl.zeros((BN, DVP), tl.float32)

    parts = tl.cdiv(b_q, BM)
    begin, end = tl.load(begins_ptr + own), tl.load(begins_ptr + own + 1)
    for step in range(0, (end - begin).to(tl.int32) * parts):
        place = tl.load(places_ptr + begin + step // parts)
        i = (step % parts) * BM + tl.arange(0, BM)
        is_query, index = i < b_q, place * b_q + i
        query = load_rows(query_ptr, index, is_query, x, D)
        grad = load_rows(grad_ptr, index, is_query, y, DV)
        normaliser = tl.load(normaliser_ptr + index, mask=is_query, other=0.0)
        delta = tl.load(delta_ptr + index, mask=is_query, other=0.0)
        keep = is_key[:, None] & is_query[None, :]
        if CAUSAL:
            keep = keep & (columns[:, None] <= ((place % query_blocks) * b_q + i + offset)[None, :])
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (BN, BM)
        weights = tl.exp(tl.where(keep, scores - normaliser[None, :], float("-inf")))
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        applied = weights
        if DROPOUT > 0.0:
            factors = dropout_factors(seed, index[None, :], columns[:, None], width, DROPOUT)
            applied, grad_weights = weights * factors, grad_weights * factors
        grad_value = tl.dot(applied.to(kind), grad, grad_value, input_precision=PRECISION)
        flow = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(flow.to(kind), query, grad_key, input_precision=PRECISION)

    store_rows(grad_key_ptr, at, is_stored, x, grad_key, D)
    store_rows(grad_value_ptr, at, is_stored, y, grad_value, DV)


@triton.jit
def moment_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    centre_ptr,
    tilt_ptr,
    moments_ptr,
    spread_ptr,
    log_count_ptr,
    far_ptr,
    grad_ptr,
    normaliser_ptr,
    delta_ptr,
    grad_centre_ptr,  # (splits, R, K, d): of the centres as each row of queries sees them
    grad_moments_ptr,  # (splits, R, 1 + r, K, d_v)
    grad_spread_ptr,  # (splits, R, K, r²)
    rows,
    groups,
    query_blocks,
    key_blocks,
    blocks_per_split,
    b_q,
    b_k,
    offset,
    seed,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    LIMIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    RP: tl.constexpr,
    RS: tl.constexpr,  # R as a power of two
    QUERY_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    TILE: tl.constexpr,
):
    tiles = tl.cdiv(key_blocks, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    key_row = row // groups
    first = (tl.program_id(0) % tiles) * TILE
    far = first + tl.arange(0, TILE)
    exists = far < key_blocks
    x, y, p, s_all = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, RP), tl.arange(0, RS)
    width = key_blocks * (b_k + 1)

    kind = query_ptr.dtype.element_ty
    grad_centre = tl.zeros((TILE, DP), tl.float32)
    grad_mean = tl.zeros((TILE, DVP), tl.float32)
    # One row per far block and coordinate: as one product over all coordinates it is large enough for tensor cores.
    grad_covariance = tl.zeros((TILE * RS, DVP), tl.float32)
    grad_spread = tl.zeros((TILE * RS, RP), tl.float32)

    parts = tl.cdiv(b_q, BM)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, query_blocks)
    if CAUSAL:  # earlier query blocks have none of these far blocks behind them
        begin = tl.maximum(begin, ((first + 1) * b_k - 1 - offset + b_q - 1) // b_q)
    for step in range(0, tl.maximum(end - begin, 0).to(tl.int32) * parts):
        place = row * query_blocks + begin + step // parts
        i = (step % parts) * BM + tl.arange(0, BM)
        is_query, index = i < b_q, place * b_q + i
        query = load_rows(query_ptr, index, is_query, x, D)
        grad = load_rows(grad_ptr, index, is_query, y, DV)
        normaliser = tl.load(normaliser_ptr + index, mask=is_query, other=0.0)
        delta = tl.load(delta_ptr + index, mask=is_query, other=0.0)
        coordinates = load_coordinates(tilt_ptr, index, is_query, p, R).to(kind)  # (BM, RP)
        logits, room = far_scores(
            query, coordinates, tilt_ptr, centre_ptr, spread_ptr, log_count_ptr, index, is_query, row, key_row,
            far, exists, key_blocks, x, p, D, R, HAS_SPREAD, LIMIT, PRECISION,
        )  # fmt: skip
        is_far = tl.load(far_ptr + place * key_blocks + far, mask=exists, other=0) != 0
        keep = is_far[None, :] & is_query[:, None]
        weights = tl.exp(tl.where(keep, logits - normaliser[:, None], float("-inf")))  # (BM, TILE)
        grad_weights = tl.zeros_like(weights)
        for s in tl.static_range(1 + R):
            moment = load_rows(moments_ptr, (row * (1 + R) + s) * key_blocks + far, exists, y, DV)  # (TILE, DVP)
            product = tl.dot(grad, tl.trans(moment), input_precision=PRECISION)  # (BM, TILE)
            grad_weights += load_tilt(tilt_ptr, index, is_query, s, R)[:, None] * product
        applied = weights
        if DROPOUT > 0.0:
            factors = dropout_factors(seed, index[:, None], (key_blocks * b_k + far)[None, :], width, DROPOUT)
            applied, grad_weights = weights * factors, grad_weights * factors
        flow = weights * (grad_weights - delta[:, None])
        applied, flow, room = tl.trans(applied), tl.trans(flow), tl.trans(room)  # (TILE, BM)
        grad_centre = tl.dot(flow.to(kind), query, grad_centre, input_precision=PRECISION)
        constant = load_tilt(tilt_ptr, index, is_query, 0, R)  # (BM,)
        grad_mean = tl.dot((applied * constant[None, :]).to(kind), grad, grad_mean, input_precision=PRECISION)
        if R > 0:
            inside = (s_all < R)[:, None] & is_query[None, :]
            a = tl.load(tilt_ptr + index[None, :] * (1 + R) + 1 + s_all[:, None], mask=inside, other=0.0)  # (RS, BM)
            tilted = tl.reshape(applied[:, None, :] * a[None, :, :], (TILE * RS, BM))
            grad_covariance = tl.dot(tilted.to(kind), grad, grad_covariance, input_precision=PRECISION)
            if HAS_SPREAD:
                flow = tl.where(room, flow, 0.0)
                tilted = tl.reshape(flow[:, None, :] * a[None, :, :], (TILE * RS, BM))
                grad_spread = tl.dot(tilted.to(kind), coordinates, grad_spread, input_precision=PRECISION)

    out = split * rows + row
    store_rows(grad_centre_ptr, out * key_blocks + far, exists, x, grad_centre, D)
    store_rows(grad_moments_ptr, out * (1 + R) * key_blocks + far, exists, y, grad_mean, DV)
    if R > 0:
        both = tl.arange(0, TILE * RS)
        block, s = first + both // RS, both % RS
        is_real = (s < R) & (block < key_blocks)
        store_rows(grad_moments_ptr, (out * (1 + R) + 1 + s) * key_blocks + block, is_real, y, grad_covariance, DV)
        if HAS_SPREAD:
            store_rows(grad_spread_ptr, (out * key_blocks + block) * R + s, is_real, p, grad_spread, R)
