"""Pieces that the fused kernels of `eigen_block` share: tiles of rows, scores of far blocks, dropout.

Imported only where Triton is installed. Shapes in comments: BM queries, BN keys, TILE far blocks, D dimensions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads annotations of its own functions as its own, so parameters and results of these have none.


@triton.jit
def load_rows(pointer, index, valid, column, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `index` of an array (·, WIDTH), zero where they are not valid: (len(index), len(column))."""
    inside = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + index[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, index, valid, column, rows, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what `load_rows` reads, in the type that is stored there."""
    inside = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + index[:, None] * WIDTH + column[None, :], rows.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_tilt(tilt_ptr, index, valid, s, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coordinate s of the queries `index`, 0 being the constant one: (BM,) float32."""
    return tl.load(tilt_ptr + index * (1 + R) + s, mask=valid, other=0.0)


@triton.jit
def load_coordinates(tilt_ptr, index, valid, p, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """All coordinates of the queries `index` but the constant one: (BM, len(p)), zero from R on."""
    inside = valid[:, None] & (p < R)[None, :]
    return tl.load(tilt_ptr + index[:, None] * (1 + R) + 1 + p[None, :], mask=inside, other=0.0)


@triton.jit
def far_scores(  # type: ignore[no-untyped-def]
    query,  # (BM, D)
    coordinates,  # (BM, RP), the query's coordinates in the type of products
    tilt_ptr,
    centre_ptr,
    spread_ptr,
    log_count_ptr,
    index,  # (BM,) queries among all
    valid,  # (BM,)
    row,
    key_row,
    far,  # (TILE,) far blocks
    exists,  # (TILE,)
    key_blocks,
    x,
    p,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits (BM, TILE) of far blocks, and where the bonus of their spread is below its limit."""
    centre = load_rows(centre_ptr, key_row * key_blocks + far, exists, x, D)  # (TILE, D)
    logits = tl.dot(query, tl.trans(centre), input_precision=PRECISION)
    logits += tl.load(log_count_ptr + row * key_blocks + far, mask=exists, other=0.0)[None, :]
    room = logits < 0.0  # only read with a spread
    if HAS_SPREAD:
        bonus = tl.zeros_like(logits)
        for s in tl.static_range(R):
            spread = load_rows(spread_ptr, (row * key_blocks + far) * R + s, exists, p, R)  # (TILE, RP)
            a = load_tilt(tilt_ptr, index, valid, 1 + s, R)
            bonus += a[:, None] * tl.dot(coordinates, tl.trans(spread), input_precision=PRECISION)
        room = bonus < LIMIT
        logits += tl.minimum(bonus, LIMIT)
    return logits, room


@triton.jit
def dropout_factors(seed, queries, columns, width, DROPOUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 with probability DROPOUT, else 1 / (1 − DROPOUT), from the pair alone: any kernel draws the same.

    Args:
        seed: of the call.
        queries: int64, indices among all queries; columns: int64, keys of a row and after them its far blocks.
            They broadcast to the shape of the result.
        width: number of columns.
    """
    return tl.where(tl.rand(seed, queries * width + columns) >= DROPOUT, 1.0 / (1.0 - DROPOUT), 0.0)
