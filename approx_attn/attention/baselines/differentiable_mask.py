"""Differentiable mask: exact attention that learns which offsets, or which pairs, it can do without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.baselines.linear import divide_or_zero
from approx_attn.attention.baselines.positional import PositionTable
from approx_attn.attention.exact import exact_attention
from approx_attn.attention.layouts.pattern import LaidOutPattern, Pattern, Rows
from approx_attn.attention.mask import AttentionMask, at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_weight


@register_attention("differentiable_mask")
class DifferentiableMaskAttention(AttentionMechanism):
    """softmax(s·Q·Kᵀ + log G + mask)·V with gates G ∈ {0, 1} learned per head, by offset or by pair.

    Source: SparseBERT (Shi et al., arXiv 2102.12871). In training a gate is 1 where θ plus logistic noise is
    above 0 (a Gumbel-sigmoid sample), and the derivative is that of sigmoid((θ + noise)/temperature), straight
    through. A closed gate adds −∞ to the score; in the backward pass its pair counts at most as much as the
    strongest open one, so that closed gates can open again.

    In evaluation, and in training once the gates are frozen, a gate is 1 where θ > 0. This pattern is the same for
    all samples: each block of queries then computes only the keys that one of its queries uses, where that is less
    than a dense product. Masks with an arbitrary pattern or a bias take the dense product.

    Attributes:
        auxiliary_loss: in training, until gates are frozen, `penalty` times the mean gate over the pairs of real
            queries that the mask allows.
        open_fraction: fraction of those pairs whose gate was open in the latest such pass, a scalar tensor.
        frozen: gates are neither drawn nor learned any more.

    Args:
        alignment: relative: one gate per head and offset. absolute: one per head and pair of positions.
        penalty: λ, weight of the mean gate in the loss.
        temperature: of the sigmoid in the derivative.
        initial_open: probability with which every gate is open at the start.
        lr_multiplier: learning rate of the gates by that of the model. θ is this times the parameter, which optimizers
            such as Adam, whose step does not depend on the scale of the gradient, make a factor on the rate.
        freeze_step: training step from which the gates are frozen; None: never. They have no gradient then, which
            training in several processes must expect (`trainer.strategy=ddp_find_unused_parameters_true`).
        closed_offsets: offsets key − query at which every gate is closed for good; [0] drops the diagonal.
    """

    capabilities = Capabilities(has_parameters=True, window=True)
    cost_formula = "n²·d, kept pairs·d when frozen"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        alignment: str = "relative",
        penalty: float = 1.0,
        temperature: float = 1.0,
        initial_open: float = 0.9,
        lr_multiplier: float = 1.0,
        freeze_step: int | None = None,
        closed_offsets: Sequence[int] = (),
    ) -> None:
        super().__init__(shape)
        for option, factor in (("temperature", temperature), ("lr_multiplier", lr_multiplier)):
            if not 0.0 < factor < math.inf:
                raise ValueError(f"attention.{option} must be a number above 0, got {factor!r}.")
        if not 0.0 < initial_open < 1.0:
            raise ValueError(f"attention.initial_open must be a probability between 0 and 1, got {initial_open!r}.")
        if any(isinstance(offset, bool) or not isinstance(offset, int) for offset in closed_offsets):
            raise ValueError(f"attention.closed_offsets must list whole numbers, got {list(closed_offsets)!r}.")
        self.penalty = require_weight("attention.penalty", penalty)
        self.temperature, self.lr_multiplier = float(temperature), float(lr_multiplier)
        self.freeze_step = None if freeze_step is None else require_count("attention.freeze_step", freeze_step, 0)
        self.closed_offsets = tuple(closed_offsets)
        initial = math.log(initial_open / (1.0 - initial_open)) / self.lr_multiplier
        self.gates = PositionTable(shape.num_heads, self._laid_out_length(), alignment, initial)
        self.open_fraction: Tensor | None = None
        self.frozen = self.freeze_step == 0
        self._laid_out: tuple[tuple, LaidOutPattern | None] | None = None  # the latest, with what it depends on

    def begin_step(self, step: int) -> None:
        self.frozen = self.freeze_step is not None and step >= self.freeze_step

    def logits(self, n_q: int, n_k: int, query_offset: int = 0) -> Tensor:
        """(h, n_q, n_k) θ of the gates; the chance that a draw opens one is its sigmoid."""
        theta = at_least_float32(self.gates(n_q, n_k, query_offset)) * self.lr_multiplier
        if not self.closed_offsets:
            return theta
        rows, columns = (torch.arange(n, device=theta.device) for n in (n_q, n_k))
        offsets = columns - rows[:, None] - query_offset
        closed = torch.isin(offsets, torch.tensor(self.closed_offsets, device=theta.device))
        return theta.masked_fill(closed, -math.inf)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        if self.training and not self.frozen:
            return self._drawn(query, key, value, request)
        self.auxiliary_loss = None
        mask, scale, dropout_p, need_weights = request
        pattern = self._pattern(query, key, mask) if mask.is_structured else None
        if pattern is not None:
            return pattern.attend(query, key, value, mask.key_keep, scale, dropout_p, need_weights)
        n_q, n_k = query.shape[-2], key.shape[-2]
        is_open = self._open(n_q, n_k, mask.query_offset)[None]
        if mask.pair_keep is not None:
            is_open = is_open & mask.pair_keep
        return exact_attention(query, key, value, request._replace(mask=replace(mask, pair_keep=is_open)))

    # -- gates that are drawn ------------------------------------------------------------------------------

    def _drawn(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        n_q, n_k = query.shape[-2], key.shape[-2]
        gate = self._sample(n_q, n_k, mask.query_offset)  # (h, n_q, n_k)
        keep = mask.dense_keep(n_q, n_k, query.device)
        self._record(gate, mask, keep)
        scores = mask.logits(at_least_float32((query * scale) @ key.transpose(-2, -1)))  # (b, h, n_q, n_k)
        weights = gated_softmax(scores, gate, keep)
        weights = apply_dropout(weights, dropout_p).to(value.dtype)
        return weights @ value, weights if need_weights else None

    def _sample(self, n_q: int, n_k: int, query_offset: int) -> Tensor:
        """(h, n_q, n_k) gates, drawn 0 or 1, with the derivative of the soft gate."""
        theta = self.logits(n_q, n_k, query_offset)
        noisy = theta + torch.rand_like(theta).logit(eps=1e-6)  # logistic: the difference of two Gumbel variables
        soft = torch.sigmoid(noisy / self.temperature)
        return (noisy > 0).to(soft.dtype) + (soft - soft.detach())

    def _record(self, gate: Tensor, mask: AttentionMask, keep: Tensor | None) -> None:
        """Set `open_fraction` and `auxiliary_loss` from the gates of allowed pairs of real queries."""
        if mask.query_keep is not None:  # whatever is padded has no part in the loss
            rows = mask.query_keep[:, None, :, None]
            keep = rows if keep is None else keep & rows
        if keep is None:
            mean = gate.mean()
        else:
            allowed = keep.expand(*keep.shape[:-3], *gate.shape).reshape(-1, *gate.shape).sum(dim=0)  # samples per pair
            mean = (gate * allowed).sum() / allowed.sum().clamp(min=1)
        self.open_fraction = mean.detach()
        self.auxiliary_loss = self.penalty * mean

    # -- gates that are fixed ------------------------------------------------------------------------------

    def _open(self, n_q: int, n_k: int, query_offset: int) -> Tensor:
        """(h, n_q, n_k) bool."""
        return self.logits(n_q, n_k, query_offset) > 0

    def _rows(self, n_k: int, mask: AttentionMask) -> Rows:
        """The open pairs that causality and window leave."""
        shared = replace(mask, key_keep=None, query_keep=None)

        def rows(start: int, stop: int) -> Tensor:
            part = shared.queries(start, stop)
            is_open = self._open(stop - start, n_k, part.query_offset)
            keep = part.dense_keep(stop - start, n_k, is_open.device)
            return is_open if keep is None else is_open & keep

        return rows

    @torch.compiler.disable  # widths of slices depend on the gates
    def _pattern(self, query: Tensor, key: Tensor, mask: AttentionMask) -> LaidOutPattern | None:
        """The open pairs laid out; None where a dense product of all pairs does no more."""
        values = self.gates.values
        sizes = (query.shape[-2], key.shape[-2], mask.causal, mask.query_offset, mask.window)
        state = None if values.is_inference() else values._version  # count of in-place changes
        depends_on = (*sizes, values.data_ptr(), values.device, state)
        if self._laid_out is None or state is None or self._laid_out[0] != depends_on:
            rows = self._rows(key.shape[-2], mask)
            pattern = Pattern.cheapest(rows, self.num_heads, *sizes[:2])
            self._laid_out = depends_on, None if pattern is None else pattern.lay_out(rows)
        return self._laid_out[1]

    @torch.no_grad()
    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        mask = AttentionMask(causal=causal, query_offset=n_k - n_q if causal else 0)
        rows = self._rows(n_k, mask)
        pattern = Pattern.cheapest(rows, self.num_heads, n_q, n_k)
        computed, held = self.num_heads * n_q * n_k, 2 * self.num_heads * n_q * n_k
        if pattern is not None:
            computed = pattern.computed_pairs
            held = 2 * computed + pattern.slices * (self.head_dim + self.value_dim)
        return Cost(
            exact_pairs=sum(int(rows(start, min(start + 256, n_q)).sum()) for start in range(0, n_q, 256)),
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=computed * self.head_dim,
            value_multiply_adds=computed * self.value_dim,
            state=self.gates.values.numel() + held,
            computed_pairs=computed,
        )


def gated_softmax(scores: Tensor, gate: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax over the open pairs, differentiable in the gates of closed ones as well.

    Args:
        scores: (b, h, n_q, n_k), at least float32.
        gate: (h, n_q, n_k), exactly 0 or 1 in value, with a derivative of its own.
        keep: bool, broadcastable to `scores`, or None; pairs that no gate can open.

    Returns:
        Weights of the shape of `scores`; a row with nothing open is zero.
    """
    is_open = gate.detach() > 0
    if keep is not None:
        is_open = is_open & keep
    lowest = torch.finfo(scores.dtype).min
    top = scores.detach().masked_fill(~is_open, lowest).amax(dim=-1, keepdim=True)
    # The limit is met by closed pairs only: they would overflow, and have a part in the gradient of the gates alone.
    exponentials = (scores - top).clamp(max=0.0).exp() * gate
    if keep is not None:
        exponentials = exponentials.masked_fill(~keep, 0.0)
    return divide_or_zero(exponentials, exponentials.sum(dim=-1, keepdim=True))
