"""Top-k attention whose keys are chosen in a few principal dimensions of the keys, the rest dropped.

Singhania, Singh, He, Feizi, Bhatele: *Loki: Low-rank Keys for Efficient Sparse Attention*, arXiv 2406.02542.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from approx_attn.attention.base import Capabilities, Cost, Request, clamped_rank, repeat_heads
from approx_attn.attention.baselines.topk import topk_attention
from approx_attn.attention.budget import kept_pairs, require_budget, resolve_count
from approx_attn.attention.calibrated import ObservingMechanism
from approx_attn.attention.exact import exact_attention
from approx_attn.attention.mask import AttentionMask, at_least_float32, query_chunks
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of

MOMENTUM = 0.99  # of the running covariance: it remembers about the last 100 training passes
EIGH_MULTIPLY_ADDS = 9  # times d³, all eigenvectors of a symmetric matrix (Golub and Van Loan, §8.3)


@register_attention("low_rank_topk")
class LowRankTopKAttention(ObservingMechanism):
    """Per query the k keys with the largest products in r principal dimensions; exact softmax over those.

    The r directions of a head are the leading eigenvectors of the covariance of its keys within a sequence
    (a constant in the keys moves all scores of a query alike, so it is left out). They choose the keys and
    get no gradient; queries, keys and values do, through the exact scores of the chosen keys.

    The authors use it in models that were trained with exact attention, with the basis of their keys. A converted model
    is that: calibration sees the keys that its scores are computed from, any rotary positions in them. From scratch,
    `in_training="exact"` is that in one run.

    Args:
        rank: r, clamped to head_dim.
        keep: k, as a fraction of the keys that a query may use or as a number of keys.
        basis: where the covariance comes from. `running`: a moving average over training passes, held in
            the checkpoint; until the first one, or calibration, the first r dimensions. The directions are found when
            it has changed, so `cost` leaves them out: a training pass has n·d² + 9·d³ more. `input`: each sequence's
            own keys, which needs no training but would let a query's choice depend on later keys, so not causal.
        in_training: what a training pass computes. `chosen`: the same as any other. `exact`: exact attention, at its
            price, while the running covariance is taken; keys are chosen in evaluation alone.
        chunk_size: queries handled at once, all of whose exact scores are computed; bounds the memory at chunk_size·n
            numbers per head.
    """

    capabilities = Capabilities(needs_calibration=True, has_parameters=True, window=True, softcap=True, sinks=True)
    cost_formula = "n²·(r + d), with basis=input n·d² + 9·d³ more"
    covariance: Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        rank: int = 8,
        keep: float | int = 0.25,
        basis: str = "running",
        in_training: str = "chosen",
        chunk_size: int = 256,
    ) -> None:
        super().__init__(shape)
        self.rank = clamped_rank(rank, shape.head_dim)
        self.keep = require_budget("attention.keep", keep)
        self.directions_from = require_one_of("attention.basis", basis, ("running", "input"))
        self.in_training = require_one_of("attention.in_training", in_training, ("chosen", "exact"))
        self.chunk_size = require_count("attention.chunk_size", chunk_size)
        if shape.causal:
            self._refuse_own_keys_under_a_causal_mask()
        if basis == "running":
            # Falling along the diagonal, so that before any training the first r dimensions lead; so small
            # that the first training pass outweighs it.
            start = torch.diag(torch.linspace(1.0, 0.5, shape.head_dim)) * 1e-6
            self.register_buffer("covariance", start.repeat(shape.num_heads, 1, 1))  # (h, d, d)
        self._found: tuple[Tensor, Tensor] | None = None  # the latest covariance, and its directions (1, h, d, r)
        self._of_training_pass: Tensor | None = None  # directions that the latest training pass used
        self._observed: tuple[Tensor, Tensor] | None = None  # scatter (h, d, d) and number (1, 1, 1) of observed keys

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        return {"keep": 1.0}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        if request.mask.causal:
            self._refuse_own_keys_under_a_causal_mask()
        if self.training and self.in_training == "exact":
            if self.directions_from == "running" and not in_backward_pass():
                self._update_covariance(key, request.mask)
            return exact_attention(query, key, value, request)
        directions = self._directions(key, request.mask)  # (b | 1, h, d, r)
        estimate = (query.detach() @ directions.to(query.dtype), key.detach() @ directions.to(key.dtype))
        return topk_attention(query, key, value, request, self.keep, self.chunk_size, estimate)

    @torch.no_grad()
    def _directions(self, key: Tensor, mask: AttentionMask) -> Tensor:
        """(b | 1, h, d, r): the principal directions; updates the running covariance when training.

        The update counts from the next pass on, so that no sample is touched by its neighbours in a batch. A pass
        that activation checkpointing computes again in the backward pass is the same pass as before: it has the
        same directions, and no update.
        """
        if self.directions_from == "input":
            scatter, count = key_scatter(key, mask.key_keep)
            return principal_directions(scatter / count.clamp(min=1), self.rank)
        if self.training and self._of_training_pass is not None and in_backward_pass():
            return self._of_training_pass
        directions = self._running_directions()
        if self.training:
            self._of_training_pass = directions
            self._update_covariance(key, mask)
        return directions

    @torch.no_grad()
    def _update_covariance(self, key: Tensor, mask: AttentionMask) -> None:
        """Let the running covariance take in the keys of a training pass."""
        scatter, count = key_scatter(key, mask.key_keep)
        scatter, count = scatter.sum(dim=0), count.sum(dim=0)  # (h, d, d), (1, 1, 1)
        if dist.is_available() and dist.is_initialized():  # over the batches of all processes that train together
            dist.all_reduce(scatter)
            dist.all_reduce(count)
        now = scatter / count.clamp(min=1)  # (h, d, d)
        self.covariance.lerp_(now.to(self.covariance.dtype), 1.0 - MOMENTUM)
        self._found = None

    @torch.no_grad()
    def observe(
        self, query: Tensor, key: Tensor, mask: AttentionMask | None = None, *, scale: float | None = None
    ) -> None:
        """Add the keys of a batch to the covariance that `fit` will take; basis=input has nothing to fit."""
        if self.directions_from == "running":
            scatter, count = key_scatter(repeat_heads(key, self.num_heads), None if mask is None else mask.key_keep)
            before = (0.0, 0.0) if self._observed is None else self._observed
            self._observed = before[0] + scatter.sum(dim=0), before[1] + count.sum(dim=0)

    @torch.no_grad()
    def fit(self) -> None:
        """Take the covariance of the observed keys as the running one."""
        if self.directions_from == "running":
            if self._observed is None:
                raise ValueError("attention=low_rank_topk: call observe(query, key) before fit(), got no observations.")
            scatter, count = self._observed
            self.covariance.copy_(scatter / count.clamp(min=1))
            self._observed = None

    def _running_directions(self) -> Tensor:
        """(1, h, d, r) of the running covariance, found again where it is another than at the latest pass."""
        if torch.compiler.is_compiling():  # whose code may not depend on what the covariance is
            return principal_directions(self.covariance, self.rank)[None]
        # By its numbers: training, loading and moves to other devices and types all change it in ways of their own.
        if self._found is None or not equal_tensors(self._found[0], self.covariance):
            self._found = self.covariance.clone(), principal_directions(self.covariance, self.rank)[None]
        return self._found[1]

    def _refuse_own_keys_under_a_causal_mask(self) -> None:
        if self.directions_from == "input":
            raise ValueError(
                "attention.basis=input of low_rank_topk takes directions from all keys of a sequence, so it does not "
                "support causal attention; use attention.basis=running."
            )

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        r, d, k = self.rank, self.head_dim, resolve_count(self.keep, n_k)
        chunks = query_chunks(n_q, n_k, self.chunk_size, causal)
        computed = sum((stop - start) * keys for start, stop, keys in chunks)
        basis_state = (
            d * d + d * r if self.directions_from == "input" else 2 * d * d + d * r
        )  # running: and what they are of
        basis = n_k * d * d + EIGH_MULTIPLY_ADDS * d**3 if self.directions_from == "input" else 0
        return Cost(
            exact_pairs=self.num_heads * kept_pairs(self.keep, n_q, n_k, causal),
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * ((n_q + n_k) * d * r + computed * (r + d) + basis),
            value_multiply_adds=self.num_heads * computed * self.value_dim,
            state=self.num_heads * (basis_state + (n_q + n_k) * r + 2 * n_q * k + 2 * min(self.chunk_size, n_q) * n_k),
            computed_pairs=self.num_heads * computed,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, keep={self.keep}"


def key_scatter(key: Tensor, key_keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ (k − k̄)(k − k̄)ᵀ over the kept keys of each sequence (b, h, d, d), and their number (b, 1, 1, 1).

    Never across sequences, and in at least float32 whatever autocast says.
    """
    with torch.autocast(key.device.type, enabled=False):
        key = at_least_float32(key)
        keep = key.new_ones(key.shape[0], 1, key.shape[-2], 1)
        if key_keep is not None:
            keep = keep * key_keep[:, None, :, None]
        count = keep.sum(dim=-2, keepdim=True)  # (b, 1, 1, 1)
        centred = (key - (key * keep).sum(dim=-2, keepdim=True) / count.clamp(min=1)) * keep
        return centred.transpose(-2, -1) @ centred, count


def equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same numbers, of the same type and on the same device."""
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def in_backward_pass() -> bool:
    """Whether autograd is computing gradients right now, which is when activation checkpointing repeats a pass."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # PyTorch has no public name for it; its own FSDP asks so, too


def principal_directions(covariance: Tensor, rank: int) -> Tensor:
    """(..., d, d) -> (..., d, rank): orthonormal columns of the largest eigenvalues, largest first."""
    with torch.autocast(covariance.device.type, enabled=False):
        return torch.linalg.eigh(at_least_float32(covariance)).eigenvectors[..., -rank:].flip(-1)
