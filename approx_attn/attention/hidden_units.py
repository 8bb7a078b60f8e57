"""A feed-forward layer as attention over its hidden units, of which each token uses the k best.

Gupta, Dar, Goodman, Ciprut, Berant: *Memory-efficient Transformers via Top-k Attention*, arXiv 2106.06899.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top_units(scores: Tensor, activation: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Activations of the `count` largest pre-activations of each token, and zeros in place of the others.

    Args:
        scores: (..., m), the pre-activations of m hidden units.
        activation: applied to single numbers of any shape.
        count: 1 to m.

    Returns:
        (..., m).
    """
    top, units = scores.topk(count, dim=-1)  # (..., count)
    weights = activation(top)
    # Zeros for one dense product: gathering the value rows of each token would hold (..., count, dim).
    return torch.zeros_like(scores, dtype=weights.dtype).scatter(-1, units, weights)
