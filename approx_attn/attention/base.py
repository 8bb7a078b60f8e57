"""The contract that every attention mechanism keeps.

A mechanism is a module from queries, keys and values of shape (batch, heads, length, dim) to outputs.
It declares what it can do (`Capabilities`), refuses the rest by name, and states what it costs (`Cost`).
`AttentionMechanism.forward` does what is the same for all: checks, grouped-query heads, and the clearing
of padded keys; a mechanism implements `attend` and `cost`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from approx_attn.attention.budget import kept_pairs
from approx_attn.attention.decoding import DecodingCache
from approx_attn.attention.mask import AttentionMask
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, warn


@dataclass(frozen=True)
class Capabilities:
    """What a mechanism can do. Asking for what is False raises a `ValueError`, never a silent fallback.

    Attributes:
        causal: honours `mask.causal` without any gradient from output i to input j > i.
        cross: queries and keys may differ in number.
        padding_mask: honours `mask.key_keep`.
        arbitrary_mask: honours `mask.pair_keep` and `mask.bias`.
        variable_length: runs at lengths other than `max_length`, shorter and longer.
        needs_calibration: gives a useful output only after calibration or training.
        returns_weights: can return the (batch, heads, n_q, n_k) weights it applied.
        has_parameters: holds learned parameters, so it must be built once and kept, not once per call.
        grouped_query: takes fewer key/value heads than query heads without copies being made for it.
        window: honours `mask.window`.
        head_budgets: takes as `keep` a list too, one budget for each query head.
        softcap: honours `mask.softcap`.
        sinks: honours `mask.sinks`.
        independent_queries: what a query gets never depends on other queries, as the cross-attention of a causal
            decoder needs, or words would see those behind them.
    """

    causal: bool = True
    cross: bool = True
    padding_mask: bool = True
    arbitrary_mask: bool = True
    variable_length: bool = True
    needs_calibration: bool = False
    returns_weights: bool = True
    has_parameters: bool = False
    grouped_query: bool = False
    window: bool = False
    head_budgets: bool = False
    softcap: bool = False
    sinks: bool = False
    independent_queries: bool = True


@dataclass(frozen=True)
class Cost:
    """What one forward pass over one sequence costs, summed over heads.

    Attributes:
        exact_pairs: pairs whose score enters the result as computed from the full query and key.
        total_pairs: pairs that exact attention would compute (under the causal mask, if there is one).
        score_multiply_adds: multiply-adds up to the unnormalised weights: scores, estimates, solves,
            feature maps, selection.
        value_multiply_adds: multiply-adds from the weights and values to the output.
        state: numbers held besides queries, keys, values and output (parameters and the largest
            intermediate arrays of a forward pass).
        computed_pairs: pairs whose score is computed from the full query and key, whether or not it enters the
            result: more than `exact_pairs` where pairs are chosen by their exact scores or computed by whole blocks.
            None: the exact pairs alone.
    """

    exact_pairs: int
    total_pairs: int
    score_multiply_adds: int
    value_multiply_adds: int
    state: int
    computed_pairs: int | None = None

    @property
    def multiply_adds(self) -> int:
        return self.score_multiply_adds + self.value_multiply_adds

    @property
    def exact_share(self) -> float:
        """Share of the pairs whose score is computed exactly, 0 to 1."""
        return self.exact_pairs / max(self.total_pairs, 1)

    @property
    def computed_share(self) -> float:
        """Computed scores relative to those of exact attention; above 1 where closed pairs are computed too."""
        return self._computed / max(self.total_pairs, 1)

    @property
    def _computed(self) -> int:
        return self.exact_pairs if self.computed_pairs is None else self.computed_pairs

    def __add__(self, other: Cost) -> Cost:
        exact_alone = self.computed_pairs is None and other.computed_pairs is None
        summed = [getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "computed_pairs"]
        return replace(Cost(*summed), computed_pairs=None if exact_alone else self._computed + other._computed)


class Request(NamedTuple):
    """How one pass of a mechanism is to be.

    Attributes:
        mask: which pairs may be used and how their scores count; holds only parts that the capabilities allow.
        scale: factor on query-key products.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        need_weights: return the weights; only True if `capabilities.returns_weights`.
    """

    mask: AttentionMask
    scale: float
    dropout_p: float = 0.0
    need_weights: bool = False


class AttentionMechanism(nn.Module):
    """Base class of all mechanisms.

    Args:
        shape: of the layer that the mechanism serves; its parts are attributes of the mechanism, too.
    """

    registered: ClassVar[dict[str, type[AttentionMechanism]]] = {}  # all of them by name, filled by the registry
    name: ClassVar[str] = ""  # set by the registry
    capabilities: ClassVar[Capabilities] = Capabilities()
    cost_formula: ClassVar[str] = ""  # for people: multiply-adds of scores per head, e.g. "n·m·d + n²·r"

    substitute: Callable[[Tensor, Tensor, Tensor, Request], tuple[Tensor, Tensor | None]] | None = None
    """Computes in place of `attend` while it is set; see `approx_attn.attention.exact.computing_exactly`."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        if shape.causal and not self.capabilities.causal:
            raise ValueError(self._refusal("causal attention", "causal"))
        self.shape = shape
        self.num_heads, self.num_key_value_heads = shape.num_heads, shape.num_key_value_heads
        self.head_dim, self.value_dim = shape.head_dim, shape.value_dim
        self.max_length, self.causal, self.layer_index = shape.max_length, shape.causal, shape.layer_index
        self.auxiliary_loss: Tensor | None = None
        """Scalar set by a training forward pass of mechanisms with a loss of their own, else None."""

    # -- for mechanisms to implement ---------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        """Compute the output; everything has been checked.

        Args:
            query: (b, h, n_q, d).
            key: (b, h, n_k, d); (b, h_kv, n_k, d) if `capabilities.grouped_query`. Zero where padded.
            value: likewise with d_v. Zero where padded.
            request: mask, scale, dropout and whether weights are wanted.

        Returns:
            output (b, h, n_q, d_v) and weights (b, h, n_q, n_k) or None. A query without any usable key
            gives zeros.
        """
        raise NotImplementedError

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Cost of one sequence, all heads. `key_length` defaults to `query_length`, `causal` to `self.causal`.

        Of a mask without padding and without a window.
        """
        raise NotImplementedError

    def start_cache(self) -> DecodingCache | None:
        """What is to be kept beside one key/value cache from its first key on, so that decoding reads few keys.

        None: nothing, every step is a pass over all keys.
        """
        return None

    def decoding_cost(self, key_length: int) -> Cost:
        """Cost of one step, a query behind `key_length` - 1 others, with what `start_cache` keeps."""
        return self.cost(1, key_length, causal=True)

    def runs_compiled(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether inputs of this type on this device are computed by a compiled operator of this package.

        False is for PyTorch's own operators, one after the other, fused ones such as
        `scaled_dot_product_attention` among them.
        """
        return False

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any] | None:
        """Options under which the mechanism equals exact attention at this length, whatever its parameters.

        None if there are none (the mechanism converges, or needs particular parameters, instead).
        """
        return None

    def tie_to(self, first: AttentionMechanism) -> None:
        """Use the learned parameters of `first`, the same mechanism in another layer, where options say so.

        Called by models on every layer after the first. The default shares nothing.
        """

    def begin_step(self, step: int) -> None:
        """Prepare for a training step; called before each of them with the number of steps done.

        The default does nothing.
        """

    # -- the same for all --------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask | None = None,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of (b, h, n_q, d) queries over (b, h_kv, n_k, d) keys and (b, h_kv, n_k, d_v) values.

        Args:
            mask: which pairs may be used; all if None.
            scale: factor on query-key products, 1/sqrt(d) if None.
            dropout_p: probability of dropping an attention weight, applied in training mode only.
            need_weights: also return the weights.

        Returns:
            (output, weights): (b, h, n_q, d_v) in the type of `query`; (b, h, n_q, n_k) or None.

        Raises:
            ValueError: shapes that do not fit, or a request beyond `capabilities`.
        """
        mask = AttentionMask() if mask is None else mask
        self._check_shapes(query, key, value, mask)
        self._check_capabilities(query.shape[-2], key.shape[-2], mask, need_weights)
        if 0 in query.shape or 0 in key.shape:
            return self._attend_nothing(query, key, value, need_weights)
        if mask.key_keep is not None:
            # Whatever stands in the padding, even NaN, must not reach a product with a zero weight.
            padded = ~mask.key_keep[:, None, :, None]
            key, value = key.masked_fill(padded, 0.0), value.masked_fill(padded, 0.0)
        mask = mask.with_padding_cleared(query.shape[-2])
        if not self.capabilities.grouped_query and self.num_key_value_heads != self.num_heads:
            key, value = repeat_heads(key, self.num_heads), repeat_heads(value, self.num_heads)
        scale = 1.0 / math.sqrt(self.head_dim) if scale is None else scale
        attend = self.attend if self.substitute is None else self.substitute
        request = Request(mask, scale, dropout_p if self.training else 0.0, need_weights)
        output, weights = attend(query, key, value, request)
        if weights is not None and weights.requires_grad:
            # On the way to the output, as in eager attention: a caller may ask for the gradient of the weights.
            output = weights.to(value.dtype) @ repeat_heads(value, self.num_heads)
        return output.to(query.dtype), weights

    def require_independent_queries(self) -> None:
        """Refuse a mechanism whose queries see each other, in the cross-attention of a causal decoder.

        Raises:
            ValueError: names the mechanisms that can.
        """
        if not self.capabilities.independent_queries:
            raise ValueError(self._refusal("the cross-attention of a causal decoder", "independent_queries"))

    def _attend_nothing(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Zeros for inputs without a sequence, a query or a key, through which gradients still flow (as zeros)."""
        b, h, n_q, n_k = *query.shape[:3], key.shape[-2]
        nothing = sum(tensor[..., :0].sum() for tensor in (query, key, value))
        output = query.new_zeros(b, h, n_q, self.value_dim) + nothing
        return output, query.new_zeros(b, h, n_q, n_k) if need_weights else None

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> None:
        expected = (
            ("query", query, self.num_heads, self.head_dim),
            ("key", key, self.num_key_value_heads, self.head_dim),
            ("value", value, self.num_key_value_heads, self.value_dim),
        )
        for label, tensor, heads, dim in expected:
            if tensor.dim() != 4 or tensor.shape[1] != heads or tensor.shape[-1] != dim:
                raise ValueError(
                    f"{self.name}: {label} must be (batch, {heads}, length, {dim}), got {tuple(tensor.shape)}."
                )
        if mask.sinks is not None and mask.sinks.shape != (self.num_heads,):
            raise ValueError(f"{self.name}: mask.sinks must be ({self.num_heads},), got {tuple(mask.sinks.shape)}.")
        if key.shape[-2] != value.shape[-2]:
            raise ValueError(
                f"{self.name}: key and value lengths must be equal, got {key.shape[-2]} and {value.shape[-2]}."
            )
        for part, tensor in (("query", query), ("key", key)):
            points = getattr(mask, f"{part}_coordinates")
            if points is not None and (points.dim() != 3 or points.shape[:2] != (tensor.shape[0], tensor.shape[-2])):
                raise ValueError(
                    f"{self.name}: mask.{part}_coordinates must be ({tensor.shape[0]}, {tensor.shape[-2]}, any), "
                    f"got {tuple(points.shape)}."
                )

    def _check_capabilities(self, n_q: int, n_k: int, mask: AttentionMask, need_weights: bool) -> None:
        can = self.capabilities
        if mask.causal and not can.causal:
            raise ValueError(self._refusal("causal attention", "causal"))
        if n_q != n_k and not can.cross:
            raise ValueError(self._refusal(f"{n_q} queries over {n_k} keys", "cross"))
        if mask.window is not None and not can.window:
            raise ValueError(self._refusal(f"a window of {mask.window} keys in the mask", "window"))
        if mask.softcap is not None and not can.softcap:
            raise ValueError(self._refusal(f"scores that are soft-capped at {mask.softcap:g}", "softcap"))
        if mask.sinks is not None and not can.sinks:
            raise ValueError(self._refusal("attention sinks", "sinks"))
        if mask.key_keep is not None and not can.padding_mask:
            raise ValueError(self._refusal("a key padding mask", "padding_mask"))
        if not mask.is_structured and not can.arbitrary_mask:
            raise ValueError(self._refusal("an arbitrary or additive attention mask", "arbitrary_mask"))
        if need_weights and not can.returns_weights:
            raise ValueError(self._refusal("returning attention weights", "returns_weights"))
        if self.max_length is not None and max(n_q, n_k) > self.max_length and not can.variable_length:
            raise ValueError(self._refusal(f"length {max(n_q, n_k)} > max_length={self.max_length}", "variable_length"))

    @classmethod
    def _refusal(cls, request: str, capability: str) -> str:
        able = (name for name, known in cls.registered.items() if getattr(known.capabilities, capability))
        others = ", ".join(sorted(able)) or "none"
        return f"attention={cls.name} does not support {request}; mechanisms that do: {others}."

    def _laid_out_length(self) -> int:
        """`max_length`, for mechanisms with parameters per position.

        Raises:
            ValueError: it was not given.
        """
        if self.max_length is None:
            raise ValueError(
                f"attention={self.name} needs max_length, the longest input, to lay out its parameters over positions, "
                "got None."
            )
        return self.max_length

    def _pairs(self, query_length: int, key_length: int | None, causal: bool | None) -> tuple[int, int, int, bool]:
        """(n_q, n_k, pairs that exact attention computes in one head, causal), from the arguments of `cost`."""
        n_q, n_k = query_length, query_length if key_length is None else key_length
        causal = self.causal if causal is None else causal
        return n_q, n_k, kept_pairs(1.0, n_q, n_k, causal), causal

    def extra_repr(self) -> str:
        kv = "" if self.num_key_value_heads == self.num_heads else f", num_key_value_heads={self.num_key_value_heads}"
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}{kv}"


def clamped_rank(rank: Any, head_dim: int) -> int:
    """A number of dimensions of a head, all of them where more are asked for, which is warned of.

    Raises:
        ValueError: not a whole number above 0.
    """
    if require_count("attention.rank", rank) > head_dim:
        warn(f"attention.rank={rank} is more than the {head_dim} dimensions of a head, all of which are taken.")
    return min(rank, head_dim)


def apply_dropout(weights: Tensor, dropout_p: float) -> Tensor:
    """Drop weights with probability `dropout_p` and rescale the rest, as PyTorch's attention does."""
    return nn.functional.dropout(weights, dropout_p) if dropout_p > 0.0 else weights


def repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(b, h_kv, n, d) -> (b, num_heads, n, d), each head repeated for its group of queries."""
    groups = num_heads // tensor.shape[1]
    return tensor if groups == 1 else torch.repeat_interleave(tensor, groups, dim=1)
