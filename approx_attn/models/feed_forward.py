"""The position-wise feed-forward layer of a transformer block, dense and with the top-k of its hidden units.

Both classes hold the same parameters under the same names, so a checkpoint of one loads into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from approx_attn.attention.base import apply_dropout
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.hidden_units import top_units
from approx_attn.errors import require_count, require_one_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """W₂·act(W₁·x + b₁) + b₂ for every token on its own.

    Dropout falls on the hidden units only; dropout of the output, before the residual sum, is left to
    the block around this layer.

    Args:
        dim: features of a token, in and out.
        hidden_dim: hidden units.
        dropout: probability of dropping a hidden unit in training, 0 to 1.
        activation: one of `ACTIVATIONS`.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, activation: str = "gelu") -> None:
        super().__init__()
        self.dim = require_count("model.dim", dim)
        self.hidden_dim = require_count("model.hidden_dim", hidden_dim)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"model.dropout must be between 0 and 1, got {dropout!r}.")
        self.dropout = float(dropout)
        self.activation = require_one_of("model.activation", activation, tuple(ACTIVATIONS))
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        hidden = ACTIVATIONS[self.activation](self.up(x))  # (..., hidden_dim)
        return self.down(apply_dropout(hidden, self.dropout if self.training else 0.0))

    def multiply_adds(self, length: int) -> int:
        """Multiply-adds of a forward pass over `length` tokens."""
        return 2 * length * self.dim * self.hidden_dim

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}"


class TopKFeedForward(FeedForward):
    """The feed-forward layer as attention over its hidden units, of which each token uses the top k.

    The rows of the first weight are keys, the columns of the second are values, the activation stands
    in place of the softmax: a token keeps its k largest pre-activations and drops the other units (Gupta
    et al., *Memory-efficient Transformers via Top-k Attention*, arXiv 2106.06899). Tokens are processed
    in chunks that the backward pass computes again, so what is held for it is the input and not the
    (tokens, hidden_dim) array of activations.

    At `keep=1.0` it equals `FeedForward`; with `relu` it does already where k reaches the number of
    positive pre-activations.

    Args:
        keep: share of the hidden units (float in (0, 1]) or their number (int, clamped to hidden_dim).
        dim, hidden_dim, dropout, activation: as in `FeedForward`.
    """

    chunk_tokens = 4096  # hidden activations held at once; large enough that a matrix product fills a core

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        activation: str = "gelu",
        keep: float | int = 0.25,
    ) -> None:
        super().__init__(dim, hidden_dim, dropout, activation)
        self.keep = require_budget("model.feed_forward_keep", keep)
        self.num_kept = resolve_count(self.keep, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        tokens = x.reshape(-1, self.dim)
        chunks = tokens.split(self.chunk_tokens) if tokens.shape[0] else (tokens,)
        if torch.is_grad_enabled():
            # Randomness is only in the dropout; storing its state for nothing would wait for the device.
            random = self.training and self.dropout > 0.0
            outputs = [checkpoint(self._chunk, c, use_reentrant=False, preserve_rng_state=random) for c in chunks]
        else:
            outputs = [self._chunk(c) for c in chunks]
        return torch.cat(outputs).reshape(x.shape)

    def _chunk(self, x: Tensor) -> Tensor:
        """(t, dim) -> (t, dim)."""
        dropout_p = self.dropout if self.training else 0.0

        def weights(top: Tensor) -> Tensor:
            return apply_dropout(ACTIVATIONS[self.activation](top), dropout_p)

        return self.down(top_units(self.up(x), weights, self.num_kept))  # scores: products with every key

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}"
