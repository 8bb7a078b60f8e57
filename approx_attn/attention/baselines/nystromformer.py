"""Nyströmformer: softmax attention through segment-mean landmarks and an iterative pseudo-inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.mask import at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count


@register_attention("nystromformer")
class NystromformerAttention(AttentionMechanism):
    """softmax(s·Q·K̃ᵀ) · softmax(s·Q̃·K̃ᵀ)⁺ · softmax(s·Q̃·Kᵀ) · V with m landmarks Q̃, K̃, means of segments.

    Source: Xiong et al., *Nyströmformer*, arXiv 2102.03902. Segments divide the real tokens of each sample,
    at any length, so that padding changes nothing; with fewer tokens than landmarks every token is one.
    Query landmarks are means over `mask.query_keep`. Where that is missing, queries and keys are as many and
    keys are padded, the queries are taken for the same tokens as the keys, since this is how self-attention
    with a key padding mask arrives from most callers; for cross-attention give `query_keep`.

    Not causal: landmarks and the pseudo-inverse mix all positions. The weights of a query need not be
    positive, nor sum to one, so they are not returned. Dropout acts on the weights from landmarks to keys.

    Args:
        num_landmarks: m, clamped to the number of real tokens.
        pinv_iterations: steps of the pseudo-inverse, each of third order. The more, the nearer to exact
            attention where every token is a landmark.
        conv_kernel: size of a depthwise convolution of the values over positions, learned per head, which is
            added to the output; odd, and for self-attention only. The authors train with 35 on the Long Range Arena
            and 33 in their language model. None: no convolution, as for cross-attention and for models that are
            converted, which did not learn one.
    """

    capabilities = Capabilities(
        causal=False, arbitrary_mask=False, returns_weights=False, has_parameters=True, independent_queries=False
    )
    cost_formula = "n·m·d + m³"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
        conv_kernel: int | None = None,
    ) -> None:
        super().__init__(shape)
        self.num_landmarks = require_count("attention.num_landmarks", num_landmarks)
        self.pinv_iterations = require_count("attention.pinv_iterations", pinv_iterations)
        self.conv: nn.Conv2d | None = None
        if conv_kernel is not None:
            if require_count("attention.conv_kernel", conv_kernel) % 2 == 0:
                raise ValueError(f"attention.conv_kernel must be odd or null, got {conv_kernel}.")
            heads, margin = shape.num_heads, conv_kernel // 2
            self.conv = nn.Conv2d(heads, heads, (conv_kernel, 1), padding=(margin, 0), groups=heads, bias=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, _ = request
        n_q, n_k = query.shape[-2], key.shape[-2]
        if self.conv is not None and n_q != n_k:
            raise ValueError(
                f"attention.conv_kernel needs as many queries as keys, got {n_q} and {n_k}; set it to null."
            )
        query_keep = mask.real_queries(n_q)
        with torch.autocast(query.device.type, enabled=False):  # a pseudo-inverse is no matter for 16 bits
            q, k, v = (at_least_float32(x) for x in (query * scale, key, value))
            query_landmarks, query_full = segment_means(q, query_keep, self.num_landmarks)  # (b, h, m, d), (b, 1, m)
            key_landmarks, key_full = segment_means(k, mask.key_keep, self.num_landmarks)
            keep = None if mask.key_keep is None else mask.key_keep[:, None, None, :]
            to_landmarks = masked_softmax(q @ key_landmarks.transpose(-2, -1), key_full)  # (b, h, n_q, m)
            between = masked_softmax(query_landmarks @ key_landmarks.transpose(-2, -1), key_full)  # (b, h, m, m)
            from_landmarks = masked_softmax(query_landmarks @ k.transpose(-2, -1), keep)  # (b, h, m, n_k)
            if query_full is not None:  # rows of landmarks without tokens stay out of the inverse
                between = between.masked_fill(~query_full.transpose(-2, -1), 0.0)
            inverse = iterative_pinv(between, self.pinv_iterations)
            output = to_landmarks @ (inverse @ (apply_dropout(from_landmarks, dropout_p) @ v))
            if self.conv is not None:
                output = output + self._convolve(v)
        return output, None

    def _convolve(self, value: Tensor) -> Tensor:
        """(b, h, n, d_v): padded values are zero, as beyond the ends."""
        assert self.conv is not None
        return nn.functional.conv2d(
            value, self.conv.weight.to(value.dtype), padding=self.conv.padding, groups=self.num_heads
        )

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        rows, columns = min(self.num_landmarks, n_q), min(self.num_landmarks, n_k)
        kernels = (n_q * columns + rows * columns + rows * n_k) * self.head_dim
        step = 2 * rows * rows * columns + 2 * rows**3  # A·Z, two products of (m, m), Z·(...)
        inverse = self.pinv_iterations * step
        values = (rows * n_k + rows * columns + n_q * columns) * self.value_dim
        convolution = 0 if self.conv is None else n_k * self.value_dim * self.conv.kernel_size[0]
        return Cost(
            exact_pairs=0,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * (kernels + inverse),
            value_multiply_adds=self.num_heads * (values + convolution),
            state=self.num_heads * (n_q * columns + rows * n_k + 4 * rows * columns)
            + sum(p.numel() for p in self.parameters()),
        )

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        # With A = softmax(s·Q·Kᵀ) and every token a landmark, A·A⁺·A = A, once the inverse has converged.
        return {"num_landmarks": length, "pinv_iterations": 40}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_landmarks={self.num_landmarks}, pinv_iterations={self.pinv_iterations}"


def segment_means(x: Tensor, keep: Tensor | None, num_segments: int) -> tuple[Tensor, Tensor | None]:
    """Means over consecutive segments of the kept tokens, as equal in size as can be.

    Args:
        x: (b, h, n, d). Where `keep` is False it may hold anything.
        keep: (b, n) bool or None.
        num_segments: clamped to n, and per sample to its number of kept tokens.

    Returns:
        means (b, h, m, d), zero where a sample has fewer tokens than segments, and (b, 1, 1, m) bool that is
        False there, or None if there is no `keep`.
    """
    batch, heads, length, dim = x.shape
    count = min(num_segments, length)
    if keep is None:
        segment = (torch.arange(length, device=x.device) * count).div(length, rounding_mode="floor").expand(batch, -1)
    else:
        x = x.masked_fill(~keep[:, None, :, None], 0.0)
        kept = keep.sum(dim=-1, keepdim=True)  # (b, 1)
        rank = keep.cumsum(dim=-1) - 1  # (b, n): place among the kept tokens
        segment = (rank * kept.clamp(max=count)).div(kept.clamp(min=1), rounding_mode="floor").clamp(min=0)
    index = segment[:, None, :, None].expand(-1, heads, -1, dim)
    sums = x.new_zeros(batch, heads, count, dim).scatter_add(2, index, x)  # (b, h, m, d)
    ones = x.new_ones(batch, length) if keep is None else keep.to(x.dtype)
    sizes = x.new_zeros(batch, count).scatter_add(1, segment, ones)  # (b, m)
    means = sums / sizes.clamp(min=1.0)[:, None, :, None]
    return means, None if keep is None else (sizes > 0)[:, None, None, :]


def iterative_pinv(matrix: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse by the third-order iteration of Razavi et al. that the paper uses.

    Each matrix starts from its own scale, Aᵀ / (‖A‖₁·‖A‖∞), so none depends on the others in the batch. Zero
    rows and columns stay zero, and a zero matrix has the inverse zero.

    Args:
        matrix: (..., r, c).
        iterations: steps; each shrinks the residual of the largest singular values to its third power.

    Returns:
        (..., c, r).
    """
    magnitudes = matrix.abs()
    norm_1 = magnitudes.sum(dim=-2).amax(dim=-1)
    norm_inf = magnitudes.sum(dim=-1).amax(dim=-1)
    norms = (norm_1 * norm_inf)[..., None, None]
    z = matrix.transpose(-2, -1) / norms.masked_fill(norms == 0, 1.0)  # (..., c, r)
    identity = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        az = matrix @ z  # (..., r, r)
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z
