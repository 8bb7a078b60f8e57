"""Performer: softmax attention estimated with positive orthogonal random features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request
from approx_attn.attention.baselines.linear import feature_attention, feature_cost
from approx_attn.attention.mask import at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count


@register_attention("performer")
class PerformerAttention(AttentionMechanism):
    """FAVOR+: exp(s·q·k) = E_ω[φ_ω(√s·q)·φ_ω(√s·k)] with φ_ω(x) = exp(ω·x − ‖x‖²/2), ω normal.

    Source: Choromanski et al., *Rethinking Attention with Performers*, arXiv 2009.14794. The m directions ω
    are drawn per layer and shared by its heads. The error against exact attention falls as 1/√m. Dropout drops a key
    for all queries of a head at once, since single weights do not exist.

    The paper draws new directions in training (`redraw()`), so that a model cannot fit one draw and its error. By
    default none are drawn: a model takes long to get over each. One trained on digits, 95.3% right with its own
    directions, falls to between 16 and 50% with others.

    Args:
        num_features: m, the number of random features; head_dim·ln(head_dim), rounded up, if None.
        orthogonal: draw the directions orthogonal in groups of head_dim, which lowers the variance.
        seed: of the directions; each layer draws its own.
        redraw_interval: training steps between redraws; None for never.
    """

    capabilities = Capabilities(arbitrary_mask=False)
    cost_formula = "n·m·d"
    projection: Tensor
    num_draws: Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_features: int | None = None,
        orthogonal: bool = True,
        seed: int = 0,
        redraw_interval: int | None = None,
    ) -> None:
        super().__init__(shape)
        default = max(1, math.ceil(shape.head_dim * math.log(shape.head_dim)))
        self.num_features = require_count("attention.num_features", default if num_features is None else num_features)
        self.orthogonal = orthogonal
        self.seed = require_count("attention.seed", seed, 0)
        self.redraw_interval = (
            None if redraw_interval is None else require_count("attention.redraw_interval", redraw_interval)
        )
        # Buffers: a checkpoint goes on with its directions and, after a redraw, with the draws that follow.
        self.register_buffer("projection", torch.empty(self.num_features, shape.head_dim))
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.long))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Replace the random directions by the next draw of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (self.layer_index + 1,), generator=generator)  # one stream per layer
        generator.manual_seed((int(seeds[-1]) + int(self.num_draws)) % 2**62)
        self.projection.copy_(random_directions(self.num_features, self.head_dim, self.orthogonal, generator))
        self.num_draws += 1

    def begin_step(self, step: int) -> None:
        """Redraw if it is time.

        The draw is a function of (seed, step): a run that is resumed, or a step of several batches, draws once.
        """
        if self.redraw_interval is not None and step > 0 and step % self.redraw_interval == 0:
            self.num_draws.fill_(step // self.redraw_interval)
            self.redraw()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        scale = request.scale
        root = math.sqrt(abs(scale))  # half of the scale on each side balances the two norms in the exponents
        log_query = log_positive_features(query, self.projection, math.copysign(root, scale))
        log_key = log_positive_features(key, self.projection, root)  # (b, h, n, m)
        return feature_attention(log_query, log_key, value, request)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        features, heads = self.num_features, self.num_heads
        maps = heads * (n_q + n_k) * features * self.head_dim
        sums = feature_cost(heads, n_q, n_k, pairs, features, self.value_dim, causal)
        return sums + Cost(0, 0, score_multiply_adds=maps, value_multiply_adds=0, state=self.projection.numel())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_features={self.num_features}"


def log_positive_features(x: Tensor, directions: Tensor, factor: float) -> Tensor:
    """log φ(factor·x) = factor·ω·x − factor²·‖x‖²/2 without the 1/√m that cancels in attention.

    Args:
        x: (..., n, d).
        directions: ω, (m, d) or broadcastable to (..., m, d).
        factor: on x.

    Returns:
        (..., n, m) in at least float32, whatever autocast says: it is an exponent.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x) * factor
        squared_norm = x.square().sum(dim=-1, keepdim=True)  # (..., n, 1)
        return x @ directions.to(x.dtype).transpose(-2, -1) - 0.5 * squared_norm


def random_directions(count: int, dim: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """(count, dim) rows that are each standard normal; if `orthogonal`, at right angles in groups of `dim`."""
    if not orthogonal:
        return torch.randn(count, dim, generator=generator)
    groups = -(-count // dim)
    q, r = torch.linalg.qr(torch.randn(groups, dim, dim, generator=generator, dtype=torch.float64))
    # The signs of R's diagonal make Q uniform over rotations; lengths come from independent normal vectors.
    rotations = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    lengths = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    rows = rotations.transpose(-2, -1).reshape(groups * dim, dim)[:count]
    return (rows * lengths).float()
