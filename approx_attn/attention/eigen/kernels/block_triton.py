"""Block-wise attention on a GPU: fused Triton kernels for the forward and the backward pass, as one operator.

Imported only where Triton is installed. See `block_triton_forward` and `block_triton_backward` for the kernels.
The mean and covariance of every block are plain batched products of torch before them: they read each key and value
once, which a kernel of our own could not do with less.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from approx_attn.attention.eigen.kernels.block_inputs import SPREAD_LIMIT, BlockInputs, Causality
from approx_attn.attention.eigen.kernels.block_triton_backward import key_kernel, moment_kernel, query_kernel
from approx_attn.attention.eigen.kernels.block_triton_forward import forward_kernel, probe_kernel

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM = 128  # dimensions of a head of which tiles still fit into shared memory
LARGEST_RANK = 16  # the loops over coordinates are unrolled
MOST_BLOCKS = 65535  # key blocks that the second axis of a launch can count
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAR_TILE = 16  # far blocks of a program of `moment_kernel`: with r coordinates each, 16·r rows of one product
PROGRAMS_PER_CORE = 4  # programs of `moment_kernel` per multiprocessor, made up by splitting the queries


def can_run(inputs: BlockInputs) -> bool:
    """Whether the kernels take these shapes, types and device; else the chunked form in torch does."""
    return (
        (inputs.query.is_cuda or INTERPRETED)
        and max(inputs.query.shape[-1], inputs.value.shape[-1]) <= LARGEST_DIM
        and inputs.tilt.shape[-1] - 1 <= LARGEST_RANK
        and inputs.query.dtype in TYPES
    )


def can_weigh(probes: Tensor, key: Tensor) -> bool:
    """Whether `probe_mass` takes these shapes, types and device."""
    return (
        (probes.is_cuda or INTERPRETED)
        and probes.dtype == torch.float32
        and probes.shape[-1] <= LARGEST_DIM
        and key.shape[2] <= MOST_BLOCKS
    )


def block_attention(inputs: BlockInputs, causality: Causality, dropout_p: float = 0.0) -> Tensor:
    """What `block.block_attention` computes: (R, Q, b_q, d_v) in the type of the values; differentiable.

    Queries, keys and values are of one type; it is that of all products, which accumulate in float32. Dropped are
    other pairs than on the CPU.
    """
    seed = int(torch.randint(1 << 62, ())) if dropout_p > 0.0 else 0
    return _forward(*inputs, causality.active, causality.offset, dropout_p, seed)[0]


# -- configurations: tiles of b_q x b_k, and what a compiler does with them -----------------------------------


def _configs(tiles: tuple[str, ...]) -> list[triton.Config]:
    """Configurations to choose from by measurement, per shape and type.

    64 or 128 queries feed the warp-group products of a Hopper GPU (64 rows per group of 4 warps). More stages hide
    the latency of gathered blocks and take shared memory; compiled for it, 128 queries, 64 keys and 32 far blocks
    in bfloat16 at d = 64, r = 8 take 108 KiB in 2 stages, so two programs fit on a multiprocessor. The first
    configuration is for short blocks, and for float32 at d = 128, where the larger ones need more than there is.

    Args:
        tiles: which sizes the kernel has: BM queries, BN keys, TILE far blocks.
    """
    if INTERPRETED:
        return [triton.Config(dict.fromkeys(tiles, 16))]
    configs = [
        triton.Config({"BM": 32, "BN": 32, "TILE": 16}, num_warps=4, num_stages=1),
        triton.Config({"BM": 64, "BN": 32, "TILE": 32}, num_warps=4, num_stages=2),
        triton.Config({"BM": 64, "BN": 64, "TILE": 32}, num_warps=4, num_stages=2),
        triton.Config({"BM": 64, "BN": 64, "TILE": 32}, num_warps=4, num_stages=3),
        triton.Config({"BM": 128, "BN": 64, "TILE": 32}, num_warps=8, num_stages=2),
        triton.Config({"BM": 128, "BN": 64, "TILE": 32}, num_warps=8, num_stages=3),
        triton.Config({"BM": 128, "BN": 128, "TILE": 64}, num_warps=8, num_stages=2),
    ]
    for config in configs:
        config.kwargs = {name: config.kwargs[name] for name in tiles}
    return list({str(config): config for config in configs}.values())


def _fitting(configs: list[triton.Config], named: dict[str, Any], **options: Any) -> list[triton.Config]:
    """The first configuration and those whose tiles are no larger than the blocks; small ones for float32.

    Products in float32 are three of TF32 each, in registers: large tiles spill them, and take minutes to compile.
    """
    queries, keys = options["QUERY_SIZE"], options.get("KEY_SIZE", 64)
    if named["query_ptr"].dtype == torch.float32:
        queries, keys = min(queries, 64), min(keys, 32)
    return configs[:1] + [c for c in configs[1:] if c.kwargs["BM"] <= queries and c.kwargs.get("BN", 32) <= keys]


def _tuned(kernel: Any, tiles: tuple[str, ...], *by: str) -> Any:
    by = ("D", "DV", "QUERY_SIZE", "CAUSAL", *by)
    return triton.autotune(_configs(tiles), key=[*by], prune_configs_by={"early_config_prune": _fitting})(kernel)


_forward_kernel = _tuned(forward_kernel, ("BM", "BN", "TILE"), "R", "KEY_SIZE", "HAS_SPREAD")
_query_kernel = _tuned(query_kernel, ("BM", "BN", "TILE"), "R", "KEY_SIZE", "HAS_SPREAD")
_key_kernel = _tuned(key_kernel, ("BM", "BN"), "KEY_SIZE")
_moment_kernel = _tuned(moment_kernel, ("BM",), "R", "HAS_SPREAD")


# -- launches ---------------------------------------------------------------------------------------------------


def _padded(size: int) -> int:
    """Tensor cores multiply tiles of at least 16, and tiles are powers of two."""
    return max(16, triton.next_power_of_2(size))


def _precision() -> str:
    """Of products in float32: three in TF32 are as exact as one in float32, and run on tensor cores."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


class _Launch:
    """Arguments that the kernels share."""

    def __init__(self, inputs: BlockInputs, causality: Causality, dropout_p: float, seed: int) -> None:
        self.rows, self.query_blocks, self.b_q, self.d = inputs.query.shape
        self.key_rows, self.key_blocks, self.b_k, self.d_v = inputs.value.shape
        self.slots, self.rank = inputs.chosen.shape[-1], inputs.tilt.shape[-1] - 1
        self.causality, self.seed = causality, seed
        kind = inputs.key.dtype
        # Moments in the type of products, so that they can be copied to shared memory as they are.
        self.inputs = inputs._replace(
            **{name: x.contiguous() for name, x in inputs._asdict().items() if x is not None}
        )._replace(
            centre=inputs.centre.to(kind).contiguous(),
            tilt=inputs.tilt.float().contiguous(),
            moments=inputs.moments.to(kind).contiguous(),
            spread=inputs.spread.to(kind).contiguous(),
            log_count=inputs.log_count.float().contiguous(),
        )
        self.unused = self.inputs.query  # a pointer for what is None; never read
        # Up to the last slot that counts: those behind it are not even loaded.
        self.used = self.unused
        if inputs.slot_open is not None:
            places = torch.arange(1, self.slots + 1, dtype=torch.int32, device=inputs.query.device)
            self.used = (inputs.slot_open * places).amax(-1).contiguous()
        self.options = {
            "D": self.d,
            "DV": self.d_v,
            "CAUSAL": causality.active,
            "DROPOUT": dropout_p,
            "DP": _padded(self.d),
            "DVP": _padded(self.d_v),
            "QUERY_SIZE": _padded(self.b_q),
            "PRECISION": _precision(),
        }
        self.far_options = {
            "R": self.rank,
            "HAS_SPREAD": inputs.spread.shape[-1] > 0,
            "LIMIT": SPREAD_LIMIT,
            "RP": _padded(max(self.rank, 1)),
        }

    @property
    def exact_options(self) -> dict[str, Any]:
        return {
            "HAS_SLOTS": self.inputs.slot_open is not None,
            "HAS_PADDING": self.inputs.key_open is not None,
            "KEY_SIZE": _padded(self.b_k),
        }

    def per_query_tile(self, kernel: Any, *more: Tensor) -> None:
        """Launch a kernel with a program per tile of queries."""
        x = self.inputs
        kernel[self._grid(self.rows * self.query_blocks, self.b_q, "BM")](
            *x[:8],
            x.chosen,
            self.unused if x.slot_open is None else x.slot_open,
            self.used,
            x.far_open,
            self.unused if x.key_open is None else x.key_open,
            *more,
            self.rows // self.key_rows,
            self.query_blocks,
            self.key_blocks,
            self.slots,
            self.b_q,
            self.b_k,
            self.causality.offset,
            self.seed,
            **self.options,
            **self.far_options,
            **self.exact_options,
        )

    def per_key_tile(self, *tensors: Tensor) -> None:
        """Launch `key_kernel`; `tensors`: gradient, normaliser, δ, and the gradients of keys and values to fill."""
        x = self.inputs
        places, begins = queries_by_key_block(x.chosen, x.slot_open, self.key_rows, self.key_blocks)
        exact = self.exact_options
        exact.pop("HAS_SLOTS")  # the list holds none that does not count
        _key_kernel[self._grid(self.key_rows * self.key_blocks, self.b_k, "BN")](
            *x[:3],
            places,
            begins,
            self.unused if x.key_open is None else x.key_open,
            *tensors,
            self.query_blocks,
            self.key_blocks,
            self.b_q,
            self.b_k,
            self.causality.offset,
            self.seed,
            **self.options,
            **exact,
        )

    def per_far_blocks(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Launch `moment_kernel`; gradients (float32) of centres by row of queries, of moments and of spreads."""
        x, splits = self.inputs, self._splits()
        outputs = tuple(
            torch.empty(splits, *shape, dtype=torch.float32, device=x.query.device)
            for shape in ((self.rows, self.key_blocks, self.d), x.moments.shape, x.spread.shape)
        )
        programs = self.rows * -(-self.key_blocks // FAR_TILE)
        _moment_kernel[(programs, splits)](
            x.query,
            *x[3:8],
            x.far_open,
            *tensors,
            *outputs,
            self.rows,
            self.rows // self.key_rows,
            self.query_blocks,
            self.key_blocks,
            -(-self.query_blocks // splits),
            self.b_q,
            self.b_k,
            self.causality.offset,
            self.seed,
            **self.options,
            **self.far_options,
            RS=triton.next_power_of_2(max(self.rank, 1)),
            TILE=FAR_TILE,
        )
        centre, moments, spread = (x.sum(0) for x in outputs)
        return centre, moments, spread

    def _splits(self) -> int:
        """Shares of the queries, so that the few far blocks keep the whole device busy."""
        device = self.inputs.query.device
        cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        programs = self.rows * -(-self.key_blocks // FAR_TILE)
        return max(1, min(self.query_blocks, -(-PROGRAMS_PER_CORE * cores // programs)))

    @staticmethod
    def _grid(blocks: int, size: int, tile: str) -> Callable[[dict[str, int]], tuple[int]]:
        return lambda meta: (blocks * triton.cdiv(size, meta[tile]),)


def queries_by_key_block(
    chosen: Tensor, slot_open: Tensor | None, key_rows: int, key_blocks: int
) -> tuple[Tensor, Tensor]:
    """The choice of blocks, turned round.

    Args:
        chosen, slot_open: see `BlockInputs`; rows r·g .. r·g + g − 1 of the R rows share row r of the keys.

    Returns:
        places: (R·Q·T,) int64, indices of query blocks among all R·Q, sorted by the key block that they chose;
            those of slots that do not count at the end.
        begins: (key_rows·key_blocks + 1,) int64, where the query blocks of each key block begin.
    """
    rows, _, slots = chosen.shape
    key_row = torch.arange(rows, device=chosen.device) // (rows // key_rows)
    owner = key_row[:, None, None] * key_blocks + chosen
    if slot_open is not None:
        owner = owner.masked_fill(~slot_open, key_rows * key_blocks)
    owner, order = owner.flatten().sort(stable=True)
    begins = torch.searchsorted(owner, torch.arange(key_rows * key_blocks + 1, device=chosen.device))
    return order // slots, begins


@torch.library.custom_op("approx_attn::probe_mass_fused", mutates_args=())
def probe_mass(probes: Tensor, key: Tensor, key_open: Tensor | None, far_open: Tensor) -> Tensor:
    """What `block.probe_mass` computes, without scores in memory: (b, h, Q, g, K) float32."""
    b, h, rows, g, d = probes.shape
    key_heads, columns, b_k, _ = key.shape[1:]
    mass = torch.empty(b, h, rows, g, columns, dtype=torch.float32, device=key.device)
    tile = 64 if probes.is_cuda else 16
    probe_kernel[(b * h * -(-rows * g // tile), columns)](
        probes.contiguous(),
        key.contiguous(),
        probes if key_open is None else key_open.expand(b, -1, -1).contiguous(),
        mass,
        h,
        h // key_heads,
        rows * g,
        columns,
        b_k,
        D=d,
        HAS_PADDING=key_open is not None,
        DP=_padded(d),
        PRECISION=_precision(),
        BM=tile,
        BN=min(tile, _padded(b_k)),
    )
    closed = ~far_open[:, None, :, None]  # (b | 1, 1, Q | 1, 1, K)
    return mass.masked_fill_(closed, torch.finfo(mass.dtype).min).softmax(-1)


@probe_mass.register_fake
def _(probes: Tensor, key: Tensor, key_open: Tensor | None, far_open: Tensor) -> Tensor:
    return probes.new_empty(*probes.shape[:-1], key.shape[2], dtype=torch.float32)


# -- as operators that torch.compile and autograd see as one step ----------------------------------------------


@torch.library.custom_op("approx_attn::block_attention_fused", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    tilt: Tensor,
    moments: Tensor,
    spread: Tensor,
    log_count: Tensor,
    chosen: Tensor,
    slot_open: Tensor | None,
    far_open: Tensor,
    key_open: Tensor | None,
    causal: bool,
    offset: int,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Output (R, Q, b_q, d_v) and logarithm of the normaliser (R, Q, b_q) float32."""
    inputs = BlockInputs(
        query, key, value, centre, tilt, moments, spread, log_count, chosen, slot_open, far_open, key_open
    )
    launch = _Launch(inputs, Causality(causal, offset), dropout_p, seed)
    output = value.new_empty(*query.shape[:3], value.shape[-1])
    normaliser = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    launch.per_query_tile(_forward_kernel, output, normaliser)
    return output, normaliser


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return (
        value.new_empty(*query.shape[:3], value.shape[-1]),
        torch.empty(query.shape[:3], dtype=torch.float32, device=query.device),
    )


@torch.library.custom_op("approx_attn::block_attention_fused_backward", mutates_args=())
def _backward(
    grad: Tensor,
    output: Tensor,
    normaliser: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    tilt: Tensor,
    moments: Tensor,
    spread: Tensor,
    log_count: Tensor,
    chosen: Tensor,
    slot_open: Tensor | None,
    far_open: Tensor,
    key_open: Tensor | None,
    causal: bool,
    offset: int,
    dropout_p: float,
    seed: int,
) -> list[Tensor]:
    """Gradients of query, key, value, centre, tilt, moments and spread."""
    inputs = BlockInputs(
        query, key, value, centre, tilt, moments, spread, log_count, chosen, slot_open, far_open, key_open
    )
    launch = _Launch(inputs, Causality(causal, offset), dropout_p, seed)
    grad = grad.to(value.dtype).contiguous()
    delta = (output.float() * grad.float()).sum(-1)  # (R, Q, b_q)
    grad_query, grad_key, grad_value, grad_tilt = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, launch.inputs.tilt)
    )
    launch.per_query_tile(_query_kernel, grad, normaliser, delta, grad_query, grad_tilt)
    launch.per_key_tile(grad, normaliser, delta, grad_key, grad_value)
    grad_centre, grad_moments, grad_spread = launch.per_far_blocks(grad, normaliser, delta)
    grad_centre = grad_centre.unflatten(0, (launch.key_rows, -1)).sum(1)
    return [
        grad_query,
        grad_key,
        grad_value,
        grad_centre.to(centre.dtype),
        grad_tilt.to(tilt.dtype),
        grad_moments.to(moments.dtype),
        grad_spread.to(spread.dtype),
    ]


@_backward.register_fake
def _(grad: Tensor, output: Tensor, normaliser: Tensor, *rest: object) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rest[:7]]  # type: ignore[arg-type]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, offset, dropout_p, seed = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.settings = (causal, offset, dropout_p, seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    output, normaliser, *tensors = ctx.saved_tensors
    if grad is None:
        return (None,) * 16
    grads = _backward(grad, output, normaliser, *tensors, *ctx.settings)
    return (*grads, *(None for _ in range(9)))


_forward.register_autograd(_differentiate, setup_context=_save)
