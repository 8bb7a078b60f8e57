"""What training, estimation and calibration ask of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.base import Cost


class SequenceModel(nn.Module):
    """Base of all models: a module from the tensors of a batch, by name, to logits.

    What a model shares with the data (`vocab_size`, `num_classes`, `max_length`, `two_towers`, `causal`, `pad_id`) it
    takes as arguments of these names; the rest of its arguments are its options, `model.<option>`.
    """

    causal: bool = False
    """No position sees a later one."""

    translates: ClassVar[bool] = False
    """Writes a target from a source, as `EncoderDecoder` does; such a model is for data of kind translation alone."""

    calibration_batches: int = 0
    """Training batches on which bases are fitted before training."""

    new_parameters: Sequence[str] | None = None
    """Parameters that start at random in a model whose others were trained before; None where all start so."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse what can be seen to be wrong before the data are read; raises `ValueError`."""

    @property
    def mechanisms(self) -> list[AttentionMechanism]:
        """The attention mechanisms, in the order of the layers."""
        return attention_mechanisms(self)

    @property
    def attention_length(self) -> int | None:
        """Queries of the longest attention where they do not depend on the input; None: the tokens of the input."""
        return None

    def costs(self, length: int, causal: bool) -> list[Cost]:
        """What every mechanism does for one sample of `length` tokens, in the order of the layers."""
        length = self.attention_length or length
        return [mechanism.cost(length, causal=causal or mechanism.causal) for mechanism in self.mechanisms]

    @property
    def rebuild_options(self) -> dict[str, Any]:
        """Options that a checkpoint must hold in place of those of the configuration to build the model again."""
        return {}


def attention_mechanisms(model: nn.Module) -> list[AttentionMechanism]:
    """The mechanisms in a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, AttentionMechanism)]


def passes_options_to(part: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a constructor whose `**options` go on to another class: its signature then lists them.

    Added are the keyword-only arguments of `part`, so that a misspelt option is refused and help can show the others.
    """

    def listing(constructor: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(constructor)
        listed = {name: p for name, p in own.parameters.items() if p.kind != p.VAR_KEYWORD}
        passed = {name: p for name, p in inspect.signature(part).parameters.items() if p.kind == p.KEYWORD_ONLY}
        constructor.__signature__ = own.replace(parameters=[*(listed | passed).values()])  # type: ignore[attr-defined]
        return constructor

    return listing
