"""The content basis: a rank-r bilinear estimate of every score from two small maps.

A score is s·q·k. With a query map A and a key map B (both d × r) and a mean key k̄, it is estimated by

    ŝ_ij = s·(q_i A)·((k_j − k̄) B) + s·q_i·k̄

which costs r instead of d multiply-adds per pair. For queries with second moment C_q = E[qqᵀ] and keys with
covariance C_k = E[(k−k̄)(k−k̄)ᵀ] the maps with the least mean squared score error have a closed form
(`fit_content_basis`); after that A and B are ordinary parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism, clamped_rank
from approx_attn.attention.calibrated import SHARES, BasisMechanism
from approx_attn.attention.eigen.basis_file import load_basis_into
from approx_attn.errors import require_count, require_one_of

INITS = ("random", "calibrated")


@dataclass(frozen=True)
class ContentFit:
    """A fitted content basis; `...` are the leading axes (heads) of the statistics it was fitted to.

    Attributes:
        query_map: (..., d, r), A. Columns are ordered, so the first r' of them are the best basis of rank r'.
        key_map: (..., d, r), B, in the same order.
        key_mean: (..., d), k̄.
        singular_values: (..., d), all of them: the mean squared score error (before the scale s²) of rank r is
            the sum of the squares from the r-th on, and the sum of all squares is that of the mean key alone.
    """

    query_map: Tensor
    key_map: Tensor
    key_mean: Tensor
    singular_values: Tensor


def fit_content_basis(
    query_second_moment: Tensor,
    key_covariance: Tensor,
    key_mean: Tensor,
    rank: int | None = None,
    regularisation: float = 1e-8,
) -> ContentFit:
    """The rank-r query and key maps with the least mean squared score error, in closed form.

    With Cholesky factors C_q = L_q L_qᵀ, C_k = L_k L_kᵀ and U Σ Vᵀ = svd(L_qᵀ L_k):

        A = L_q⁻ᵀ U_r Σ_r^½        B = L_k⁻ᵀ V_r Σ_r^½

    The error of an estimate q·M·(k−k̄) is E[(q (M−I) (k−k̄))²] = ‖L_qᵀ (M−I) L_k‖²_F, and A·Bᵀ is the M for
    which L_qᵀ M L_k is the best rank-r approximation of L_qᵀ L_k (Eckart–Young). At r = d, A·Bᵀ = I.

    Args:
        query_second_moment: (..., h, d, d), C_q of what enters the attention (after any rotary embedding).
        key_covariance: (..., h_kv, d, d), C_k; h_kv divides h, and each key head serves h/h_kv query heads.
        key_mean: (..., h_kv, d), k̄.
        rank: columns kept, 1 to d; all d if None.
        regularisation: added to both diagonals as a fraction of their mean, so that directions which never
            occur in the data stay invertible.

    Returns:
        Maps with h heads and the key mean as given, in float64.

    Raises:
        ValueError: shapes that do not fit each other, or statistics that are not finite.
    """
    heads, dim = query_second_moment.shape[-3], query_second_moment.shape[-1]
    key_heads = key_covariance.shape[-3]
    if key_covariance.shape[-2:] != query_second_moment.shape[-2:] or heads % key_heads:
        raise ValueError(
            "query_second_moment (..., h, d, d) and key_covariance (..., h_kv, d, d) must agree in d, and h_kv must "
            f"divide h; got {tuple(query_second_moment.shape)} and {tuple(key_covariance.shape)}."
        )
    if not (query_second_moment.isfinite().all() and key_covariance.isfinite().all() and key_mean.isfinite().all()):
        raise ValueError("the statistics of a content basis must be finite, got NaN or infinity.")
    rank = dim if rank is None else min(require_count("rank", rank), dim)
    query_factor = _cholesky(query_second_moment, regularisation)  # (..., h, d, d)
    key_factor = _cholesky(key_covariance, regularisation)  # (..., h_kv, d, d)
    key_factor = key_factor.repeat_interleave(heads // key_heads, dim=-3)  # (..., h, d, d)
    left, singular_values, right = torch.linalg.svd(query_factor.mT @ key_factor)
    root = singular_values[..., None, :rank].sqrt()  # (..., h, 1, r)
    return ContentFit(
        query_map=torch.linalg.solve_triangular(query_factor.mT, left[..., :rank] * root, upper=True),
        key_map=torch.linalg.solve_triangular(key_factor.mT, right.mT[..., :rank] * root, upper=True),
        key_mean=key_mean.double(),
        singular_values=singular_values,
    )


def _cholesky(moment: Tensor, regularisation: float) -> Tensor:
    """Lower Cholesky factor in float64 of a moment matrix with a regularised diagonal."""
    moment = moment.double()
    moment = (moment + moment.mT) / 2
    dim = moment.shape[-1]
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)  # (..., h)
    eye = torch.eye(dim, dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(moment + regularisation * level[..., None, None] * eye)


class ContentBasis(nn.Module):
    """Query map A, key map B and mean key k̄ of one attention layer.

    At the start A = B has random orthonormal columns and k̄ = 0, so the estimate is the score of the projections
    on a random r-dimensional subspace. At rank = head_dim the estimate is the exact score at this start and after
    calibration (A·Bᵀ = I in both cases) but not for arbitrary trained maps: a mechanism whose full-budget limit
    must hold whatever the parameters reaches it by scoring all pairs exactly.

    Args:
        num_heads: query heads h.
        num_key_value_heads: key heads h_kv, a divisor of h.
        head_dim: d.
        rank: r; clamped to d.
        share: `head` gives every query head its own maps, `layer` one pair of maps for all heads, `model` likewise
            and the same in all layers (see `tie_to`). The mean key is always one per key head and layer.
        init: `random`, or `calibrated`: unusable until `load` or a state dict has filled it.
        train_basis: whether gradients flow to A and B; k̄ is a buffer, set by calibration alone.
        seed: of the random start; None draws from PyTorch's global generator, so the seed of a run decides.
    """

    key_mean: Tensor

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rank: int,
        *,
        share: str = "head",
        init: str = "random",
        train_basis: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.rank = clamped_rank(rank, head_dim)
        self.share = require_one_of("attention.share", share, SHARES)
        self.is_ready = require_one_of("attention.basis_init", init, INITS) == "random"
        maps = num_heads if share == "head" else 1
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        start = torch.linalg.qr(torch.randn(maps, head_dim, head_dim, generator=generator))[0][..., : self.rank]
        start = start.contiguous()  # parameters that are not cannot be sharded
        self.query_map = nn.Parameter(start.clone(), requires_grad=train_basis)  # (h | 1, d, r)
        self.key_map = nn.Parameter(start.clone(), requires_grad=train_basis)  # (h | 1, d, r)
        self.register_buffer("key_mean", torch.zeros(num_key_value_heads, head_dim))

    def query_coordinates(self, query: Tensor) -> Tensor:
        """q·A, without the scale: (b, h, n_q, d) -> (b, h, n_q, r)."""
        self.require_ready()
        return query @ self.query_map.to(query.dtype)

    def key_coordinates(self, key: Tensor) -> Tensor:
        """(k − k̄)·B per query head: (b, h_kv, n_k, d) or (b, h, n_k, d) -> (b, h, n_k, r).

        A padded key that was cleared to zero gets the coordinates −k̄·B: leave it out by the mask.
        """
        self.require_ready()
        key_map = self.key_map.to(key.dtype)
        key = key - self._mean_for(key.shape[1]).to(key.dtype)[:, None]  # (b, h_kv | h, n_k, d)
        if key.shape[1] == self.num_heads or self.share != "head":
            coordinates = key @ key_map
            return coordinates.repeat_interleave(self.num_heads // key.shape[1], dim=1)
        groups = self.num_heads // self.num_key_value_heads
        key_map = key_map.unflatten(0, (self.num_key_value_heads, groups))  # (h_kv, g, d, r)
        return (key.unsqueeze(2) @ key_map).flatten(1, 2)

    def row_offset(self, query: Tensor) -> Tensor:
        """q·k̄, the part of the estimate that is constant in a row, without the scale: -> (b, h, n_q, 1)."""
        self.require_ready()
        return query @ self._mean_for(self.num_heads).to(query.dtype)[:, :, None]

    def estimate(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """ŝ for all pairs: (b, h, n_q, d), (b, h_kv | h, n_k, d) -> (b, h, n_q, n_k). For tests and analyses."""
        near = self.query_coordinates(query) @ self.key_coordinates(key).mT
        return scale * (near + self.row_offset(query))

    @torch.no_grad()
    def load(self, query_map: Tensor, key_map: Tensor, key_mean: Tensor) -> None:
        """Take over a fitted basis; a basis of a higher rank is cut to this one's.

        Args:
            query_map: (h, d, r') with r' >= r; (1, d, r') unless `share` is `head`.
            key_map: as `query_map`.
            key_mean: (h_kv, d).

        Raises:
            ValueError: any other shape, naming both; nothing is changed then.
        """
        wanted = tuple(self.query_map.shape)
        for label, tensor in (("query_map", query_map), ("key_map", key_map)):
            if tensor.dim() != 3 or tuple(tensor.shape[:2]) != wanted[:2] or tensor.shape[2] < self.rank:
                raise ValueError(
                    f"content basis {label} must be {wanted} (heads, head_dim, rank; share={self.share}) or of a "
                    f"higher rank, got {tuple(tensor.shape)}."
                )
        if key_mean.shape != self.key_mean.shape:
            raise ValueError(
                f"content basis key_mean must be {tuple(self.key_mean.shape)} (key heads, head_dim), "
                f"got {tuple(key_mean.shape)}."
            )
        self.query_map.copy_(query_map[..., : self.rank])
        self.key_map.copy_(key_map[..., : self.rank])
        self.key_mean.copy_(key_mean)
        self.is_ready = True

    def tie_to(self, first: ContentBasis) -> None:
        """With `share=model`, use the maps of the basis in the first layer from now on."""
        if self.share == "model":
            self.query_map, self.key_map = first.query_map, first.key_map

    def _mean_for(self, heads: int) -> Tensor:
        """k̄ for keys or queries with this many heads: (heads, d)."""
        return self.key_mean.repeat_interleave(heads // self.num_key_value_heads, dim=0)

    def require_ready(self) -> None:
        """Raise a `ValueError` if a calibrated basis has not been filled yet."""
        if not self.is_ready:
            raise ValueError(
                "attention.basis_init=calibrated has no basis yet: give attention.basis=<file>, calibrate the model, "
                "or load a checkpoint; or use attention.basis_init=random."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_ready = self.is_ready or f"{prefix}query_map" in state_dict

    def extra_repr(self) -> str:
        return f"rank={self.rank}, share={self.share}"


class HasContentBasis(BasisMechanism):
    """A mechanism with a content basis as its attribute `basis`: calibration and sharing between layers."""

    basis_kind = "content"
    fit_type = ContentFit
    basis: ContentBasis

    @property
    def share(self) -> str:  # type: ignore[override]
        return self.basis.share

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.basis.rank

    def _start_basis(
        self, rank: int, share: str, init: str, path: str | None, train_basis: bool, seed: int | None
    ) -> None:
        """Make the basis from the options of the mechanism, starting from the file at `path` if there is one."""
        heads, key_heads = self.num_heads, self.num_key_value_heads
        options = {"share": share, "init": init, "train_basis": train_basis, "seed": seed}
        self.basis = ContentBasis(heads, key_heads, self.head_dim, rank, **options)  # type: ignore[arg-type]
        if path is not None:
            load_basis_into(self, path)

    def tie_to(self, first: AttentionMechanism) -> None:
        """With `share=model`, use the maps of the first layer's basis from now on."""
        if isinstance(first, type(self)):
            self.basis.tie_to(first.basis)

    def load_content_basis(self, query_map: Tensor, key_map: Tensor, key_mean: Tensor) -> None:
        """Start from a fitted basis; see `ContentBasis.load`. Nothing but the basis changes."""
        self.basis.load(query_map, key_map, key_mean)

    def load_fit(self, fitted: Callable[[str], ContentFit]) -> None:
        maps = fitted(self.share)
        # The mean key belongs to the layer, however widely the maps are shared.
        self.load_content_basis(maps.query_map, maps.key_map, fitted("head").key_mean)
