"""The output projection W_O of every attention layer of a live model, found by what flows into it.

Models name W_O and place it differently (a sibling of the attention module in BERT, `o_proj` in Llama, a
transposed `Conv1D` in GPT-2). What they share is that its input is the attention output, heads side by side.
So one batch is run, exact attention is computed beside the model, and the linear layer that receives that very
array is W_O. A model that puts a gate or a norm in between has no such layer, and none is claimed for it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.fitting import run_model
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import attention_observed

TOLERANCE = 1e-3  # relative; fused kernels and half precision differ from the plain formula by less


def find_output_projections(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """W_O of every attention layer that runs on a batch, cut by heads.

    Args:
        model: holds layers that `capture_attention_inputs` sees.
        batch: one batch of inputs; a single short sequence is enough.

    Returns:
        By layer name, (h, d_v, D): the rows of W_O that multiply each head's output. Layers without a linear
        layer that takes the attention output as it is are missing.
    """
    finder = _Finder()
    with ExitStack() as stack:
        for module in model.modules():
            if _matrix(module) is not None:
                stack.callback(module.register_forward_pre_hook(finder.on_linear).remove)
        stack.enter_context(attention_observed(model, finder.on_attention))
        run_model(model, batch)
    modules = dict(model.named_modules())
    for name, heads in finder.heads.items():
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention):
            # PyTorch's layer hands the weight of its out_proj to a function and does not call it.
            finder.found[name] = _by_heads(module.out_proj.weight.detach().mT, heads)
    return finder.found


class _Finder:
    """Matches what attention layers give with what linear layers take."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, Tensor, Tensor]] = []  # name, output (b, n_q, h·d_v), real queries (b, n_q)
        self.heads: dict[str, int] = {}
        self.found: dict[str, Tensor] = {}

    def on_attention(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        real, used = used_tokens(mask, query, key)
        key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
        output, _ = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        self.heads[layer] = query.shape[1]
        self.pending = [entry for entry in self.pending if entry[0] != layer]
        self.pending.append((layer, output.transpose(1, 2).flatten(2), real))

    def on_linear(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or not isinstance(inputs[0], Tensor):
            return
        given = inputs[0]
        for entry in self.pending:
            layer, output, real = entry
            if _same(given, output, real):
                matrix = _matrix(module)
                assert matrix is not None
                self.found[layer] = _by_heads(matrix, self.heads[layer])
                self.pending.remove(entry)
                return


def _same(given: Tensor, output: Tensor, real: Tensor) -> bool:
    """Is this input the attention output, at the real queries?"""
    if given.shape[-1] != output.shape[-1] or given.numel() != output.numel():
        return False
    difference = (given.reshape(output.shape).float() - output.float())[real]
    return float(difference.norm()) <= TOLERANCE * max(float(output[real].norm()), 1e-12)


def _matrix(module: nn.Module) -> Tensor | None:
    """(features in, features out) of a linear layer; None for any other module."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return weight.detach().mT if isinstance(weight, Tensor) else None
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.detach()  # GPT-2's layer holds its matrix the other way round
    return None


def _by_heads(matrix: Tensor, heads: int) -> Tensor:
    return matrix.unflatten(0, (heads, -1)).contiguous()  # (h, d_v, D)
