"""Exact scores for the key blocks that matter, low-rank moments for all the others (`eigen_block`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import (
    Capabilities,
    Cost,
    apply_dropout,
    require_at_least,
    require_positive,
    require_share_or_count,
)
from approx_attn.attention.eigen.block_choice import BlockSelection, Layout
from approx_attn.attention.eigen.content_basis import ContentBasis, HasContentBasis
from approx_attn.attention.eigen.kernels.block import block_attention
from approx_attn.attention.eigen.kernels.block_inputs import BlockInputs, Causality
from approx_attn.attention.eigen.kernels.block_reference import block_weights
from approx_attn.attention.mask import AttentionMask, at_least_float32
from approx_attn.attention.registry import register_attention

ORDERS = (0, 1, 2)


@register_attention("eigen_block")
class EigenBlockAttention(HasContentBasis):
    """Each block of queries scores a few blocks of keys exactly and sees the others through their moments.

    Let z_j = k_j·B and a_i = s·q_i·A be the coordinates of the content basis, and N, k̄, z̄, v̄ the size and means of a
    key block, C = mean (z_j − z̄)ᵀ v_j, Σ = mean (z_j − z̄)ᵀ(z_j − z̄). A query enters a block that is not exact with

        weight N·exp(s·q·k̄ + g),    value v̄ + a·C        (order 0: without C; g = min(½ a Σ aᵀ, 2) at order 2, else 0)

    which is the expansion of Σ_j exp(s·q·k_j)·v_j about the block's mean key, the deviations from it seen in r
    dimensions: of first order, and at order 2 with the cumulants of a Gaussian. The mean key itself is used in all d
    dimensions, since its score costs 1/b of the scores, so the basis has to explain deviations within a block only.
    Exact keys and far blocks share one softmax. Gradient flows through scores, moments and basis, not through the
    choice.

    Exact are the blocks that straddle the diagonal of a causal mask, otherwise the query block's own, and those in
    which a few mean queries of the block (`probes`) put the most weight. Under a causal mask the probes are means over
    the queries up to the first of the block, so that no output depends on a later input.

    Args:
        rank: r, clamped to head_dim.
        keep: exact blocks of each query block: a share of the blocks that it may use (under a causal mask: of those
            up to it; padding does not count), or a number of keys, rounded up to blocks. Blocks that are always
            exact count in it; where they alone are more, all of them are exact. 1.0 is exact attention.
        block_size: keys per block; `auto` grows with `max_length`, or with the number of keys where that is not known
            or exceeded, and then depends on padding (see `automatic_block_size`).
        query_block_size: queries that share their exact blocks; None for as many as keys per block.
        order: 0, 1 or 2, terms of the expansion.
        neighbours: key blocks on either side of the own one that are always exact, where queries and keys are the
            same sequence.
        first_block: whether the first key block is always exact.
        probes: mean queries per query block, each of an equal part of it, that choose its exact blocks.
        share: basis per `head`, per `layer`, or one for the `model`.
        basis_init: `random`, or `calibrated` (to be filled before use; implied by `basis`).
        basis: file written by `approx_attn.calibrate` to start from, or None.
        train_basis: whether A and B learn (at order 0 they are not used).
        seed: of the random start; None follows the seed of the run.
    """

    capabilities = Capabilities(arbitrary_mask=False, needs_calibration=True, has_parameters=True, grouped_query=True)
    cost_formula = "n·t·d + n·(n/b)·(d + d_v·(r + 1)) + n²·d·probes/b"

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        num_key_value_heads: int | None = None,
        max_length: int | None = None,
        causal: bool = False,
        layer_index: int = 0,
        rank: int = 8,
        keep: float | int = 0.125,
        block_size: int | str = 64,
        query_block_size: int | None = None,
        order: int = 2,
        neighbours: int = 0,
        first_block: bool = False,
        probes: int = 2,
        share: str = "head",
        basis_init: str = "random",
        basis: str | None = None,
        train_basis: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            num_heads,
            head_dim,
            value_dim=value_dim,
            num_key_value_heads=num_key_value_heads,
            max_length=max_length,
            causal=causal,
            layer_index=layer_index,
        )
        self.block_size = block_size if block_size == "auto" else _require_size("attention.block_size", block_size)
        self.query_block_size = (
            None if query_block_size is None else require_positive("attention.query_block_size", query_block_size)
        )
        if isinstance(order, bool) or order not in ORDERS:
            raise ValueError(f"attention.order must be one of {', '.join(map(str, ORDERS))}, got {order!r}.")
        self.order = order
        if not isinstance(first_block, bool):
            raise ValueError(f"attention.first_block must be true or false, got {first_block!r}.")
        self.selection = BlockSelection(
            keep=require_share_or_count("attention.keep", keep),
            neighbours=require_at_least("attention.neighbours", neighbours, 0),
            first_block=first_block,
        )
        self.probes = require_positive("attention.probes", probes)
        self.basis = ContentBasis(
            num_heads,
            self.num_key_value_heads,
            head_dim,
            rank,
            share=share,
            init=basis_init,
            train_basis=train_basis and order > 0,
            seed=seed,
        )
        self.load_basis_file(basis)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        return {"keep": 1.0, "block_size": 4}

    # -- the computation -------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
        dropout_p: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # Exponentials of sums over blocks: float32 throughout, also under autocast, but for products on a GPU.
        product_type = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = at_least_float32(query) * scale, at_least_float32(key), at_least_float32(value)
            if mask.query_keep is not None:
                query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
            layout = self._lay_out(query.shape[-2], key.shape[-2], mask)
            inputs, deviations = self._prepare(query, key, value, mask, layout)
            causality = Causality(mask.causal, mask.query_offset)
            weights = None
            if need_weights:
                weights = apply_dropout(block_weights(inputs, deviations, causality), dropout_p)  # (R, Q·b_q, K·b_k)
                output = _from_blocks(layout, self._weighted_values(weights, inputs.value), query)
                weights = weights.unflatten(0, query.shape[:2])[:, :, : query.shape[-2], : key.shape[-2]]
            else:
                output = _from_blocks(layout, block_attention(inputs, causality, dropout_p, product_type), query)
            has_key = _has_key(mask, query.shape[-2], key.shape[-2], query.device)
            if has_key is not None:
                output = output.masked_fill(~has_key, 0.0)
                weights = None if weights is None else weights.masked_fill(~has_key, 0.0)
        return output, weights

    def _weighted_values(self, weights: Tensor, value: Tensor) -> Tensor:
        groups = weights.shape[0] // value.shape[0]
        return weights @ value.flatten(1, 2).repeat_interleave(groups, dim=0)

    def _lay_out(self, n_q: int, n_k: int, mask: AttentionMask) -> Layout:
        # By the model's length where it is known: by that of the input, padding would change how it is cut.
        longest = max(n_k, self.max_length or 0)
        b_k = automatic_block_size(longest) if self.block_size == "auto" else int(self.block_size)
        b_q = self.query_block_size or b_k
        probe = -(-b_q // self.probes)  # queries per probe; fixed by the options, so that padding changes nothing
        b_q = probe * min(self.probes, -(-n_q // probe), -(-b_q // probe))
        b_k = min(b_k, n_k)
        return Layout(n_q, n_k, b_q, b_k, probe, mask.causal, mask.query_offset)

    def _prepare(
        self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, layout: Layout
    ) -> tuple[BlockInputs, Tensor]:
        """Blocks, moments and choice of one forward pass, and the centred key coordinates (R, K, b_k, r)."""
        n_q, n_k, b_q, b_k = layout.n_q, layout.n_k, layout.b_q, layout.b_k
        coordinates = self.basis.query_coordinates(query)  # (b, h, n_q, r), scaled as the query is
        tilt = F.pad(coordinates, (1, 0), value=1.0)[..., : 1 + (self.basis.rank if self.order > 0 else 0)]
        query, tilt = _to_blocks(query, b_q), _to_blocks(tilt, b_q)  # (b, h, Q, b_q, ·)
        key, value = _to_blocks(key, b_k), _to_blocks(value, b_k)  # (b, h_kv, K, b_k, ·)
        key_open = _open_blocks(mask.key_keep, n_k, b_k, key.device)  # (b | 1, K, b_k) or None
        query_open = _open_blocks(mask.real_queries(n_q), n_q, b_q, key.device)  # (b | 1, Q, b_q) or None

        if key_open is None:
            count = key.new_full((1, 1, key.shape[2]), b_k)
            used = None
        else:
            used = key_open[:, None, :, :, None].to(key.dtype)  # (b | 1, 1, K, b_k, 1)
            count = used.sum(dim=(-2, -1))  # (b | 1, 1, K)
        safe_count = count.clamp_min(1.0)[..., None]
        centre = key.sum(-2) / safe_count  # (b, h_kv, K, d)
        mean_value = value.sum(-2) / safe_count
        groups = self.num_heads // self.num_key_value_heads

        deviations = self._deviations(key, centre, used)  # (b, h, K, b_k, r)
        moments = [mean_value.repeat_interleave(groups, 1)[:, :, None]]  # (b, h, 1, K, d_v)
        if self.order > 0:
            values = value.repeat_interleave(groups, 1) if groups > 1 else value
            covariance = (deviations.mT @ values) / safe_count[..., None]  # (b, h, K, r, d_v)
            moments.append(covariance.transpose(2, 3))
        spread = key.new_empty(*deviations.shape[:3], 0)
        if self.order == 2:
            spread = (deviations.mT @ deviations).flatten(-2) / (2 * safe_count)  # (b, h, K, r²)

        choice = self.selection.choose(query.detach(), key.detach(), key_open, query_open, layout)
        b, h = query.shape[:2]
        rows = (b, h, *choice.far_open.shape[-2:])
        inputs = BlockInputs(
            query=query.flatten(0, 1).contiguous(),
            key=key.flatten(0, 1).contiguous(),
            value=value.flatten(0, 1).contiguous(),
            centre=centre.flatten(0, 1),
            tilt=tilt.flatten(0, 1).contiguous(),
            moments=torch.cat(moments, dim=2).flatten(0, 1).contiguous(),
            spread=spread.flatten(0, 1),
            log_count=count.log().clamp_min(torch.finfo(key.dtype).min / 4).expand(b, h, -1).flatten(0, 1).contiguous(),
            chosen=choice.chosen.flatten(0, 1),
            slot_open=None if choice.slot_open is None else choice.slot_open.flatten(0, 1),
            far_open=choice.far_open.expand(rows).flatten(0, 1),
            key_open=None
            if key_open is None
            else key_open[:, None].expand(b, key.shape[1], -1, -1).flatten(0, 1).contiguous(),
        )
        return inputs, deviations.flatten(0, 1)

    def _deviations(self, key: Tensor, centre: Tensor, used: Tensor | None) -> Tensor:
        """Coordinates of the keys about their block's mean, zero for padding: (b, h, K, b_k, r)."""
        if self.order == 0:
            return key.new_zeros(key.shape[0], self.num_heads, *key.shape[2:4], self.basis.rank)
        flat = self.basis.key_coordinates(key.flatten(2, 3)).unflatten(2, key.shape[2:4])
        middle = self.basis.key_coordinates(centre)[..., None, :]  # (b, h, K, 1, r)
        deviations = flat - middle
        return deviations if used is None else deviations * used

    # -- the cost --------------------------------------------------------------------------------------

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        causal = self.causal if causal is None else causal
        n_q, n_k, pairs = self._pairs(query_length, key_length, causal)
        mask = AttentionMask(causal=causal, query_offset=n_k - n_q if causal else 0)
        layout = self._lay_out(n_q, n_k, mask)
        h, d, d_v = self.num_heads, self.head_dim, self.value_dim
        r = self.basis.rank if self.order > 0 else 0
        sizes = torch.full((layout.columns,), layout.b_k)
        sizes[-1] = n_k - (layout.columns - 1) * layout.b_k
        most = self.selection.most_exact(layout)
        exact = computed = far = 0
        for row in range(layout.rows):
            first, last = row * layout.b_q, min((row + 1) * layout.b_q, n_q) - 1
            seen = layout.columns
            if causal:
                seen = min(max((last + layout.offset) // layout.b_k + 1, 0), layout.columns)
            slots = min(most, seen)
            computed += (last - first + 1) * slots * layout.b_k
            exact += self.selection.exact_pairs(layout, row, first, last)
            far += (last - first + 1) * seen
        probed = layout.rows * (layout.b_q // layout.probe) * layout.columns * layout.b_k
        maps = (n_q + n_k + layout.columns) * r * d
        spread = (far + n_k) * r * r if self.order == 2 else 0
        parameters = sum(parameter.numel() for parameter in self.parameters())
        moments = layout.columns * ((1 + r) * d_v + d + (r * r if self.order == 2 else 0))
        return Cost(
            exact_pairs=h * min(exact, pairs),
            total_pairs=h * pairs,
            score_multiply_adds=h * (computed * d + far * d + probed * d + maps + spread),
            value_multiply_adds=h * (computed * d_v + far * (1 + r) * d_v + n_k * r * d_v),
            state=parameters + h * (moments + (n_q + n_k) * r) + layout.b_q * (most * layout.b_k + layout.columns),
        )


def automatic_block_size(n_k: int) -> int:
    """Keys per block at a length: a power of two near n/16 up to 64, from 4,096 keys on √n, from 16,384 on n/128.

    At √n the work on exact and on far blocks grows alike, but products of blocks under 64 are slow; and 128 far
    blocks keep the work on them linear in n.
    """
    size = max(min(n_k / 16, 64.0), math.sqrt(n_k) if n_k > 4096 else 16.0) if n_k <= 16384 else n_k / 128
    return 2 ** round(math.log2(size))


def _require_size(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be auto or a whole number of at least 1, got {value!r}.")
    return value


def _to_blocks(x: Tensor, size: int) -> Tensor:
    """(b, h, n, d) -> (b, h, ceil(n / size), size, d), filled up with zeros."""
    missing = -x.shape[-2] % size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (-1, size))


def _from_blocks(layout: Layout, output: Tensor, query: Tensor) -> Tensor:
    """(R, Q, b_q, d_v) or (R, Q·b_q, d_v) -> (b, h, n_q, d_v)."""
    return output.reshape(*query.shape[:2], -1, output.shape[-1])[:, :, : layout.n_q]


def _open_blocks(keep: Tensor | None, n: int, size: int, device: torch.device) -> Tensor | None:
    """(b | 1, blocks, size) bool: tokens that are neither padding nor fill; None if all are."""
    missing = -n % size
    if keep is None and not missing:
        return None
    keep = torch.ones(1, n, dtype=torch.bool, device=device) if keep is None else keep
    return F.pad(keep, (0, missing)).unflatten(1, (-1, size))


def _has_key(mask: AttentionMask, n_q: int, n_k: int, device: torch.device) -> Tensor | None:
    """(b | 1, 1, n_q | 1, 1) bool: queries with at least one usable key; None if all have one."""
    if mask.key_keep is None and not (mask.causal and mask.query_offset < 0):
        return None
    keep = torch.ones(1, n_k, dtype=torch.bool, device=device) if mask.key_keep is None else mask.key_keep
    if not mask.causal:
        return keep.any(-1)[:, None, None, None]
    first = keep.int().argmax(-1)  # (b | 1,) position of the first usable key, if there is one
    reached = mask.query_positions(n_q, device) >= first[:, None]  # (b | 1, n_q)
    return (reached & keep.any(-1, keepdim=True))[:, None, :, None]
