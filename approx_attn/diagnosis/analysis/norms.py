"""Attention by the norms of what is added, not by its weights alone.

The output of attention at query i is Σ_h Σ_j α_ij^h f^h(x_j) with f^h(x) = (x W_V^h + b_V^h) W_O^h: a large
weight on a short vector adds little. Source: Kobayashi, Kuribayashi, Yokoi and Inui, *Attention is Not Only a
Weight: Analyzing Transformers with Vector Norms*, EMNLP 2020 (arXiv 2004.10102).

Captured values are x W_V + b_V already, so only the output projection W_O is needed beside them. No array over
(batch, heads, queries, keys, features) is formed: ‖αf‖ = α‖f‖, and the norm of the sum over heads follows from
the heads' inner products ⟨f^h(x_j), f^g(x_j)⟩, of which there are h² per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from approx_attn.attention.base import repeat_heads

TOKENS_AT_ONCE = 512  # tokens whose transformed vectors (h, D) are held together


def head_products(value: Tensor, projection: Tensor) -> Tensor:
    """Inner products of the heads' transformed vectors of every token.

    Args:
        value: (b, h, n, d_v), after W_V; grouped key heads repeated.
        projection: (h, d_v, D), the rows of W_O that belong to each head.

    Returns:
        (b, n, h, h) with ⟨f^h(x_j), f^g(x_j)⟩.
    """
    b, h, n, d = value.shape
    tokens = value.transpose(1, 2).reshape(b * n, h, d)
    products = []
    for part in tokens.split(TOKENS_AT_ONCE):
        transformed = torch.einsum("thd,hdm->thm", part, projection)
        products.append(transformed @ transformed.mT)  # (t, h, h)
    return torch.cat(products).view(b, n, h, h)


def transformed_norms(products: Tensor) -> Tensor:
    """(b, h, n) with ‖f^h(x_j)‖, from `head_products`."""
    return products.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt().transpose(1, 2)


def summed_norms(weights: Tensor, products: Tensor) -> Tensor:
    """‖Σ_h α_ij^h f^h(x_j)‖ of every pair.

    Args:
        weights: (b, h, n_q, n_k).
        products: (b, n_k, h, h), from `head_products`.

    Returns:
        (b, n_q, n_k).
    """
    per_key = weights.permute(0, 3, 2, 1)  # (b, n_k, n_q, h)
    squares = ((per_key @ products) * per_key).sum(-1)  # (b, n_k, n_q)
    return squares.clamp_min(0.0).sqrt().transpose(1, 2)


class NormMoments:
    """Streaming sums of one layer over pairs and tokens, by category of the key's token, in float64.

    Args:
        categories: names of the categories; tokens come with indices into them.

    Attributes (h heads, c categories):
        weight: (h, c) sum of α over pairs.
        weighted_norm: (h, c) sum of ‖αf‖ over pairs.
        norm: (h, c) sum of ‖f‖ over tokens.
        summed_norm: (c,) sum of ‖Σ_h αf‖ over pairs.
        tokens, pairs: (c,) how many, those closed by a mask left out. `pairs` is of the first head.
        correlation_sums: (h, 6) counts and sums over pairs of α, ‖f‖, α², ‖f‖², α‖f‖.
    """

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)
        self.weight = self.weighted_norm = self.norm = self.correlation_sums = torch.zeros((), dtype=torch.float64)
        self.summed_norm = self.tokens = self.pairs = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self, weights: Tensor, value: Tensor, projection: Tensor, category: Tensor, keep: Tensor) -> None:
        """Add a batch.

        Args:
            weights: (b, h, n_q, n_k); zero for pairs that are not kept.
            value: (b, h_kv, n_k, d_v).
            projection: (h, d_v, D).
            category: (b, n_k) int64 indices into `categories`.
            keep: (b, h | 1, n_q, n_k) bool, the pairs that count: open, and neither query nor key padding.
        """
        h = weights.shape[1]
        keys = keep.any(1).any(1)  # (b, n_k)
        value = repeat_heads(value, h).masked_fill(~keys[:, None, :, None], 0.0)
        products = head_products(value, projection.to(value.dtype))
        weights = weights.masked_fill(~keep, 0.0)
        norm = transformed_norms(products).double()  # (b, h, n_k)
        open_pairs = keep.sum(2).double().expand(-1, h, -1)  # (b, h, n_k)
        weight = weights.sum(2).double()
        square = torch.linalg.vecdot(weights, weights, dim=2).double()
        one_hot = torch.nn.functional.one_hot(category, len(self.categories)).double()  # (b, n_k, c)
        one_hot = one_hot * keys[..., None]

        def by_category(of_keys: Tensor) -> Tensor:
            return torch.einsum("bhj,bjc->hc", of_keys, one_hot).cpu()

        self.weight = self.weight + by_category(weight)
        self.weighted_norm = self.weighted_norm + by_category(weight * norm)
        self.norm = self.norm + by_category(norm)
        summed = summed_norms(weights, products).sum(1).double()  # (b, n_k)
        self.summed_norm = self.summed_norm + by_category(summed[:, None])[0]
        self.tokens = self.tokens + one_hot.sum((0, 1)).cpu()
        self.pairs = self.pairs + by_category(open_pairs[:, :1])[0]
        per_pair = (open_pairs, weight, open_pairs * norm, square, open_pairs * norm.square(), weight * norm)
        self.correlation_sums = self.correlation_sums + torch.stack([s.sum((0, 2)) for s in per_pair], -1).cpu()

    def grouped(self, groups: Mapping[str, Sequence[int]]) -> NormMoments:
        """The same sums with categories put together: names of the groups with indices of the categories in them."""
        merged = NormMoments(tuple(groups))
        for name in ("weight", "weighted_norm", "norm", "summed_norm", "tokens", "pairs"):
            sums: Tensor = getattr(self, name)
            setattr(merged, name, torch.stack([sums[..., list(members)].sum(-1) for members in groups.values()], -1))
        merged.correlation_sums = self.correlation_sums
        return merged

    def weight_share(self) -> Tensor:
        """(h, c) share of all attention weight that falls on each category."""
        return self.weight / self.weight.sum(-1, keepdim=True)

    def contribution_share(self) -> Tensor:
        """(h, c) share of all ‖αf‖ that falls on each category."""
        return self.weighted_norm / self.weighted_norm.sum(-1, keepdim=True)

    def layer_contribution_share(self) -> Tensor:
        """(c,) share of all ‖Σ_h αf‖ that falls on each category."""
        return self.summed_norm / self.summed_norm.sum()

    def mean_norm(self) -> Tensor:
        """(h, c) mean ‖f(x)‖ of a token; NaN for a category without tokens."""
        return self.norm / self.tokens

    def token_share(self) -> Tensor:
        """(c,) share of the open pairs whose key is of each category: the weight share of uniform attention."""
        return self.pairs / self.pairs.sum()

    def correlation(self) -> Tensor:
        """(h,) Pearson correlation over pairs of α_ij and ‖f(x_j)‖."""
        n, a, f, aa, ff, af = self.correlation_sums.unbind(-1)
        covariance = af / n - a * f / n**2
        spread = ((aa / n - (a / n) ** 2) * (ff / n - (f / n) ** 2)).clamp_min(0.0).sqrt()
        return covariance / spread
