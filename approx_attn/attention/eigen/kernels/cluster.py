"""Attention over exact keys and cluster moments under one softmax, and the plan of which keys are which.

Where it runs: one compiled operator (cluster_cpu/) on a CPU in float32 or bfloat16, PyTorch operators
(cluster_torch.py) elsewhere and for soft-capped scores. Neither holds an array of queries by keys in training or
inference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from approx_attn.attention.eigen.kernels import cluster_torch, native
from approx_attn.attention.eigen.kernels.cluster_torch import Inputs, Layout

KERNEL_LANES = 16  # numbers in a vector of the compiled kernel: it takes features in multiples of this
LEAST_BFLOAT16_CLUSTER = 4  # its bfloat16 products take 16 keys of a cluster at a time, whether or not they are there
SHARE_ROUNDING = 1e-6  # a share of keys that is a whole number but for rounding is that number


class Places(NamedTuple):
    """Where the keys of one query block stand, in runs: [near_first, far_first) and [far_last, near_last) are near."""

    far_first: int
    far_last: int
    near_first: int
    near_last: int

    @property
    def near_runs(self) -> int:
        return self.near_last - self.near_first - (self.far_last - self.far_first)

    def all_near(self) -> Places:
        return self._replace(far_first=self.near_last, far_last=self.near_last)


def cluster_attention(
    inputs: Inputs, keep: float | int, layout: Layout, dropout_p: float = 0.0, need_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Output (b, h, n_q, d_v) and, if asked for, the weights (b, h, n_q, n_k) with which values enter it.

    With the clusters c of the far runs of a query block, N, k̄, v̄ the number and means of a cluster's open keys,
    z̃ = k·B − k̄·B, Σ = mean z̃ᵀz̃ and M = mean z̃ᵀv over them, and a = q·A:

        logit of a cluster:  q·k̄ + log N + min(½ a Σ aᵀ, SPREAD_LIMIT)     (last term: order 1 and 2)
        value of a cluster:  v̄ + a·M                                       (last term: order 2)

    With a cap c on scores, c·tanh(q·k̄/c) takes the place of q·k̄ and c·tanh(q·k/c) that of q·k, and a is multiplied by
    1 − tanh²(q·k̄/c): within a cluster the capped score is expanded to first order about the mean key.

    The own clusters of a query have the highest logit + √(a Σ aᵀ). Softmax is over the open keys of own clusters and
    near runs, with q·k as logits, the other clusters, unless the layout drops these, and the sink of the head if there
    is one, which has no value. The weight of a cluster is spread over its keys as its value is over theirs, at order 2
    with tilts that may be negative. Rows of queries without a usable key are zero.

    Args:
        inputs: queries, keys, values and maps.
        keep: exact keys per query: a share of those that its block may use, or a number.
        layout: where queries and keys stand and how they are cut.
        dropout_p: probability of dropping an exact pair or a whole cluster.
        need_weights: return the weights; an array of queries by keys, which nothing else here makes.
    """
    plan = make_plan(layout, keep, inputs.key_open, inputs.query.device)
    if runs_compiled(inputs.key) and inputs.softcap is None and not need_weights:
        return _compiled(inputs, plan, layout, most_own(layout, keep), dropout_p), None
    fixed = near_runs(layout, keep, inputs.key_open is not None), most_own(layout, keep)
    return cluster_torch.attend(inputs, plan, *fixed, layout, dropout_p, need_weights)


def runs_compiled(key: Tensor) -> bool:
    """Whether the compiled operator works on such keys."""
    return key.device.type == "cpu" and key.dtype in (torch.float32, torch.bfloat16) and native.is_available()


def multiplies_bfloat16(key: Tensor, cluster: int) -> bool:
    """Whether it multiplies such keys as they are, in clusters of such a size; else they are to be float32."""
    if key.dtype != torch.bfloat16 or not runs_compiled(key):
        return False
    return native.has_bfloat16_products() and cluster >= LEAST_BFLOAT16_CLUSTER


def _compiled(inputs: Inputs, plan: Tensor, layout: Layout, most: int, dropout_p: float) -> Tensor:
    query, key, value, query_map, key_map, key_open, _, sinks = inputs
    missing, missing_value = -query.shape[-1] % KERNEL_LANES, -value.shape[-1] % KERNEL_LANES
    if missing:
        query, key = F.pad(query, (0, missing)), F.pad(key, (0, missing))
        query_map, key_map = F.pad(query_map, (0, 0, 0, missing)), F.pad(key_map, (0, 0, 0, missing))
    padded = F.pad(value, (0, missing_value)) if missing_value else value
    tensors = (x.contiguous() for x in (query, key, padded, query_map, key_map))
    seed = int(torch.randint(1 << 62, ())) if dropout_p > 0.0 else 0
    sinks = None if sinks is None else sinks.float()
    output = _forward_op(*tensors, sinks, key_open, plan, *layout[2:], dropout_p, seed, most)[0]
    return output[..., : value.shape[-1]]


# -- the plan ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def places(layout: Layout) -> tuple[Places, ...]:
    """Near and far runs of every query block, whatever is padded."""
    n_q, n_k, causal, offset, window, run = layout[:6]
    runs = -(-n_k // run)
    result = []
    for block in range(offset // run, (offset + n_q - 1) // run + 1):
        start, stop = block * run, (block + 1) * run  # positions, also of queries that are not there
        far_first, far_last, near_first, near_last = 0, runs, 0, runs
        if causal:
            far_last, near_last = block, block + 1
        elif window:
            far_last, near_last = (start + window) // run, (stop + window - 2) // run + 1
        if window:
            far_first, near_first = -(-(stop - window) // run), (start - window + 1) // run
        near_first, near_last = (min(max(x, 0), runs) for x in (near_first, near_last))
        far_first, far_last = (min(max(x, near_first), near_last) for x in (far_first, far_last))
        found = Places(far_first, far_last, near_first, near_last)
        result.append(found if far_first < far_last else found.all_near())
    return tuple(result)


def _own_of(budget: float, layout: Layout, at: Places) -> int:
    """Own clusters that a budget of exact keys leaves, beside near runs that count as if all their keys were there."""
    far_clusters = (at.far_last - at.far_first) * layout.run // layout.cluster
    return min(max(math.ceil((budget - at.near_runs * layout.run) / layout.cluster), 0), far_clusters)


def _is_everything(keep: float | int) -> bool:
    return keep == 1.0 and not isinstance(keep, int)


def most_own(layout: Layout, keep: float | int) -> int:
    """No query has more own clusters, whatever is padded."""
    if _is_everything(keep):
        return 0
    runs = ((at, at.far_last - at.far_first + at.near_runs) for at in places(layout))
    return max(_own_of(keep if isinstance(keep, int) else keep * n * layout.run, layout, at) for at, n in runs)


@functools.lru_cache(maxsize=256)
def unpadded_plan(layout: Layout, keep: float | int) -> tuple[tuple[int, ...], ...]:
    """What `make_plan` gives where no key is padded: the four `Places` and the own clusters of each block."""
    rows = []
    for at in places(layout):
        usable = min(at.far_last * layout.run, layout.n_k) - at.far_first * layout.run + at.near_runs * layout.run
        budget = keep if isinstance(keep, int) else keep * usable - SHARE_ROUNDING
        everything = _is_everything(keep) or budget >= usable
        rows.append((*at.all_near(), 0) if everything else (*at, _own_of(budget, layout, at)))
    return tuple(rows)


def near_runs(layout: Layout, keep: float | int, padded: bool) -> list[list[int]]:
    """Runs that may be near, for each query block: with padding, a number of keys may be all that there are."""
    rows = [row[:4] for row in unpadded_plan(layout, keep)]
    if padded and isinstance(keep, int):
        rows = [at.all_near() for at in places(layout)]
    return [[*range(near, far), *range(far_last, near_last)] for far, far_last, near, near_last in rows]


def make_plan(layout: Layout, keep: float | int, key_open: Tensor | None, device: torch.device) -> Tensor:
    """(b | 1, Q, 5) int64: `Places` and own clusters of each query block; all keys are near where the budget has room.

    The keys of near runs count in `keep` as if all were there, so that later keys change no choice.
    """
    if key_open is None or _is_everything(keep):
        return torch.tensor(unpadded_plan(layout, keep), dtype=torch.long, device=device).view(1, -1, 5)
    count = F.pad(key_open, (0, -layout.n_k % layout.run)).unflatten(1, (-1, layout.run)).sum(-1)  # (b, runs)
    before = F.pad(count.cumsum(-1), (1, 0))  # open keys before each run
    far_first, far_last, near_first, near_last = torch.tensor(places(layout), device=device).unbind(-1)  # (Q,) each
    near = (near_last - near_first - (far_last - far_first)) * layout.run
    usable = before[:, far_last] - before[:, far_first] + near  # (b, Q)
    budget = torch.full_like(usable, keep) if isinstance(keep, int) else keep * usable.double() - SHARE_ROUNDING
    own = ((budget - near) / layout.cluster).ceil().long().clamp_min(0)
    own = own.minimum((far_last - far_first) * layout.run // layout.cluster)
    everything = budget >= usable
    far_first, far_last = (torch.where(everything, near_last, x) for x in (far_first, far_last))
    rows = (far_first, far_last, near_first.expand_as(own), near_last.expand_as(own), own.masked_fill(everything, 0))
    return torch.stack(rows, dim=-1)


# -- as operators that torch.compile and autograd see as one step ---------------------------------------------


@torch.library.custom_op("approx_attn::cluster_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    sinks: Tensor | None,
    key_open: Tensor | None,
    plan: Tensor,
    causal: bool,
    offset: int,
    window: int,
    run: int,
    cluster: int,
    order: int,
    drops_rest: bool,
    dropout_p: float,
    seed: int,
    most: int,
) -> list[Tensor]:
    """Output, and what the backward pass needs: log-sum-exp, own clusters, members and moments of clusters."""
    kernel = native.load()
    assert kernel is not None
    key_open = None if key_open is None else key_open.contiguous()
    settings = (causal, offset, window, run, cluster, order, drops_rest, dropout_p, seed)
    output, lse, *rest = kernel.cluster_forward(query, key, value, query_map, key_map, key_open, plan, *settings, most)
    if sinks is not None:  # one more column of the softmax: what is there shrinks, and the sum of exponentials grows
        without, lse = lse, torch.logaddexp(lse, sinks[:, None])
        output = (output * (without - lse).exp()[..., None]).to(output.dtype)
    return [output, lse, *rest]


@_forward_op.register_fake
def _forward_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    sinks: Tensor | None,
    key_open: Tensor | None,
    plan: Tensor,
    causal: bool,
    offset: int,
    window: int,
    run: int,
    cluster: int,
    order: int,
    drops_rest: bool,
    dropout_p: float,
    seed: int,
    most: int,
) -> list[Tensor]:
    b, h, n_q, d = query.shape
    v, r = value.shape[-1], query_map.shape[-1]
    clusters = -(-key.shape[2] // run) * (run // cluster)
    return [
        query.new_empty(b, h, n_q, v, dtype=value.dtype),
        query.new_empty(b, h, n_q, dtype=torch.float32),
        query.new_empty(b, h, n_q, most, dtype=torch.int32),
        query.new_empty(b * h, clusters, cluster, dtype=torch.int32),
        query.new_empty(b * h, clusters, d, dtype=torch.float32),
        query.new_empty(b * h, clusters, 1 + r if order == 2 else 1, v, dtype=torch.float32),
        query.new_empty(b * h, clusters, r * (r + 1) // 2 if order else 0, dtype=torch.float32),
        query.new_empty(b * h, clusters, dtype=torch.float32),
    ]


@torch.library.custom_op("approx_attn::cluster_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    sinks: Tensor | None,
    key_open: Tensor | None,
    plan: Tensor,
    results: list[Tensor],
    causal: bool,
    offset: int,
    window: int,
    run: int,
    cluster: int,
    order: int,
    drops_rest: bool,
    dropout_p: float,
    seed: int,
) -> list[Tensor]:
    """Gradients of query, key, value, query_map, key_map and, if there are any, sinks."""
    kernel = native.load()
    assert kernel is not None
    key_open = None if key_open is None else key_open.contiguous()
    settings = (causal, offset, window, run, cluster, order, drops_rest, dropout_p, seed)
    query_grad, key_grad, value_grad, map_grads = kernel.cluster_backward(
        grad, query, key, value, query_map, key_map, key_open, plan, *results, *settings
    )
    parts = key_grad.shape[2] > 1
    key_grad, value_grad = ((x.sum(2) if parts else x.squeeze(2)) for x in (key_grad, value_grad))
    wide = (query_grad, key_grad, value_grad)
    narrow = (x.to(like.dtype) for x, like in zip(wide, (query, key, value), strict=True))
    found = [*narrow, *(parts.sum(0) for parts in map_grads)]  # views of one are refused
    if sinks is not None:  # each takes its weight of the value that is missing
        output, lse = results[:2]
        weight = (sinks[:, None] - lse).exp()  # (b, h, n_q)
        found.append(-(weight * (grad.float() * output.float()).sum(-1)).sum(dim=(0, 2)))
    return found


@_backward_op.register_fake
def _backward_shapes(grad: Tensor, *tensors: object) -> list[Tensor]:
    found = tensors[: 5 if tensors[5] is None else 6]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found]  # type: ignore[arg-type]


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, causal, offset, window, run, cluster, order, drops_rest, dropout_p, seed, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (causal, offset, window, run, cluster, order, drops_rest, dropout_p, seed)  # type: ignore[attr-defined]
    ctx.set_materialize_grads(False)


INPUTS = 18  # of the operator


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    grad = grads[0]
    if grad is None:
        return (None,) * INPUTS
    found = _backward_op(grad.contiguous(), *saved[:8], list(saved[8:]), *ctx.settings)  # type: ignore[attr-defined]
    return (*found, *(None for _ in range(INPUTS - len(found))))


_forward_op.register_autograd(_differentiate, setup_context=_save)


# -- their operations, for torch's counter ----------------------------------------------------------------------


@register_flop_formula(torch.ops.approx_attn.cluster_attention, get_raw=True)
def _forward_operations(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, *rest: Any, **kwargs: object
) -> int:
    _, _, _, plan, *settings, _, _, _ = rest
    layout = Layout(query.shape[2], key.shape[2], *settings)
    return 2 * _multiply_adds(query, value, query_map.shape[2], plan, layout)


@register_flop_formula(torch.ops.approx_attn.cluster_attention_backward, get_raw=True)
def _backward_operations(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, *rest: Any, **kwargs: object
) -> int:
    _, _, _, plan, _, *settings, _, _ = rest
    layout = Layout(query.shape[2], key.shape[2], *settings)
    # Scores are computed again and differentiated by both factors; values likewise, but for their output.
    return 5 * _multiply_adds(query, value, query_map.shape[2], plan, layout)


def _multiply_adds(query: Tensor, value: Tensor, rank: int, plan: Tensor, layout: Layout) -> int:
    done = work(layout, plan[0].tolist())
    pair, cluster = products(query.shape[3], value.shape[3], rank, layout.order, layout.drops_rest)
    per_head = (done.near + done.own) * sum(pair) + done.clusters * sum(cluster)
    per_head += preparation(layout, query.shape[3], value.shape[3], rank)
    return query.shape[0] * query.shape[1] * per_head


class Work(NamedTuple):
    """Pairs of one head that are computed: queries by near keys, by keys of own clusters, and by far clusters.

    `exact` counts the scores that enter the result: those of own clusters and the near ones that causality leaves open.
    """

    near: int
    own: int
    clusters: int
    exact: int


def work(layout: Layout, plan: Sequence[Sequence[int]]) -> Work:
    """What a plan (one sample of `make_plan`) makes the kernels compute; empty slots of clusters count."""
    near = own = clusters = closed = 0
    n_q, n_k, causal, offset, _, run = layout[:6]
    for block, (far_first, far_last, near_first, near_last, own_count) in enumerate(plan, offset // run):
        first, last = max(block * run, offset), min((block + 1) * run, offset + n_q) - 1  # positions
        queries = last - first + 1
        near_end, far_keys = min(near_last * run, n_k), min(far_last * run, n_k) - far_first * run
        near += queries * max(near_end - near_first * run - max(far_keys, 0), 0)
        own += queries * own_count * layout.cluster
        clusters += queries * (far_last - far_first) * run // layout.cluster
        if causal:
            closed += sum(max(near_end - position - 1, 0) for position in range(first, last + 1))
    return Work(near, own, clusters, near + own - closed)


def products(
    dim: int, value_dim: int, rank: int, order: int, drops_rest: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Multiply-adds (of scores, of values) per exact pair and per pair of a query and a cluster."""
    spread = rank * (rank + 1) // 2 if order > 0 else 0
    moments = 1 + rank if order == 2 else 1
    return (dim, value_dim), (dim + spread, 0 if drops_rest else moments * value_dim)


def preparation(layout: Layout, dim: int, value_dim: int, rank: int) -> int:
    """Multiply-adds of one head before any score: coordinates of queries and keys, spread and tilt of clusters."""
    _, per_cluster = products(dim, value_dim, rank, layout.order)
    coordinates = (layout.n_q if layout.order > 0 else 0) + layout.n_k
    return coordinates * rank * dim + layout.n_k * (sum(per_cluster) - dim - value_dim)
