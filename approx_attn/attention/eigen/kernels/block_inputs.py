"""What block-wise attention works on: sequences laid out in blocks, and which blocks are exact."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SPREAD_LIMIT = 2.0
"""Largest logarithm of the factor that the variance of a block may add to its weight (order 2): a Gaussian tail
grows without bound, the mean of b keys is at most b times their average."""


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


def straddling_blocks(b_q: int, b_k: int, offset: int) -> int:
    """The most key blocks that are neither wholly in the past nor wholly in the future of a query block."""
    if b_q % b_k == 0 and offset % b_k == 0:
        return b_q // b_k
    if b_k % b_q == 0 and offset % b_q == 0:
        return 1
    return (b_q + b_k - 2) // b_k + 1
