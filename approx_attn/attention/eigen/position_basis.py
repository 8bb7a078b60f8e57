"""A low-rank Gaussian model of rows of scores over positions, and its posterior given observed scores.

A row of scores s ∈ R^n over key positions is modelled as

    s = offset·1 + μ + B·c + ε        c ~ N(0, Λ)    ε_j ~ N(0, ψ_j)    offset: flat prior

with ψ_j = σ² everywhere (probabilistic PCA with a free row offset) or noise of its own at every position (factor
analysis), where σ² is the geometric mean of the ψ_j. Given scores P at observed positions Ω, the posterior mean is

    Ŝ = μ + ȳ + (B − b̄)·c      c = (B_cᵀ W B_c + σ² Λ⁻¹)⁻¹ B_cᵀ W (P − μ_Ω)      B_c = B_Ω − b̄

where W are the weights σ²/ψ_j of the observed entries, 0 elsewhere, and ȳ, b̄ are the W-weighted means of P − μ_Ω and
of the rows of B_Ω. This is the estimate with the constant vector as one more basis column under a flat prior,
with that column eliminated: the system stays positive definite, also for a row with nothing observed,
whose estimate is μ. Everything below works with the whitened basis F = B Λ^{1/2}, for which the system
is F_cᵀ W F_c + σ² I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention.mask import at_least_float32
from approx_attn.errors import require_count, require_one_of

BASIS_INITS = ("dct", "random", "calibrated")
LENGTHS = ("truncate", "interpolate")
NOISES = ("shared", "position")
DEFAULT_RANK = 8

# Start of the noise variance σ²; the leading component starts at variance 1, component k at 1/k. With a
# quarter of 64 positions observed the prior then halves the eighth component and hardly touches the first.
INITIAL_NOISE = 1.0


@dataclass(frozen=True)
class PositionPrior:
    """The prior at the positions of one forward pass.

    Attributes:
        mean: (g, n) μ.
        factor: (g, n, r) whitened basis B Λ^{1/2}.
        noise: (g,) σ².
        weight: (g, n) σ²/ψ_j; None where all positions share their noise.
    """

    mean: Tensor
    factor: Tensor
    noise: Tensor
    weight: Tensor | None = None

    def weights_at(self, index: Tensor) -> Tensor:
        """(g | 1, m): what observations at m positions weigh."""
        return self.noise.new_ones(1, len(index)) if self.weight is None else self.weight.index_select(-1, index)


class PositionBasis(nn.Module):
    """Learned mean, basis, log-eigenvalues and log-noise over positions.

    Args:
        groups: how many bases: the number of heads, or 1 if heads share.
        length: positions L of the axis.
        rank: basis columns r; clamps to the number of positions.
        lengths: how an input of another length uses the basis. "truncate": position p is entry p, and
            positions never learned have mean and basis zero, so their estimate is the row's offset.
            "interpolate": the whole axis is stretched or squeezed linearly to the input.
        init: "dct" (smooth cosines), or "random". "calibrated" starts as "dct" until `load` is called.
        seed: of the random start.
        noise: one variance for all positions ("shared") or one for each ("position"). Positions never learned have
            the geometric mean.

    Attributes:
        mean: (g, L), basis: (g, L, r), log_eigenvalues: (g, r), log_noise: (g,) or (g, L).
    """

    def __init__(
        self,
        groups: int,
        length: int,
        rank: int,
        *,
        lengths: str = "truncate",
        init: str = "dct",
        seed: int = 0,
        noise: str = "shared",
    ) -> None:
        super().__init__()
        self.length = length
        self.noise = require_one_of("attention.noise", noise, NOISES)
        self.lengths = require_one_of("attention.lengths", lengths, LENGTHS)
        require_one_of("attention.basis_init", init, BASIS_INITS)
        self.rank = min(rank, length)
        columns = random_basis(length, self.rank, seed) if init == "random" else dct_basis(length, self.rank)
        eigenvalues = 1.0 / torch.arange(1, self.rank + 1, dtype=torch.get_default_dtype())
        self.mean = nn.Parameter(torch.zeros(groups, length))
        self.basis = nn.Parameter(columns.to(self.mean.dtype).expand(groups, -1, -1).clone())
        self.log_eigenvalues = nn.Parameter(eigenvalues.log().expand(groups, -1).clone())
        self.log_noise = nn.Parameter(torch.full(self._noise_shape(groups), math.log(INITIAL_NOISE)))

    def _noise_shape(self, groups: int) -> tuple[int, ...]:
        return (groups,) if self.noise == "shared" else (groups, self.length)

    def prior(self, length: int, dtype: torch.dtype | None = None) -> PositionPrior:
        """The prior at positions 0 … length − 1.

        Args:
            dtype: type to compute in; that of the parameters, but at least float32, if None.
        """
        dtype = at_least_float32(self.mean[:0]).dtype if dtype is None else dtype
        mean, log_noise = self.mean.to(dtype), self.log_noise.to(dtype)
        factor = self.basis.to(dtype) * self.log_eigenvalues.to(dtype).mul(0.5).exp()[:, None, :]
        log_weight = None
        if self.noise == "position":
            own, log_noise = log_noise, log_noise.mean(-1)
            log_weight = log_noise[:, None] - own
        if length != self.length:
            mean = self._resized(mean[..., None], length)[..., 0]
            factor = self._resized(factor, length)
            log_weight = None if log_weight is None else self._resized(log_weight[..., None], length)[..., 0]
        return PositionPrior(mean, factor, log_noise.exp(), None if log_weight is None else log_weight.exp())

    def _resized(self, table: Tensor, length: int) -> Tensor:
        """(g, L, r) -> (g, length, r)."""
        if self.lengths == "truncate" or length <= 1:
            return F.pad(table, (0, 0, 0, length - self.length))  # a negative pad crops
        return F.interpolate(table.transpose(1, 2), size=length, mode="linear", align_corners=True).transpose(1, 2)

    def load(self, mean: Tensor, basis: Tensor, eigenvalues: Tensor, noise: Tensor) -> None:
        """Start from a fitted basis.

        Args:
            mean: (g | 1, L).
            basis: (g | 1, L, r), columns in the order of their eigenvalues.
            eigenvalues: (g | 1, r), positive variances of the coefficients.
            noise: (g | 1,), positive variance of the residual; (g | 1, L) where every position has its own.

        Raises:
            ValueError: another shape, or values that are not finite or not positive; nothing is copied.
        """
        given = {"mean": mean, "basis": basis, "eigenvalues": eigenvalues, "noise": noise}
        own = {"mean": self.mean, "basis": self.basis, "eigenvalues": self.log_eigenvalues, "noise": self.log_noise}
        copy_checked(own, given)

    def extra_repr(self) -> str:
        groups, positions, rank = self.basis.shape
        return f"groups={groups}, positions={positions}, rank={rank}"


@torch.no_grad()
def copy_checked(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Start the parameters of a basis from fitted ones; `eigenvalues` and `noise` are held as logarithms.

    Args:
        own: the parameters by name, (g, ...) each.
        given: by the same names, (g | 1, ...).

    Raises:
        ValueError: another shape, or values that are not finite or negative; nothing is copied.
    """
    for name, tensor in given.items():
        shape, expected = tuple(tensor.shape), tuple(own[name].shape)
        if len(shape) != len(expected) or shape[0] not in (1, expected[0]) or shape[1:] != expected[1:]:
            raise ValueError(f"the {name} of the position basis has shape {shape}, the mechanism needs {expected}.")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} of the position basis must be finite.")
        if name in ("eigenvalues", "noise") and not bool((tensor >= 0).all()):
            raise ValueError(f"the {name} of the position basis must not be negative.")
    # A component of variance zero and noise of zero are limits: stay where the logarithm is finite.
    least = 1e-12 * float(given["eigenvalues"].max()) if given["eigenvalues"].numel() else 0.0
    least = max(least, 1e-30)
    for name, tensor in given.items():
        positive = name in ("eigenvalues", "noise")
        own[name].copy_(tensor.double().clamp_min(least).log() if positive else tensor)


def observable_rank(rank: int | None, observed: int, things: str, keep: float | int, length: int) -> int:
    """The rank that observed scores can determine: `DEFAULT_RANK` if None, at most as many as are observed.

    Args:
        rank: the option, or None.
        observed: number of `things`, keys or pairs, that the budget `keep` observes at `length` positions.

    Raises:
        ValueError: more than are observed.
    """
    if rank is None:
        return min(DEFAULT_RANK, observed)
    if require_count("attention.rank", rank, 0) > observed:
        raise ValueError(
            f"attention.rank={rank} is more than the {observed} {things} that attention.keep={keep} observes at "
            f"max_length={length}; lower attention.rank or raise attention.keep."
        )
    return rank


def dct_basis(length: int, rank: int) -> Tensor:
    """(length, rank) float64: the first cosines of the DCT-II after the constant, columns of norm √length.

    Entries are of order one, so that a learning rate that suits weights suits the basis, and the eigenvalues
    are variances of single scores.
    """
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    frequency = torch.arange(1, rank + 1, dtype=torch.float64)
    return math.sqrt(2.0) * torch.cos(math.pi * position[:, None] * frequency)


def random_basis(length: int, rank: int, seed: int) -> Tensor:
    """(length, rank) float64: Gaussian entries of variance one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, rank, generator=generator, dtype=torch.float64)


def centred_products(second: Tensor, centre: Tensor, count: Tensor) -> Tensor:
    """F_cᵀ W F_c from FᵀWF (..., r, r), the mean row b̄ of F (..., r) and the sum of the weights (..., 1)."""
    return second - count[..., None] * centre[..., :, None] * centre[..., None, :]


def posterior_covariance(second: Tensor, noise: Tensor) -> Tensor:
    """(F_cᵀ W F_c + σ² I)⁻¹ with what rounding needs to stay positive definite.

    Args:
        second: (..., r, r) F_cᵀ W F_c.
        noise: σ², broadcastable to (...).

    The jitter is a few units of rounding of the trace: invisible beside any noise that was fitted to data.
    """
    rank = second.shape[-1]
    jitter = 8.0 * torch.finfo(second.dtype).eps * second.diagonal(dim1=-2, dim2=-1).sum(-1)
    identity = torch.eye(rank, dtype=second.dtype, device=second.device)
    precision = second + (noise + jitter)[..., None, None] * identity
    # Without the check of the factorisation, which would wait for the device.
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(precision, check_errors=False).L)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast off: products of the basis and solves stay in float32 (or float64)."""
    with torch.autocast(device_type=device.type, enabled=False):
        yield
