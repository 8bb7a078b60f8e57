"""What tests of several mechanisms ask of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from approx_attn.attention import AttentionMask
from approx_attn.attention.base import AttentionMechanism


@pytest.fixture
def kept_arrays() -> Callable[[AttentionMechanism, list[Tensor], AttentionMask], list[int]]:
    """Sizes, in numbers and ascending, of what a forward pass keeps for the backward pass besides its inputs."""

    def sizes_of(mechanism: AttentionMechanism, tensors: list[Tensor], mask: AttentionMask) -> list[int]:
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            mechanism(*tensors, mask)
        for tensor in tensors:
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        return sorted(sizes.values())

    return sizes_of
