"""`torch.nn.MultiheadAttention` with a choice of attention mechanism."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import MultiheadAttention as TorchMultiheadAttention
from torch.nn import functional as F

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape
from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.registry import AttentionSpec, resolve_attention
from approx_attn.attention.rotary import rotate
from approx_attn.attention.torch_masks import mask_from_drop_masks

LARGE_WEIGHTS = 2**29
"""Bytes of attention weights from which `forward` warns: two heads of 8,192 tokens in float32."""


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class MultiheadAttention(TorchMultiheadAttention):
    """Multi-head attention with the interface of `torch.nn.MultiheadAttention` plus `attention=`.

    Constructor, `forward`, masks (`True` = masked out), return values and state_dict keys are those of
    PyTorch. With `attention="exact"` and without `rotary` the computation is PyTorch's own too. Any other
    mechanism takes the place of the softmax between the input and output projections; its parameters, if it
    has any, are found under `attention.` in the state_dict.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as in `torch.nn.MultiheadAttention`.
        attention: name of a mechanism, `{"name": ..., **options}`, a factory, or a built mechanism.
        max_length: longest input that length-dependent mechanisms are laid out for.
        causal: declares use under a causal mask, so that a mechanism that cannot is refused here. As in
            PyTorch, the mask given to `forward` decides what is masked.
        layer_index: position of this layer in its model, for mechanisms with one basis per layer.
        coordinate_dim: declares that every input comes with coordinates of so many numbers per token.
        rotary: turn queries and keys by their positions (see `approx_attn.attention.rotary`), for self-attention.

    Raises:
        ValueError: unknown mechanism or option, a built mechanism of another shape, or `rotary` with an odd number
            of features per head or with `add_bias_kv`.

    Example:
        >>> layer = MultiheadAttention(64, 4, batch_first=True, attention={"name": "topk", "keep": 0.25})
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = layer(x, x, x)
    """

    spec: dict[str, Any] | None = None
    """`{"name": ..., **options}` of the mechanism, if `convert` made this layer."""

    replaced: tuple[TorchMultiheadAttention] | None = None
    """The layer whose place this one took, if `convert` made it; in a tuple, so that it is no submodule."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention: AttentionSpec = "exact",
        max_length: int | None = None,
        causal: bool = False,
        layer_index: int = 0,
        coordinate_dim: int | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary needs an even number of features per head, got {self.head_dim}.")
        if rotary and add_bias_kv:
            raise ValueError("rotary cannot stand with add_bias_kv=True, whose key has no position.")
        self.rotary = rotary
        shape = AttentionShape(
            num_heads,
            self.head_dim,
            max_length=max_length,
            causal=causal,
            layer_index=layer_index,
            coordinate_dim=coordinate_dim,
        )
        mechanism = resolve_attention(attention, shape)
        self._install(mechanism.to(device=device, dtype=dtype))

    @classmethod
    def from_torch(
        cls, module: TorchMultiheadAttention, attention: AttentionSpec, **options: Any
    ) -> MultiheadAttention:
        """A layer that uses the very parameters of `module` (shared, not copied) with another mechanism.

        Args:
            module: a `torch.nn.MultiheadAttention`.
            attention: as in the constructor.
            options: `max_length`, `causal`, `layer_index` of the constructor.
        """
        if isinstance(module, MultiheadAttention):
            options = {"rotary": module.rotary, "coordinate_dim": module.attention.shape.coordinate_dim, **options}
        layer = cls(**_constructor_arguments(module), attention=attention, **options)
        _share_parameters(module, layer)
        layer.attention.to(device=module.out_proj.weight.device, dtype=module.out_proj.weight.dtype)
        return layer.train(module.training)

    def to_torch(self) -> TorchMultiheadAttention:
        """The plain PyTorch layer with the very parameters of this one (shared, not copied), computing exactly.

        Raises:
            ValueError: a layer with rotary positions, which PyTorch's has not.
        """
        if self.rotary:
            raise ValueError("a layer with rotary positions has no form in plain PyTorch.")
        layer = TorchMultiheadAttention(**_constructor_arguments(self), device="meta")
        _share_parameters(self, layer)
        return layer.train(self.training)

    def __prepare_scriptable__(self) -> TorchMultiheadAttention:
        """What `torch.jit.script` compiles in place of this layer: PyTorch's own, if attention is exact."""
        if not isinstance(self.attention, ExactAttention):
            raise ValueError(
                f"attention={self.attention.name} cannot be compiled by torch.jit.script; use torch.compile or "
                "torch.export."
            )
        return self.to_torch()

    def _install(self, mechanism: AttentionMechanism) -> None:
        for name, expected in (
            ("num_heads", self.num_heads),
            ("num_key_value_heads", self.num_heads),
            ("head_dim", self.head_dim),
            ("value_dim", self.head_dim),
        ):
            if getattr(mechanism, name) != expected:
                raise ValueError(
                    f"attention: a mechanism with {name}={getattr(mechanism, name)} was given to a layer "
                    f"that needs {name}={expected}."
                )
        self.attention = mechanism
        if self.rotary or not isinstance(mechanism, ExactAttention):
            # nn.TransformerEncoderLayer has an inference path that reads this layer's weights and computes
            # exact attention itself. It stands back where any submodule has a forward hook.
            mechanism.register_forward_pre_hook(_keep_fused_encoder_off)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        coordinates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries over keys and values; see `torch.nn.MultiheadAttention.forward`.

        Args:
            query: (n_q, b, embed_dim); (b, n_q, embed_dim) if `batch_first`; (n_q, embed_dim) unbatched.
            key: likewise (n_k, b, kdim).
            value: likewise (n_k, b, vdim).
            key_padding_mask: (b, n_k), or (n_k) unbatched; bool (True = masked out) or float (added).
            need_weights: also return the weights, which takes memory that grows with the square of the length.
            attn_mask: (n_q, n_k) or (b * num_heads, n_q, n_k); bool (True = masked out) or float (added).
            average_attn_weights: average the returned weights over heads.
            is_causal: a hint that `attn_mask` is the causal mask; it is then not read.
            coordinates: (b, n, c), where the tokens of self-attention stand, for mechanisms that go by distance; the
                others, exact attention among them, do not read it.

        Returns:
            The output in the layout of `query`, and the weights (b, n_q, n_k), or (b, h, n_q, n_k) if not
            averaged, or None. Mechanisms give zeros for a query whose every key is masked, where exact
            attention gives PyTorch's NaN.

        Raises:
            ValueError: with a mechanism other than exact: shapes that do not fit, or a request beyond its
                capabilities. With exact, PyTorch's own errors. With `rotary`, another query than key.
        """
        if self.rotary and query is not key:
            raise ValueError("a layer with rotary positions does self-attention alone, got another query than key.")
        if coordinates is not None and (query.dim() != 3 or query.is_nested or query is not key):
            raise ValueError("coordinates must come with self-attention over a padded batch, got another query or key.")
        if need_weights and not query.is_nested and not torch.compiler.is_compiling():
            self._warn_of_large_weights(query, key)
        if isinstance(self.attention, ExactAttention) and not self.rotary:
            # PyTorch's fast path for inference keeps all weights: 5 times slower than its fused kernel at 2,048 tokens.
            with contextlib.nullcontext() if query.is_nested or torch.compiler.is_compiling() else _no_fast_path():
                return super().forward(
                    query,
                    key,
                    value,
                    key_padding_mask=key_padding_mask,
                    need_weights=need_weights,
                    attn_mask=attn_mask,
                    average_attn_weights=average_attn_weights,
                    is_causal=is_causal,
                )
        if query.is_nested:
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, which must be given with it, got None.")

        is_batched, is_self_attention = query.dim() == 3, query is key
        self._check_inputs(query, key, value)
        q, k, v = self._project(*(self._batch_first(x) for x in (query, key, value)))  # (b, h, n, d)
        if self.rotary:
            q, k = rotate(q, k)
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = mask_from_drop_masks(
            key_padding_mask,
            attn_mask,
            batch=q.shape[0],
            num_heads=self.num_heads,
            lengths=(q.shape[-2], k.shape[-2]),
            is_causal=is_causal,
            is_self_attention=is_self_attention,
            extra_keys=k.shape[-2] - self._length(key),
            device=q.device,
        )
        if coordinates is not None:
            mask = replace(mask, query_coordinates=coordinates, key_coordinates=coordinates)
        output, weights = self._attend(q, k, v, mask, need_weights)
        output = self.out_proj(output.transpose(1, 2).flatten(-2))  # (b, n_q, embed_dim)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _warn_of_large_weights(self, query: Tensor, key: Tensor) -> None:
        batch = query.numel() // max(self._length(query) * query.shape[-1], 1)
        pairs = self._length(query) * self._length(key)
        if batch * self.num_heads * pairs * query.element_size() >= LARGE_WEIGHTS:
            warnings.warn(  # of one wording, so that Python shows it once
                "need_weights=True, the default of nn.MultiheadAttention, keeps the weights of all pairs of tokens in "
                "memory, here half a GiB or more per layer: call the layer with need_weights=False.",
                stacklevel=1,
            )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights and not self.attention.capabilities.returns_weights:
            raise ValueError(
                f"attention={self.attention.name} does not return attention weights; call with need_weights=False."
            )
        return self.attention(q, k, v, mask, dropout_p=self.dropout, need_weights=need_weights)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, e) inputs to (b, h, n, d) queries, keys and values, with the extra keys appended."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nested (ragged) self-attention input, which nn.TransformerEncoder makes of padded input in inference."""
        if query is not key or key is not value:
            raise ValueError("nested tensors are supported for self-attention only (query, key and value the same).")
        lengths = torch.tensor([row.shape[0] for row in query.unbind()], device=query.device)
        padded = query.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=query.device)
        output, weights = self.forward(
            padded,
            padded,
            padded,
            key_padding_mask=positions >= lengths[:, None],
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        rows = [row[:length] for row, length in zip(output, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=query.layout), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _length(self, x: Tensor) -> int:
        return x.shape[1] if x.dim() == 3 and self.batch_first else x.shape[0]

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        expected = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, dim in expected:
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != dim:
                raise ValueError(
                    f"{name} must have the {dim} features of {name} in its last axis and 3 axes (2 if unbatched, "
                    f"all three alike), got {tuple(x.shape)} beside a query of {tuple(query.shape)}."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key and value must agree in batch and length, got {tuple(key.shape)} and {tuple(value.shape)}."
            )


def _keep_fused_encoder_off(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Does nothing; that it is there is what counts (see `MultiheadAttention._install`)."""


def _constructor_arguments(module: TorchMultiheadAttention) -> dict[str, Any]:
    """Arguments that build a layer of the shape of `module`."""
    return {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "dropout": module.dropout,
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
        "kdim": module.kdim,
        "vdim": module.vdim,
        "batch_first": module.batch_first,
    }


def _share_parameters(source: TorchMultiheadAttention, target: TorchMultiheadAttention) -> None:
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, parameter)
    target.out_proj = source.out_proj
