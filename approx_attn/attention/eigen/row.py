"""Rows of scores reconstructed from a learned eigenbasis over positions (`eigen_row`, `dct`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.calibrated import SHARES, BasisMechanism
from approx_attn.attention.eigen.basis_file import load_basis_into
from approx_attn.attention.eigen.biased import attend_with_key_bias
from approx_attn.attention.eigen.pair_selection import SELECTIONS, greedy_order, repeat_positions, select_positions
from approx_attn.attention.eigen.position_basis import LENGTHS, PositionBasis, full_precision, observable_rank
from approx_attn.attention.eigen.position_fit import COVARIANCE_COLUMNS, PositionFit
from approx_attn.attention.eigen.row_scores import (
    QueryBlock,
    block_scores,
    entries,
    interpolated_keys,
    prior_table,
    sampled_errors,
)
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of, require_weight


class RowAttention(AttentionMechanism):
    """Scores for a subset of the keys; the rest of each row estimated under a low-rank Gaussian model.

    Every query computes its scores with the same columns of keys, and with a window if asked. The rest of its
    row is the posterior mean given these, under the position basis (`position_basis.py`). A masked key is never
    evidence; observed pairs keep their exact score; a row with no usable evidence falls back to the mean.

    Because the estimate is linear in the observed keys, with common columns and no causal mask it *is* attention
    with interpolated keys R·K_Ω and a bias per key, and runs as one call of `scaled_dot_product_attention`.
    Under a causal mask or a window every row has its own r × r system. Where the mask caps scores, rows are computed
    one by one, too, and observed and estimated scores capped alike; a sink is one more key.

    With `lengths="truncate"` the columns are those chosen at `max_length`, repeated with that period: neither
    padding nor keys appended change a row, so decoding with a cache equals one pass. With "interpolate" basis
    and columns follow the number of keys given, padding included.

    Args:
        keep, rank, selection, window, global_tokens, share, lengths, noise, basis_init, train_basis, seed,
            auxiliary_loss_weight: as in `EigenRowAttention`.

    Raises:
        ValueError: no `max_length`, an impossible option, or `rank` above the number of observed keys.
    """

    capabilities = Capabilities(needs_calibration=True, has_parameters=True, window=True, softcap=True, sinks=True)
    cost_formula = "n²·d + n·r·d (common columns); n·m·(d + r²) + n²·r (causal, window)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int,
        rank: int | None,
        selection: str,
        window: int,
        global_tokens: int,
        lengths: str,
        seed: int,
        share: str = "layer",
        noise: str = "shared",
        basis_init: str = "dct",
        train_basis: bool = False,
        auxiliary_loss_weight: float = 0.0,
    ) -> None:
        super().__init__(shape)
        self.length = self._laid_out_length()
        self.keep = require_budget("attention.keep", keep)
        self.selection = require_one_of("attention.selection", selection, SELECTIONS)
        self.window = require_count("attention.window", window, 0)
        self.global_tokens = require_count("attention.global_tokens", global_tokens, 0)
        self.share = require_one_of("attention.share", share, SHARES)
        self.lengths = require_one_of("attention.lengths", lengths, LENGTHS)
        self.seed = require_count("attention.seed", seed, 0)
        self.auxiliary_loss_weight = require_weight("attention.auxiliary_loss_weight", auxiliary_loss_weight)
        columns = max(resolve_count(self.keep, self.length), min(self.global_tokens, self.length))
        observed = min(columns + (2 * self.window + 1 if self.window else 0), self.length)
        self.rank = observable_rank(rank, observed, "keys", self.keep, self.length)
        groups = shape.num_heads if share == "head" else 1
        basis = PositionBasis(groups, self.length, self.rank, lengths=lengths, init=basis_init, seed=seed, noise=noise)
        self.position = basis.requires_grad_(train_basis)
        self._order: tuple[int, ...] = ()
        self.column_order: Tensor | None
        self.register_buffer("column_order", None)
        self.select_greedily()

    # -- which columns -----------------------------------------------------------------------------

    def columns(self, key_length: int) -> tuple[int, ...]:
        """Positions of the keys that every query observes, ascending, at a number of keys."""
        key_length = len(range(key_length))  # a constant to the compiler, which may have it as a symbol
        if self.lengths == "truncate":
            chosen = repeat_positions(self._select(self.length), self.length, key_length)
        else:
            chosen = self._select(key_length)
        return tuple(sorted({*chosen, *range(min(self.global_tokens, key_length))}))

    def _select(self, length: int) -> tuple[int, ...]:
        return select_positions(self.selection, length, resolve_count(self.keep, length), self.seed, self._order)

    def select_greedily(self) -> None:
        """With selection="greedy", choose the columns anew from the basis as it stands; else do nothing."""
        if self.selection != "greedy":
            return
        with torch.no_grad():
            prior = self.position.prior(self.length)
            count = resolve_count(self.keep, self.length)
            noise = prior.noise if prior.weight is None else prior.noise[:, None] / prior.weight
            order = greedy_order(prior.factor, noise, count if count < self.length else 0)
        self._order = order
        self.column_order = torch.tensor(order, device=self.position.mean.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.column_order is not None:
            self._order = tuple(self.column_order.tolist())

    # -- attention ---------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, self.auxiliary_loss = request.mask, None
        columns = self.columns(key.shape[-2])
        if self._rows_share(mask) and not mask.causal and mask.softcap is None and not request.need_weights:
            return self._attend_to_interpolated_keys(query, key, value, request, columns), None
        return self._attend_by_rows(query, key, value, request, columns)

    def _rows_share(self, mask: AttentionMask) -> bool:
        """Whether rows that see equally many of the columns see the same ones, so that they have the same system."""
        return self.window == 0 and mask.is_structured and mask.window is None

    def _attend_to_interpolated_keys(
        self, query: Tensor, key: Tensor, value: Tensor, request: Request, columns: tuple[int, ...]
    ) -> Tensor:
        mask, scale, dropout_p, _ = request
        with full_precision(query.device):
            prior = self.position.prior(key.shape[-2], at_least_float32(query[:0]).dtype)
            keys, bias = interpolated_keys(key, mask.key_keep, prior, columns)
            if self.training and self.auxiliary_loss_weight > 0.0:
                queries = at_least_float32(query)

                def estimate(i: Tensor, j: Tensor) -> Tensor:
                    return (queries[..., i, :] * keys[..., j, :]).sum(-1) * scale + bias[..., j]

                self._set_auxiliary_loss([sampled_errors(estimate, query, key, None, mask, scale)])
            if mask.sinks is not None:  # a key of zeros with the logit as its bias, and a value of zeros
                keys, value = F.pad(keys, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
                bias = torch.cat([bias, mask.sinks.to(bias.dtype).expand(bias.shape[0], -1)[..., None]], dim=-1)
        return attend_with_key_bias(query, keys, bias, value, scale, dropout_p)

    def _attend_by_rows(
        self, query: Tensor, key: Tensor, value: Tensor, request: Request, columns: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """A block of queries at a time, each row with its own system."""
        mask, scale, dropout_p, need_weights = request
        n_k = key.shape[-2]
        outputs: list[Tensor] = []
        all_weights: list[Tensor] = []
        errors: list[tuple[Tensor, Tensor]] = []
        with full_precision(query.device):
            prior = self.position.prior(n_k, at_least_float32(query[:0]).dtype)
            table = prior_table(prior)  # (g, n_k, r + 2)
        rows_share = self._rows_share(mask)
        for block in self._blocks(query.shape[-2], n_k, mask.causal, mask.query_offset, columns):
            part = mask.queries(block.start, block.stop).keys(0, block.n_k)
            q, k = query[..., block.start : block.stop, :], key[..., : block.n_k, :]
            keep = part.dense_keep(q.shape[-2], block.n_k, query.device)  # (b | 1, h | 1, c | 1, n)
            with full_precision(query.device):
                scores = block_scores(q, k, keep, table[:, : block.n_k], prior, block, scale, rows_share)
                if self.training and self.auxiliary_loss_weight > 0.0:
                    errors.append(sampled_errors(partial(entries, scores), q, k, keep, part, scale))
                weights = masked_softmax(part.logits(scores), keep, mask.sinks)  # (b, h, c, n)
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
        size = 64 if causal else 256
        if self.window:
            size = min(size, max(32, 2 * self.window))
        for start in range(0, n_q, size):
            stop = min(start + size, n_q)
            first, last = start + query_offset, stop - 1 + query_offset
            visible = max(1, min(n_k, last + 1)) if causal else n_k  # later keys are in nobody's past
            observed = {j for j in columns if j < visible}
            if self.window:
                observed.update(range(max(0, first - self.window), min(visible, last + self.window + 1)))
            yield QueryBlock(start, stop, visible, columns, tuple(sorted(observed)), query_offset, self.window)

    def _set_auxiliary_loss(self, errors: list[tuple[Tensor, Tensor]]) -> None:
        total, count = (torch.stack(parts).sum() for parts in zip(*errors, strict=True))
        self.auxiliary_loss = self.auxiliary_loss_weight * total / count.clamp_min(1.0)

    # -- cost --------------------------------------------------------------------------------------

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any] | None:
        return {"keep": 1.0}

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Products of the path that is taken without padding; the solves count r³ each."""
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        h, g, r, d, d_v = self.num_heads, self.position.mean.shape[0], self.rank, self.head_dim, self.value_dim
        columns = self.columns(n_k)
        parameters = sum(p.numel() for p in self.position.parameters())
        if self.window == 0 and not causal:
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
            exact += h * block.count_exact(causal)
            systems = len(block.systems()[0]) if self.window == 0 else c
            per_row = g * systems * (m * r + m * r * r + r**3)
            per_head = h * c * (m * d + m * r + r * r + r + block.n_k * (r + 2))
            scores += per_row + per_head
            values += h * c * block.n_k * d_v
            tables = g * (block.n_k * (r + 2) + m * r * r)
            largest = max(largest, h * c * (block.n_k + m) + g * c * r * r + tables)
        return Cost(exact, h * pairs, scores, values, parameters + largest)


@register_attention("eigen_row")
class EigenRowAttention(RowAttention, BasisMechanism):
    """`RowAttention` whose mean, basis, eigenvalues and noise are calibrated or trained end to end.

    Source: after arXiv 2106.08823, whose abstract describes the idea; the estimator is derived in
    `position_basis.py`.

    Args:
        keep: keys that every query observes: fraction in (0, 1], or number of the `max_length` keys.
        rank: basis columns r; None takes 8, or the number of observed keys if that is smaller. 0: the mean row.
        selection: "strided", "random" (seeded) or "greedy" (pivoted Cholesky of the prior covariance; chosen at
            build and at `load_position_basis`, fixed during training).
        window: keys at most this far from the query are observed as well; 0 for none.
        global_tokens: this many leading keys are observed by every query as well.
        share: one basis per "head", per "layer", or one for the "model" (through `tie_to`).
        lengths: "truncate" or "interpolate" the basis at lengths other than `max_length`.
        noise: one variance of the residual for all positions ("shared": probabilistic PCA), or one for each
            ("position": factor analysis), by which an observation there counts less or more.
        basis_init: "dct", "random", or "calibrated", which needs `basis`.
        basis: path of a calibration file to start from.
        train_basis: learn mean, basis, eigenvalues and noise; else they stay as they start.
        seed: of random columns and a random basis.
        auxiliary_loss_weight: weight of the mean squared error between exact and estimated scores on random
            pairs. The exact score is the target and gets no gradient. `auxiliary_loss` includes the weight.
    """

    basis_kind = "absolute"
    fit_type = PositionFit

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        rank: int | None = None,
        selection: str = "strided",
        window: int = 0,
        global_tokens: int = 0,
        share: str = "head",
        lengths: str = "truncate",
        noise: str = "shared",
        basis_init: str = "dct",
        basis: str | None = None,
        train_basis: bool = True,
        seed: int = 0,
        auxiliary_loss_weight: float = 0.0,
    ) -> None:
        if basis_init == "calibrated" and basis is None:
            raise ValueError("attention.basis_init=calibrated needs attention.basis, the path of a calibration file.")
        super().__init__(
            shape,
            keep=keep,
            rank=rank,
            selection=selection,
            window=window,
            global_tokens=global_tokens,
            lengths=lengths,
            seed=seed,
            share=share,
            noise=noise,
            basis_init=basis_init,
            train_basis=train_basis,
            auxiliary_loss_weight=auxiliary_loss_weight,
        )
        if basis is not None:
            load_basis_into(self, basis)

    @property
    def fitted_columns(self) -> int:
        """`rank`; with noise of single positions, which is fitted to a covariance, as many as describe one well."""
        return self.rank if self.position.noise == "shared" else max(self.rank, COVARIANCE_COLUMNS)

    def load_fit(self, fitted: Callable[[str], PositionFit]) -> None:
        fit = fitted(self.share)
        self.load_position_basis(*(fit.cut if self.position.noise == "shared" else fit.factors)(self.rank))

    def load_position_basis(self, mean: Tensor, basis: Tensor, eigenvalues: Tensor, noise: Tensor) -> None:
        """Start from a fitted basis, as `PositionBasis.load`; with selection="greedy" the columns are chosen anew."""
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
