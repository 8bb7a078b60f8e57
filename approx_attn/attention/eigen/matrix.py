"""Whole score matrices reconstructed from a learned basis (`eigen_matrix`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.calibrated import SHARES, BasisMechanism
from approx_attn.attention.eigen.basis_file import load_basis_into
from approx_attn.attention.eigen.pair_selection import greedy_order
from approx_attn.attention.eigen.position_basis import (
    BASIS_INITS,
    INITIAL_NOISE,
    LENGTHS,
    centred_products,
    copy_checked,
    dct_basis,
    full_precision,
    observable_rank,
    posterior_covariance,
)
from approx_attn.attention.eigen.position_fit import PositionFit
from approx_attn.attention.mask import at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of

SELECTIONS = ("rows_and_columns", "random", "greedy")
GREEDY_ROUNDS = 64  # greedy pairs are taken in at most this many rounds


@register_attention("eigen_matrix")
class EigenMatrixAttention(BasisMechanism):
    """Scores for a subset of the pairs; the rest of the matrix estimated under a low-rank Gaussian model.

    A score matrix is modelled as S = offsets·1ᵀ + M + Σ_ρ c_ρ E_ρ + ε with c ~ N(0, Λ), ε ~ N(0, σ²) and a free
    offset per row (flat prior, eliminated by centring each row's evidence; softmax ignores it, but observed and
    estimated scores of a row must have it in common). Given the exact scores on the pairs Ω, one r × r system per
    matrix gives the posterior mean of c. Observed pairs keep their exact score; padded keys and padded queries are
    never evidence; a row with nothing observed takes M + Σ c_ρ E_ρ as it is. Where `mask.query_keep` is missing,
    queries as many as the keys are taken for the same tokens, so for cross-attention give it.

    Under a causal mask row i may know only rows up to i: the evidence is summed over the rows before, and every
    row solves its own system. Queries decoded with a cache know only the queries given with them.

    M and every E_ρ are held as products of L × `factor_rank` matrices, and all is trained end to end. A calibrated
    basis is cut to that rank, and what is lost counts as noise; `factor_rank` = L holds it whole. A forward pass
    expands the products and holds n × n arrays: this form shows what a matrix basis can do, not how to be fast.

    Source: after arXiv 2106.08823, whose abstract speaks of PCA of full score matrices; the estimator is derived
    here and in `position_basis.py`.

    Args:
        keep: pairs observed, as a fraction in (0, 1] or as keys per query.
        rank: components r; None takes 8, or the number of observed pairs if that is smaller. 0: the mean matrix.
        factor_rank: rank of M and of each component; clamps to `max_length`.
        selection: "rows_and_columns": an equal fraction of whole rows and columns at even gaps, found without any
            other pair; "random" (seeded) and "greedy" (largest posterior variance, chosen at build and at
            `select_greedily`, fixed in training) scatter, and compute the whole product to read the pairs from it.
        share: one basis per "head", per "layer", or one for the "model" (through `tie_to`).
        lengths: "truncate" keeps basis and pairs in place, repeats the pairs with period `max_length` and has
            zeros for the basis beyond; "interpolate" stretches both to the number of keys given.
        basis_init: "dct" (products of cosines), "random", or "calibrated", which needs `basis`.
        basis: path of a calibration file to start from.
        train_basis: learn mean, components, eigenvalues and noise.
        seed: of random pairs and of the start.
    """

    # An arbitrary mask may be a causal one in disguise, and evidence from later rows would leak through it.
    basis_kind = "matrix"
    fit_type = PositionFit
    capabilities = Capabilities(
        arbitrary_mask=False,
        needs_calibration=True,
        has_parameters=True,
        softcap=True,
        sinks=True,
        independent_queries=False,
    )
    cost_formula = "n·m·d + n²·r (rows_and_columns); n²·(d + r) (random, greedy)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        rank: int | None = None,
        factor_rank: int = 4,
        selection: str = "rows_and_columns",
        share: str = "layer",
        lengths: str = "truncate",
        basis_init: str = "dct",
        basis: str | None = None,
        train_basis: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        if require_one_of("attention.basis_init", basis_init, BASIS_INITS) == "calibrated" and basis is None:
            raise ValueError("attention.basis_init=calibrated needs attention.basis, the path of a calibration file.")
        self.length = length = self._laid_out_length()
        self.keep = require_budget("attention.keep", keep)
        self.pair_fraction = resolve_count(keep, length) / length if isinstance(keep, int) else keep
        observed = resolve_count(float(self.pair_fraction), length**2)
        self.rank = observable_rank(rank, observed, "pairs", self.keep, length)
        self.factor_rank = min(require_count("attention.factor_rank", factor_rank), length)
        self.selection = require_one_of("attention.selection", selection, SELECTIONS)
        self.share = require_one_of("attention.share", share, SHARES)
        self.lengths = require_one_of("attention.lengths", lengths, LENGTHS)
        self.seed = require_count("attention.seed", seed, 0)
        start = random_factors if basis_init == "random" else starting_factors
        left, right = start(length, self.rank, self.factor_rank, self.seed)
        groups = shape.num_heads if share == "head" else 1
        self.left = nn.Parameter(left.expand(groups, -1, -1, -1).clone())  # (g, r + 1, L, p), the last one for M
        self.right = nn.Parameter(right.expand(groups, -1, -1, -1).clone())
        eigenvalues = 1.0 / torch.arange(1, self.rank + 1, dtype=torch.get_default_dtype())
        self.log_eigenvalues = nn.Parameter(eigenvalues.log().expand(groups, -1).clone())
        self.log_noise = nn.Parameter(torch.full((groups,), math.log(INITIAL_NOISE)))
        for parameter in (self.left, self.right, self.log_eigenvalues, self.log_noise):
            parameter.requires_grad_(train_basis)
        self.pattern: Tensor | None
        self.register_buffer("pattern", None if selection == "rows_and_columns" else self._random_pattern())
        self.select_greedily()
        if basis is not None:
            load_basis_into(self, basis)

    # -- the basis ---------------------------------------------------------------------------------

    def load_fit(self, fitted: Callable[[str], PositionFit]) -> None:
        self.load_matrix_basis(*fitted(self.share).cut(self.rank))

    def load_matrix_basis(self, mean: Tensor, basis: Tensor, eigenvalues: Tensor, noise: Tensor) -> None:
        """Start from a fitted basis; with selection="greedy" the pairs are chosen anew.

        Args:
            mean: (g | 1, L²), matrices laid out by rows.
            basis: (g | 1, L², r).
            eigenvalues: (g | 1, r), variances of the coefficients.
            noise: (g | 1,), variance of the residual of one score.

        Raises:
            ValueError: another shape, or values that are not finite or negative; nothing is copied.
        """
        length = math.isqrt(mean.shape[-1])
        if length != self.length:
            raise ValueError(
                f"the basis is one of {length} × {length} scores, the mechanism has max_length={self.length}."
            )
        whole = torch.cat([basis, mean[..., None]], dim=-1).double().mT.unflatten(-1, (length, length))
        left, singular, right = torch.linalg.svd(whole, full_matrices=False)  # (g, r + 1, L, L)
        lost = singular[..., self.factor_rank :].square().sum(-1) / length**2  # (g, r + 1), per score
        root = singular[..., None, : self.factor_rank].sqrt()
        own = {"left": self.left, "right": self.right, "eigenvalues": self.log_eigenvalues, "noise": self.log_noise}
        given = {"left": left[..., : self.factor_rank] * root, "right": right.mT[..., : self.factor_rank] * root}
        noise = noise + (lost[..., :-1] * eigenvalues).sum(-1) + lost[..., -1]
        copy_checked(own, given | {"eigenvalues": eigenvalues, "noise": noise})
        self.select_greedily()

    # -- which pairs -------------------------------------------------------------------------------

    def _random_pattern(self) -> Tensor:
        """(L, L) bool."""
        pairs = self.length**2
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(pairs, generator=generator)[: resolve_count(float(self.pair_fraction), pairs)]
        return torch.zeros(pairs, dtype=torch.bool).index_fill(0, chosen, True).view(self.length, -1)

    @torch.no_grad()
    def select_greedily(self) -> None:
        """With selection="greedy", choose the pairs anew from the basis as it stands; else do nothing."""
        if self.selection != "greedy":
            return
        pairs = self.length**2
        count = resolve_count(float(self.pair_fraction), pairs)
        table, noise = self._components(self.length, self.length, 0, torch.float64)
        factor = table[..., :-1] - table[..., :-1].mean(2, keepdim=True)  # row offsets are free
        at_once = -(-count // GREEDY_ROUNDS) if count > self.length else 1
        order = greedy_order(factor.flatten(1, 2), noise, count, free_offset=False, at_once=at_once)
        chosen = torch.tensor(order[:count], dtype=torch.long)
        pattern = torch.zeros(pairs, dtype=torch.bool).index_fill(0, chosen, True).view(self.length, -1)
        self.pattern = pattern.to(self.left.device)

    def _learned_positions(self, start: int, stop: int, length: int) -> list[int]:
        """The learned position that each position of an input of `length` falls on."""
        if self.lengths == "truncate" or length <= 1:
            return [p % self.length for p in range(start, stop)]
        return [round(p * (self.length - 1) / (length - 1)) for p in range(start, stop)]

    def lines(self, n_q: int, n_k: int, query_offset: int = 0) -> tuple[list[int], list[int]]:
        """With selection="rows_and_columns": the queries and the keys all of whose pairs are observed."""
        length = max(n_k, n_q + query_offset)
        # Rows and columns of fraction α each cover 1 − (1 − α)² of the pairs.
        count = resolve_count(1.0 - math.sqrt(1.0 - float(self.pair_fraction)), self.length)
        # Columns start at the first key, which all rows can see; rows lie amid their stretch: the first see little.
        chosen_columns = {k * self.length // count for k in range(count)}
        chosen_rows = {(2 * k + 1) * self.length // (2 * count) for k in range(count)}
        rows = self._learned_positions(query_offset, query_offset + n_q, length)
        columns = self._learned_positions(0, n_k, length)
        return (
            [i for i, p in enumerate(rows) if p in chosen_rows],
            [j for j, p in enumerate(columns) if p in chosen_columns],
        )

    def observed(self, n_q: int, n_k: int, query_offset: int = 0) -> Tensor:
        """(n_q, n_k) bool: pairs whose exact score is used, apart from masks."""
        device = self.left.device
        if self.pattern is None:
            rows, columns = self.lines(n_q, n_k, query_offset)
            row = torch.zeros(n_q, 1, dtype=torch.bool, device=device)
            column = torch.zeros(1, n_k, dtype=torch.bool, device=device)
            row[torch.tensor(rows, dtype=torch.long, device=device)] = True
            column[:, torch.tensor(columns, dtype=torch.long, device=device)] = True
            return row | column
        length = max(n_k, n_q + query_offset)
        rows = self._learned_positions(query_offset, query_offset + n_q, length)
        columns = self._learned_positions(0, n_k, length)
        return self.pattern[torch.tensor(rows, device=device)][:, torch.tensor(columns, device=device)]

    def tie_to(self, first: AttentionMechanism) -> None:
        """Share the basis (and pairs) of `first` if `share="model"`."""
        if self.share != "model":
            return
        if not isinstance(first, EigenMatrixAttention) or first.left.shape != self.left.shape:
            raise ValueError("attention.share=model needs the same rank, factor_rank and max_length in every layer.")
        self.left, self.right = first.left, first.right
        self.log_eigenvalues, self.log_noise, self.pattern = first.log_eigenvalues, first.log_noise, first.pattern

    # -- attention ---------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        n_q, n_k = query.shape[-2], key.shape[-2]
        if mask.query_keep is not None:  # whatever stands there must not reach the system, not even as 0 · NaN
            query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
        keep = mask.dense_keep(n_q, n_k, query.device)  # (b | 1, 1, n_q | 1, n_k)
        observed = self.observed(n_q, n_k, mask.query_offset)  # (n_q, n_k)
        with full_precision(query.device):
            exact = self._exact_scores(query, key, scale, mask.query_offset)  # (b, h, n_q, n_k)
            evidence = observed[None, None]
            if keep is not None:
                evidence = evidence & keep
            real = mask.real_queries(n_q)
            if real is not None:
                evidence = evidence & real[:, None, :, None]
            table, noise = self._components(n_q, n_k, mask.query_offset, exact.dtype)  # (g, n_q, n_k, r + 1)
            estimate = reconstruct_matrix(exact, evidence.to(exact.dtype), table, noise, mask.causal)
            weights = masked_softmax(mask.logits(torch.where(observed, exact, estimate)), keep, mask.sinks)
        weights = apply_dropout(weights, dropout_p).to(value.dtype)
        return weights @ value, weights if need_weights else None

    def _exact_scores(self, query: Tensor, key: Tensor, scale: float, query_offset: int) -> Tensor:
        """(b, h, n_q, n_k) in at least float32; zero off the observed lines."""
        query = query * scale  # first: in 16 bits a product may overflow where its score does not
        if self.pattern is not None:
            return at_least_float32(query @ key.transpose(-2, -1))
        rows, columns = (
            torch.tensor(positions, dtype=torch.long, device=query.device)
            for positions in self.lines(query.shape[-2], key.shape[-2], query_offset)
        )
        by_column = at_least_float32(query @ key.index_select(-2, columns).transpose(-2, -1))
        by_row = at_least_float32(query.index_select(-2, rows) @ key.transpose(-2, -1))
        scores = by_column.new_zeros(*query.shape[:-1], key.shape[-2])
        return scores.index_copy(-1, columns, by_column).index_copy(-2, rows, by_row)

    def _components(self, n_q: int, n_k: int, query_offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Whitened components and mean (g, n_q, n_k, r + 1), and noise (g,)."""
        length = max(n_k, n_q + query_offset)
        left = self._along_positions(self.left.to(dtype), length)
        left = left[:, :, max(query_offset, 0) : n_q + query_offset]
        left = F.pad(left, (0, 0, n_q - left.shape[2], 0))  # queries that stand before the first key
        right = self._along_positions(self.right.to(dtype), length)[:, :, :n_k]
        deviation = F.pad(self.log_eigenvalues.to(dtype).mul(0.5).exp(), (0, 1), value=1.0)  # (g, r + 1)
        table = torch.einsum("grip,grjp->gijr", left * deviation[..., None, None], right)
        return table, self.log_noise.to(dtype).exp()

    def _along_positions(self, factors: Tensor, length: int) -> Tensor:
        """(g, r + 1, L, p) -> (g, r + 1, length, p)."""
        if length == self.length:
            return factors
        if self.lengths == "truncate":
            return F.pad(factors, (0, 0, 0, length - self.length))  # a negative pad crops
        flat = factors.flatten(0, 1).transpose(1, 2)  # (g·(r + 1), p, L)
        flat = F.interpolate(flat, size=length, mode="linear", align_corners=True)
        return flat.transpose(1, 2).unflatten(0, factors.shape[:2])

    # -- cost --------------------------------------------------------------------------------------

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any] | None:
        return {"keep": 1.0}

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Products without padding; a solve counts r³."""
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        h, g, r, p = self.num_heads, self.left.shape[0], self.rank, self.factor_rank
        offset = n_k - n_q if causal else 0
        observed = self.observed(n_q, n_k, offset)
        exact = observed.tril(offset) if causal else observed
        if self.pattern is None:
            rows, columns = self.lines(n_q, n_k, offset)
            products = n_q * len(columns) + len(rows) * n_k
        else:
            products = n_q * n_k
        systems = n_q if causal else 1
        basis = g * (r + 1) * n_q * n_k * p
        factors = g * (n_q * n_k * (r + r * r) + systems * r**3)
        estimates = h * (2 * n_q * n_k * r + systems * r * r)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Cost(
            exact_pairs=h * int(exact.sum()),
            total_pairs=h * pairs,
            score_multiply_adds=h * products * self.head_dim + basis + factors + estimates,
            value_multiply_adds=h * n_q * n_k * self.value_dim,
            state=parameters + g * n_q * n_k * (r + 1 + r * r) + 3 * h * n_q * n_k,
            computed_pairs=h * products,
        )


def reconstruct_matrix(exact: Tensor, evidence: Tensor, table: Tensor, noise: Tensor, causal: bool) -> Tensor:
    """Posterior mean of the score matrix given its observed entries.

    Args:
        exact: (b, h, n_q, n_k) scores; read where `evidence` is one.
        evidence: (b | 1, 1, n_q, n_k) zeros and ones.
        table: (g, n_q, n_k, r + 1) whitened components, and the mean as the last.
        noise: (g,).
        causal: row i is estimated from evidence in rows up to i.

    Returns:
        (b, h, n_q, n_k).
    """
    factor, mean = table[..., :-1], table[..., -1]
    count = evidence.sum(-1, keepdim=True).clamp_min(1.0)  # (b | 1, 1, n_q, 1)
    centre = torch.einsum("bhij,hijr->bhir", evidence, factor) / count  # of each row's evidence
    outer = factor[..., :, None] * factor[..., None, :]  # (g, n_q, n_k, r, r)
    second = torch.einsum("bhij,hijrs->bhirs", evidence, outer)
    second = centred_products(second, centre, count)  # (b | 1, g, n_q, r, r)
    residual = evidence * (exact - mean)  # (b, h, n_q, n_k)
    average = residual.sum(-1, keepdim=True) / count
    moment = torch.einsum("bhij,hijr->bhir", residual, factor) - count * average * centre  # (b, h, n_q, r)
    if causal:
        second, moment = second.cumsum(2), moment.cumsum(2)
    else:
        second, moment = second.sum(2, keepdim=True), moment.sum(2, keepdim=True)
    covariance = posterior_covariance(second, noise[:, None])
    coefficients = torch.einsum("bhirs,bhis->bhir", covariance, moment)  # (b, h, n_q | 1, r)
    offset = average - (centre * coefficients).sum(-1, keepdim=True)
    # A row without evidence has no offset to match.
    offset = offset.masked_fill(evidence.sum(-1, keepdim=True) == 0.0, 0.0)
    coefficients = coefficients.expand(-1, -1, exact.shape[-2], -1)
    return mean + offset + torch.einsum("bhir,hijr->bhij", coefficients, factor)


def starting_factors(length: int, rank: int, factor_rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Left and right factors (r + 1, length, p) of the components and, as the last, of the mean.

    Component ρ starts as the outer product of two cosines, slow ones first; the other columns have zeros on the
    left and noise on the right, so they start at zero and learn. So does the mean.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.zeros(rank + 1, length, factor_rank)
    right = torch.randn(rank + 1, length, factor_rank, generator=generator)
    side = math.isqrt(rank) + 1
    cosines = torch.cat([torch.ones(length, 1), dct_basis(length, side + 1).float()], dim=1)
    # Constant along the keys would be a row offset: the key frequency starts at 1.
    frequencies = sorted(((a, b) for a in range(side + 1) for b in range(1, side + 1)), key=lambda f: (sum(f), f))
    for component, (query_frequency, key_frequency) in enumerate(frequencies[:rank]):
        left[component, :, 0] = cosines[:, query_frequency]
        right[component, :, 0] = cosines[:, key_frequency]
    return left, right


def random_factors(length: int, rank: int, factor_rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors as of `starting_factors`, of components with Gaussian entries of variance one; the mean is zero."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, rank + 1, length, factor_rank, generator=generator) * factor_rank**-0.25
    left[-1] = 0.0
    return left, right
