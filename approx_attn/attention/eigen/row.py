"""Rows of scores reconstructed from a learned eigenbasis over positions (`eigen_row`, `dct`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, apply_dropout
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.eigen.biased import attend_with_key_bias
from approx_attn.attention.eigen.pair_selection import SELECTIONS, greedy_order, repeat_positions, select_positions
from approx_attn.attention.eigen.position_basis import ALIGNMENTS, BASIS_INITS, LENGTHS, PositionBasis, full_precision
from approx_attn.attention.eigen.row_scores import (
    QueryBlock,
    block_scores,
    interpolated_keys,
    pair_keep,
    prior_table,
    random_pairs,
    squared_error,
)
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of, require_weight

SHARES = ("head", "layer", "model")
DEFAULT_RANK = 8
GREEDY_QUERIES = 16  # query positions over which a relative basis is averaged to choose columns


@register_attention("eigen_row")
class EigenRowAttention(AttentionMechanism):
    """Scores for a subset of the keys; the rest of each row estimated under a low-rank Gaussian model.

    Every query computes its scores with the same columns of keys, and with a window if asked. The rest of its
    row is the posterior mean given these, under the position basis (`position_basis.py`): learned mean,
    basis, eigenvalues and noise, trained end to end. A masked key is never evidence; observed pairs keep their
    exact score; a row with no usable evidence falls back to the mean.

    Because the estimate is linear in the observed keys, with common columns and no causal mask it *is* attention
    with interpolated keys R·K_Ω and a bias per key, and runs as one call of `scaled_dot_product_attention`.
    Under a causal mask, a window or relative alignment every row has its own r × r system.

    With `lengths="truncate"` the columns are those chosen at `max_length`, repeated with that period: neither
    padding nor keys appended change a row, so decoding with a cache equals one pass. With "interpolate" basis
    and columns follow the number of keys given, padding included.

    Source: after arXiv 2106.08823, whose abstract describes the idea; the estimator is derived in
    `position_basis.py`.

    Args:
        keep: keys that every query observes: share in (0, 1], or number of the `max_length` keys.
        rank: basis columns r; None takes 8, or the number of observed keys if that is smaller. 0: the mean row.
        selection: "strided", "random" (seeded) or "greedy" (pivoted Cholesky of the prior covariance; chosen at
            build and at `load_position_basis`, fixed during training).
        window: keys at most this far from the query are observed as well; 0 for none.
        global_tokens: this many leading keys are observed by every query as well.
        alignment: the basis is indexed by key position ("absolute") or key − query position ("relative").
        share: one basis per "head", per "layer", or one for the "model" (through `tie_to`).
        lengths: "truncate" or "interpolate" the basis at lengths other than `max_length`.
        basis_init: "dct", "random", or "calibrated", which needs `basis`.
        basis: path of a calibration file to start from.
        train_basis: learn mean, basis, eigenvalues and noise; else they stay as they start.
        seed: of random columns and a random basis.
        auxiliary_loss_weight: weight of the mean squared error between exact and estimated scores on random
            pairs. The exact score is the target and gets no gradient. `auxiliary_loss` includes the weight.

    Raises:
        ValueError: no `max_length`, an impossible option, or `rank` above the number of observed keys.
    """

    capabilities = Capabilities(needs_calibration=True, has_parameters=True, window=True)
    cost_formula = "n²·d + n·r·d (common columns); n·m·(d + r²) + n²·r (causal, window, relative)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        rank: int | None = None,
        selection: str = "strided",
        window: int = 0,
        global_tokens: int = 0,
        alignment: str = "absolute",
        share: str = "head",
        lengths: str = "truncate",
        basis_init: str = "dct",
        basis: str | None = None,
        train_basis: bool = True,
        seed: int = 0,
        auxiliary_loss_weight: float = 0.0,
    ) -> None:
        super().__init__(shape)
        if self.max_length is None:
            raise ValueError(f"attention={self.name} needs max_length: its basis is laid out over positions.")
        self.keep = require_budget("attention.keep", keep)
        self.selection = require_one_of("attention.selection", selection, SELECTIONS)
        self.window = require_count("attention.window", window, 0)
        self.global_tokens = require_count("attention.global_tokens", global_tokens, 0)
        self.alignment = require_one_of("attention.alignment", alignment, ALIGNMENTS)
        self.share = require_one_of("attention.share", share, SHARES)
        self.lengths = require_one_of("attention.lengths", lengths, LENGTHS)
        if require_one_of("attention.basis_init", basis_init, BASIS_INITS) == "calibrated" and basis is None:
            raise ValueError("attention.basis_init=calibrated needs attention.basis, the path of a calibration file.")
        self.seed = require_count("attention.seed", seed, 0)
        self.train_basis = train_basis
        self.auxiliary_loss_weight = require_weight("attention.auxiliary_loss_weight", auxiliary_loss_weight)
        self.rank = self._checked_rank(rank)
        self.position = PositionBasis(
            shape.num_heads if share == "head" else 1,
            self.max_length,
            self.rank,
            alignment=alignment,
            lengths=lengths,
            init=basis_init,
            seed=seed,
        ).requires_grad_(train_basis)
        self._order: tuple[int, ...] = ()
        self.column_order: Tensor | None
        self.register_buffer("column_order", None)
        self.select_greedily()
        if basis is not None:
            from approx_attn.conversion.calibration import load_basis_into

            load_basis_into(self, basis)

    def _checked_rank(self, rank: int | None) -> int:
        assert self.max_length is not None
        columns = max(resolve_count(self.keep, self.max_length), min(self.global_tokens, self.max_length))
        observed = min(columns + (2 * self.window + 1 if self.window else 0), self.max_length)
        if rank is None:
            return min(DEFAULT_RANK, observed)
        require_count("attention.rank", rank, 0)
        if rank > observed:
            raise ValueError(
                f"attention.rank={rank} is more than the {observed} keys that attention.keep={self.keep} observes at "
                f"max_length={self.max_length}; lower attention.rank or raise attention.keep."
            )
        return rank

    # -- which columns -----------------------------------------------------------------------------

    def columns(self, key_length: int) -> tuple[int, ...]:
        """Positions of the keys that every query observes, ascending, at a number of keys."""
        assert self.max_length is not None
        key_length = len(range(key_length))  # a constant to the compiler, which may have it as a symbol
        if self.lengths == "truncate":
            chosen = repeat_positions(self._select(self.max_length), self.max_length, key_length)
        else:
            chosen = self._select(key_length)
        return tuple(sorted({*chosen, *range(min(self.global_tokens, key_length))}))

    def _select(self, length: int) -> tuple[int, ...]:
        return select_positions(self.selection, length, resolve_count(self.keep, length), self.seed, self._order)

    def select_greedily(self) -> None:
        """With selection="greedy", choose the columns anew from the basis as it stands; else do nothing."""
        if self.selection != "greedy":
            return
        assert self.max_length is not None
        with torch.no_grad():
            prior = self.position.prior(self.max_length)
            factor, noise = prior.factor, prior.noise
            if self.alignment == "relative":
                step = max(1, self.max_length // GREEDY_QUERIES)
                starts = range(self.max_length - 1, -1, -step)  # row i sees offsets −i … L − 1 − i
                factor = torch.cat([factor[:, s : s + self.max_length] for s in starts])
                noise = noise.repeat(len(starts))
            count = resolve_count(self.keep, self.max_length)
            order = greedy_order(factor, noise, count if count < self.max_length else 0)
        self._order = order
        self.column_order = torch.tensor(order, device=self.position.mean.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.column_order is not None:
            self._order = tuple(self.column_order.tolist())

    # -- the learned basis -------------------------------------------------------------------------

    def load_position_basis(self, mean: Tensor, basis: Tensor, eigenvalues: Tensor, noise: Tensor) -> None:
        """Start from a fitted basis; with selection="greedy" the columns are chosen anew.

        Args:
            mean: (heads | 1, P) with P = max_length positions, or 2·max_length − 1 offsets if relative.
            basis: (heads | 1, P, rank).
            eigenvalues: (heads | 1, rank).
            noise: (heads | 1,).

        Raises:
            ValueError: another shape (the message names both), or values no model can have; nothing is copied.
        """
        self.position.load(mean, basis, eigenvalues, noise)
        self.select_greedily()

    def tie_to(self, first: AttentionMechanism) -> None:
        """Share the basis (and greedy columns) of `first` if `share="model"`."""
        if self.share != "model":
            return
        if not isinstance(first, EigenRowAttention) or first.position.basis.shape != self.position.basis.shape:
            raise ValueError("attention.share=model needs the same mechanism, rank and max_length in every layer.")
        self.position = first.position
        self._order, self.column_order = first._order, first.column_order

    # -- attention ---------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
        dropout_p: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        self.auxiliary_loss = None
        columns = self.columns(key.shape[-2])
        if self._rows_share(mask) and not mask.causal and not need_weights:
            return self._attend_to_interpolated_keys(query, key, value, mask, scale, dropout_p, columns), None
        return self._attend_by_rows(query, key, value, mask, scale, dropout_p, need_weights, columns)

    @property
    def _has_common_rows(self) -> bool:
        """Without a causal mask, every row is reconstructed by the same linear map."""
        return self.alignment == "absolute" and self.window == 0

    def _rows_share(self, mask: AttentionMask) -> bool:
        """Rows that see equally many of the columns see the same ones, so that they have the same system."""
        return self._has_common_rows and mask.is_structured and mask.window is None

    def _attend_to_interpolated_keys(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
        dropout_p: float,
        columns: tuple[int, ...],
    ) -> Tensor:
        with full_precision(query.device):
            prior = self.position.prior(key.shape[-2], at_least_float32(query[:0]).dtype)
            keys, bias = interpolated_keys(key, mask.key_keep, prior, columns)
            if self.training and self.auxiliary_loss_weight > 0.0:
                self._set_auxiliary_loss([self._key_errors(query, key, keys, bias, mask, scale)])
        return attend_with_key_bias(query, keys, bias, value, scale, dropout_p)

    def _attend_by_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
        dropout_p: float,
        need_weights: bool,
        columns: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """A block of queries at a time, each row with its own system."""
        n_k = key.shape[-2]
        outputs: list[Tensor] = []
        all_weights: list[Tensor] = []
        errors: list[tuple[Tensor, Tensor]] = []
        with full_precision(query.device):
            length = self._axis_length(query.shape[-2], n_k, mask.query_offset)
            prior = self.position.prior(length, at_least_float32(query[:0]).dtype)
            table = prior_table(prior)  # (g, P, r + 2)
        rows_share = self._rows_share(mask)
        for block in self._blocks(query.shape[-2], n_k, mask.causal, mask.query_offset, columns):
            rows = mask.queries(block.start, block.stop)
            keep = rows.dense_keep(block.stop - block.start, n_k, query.device)
            if keep is not None:
                keep = keep.expand(*keep.shape[:-1], n_k)[..., : block.n_k]  # (b | 1, h | 1, c | 1, n)
            block_query, block_key = query[..., block.start : block.stop, :], key[..., : block.n_k, :]
            with full_precision(query.device):
                local = self._local_table(table, block, n_k, mask.query_offset)  # (g, c | 1, n, r + 2)
                scores = block_scores(
                    block_query, block_key, keep, local, prior.noise, block, self.window, scale, rows_share
                )
                if self.training and self.auxiliary_loss_weight > 0.0:
                    errors.append(self._score_errors(block_query, block_key, scores, keep, rows, scale))
                bias = rows.finite_bias()
                if bias is not None:
                    scores = scores + bias[..., : block.n_k]
                weights = masked_softmax(scores, keep)  # (b, h, c, n)
            weights = apply_dropout(weights, dropout_p).to(value.dtype)
            outputs.append(weights @ value[..., : block.n_k, :])
            if need_weights:
                all_weights.append(F.pad(weights, (0, n_k - block.n_k)))
        if errors:
            self._set_auxiliary_loss(errors)
        return torch.cat(outputs, dim=-2), torch.cat(all_weights, dim=-2) if need_weights else None

    def _blocks(
        self, n_q: int, n_k: int, causal: bool, query_offset: int, columns: tuple[int, ...]
    ) -> Iterator[QueryBlock]:
        """Blocks of queries: wide enough for large products, narrow enough to waste little beside a window."""
        size = 64 if causal or self.alignment == "relative" else 256
        if self.window:
            size = min(size, max(32, 2 * self.window))
        for start in range(0, n_q, size):
            stop = min(start + size, n_q)
            first, last = start + query_offset, stop - 1 + query_offset
            visible = max(1, min(n_k, last + 1)) if causal else n_k  # later keys are in nobody's past
            observed = {j for j in columns if j < visible}
            if self.window:
                observed.update(range(max(0, first - self.window), min(visible, last + self.window + 1)))
            yield QueryBlock(start, stop, visible, columns, tuple(sorted(observed)), query_offset)

    def _axis_length(self, n_q: int, n_k: int, query_offset: int) -> int:
        return n_k if self.alignment == "absolute" else max(n_k, n_q + query_offset, n_k - query_offset)

    def _local_table(self, table: Tensor, block: QueryBlock, n_k: int, query_offset: int) -> Tensor:
        """(g, 1, n, r + 2) for all rows of a block alike (absolute), or (g, c, n, r + 2) (relative)."""
        if self.alignment == "absolute":
            return table[:, None, : block.n_k]
        middle = (table.shape[1] - 1) // 2  # the entry of offset zero
        query_positions = torch.arange(block.start, block.stop, device=table.device) + query_offset
        offsets = torch.arange(block.n_k, device=table.device) - query_positions[:, None]  # (c, n)
        return table[:, offsets + middle]

    # -- auxiliary loss ----------------------------------------------------------------------------

    def _key_errors(
        self, query: Tensor, key: Tensor, keys: Tensor, bias: Tensor, mask: AttentionMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        i, j = random_pairs(query.shape[-2], key.shape[-2], query.device)
        query_i = at_least_float32(query[..., i, :])
        exact = (query_i * at_least_float32(key[..., j, :])).sum(-1) * scale  # (b, h, pairs)
        estimate = (query_i * keys[..., j, :]).sum(-1) * scale + bias[..., j]
        return squared_error(estimate, exact, pair_keep(None, mask, i, j))

    def _score_errors(
        self, query: Tensor, key: Tensor, scores: Tensor, keep: Tensor | None, rows: AttentionMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        i, j = random_pairs(query.shape[-2], key.shape[-2], query.device)
        exact = (at_least_float32(query[..., i, :]) * at_least_float32(key[..., j, :])).sum(-1) * scale
        return squared_error(scores[..., i, j], exact, pair_keep(keep, rows, i, j))

    def _set_auxiliary_loss(self, errors: list[tuple[Tensor, Tensor]]) -> None:
        total, count = (torch.stack(parts).sum() for parts in zip(*errors, strict=True))
        self.auxiliary_loss = self.auxiliary_loss_weight * total / count.clamp_min(1.0)

    # -- cost --------------------------------------------------------------------------------------

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any] | None:
        return {"keep": 1.0}

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Products of the path that is taken without padding; the solves count r³ each."""
        n_q, n_k, pairs = self._pairs(query_length, key_length, causal)
        causal = self.causal if causal is None else causal
        h, g, r, d, d_v = self.num_heads, self.position.mean.shape[0], self.rank, self.head_dim, self.value_dim
        columns = self.columns(n_k)
        parameters = sum(p.numel() for p in self.position.parameters())
        if self._has_common_rows and not causal:
            m, width = len(columns), max(d + 1, d_v)
            gain = g * (m * r + 2 * m * r * r + r**3)
            interpolation = h * (m * r + r + n_k * (r + 2)) * (d + 1)
            return Cost(
                exact_pairs=h * n_q * m,
                total_pairs=h * pairs,
                score_multiply_adds=gain + interpolation + h * n_q * n_k * width,
                value_multiply_adds=h * n_q * n_k * width,
                state=parameters + h * (n_q + 2 * n_k) * width,
            )
        offset = n_k - n_q if causal else 0
        exact = scores = values = largest = 0
        for block in self._blocks(n_q, n_k, causal, offset, columns):
            c, m = block.stop - block.start, len(block.observed)
            exact += h * block.count_exact(self.window, causal)
            systems = len(block.systems()[0]) if self._has_common_rows else c
            per_row = g * systems * (m * r + m * r * r + r**3)
            per_head = h * c * (m * d + m * r + r * r + r + block.n_k * (r + 2))
            scores += per_row + per_head
            values += h * c * block.n_k * d_v
            tables = g * (c if self.alignment == "relative" else 1) * (block.n_k * (r + 2) + m * r * r)
            largest = max(largest, h * c * (block.n_k + m) + g * c * r * r + tables)
        return Cost(exact, h * pairs, scores, values, parameters + largest)
