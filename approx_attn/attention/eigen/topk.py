"""Exact scores for the pairs that matter, low-rank estimates for all the others (`eigen_topk`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approx_attn.attention.base import Capabilities, Cost, Request, apply_dropout, repeat_heads
from approx_attn.attention.budget import keys_per_query, require_budgets, resolve_count
from approx_attn.attention.eigen.chunk_scores import (
    grouped_matmul,
    kth_largest,
    log_mean_exp,
    mean_residual,
    sampled_keep,
)
from approx_attn.attention.eigen.content_basis import HasContentBasis
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax, query_chunks
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of, require_weight

RESTS = ("keep", "drop", "mean")
SELECTS = ("error", "estimate")
POSITION_PRIORS = ("none", "absolute", "relative")
SAMPLED_TOKENS = 32  # queries and keys sampled per sequence for the auxiliary loss: 32² pairs per head


@register_attention("eigen_topk")
class EigenTopKAttention(HasContentBasis):
    """Every pair gets a rank-r estimate of its score; the chosen pairs get the exact one; one softmax over both.

    With query map A, key map B (`ContentBasis`) and k̄_i the mean of the keys that query i may use,

        ŝ_ij = s·(q_i A)·((k_j − k̄_i) B) + s·q_i·k̄_i  (+ position prior + additive mask)

    The row mean of ŝ is exact, since it costs next to nothing. Where the mask caps scores, it caps exact ones and ŝ,
    with its prior, alike. Per query, the keys of its window and the
    global tokens come first, then those with the largest expected error (or estimate, see `select`), until the
    budget is used up. Gradient flows through exact scores to queries and keys, through estimates also to A and B,
    not through the choice.

    Queries are processed in chunks; with more than one, a chunk is computed again in the backward pass, so
    memory is O(n·chunk_size).

    Args:
        rank: r, clamped to head_dim.
        keep: exact pairs of each query: a fraction of the keys that it may use (under a causal mask: of those up to
            it; padding does not count), or a number of keys. Window and global tokens count in it; where they
            alone are more, all of them are exact. 1.0 is exact attention, whatever the parameters. A list gives every
            query head a budget of its own.
        window: keys at a distance of at most this from the query are exact; 0 for no window at all.
        global_tokens: leading keys that are exact for every query; padding does not count.
        rest: what pairs without an exact score get. `keep`: their estimate. `mean`: the mean estimated weight of
            all of them in the row, so that their total weight stays. `drop`: nothing.
        select: `error` chooses by ŝ_ij + log ‖(k_j − k̄)(I − B Aᵀ)‖, the expected error of leaving the pair at its
            estimate: the part of a key that the basis cannot see is one number per key. `estimate` chooses by ŝ_ij.
        position_prior: a learned score by key position (`absolute`) or by key minus query position (`relative`)
            added to the estimate; needs `max_length`, and is zero beyond it and at the start.
        share: maps per `head`, per `layer`, or one pair for the `model`.
        basis_init: `random`, or `calibrated` (to be filled before use; implied by `basis`).
        basis: file written by `approx_attn.calibrate` to start from, or None.
        train_basis: whether A, B and the prior learn.
        auxiliary_loss_weight: weight of the mean squared error between exact and estimated scores on a random
            sample of pairs, added to the training loss; its gradient reaches the basis only.
        chunk_size: queries processed at once. Measured: at 64 a chunk of scores over 4,096 keys stays small enough for
            its memory to be used again by the next; at 256 everything takes twice as long.
        seed: of the random start; None follows the seed of the run.
    """

    capabilities = Capabilities(
        needs_calibration=True,
        has_parameters=True,
        grouped_query=True,
        window=True,
        head_budgets=True,
        softcap=True,
        sinks=True,
    )
    cost_formula = "n²·(r + d)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        rank: int = 8,
        keep: float | int | Sequence[float | int] = 0.25,
        window: int = 0,
        global_tokens: int = 0,
        rest: str = "keep",
        select: str = "error",
        position_prior: str = "none",
        share: str = "head",
        basis_init: str = "random",
        basis: str | None = None,
        train_basis: bool = True,
        auxiliary_loss_weight: float = 0.0,
        chunk_size: int = 64,
        seed: int | None = None,
    ) -> None:
        super().__init__(shape)
        self.budgets = require_budgets("attention.keep", keep, shape.num_heads)
        self.window = require_count("attention.window", window, 0)
        self.global_tokens = require_count("attention.global_tokens", global_tokens, 0)
        self.rest = require_one_of("attention.rest", rest, RESTS)
        self.select = require_one_of("attention.select", select, SELECTS)
        self.chunk_size = require_count("attention.chunk_size", chunk_size)
        self.auxiliary_loss_weight = require_weight("attention.auxiliary_loss_weight", auxiliary_loss_weight)
        self._start_basis(rank, share, basis_init, basis, train_basis, seed)
        self.position_prior = require_one_of("attention.position_prior", position_prior, POSITION_PRIORS)
        if position_prior != "none" and shape.max_length is None:
            raise ValueError(f"attention.position_prior={position_prior} needs max_length, got None; or use none.")
        entries = {"none": 0, "absolute": shape.max_length or 0, "relative": 2 * (shape.max_length or 0) - 1}[
            position_prior
        ]
        table = torch.zeros(shape.num_heads, entries)
        self.prior = nn.Parameter(table, requires_grad=train_basis) if entries > 0 else None  # (h, L | 2L - 1)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        return {"keep": 1.0}

    # -- the computation -------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        n_q, n_k = query.shape[-2], key.shape[-2]
        inputs = self._score_inputs(query, key, value, mask, hides=self.select == "error")
        self.auxiliary_loss = self._auxiliary_loss(query, key, mask, scale)

        parts = query_chunks(n_q, n_k, self.chunk_size, mask.causal, mask.query_offset)
        recompute = len(parts) > 1 and torch.is_grad_enabled()
        outputs, weights = [], []
        for part in parts:
            arguments = (inputs.part(*part), n_k, scale, dropout_p)
            if recompute:
                output, weight = checkpoint(self._attend_chunk, *arguments, use_reentrant=False)
            else:
                output, weight = self._attend_chunk(*arguments)
            outputs.append(output)
            if need_weights:
                weights.append(nn.functional.pad(weight, (0, n_k - weight.shape[-1])))
        return torch.cat(outputs, dim=-2), torch.cat(weights, dim=-2) if need_weights else None

    def _attend_chunk(self, inputs: ScoreInputs, n_k: int, scale: float, dropout_p: float) -> tuple[Tensor, Tensor]:
        """Output (b, h, c, d_v) and weights (b, h, c, seen) of a chunk of queries over the keys they may see.

        Args:
            n_k: keys that there are, seen or not; `keep` as a number is of them.
        """
        query, key, mask = inputs.query, inputs.key, inputs.mask
        c, seen = query.shape[-2], key.shape[-2]
        keep = mask.dense_keep(c, seen, query.device)
        estimate = self._estimate(inputs, keep, scale)
        rank_by = self._ranking(estimate if inputs.hidden is None else estimate + inputs.hidden, mask, keep)
        selected = self._chosen_pairs(rank_by, keep, n_k)
        # All exact scores of the chunk: one dense product is faster than gathering the keys of each query.
        exact = mask.logits(at_least_float32(grouped_matmul(query * scale, key.mT)))
        scores = exact if selected is None else torch.where(selected, exact, estimate)
        return self._weigh(scores, selected, keep, mask.sinks, inputs.value, dropout_p)

    def _weigh(
        self,
        scores: Tensor,
        selected: Tensor | None,
        keep: Tensor | None,
        sinks: Tensor | None,
        value: Tensor,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        """Output and weights from scores that are exact where `selected` is True (None: everywhere)."""
        if selected is not None and self.rest == "drop":
            keep = selected if keep is None else keep & selected
        elif selected is not None and self.rest == "mean":
            far = ~selected if keep is None else keep & ~selected
            scores = torch.where(selected, scores, log_mean_exp(scores, far))
        weights = apply_dropout(masked_softmax(scores, keep, sinks), dropout_p).to(value.dtype)
        return grouped_matmul(weights, value), weights

    @torch.no_grad()
    def _ranking(self, worth: Tensor, mask: AttentionMask, keep: Tensor | None) -> Tensor:
        """What pairs are chosen by: their worth, infinite for those that come first, minus infinite if closed."""
        c, seen = worth.shape[-2:]
        if self.window > 0 or self.global_tokens > 0:
            positions = torch.arange(seen, device=worth.device)
            first = positions < self.global_tokens
            if mask.key_keep is not None:
                first = (mask.key_keep[:, :seen].cumsum(-1) <= self.global_tokens)[:, None, None]
            if self.window > 0:
                distance = positions - mask.query_positions(c, worth.device)[:, None]
                first = first | (distance.abs() <= self.window)
            worth = worth.masked_fill(first, float("inf"))
        return worth if keep is None else worth.masked_fill(~keep, float("-inf"))

    @torch.no_grad()
    def _chosen_pairs(self, rank_by: Tensor, keep: Tensor | None, n_k: int) -> Tensor | None:
        """Which pairs of a chunk are exact: (b, h, c, seen) bool, or None for all. Ties are exact together."""
        counts = [resolve_count(budget, n_k) for budget in self.budgets]
        if min(counts) == n_k:
            return None
        seen = rank_by.shape[-1]
        budget, most = self._budget(keep, seen, rank_by.device), min(max(counts), seen)
        # Window and global tokens rank as infinite: where they exceed the budget, so is the threshold, and all pass.
        return rank_by >= kth_largest(rank_by, budget, most)

    def _budget(self, keep: Tensor | None, seen: int, device: torch.device) -> Tensor:
        """Exact pairs of each query before window and global tokens: (b | 1, h | 1, c | 1, 1)."""
        usable = torch.full((1, 1, 1, 1), seen, device=device) if keep is None else keep.sum(dim=-1, keepdim=True)
        if len(self.budgets) == 1:
            return keys_per_query(self.budgets[0], usable)
        usable = usable.expand(torch.broadcast_shapes(usable.shape, (1, self.num_heads, 1, 1)))
        counts = [keys_per_query(budget, usable[:, i]) for i, budget in enumerate(self.budgets)]
        return torch.stack(counts, dim=1)

    # -- estimates ----------------------------------------------------------------------------------------

    def _score_inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, hides: bool) -> ScoreInputs:
        """What all scores are estimated from; `hides`: and what a choice by expected error needs."""
        query_low = self.basis.query_coordinates(query)  # (b, h, n_q, r)
        key_low = self.basis.key_coordinates(key)  # (b, h, n_k, r)
        offset = self._row_offset(query, key, query_low, key_low, mask) if mask.is_structured else None
        hidden = self._hidden_part(key, key_low) if hides else None
        return ScoreInputs(query, query_low, offset, key, key_low, hidden, value, mask)

    def _estimate(self, inputs: ScoreInputs, keep: Tensor | None, scale: float) -> Tensor:
        """Estimated scores with prior, cap and bias: (b, h, n_q, n_k)."""
        estimate = at_least_float32(inputs.query_low @ inputs.key_low.mT)
        offset = inputs.offset
        if offset is None:
            offset = mean_residual(inputs.query, inputs.key, inputs.query_low, inputs.key_low, keep)
        estimate = estimate.add_(offset).mul_(scale)  # in place: the products are no longer needed
        if self.prior is not None:
            estimate = estimate + self._prior_scores(inputs.mask, *estimate.shape[-2:])
        return inputs.mask.logits(estimate)

    def _row_offset(
        self, query: Tensor, key: Tensor, query_low: Tensor, key_low: Tensor, mask: AttentionMask
    ) -> Tensor:
        """What makes the row mean of the estimates exact, for padding, causality and a window: (b, h, n_q, 1)."""
        n_q, n_k = query.shape[-2], key.shape[-2]
        both = torch.cat([repeat_heads(key, self.num_heads), key_low], dim=-1)  # (b, h, n_k, d + r)
        both = at_least_float32(both)
        used = both.new_ones(1, 1, n_k, 1) if mask.key_keep is None else mask.key_keep[:, None, :, None].to(both.dtype)
        total, count = (
            mask.sums_over_keys(both * used, n_q),
            mask.sums_over_keys(used, n_q),
        )  # (b, h, n_q | 1, d + r | 1)
        mean_key, mean_low = (total / count.clamp_min(1.0)).split([self.head_dim, key_low.shape[-1]], dim=-1)
        return (query * mean_key).sum(-1, keepdim=True) - (query_low * mean_low).sum(-1, keepdim=True)

    @torch.no_grad()
    def _hidden_part(self, key: Tensor, key_low: Tensor) -> Tensor:
        """log ‖(k − k̄)(I − B Aᵀ)‖, with the calibrated k̄ so that no key tells of another: (b, h, 1, n_k)."""
        explained = key_low @ self.basis.query_map.to(key_low.dtype).mT  # (b, h, n_k, d)
        centred = key - self.basis.key_mean.to(key.dtype)[:, None]
        norm = at_least_float32(repeat_heads(centred, self.num_heads) - explained).norm(dim=-1)
        # A key that the basis explains entirely is known already; the floor keeps such rows comparable.
        return norm.clamp_min(torch.finfo(norm.dtype).eps).log()[:, :, None]

    def _prior_scores(self, mask: AttentionMask, c: int, seen: int) -> Tensor:
        """(h, c | 1, seen) position prior, zero outside the range it was laid out for."""
        assert self.prior is not None
        positions = torch.arange(seen, device=self.prior.device)
        if self.position_prior == "relative":
            centre = (self.prior.shape[-1] - 1) // 2
            positions = positions - mask.query_positions(c, self.prior.device)[:, None] + centre  # (c, seen)
        else:
            positions = positions[None]
        inside = (positions >= 0) & (positions < self.prior.shape[-1])
        return self.prior[:, positions.clamp(0, self.prior.shape[-1] - 1)] * inside

    def _auxiliary_loss(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> Tensor | None:
        """Weighted mean squared error of estimated scores on random pairs, gradient to the basis only."""
        if not self.training or self.auxiliary_loss_weight == 0.0:
            return None
        n_q, n_k = query.shape[-2], key.shape[-2]
        i = torch.randint(n_q, (min(n_q, SAMPLED_TOKENS),), device=query.device)
        j = torch.randint(n_k, (min(n_k, SAMPLED_TOKENS),), device=query.device)
        # Queries against keys in float32 and outside autocast: squared errors are small differences.
        with torch.autocast(query.device.type, enabled=False):
            q, k = at_least_float32(query.detach()), at_least_float32(key.detach())
            if mask.query_keep is not None:  # whatever stands there must not reach the sum, not even as 0 · NaN
                q = q.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
            q_low, k_low = self.basis.query_coordinates(q), self.basis.key_coordinates(k)
            if mask.is_structured:
                offset = self._row_offset(q, k, q_low, k_low, mask).expand(-1, -1, n_q, 1)[:, :, i]
            else:
                offset = self.basis.row_offset(q[:, :, i])
            estimate = (q_low[:, :, i] @ k_low[:, :, j].mT + offset) * scale  # (b, h, i, j)
            if self.prior is not None:
                estimate = estimate + self._prior_scores(mask, n_q, n_k).expand(-1, n_q, -1)[:, i][..., j]
            exact = grouped_matmul(q[:, :, i], k[:, :, j].mT) * scale
            error = (exact - estimate).square()
            usable = sampled_keep(mask, i, j, error)
            return self.auxiliary_loss_weight * (error * usable).sum() / usable.sum().clamp_min(1.0)

    # -- the cost --------------------------------------------------------------------------------------

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        h, d, r, offset = self.num_heads, self.head_dim, self.basis.rank, n_k - n_q if causal else 0
        exact, seen = self._count_pairs(n_q, n_k, causal, offset)
        hidden = n_k * r * d if self.select == "error" else 0
        parameters = sum(parameter.numel() for parameter in self.parameters())
        maps = (n_q + n_k) * r * d + n_q * (d + r) + hidden
        return Cost(
            exact_pairs=min(exact, h * pairs),
            total_pairs=h * pairs,
            score_multiply_adds=h * (seen * (r + d) + maps),
            value_multiply_adds=h * seen * self.value_dim,
            state=parameters + h * ((n_q + n_k) * r + 4 * min(self.chunk_size, n_q) * n_k),
            computed_pairs=h * seen,
        )

    def _count_pairs(self, n_q: int, n_k: int, causal: bool, offset: int) -> tuple[int, int]:
        """Exact pairs of all heads, and pairs that are computed, estimated and weighed, of one head."""
        chunks = query_chunks(n_q, n_k, self.chunk_size, causal)
        seen = sum((stop - start) * keys for start, stop, keys in chunks)
        exact = 0
        for i in range(n_q):
            usable = min(max(i + offset + 1, 0), n_k) if causal else n_k
            first = self._count_first(i + offset, n_k, usable)
            for budget in self.budgets:
                exact += min(usable, max(resolve_count(budget, max(usable, 1)), first))
        return exact * self.num_heads // len(self.budgets), seen

    def _count_first(self, position: int, n_k: int, usable: int) -> int:
        """Keys of the window and global tokens that a query at this position may use."""
        if self.window == 0:
            return min(self.global_tokens, usable)
        low, high = max(0, position - self.window), min(usable - 1, position + self.window)
        in_window = max(0, high - low + 1)
        return in_window + min(self.global_tokens, usable, low)


class ScoreInputs(NamedTuple):
    """What the scores of some queries with some keys are computed and estimated from, the values with it.

    Attributes:
        query: (b, h, n_q, d). query_low: (b, h, n_q, r), its coordinates.
        offset: (b, h, n_q | 1, 1), what makes row means of estimates exact; None where the mask decides it by chunk.
        key: (b, h_kv, n_k, d). key_low: (b, h, n_k, r), its coordinates.
        hidden: (b, h, 1, n_k), log norm of what the basis cannot see of a key; None where nothing asks for it.
        value: (b, h_kv, n_k, d_v).
        mask: of these queries and keys.
    """

    query: Tensor
    query_low: Tensor
    offset: Tensor | None
    key: Tensor
    key_low: Tensor
    hidden: Tensor | None
    value: Tensor
    mask: AttentionMask

    def part(self, start: int, stop: int, seen: int) -> ScoreInputs:
        """Those of queries start..stop-1 with the first `seen` keys."""
        varies = self.offset is not None and self.offset.shape[-2] > 1
        return ScoreInputs(
            query=self.query[:, :, start:stop],
            query_low=self.query_low[:, :, start:stop],
            offset=self.offset[:, :, start:stop] if self.offset is not None and varies else self.offset,
            key=self.key[:, :, :seen],
            key_low=self.key_low[:, :, :seen],
            hidden=None if self.hidden is None else self.hidden[..., :seen],
            value=self.value[:, :, :seen],
            mask=self.mask.queries(start, stop).keys(0, seen),
        )
