"""A causal language model and a text cut into windows for it, with the bytes that each window predicts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.conversion.installing import find_layers
from approx_attn.data.packing import BYTE_OFFSET, BYTE_VOCAB_SIZE
from approx_attn.data.sources import read_text
from approx_attn.diagnosis.inputs import load_checkpoint, load_encoder
from approx_attn.errors import ConfigError


@dataclass(frozen=True)
class Windows:
    """Windows of tokens of a text, the last token of each the first of the next.

    Attributes:
        tokens: (windows, length + 1).
        num_bytes: of the text that is predicted: all but the first token.
    """

    tokens: Tensor
    num_bytes: int

    def batches(self, size: int) -> Iterator[Tensor]:
        """(b, length + 1) each."""
        return iter(self.tokens.split(size))


@dataclass(frozen=True)
class CausalModel:
    """A causal language model, in evaluation mode, and what it is measured on.

    Attributes:
        model: takes `inputs(tokens)`.
        first, second: of the first half of the text, to calibrate on, and of the second half.
        tokens_key: what its argument of tokens (b, n) is called.
        options: other arguments.
    """

    model: nn.Module
    first: Windows
    second: Windows
    tokens_key: str
    options: Mapping[str, Any]

    def inputs(self, window: Tensor) -> dict[str, Any]:
        """Arguments of the model for windows (b, length + 1), without their last token."""
        return {self.tokens_key: window[:, :-1], **self.options}


def load_causal(
    model: str, data: Any, *, length: int | None, sequences: int, test_sequences: int | None
) -> CausalModel:
    """A causal language model by name and windows of a text for it.

    Args:
        model: hub id or folder of a Hugging Face model, or the checkpoint (`.ckpt`) of a language model of bytes.
        data: a text file; its first half calibrates, its second half is measured.
        length: tokens per window; None for what the model declares.
        sequences: windows that calibrate.
        test_sequences: windows that are measured; None for all.

    Raises:
        ConfigError: a model that is no such model, a file that is not there, or a text too short.
    """
    if not Path(str(data)).is_file():
        raise ConfigError(f"data={data} is not a file; give a text file.")
    try:
        text = read_text(data, "data")
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    if Path(model).suffix == ".ckpt":
        task = load_checkpoint(model)
        spec = task.spec
        if spec["kind"] != "token_prediction" or not spec["causal"] or spec["vocab_size"] != BYTE_VOCAB_SIZE:
            raise ConfigError(f"model={model} must be a causal language model of bytes, got one of {spec['describe']}.")
        network, declared, key, options = task.model, spec["max_length"], "tokens", {}
        encoded = [_bytes(half) for half in halves]
    else:
        network, tokenizer = load_encoder(model, "AutoModelForCausalLM")
        declared = max((layer.max_length or 0 for layer in find_layers(network)), default=0)
        key, options = "input_ids", {"use_cache": False}
        encoded = [_tokens(tokenizer, half) for half in halves]
    if length is None and not declared:
        raise ConfigError(f"length must be set: {model} declares none.")
    length = min(length or declared, declared or length or 0)
    wanted = (sequences, test_sequences)
    parts = [_windows(*each, length, count, str(data)) for each, count in zip(encoded, wanted, strict=True)]
    return CausalModel(network, parts[0], parts[1], key, options)


def _bytes(text: str) -> tuple[Tensor, Sequence[int]]:
    """Tokens of every byte, and how many bytes have passed after each."""
    encoded = text.encode()
    return torch.tensor(list(encoded)) + BYTE_OFFSET, range(1, len(encoded) + 1)


def _tokens(tokenizer: Any, text: str) -> tuple[Tensor, Sequence[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    passed = list(itertools.accumulate(map(len, map(str.encode, text)), initial=0))  # bytes before each character
    return torch.tensor(encoded["input_ids"]), [passed[end] for _, end in encoded["offset_mapping"]]


def _windows(tokens: Tensor, passed: Sequence[int], length: int, count: int | None, data: str) -> Windows:
    there = (len(tokens) - 1) // length
    count = there if count is None else count
    if there < max(count, 1):
        raise ConfigError(f"data={data} gives {there} of {max(count, 1)} windows of {length} tokens per half.")
    starts = torch.arange(count)[:, None] * length + torch.arange(length + 1)
    return Windows(tokens[starts], passed[count * length] - passed[0])
