"""Feed-forward blocks of a model that exists, made to use the top k of the hidden units of each token.

In a plain two-layer block, W₂·act(W₁·x + b₁) + b₂, that is another activation: the k largest pre-activations of a token
pass, all other units are zero. So it is put in place of the activation, whatever the block looks like otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.hidden_units import top_units

PLAIN_BLOCKS = (
    ("intermediate_act_fn", "dense", None),
    ("intermediate_act_fn", "intermediate_dense", "output_dense"),
    ("activation", "lin1", "lin2"),
    ("activation_fn", "fc1", "fc2"),
    ("act", "fc1", "fc2"),
    ("act", "c_fc", "c_proj"),
    ("act", "wi", "wo"),
    ("act", "fc_in", "fc_out"),
    ("act", "dense_h_to_4h", "dense_4h_to_h"),
)
"""What modules with a plain block call their activation, first and second layer (None: it stands in another one)."""


class TopKActivation(nn.Module):
    """An activation that only the k largest pre-activations of a token pass; zero for the other units.

    Args:
        activation: the one it takes the place of.
        keep: k, as a share of the hidden units or as their number.
        hidden_dim: the number of them.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], keep: float | int, hidden_dim: int) -> None:
        super().__init__()
        self.activation, self.keep = activation, keep
        self.num_kept = resolve_count(keep, hidden_dim)

    def forward(self, scores: Tensor) -> Tensor:
        """(..., hidden_dim) -> (..., hidden_dim)."""
        return top_units(scores, self.activation, self.num_kept)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


@dataclass(frozen=True)
class FeedForwardBlock:
    """A plain two-layer block: the module that holds its activation, under which name, and its hidden units."""

    name: str
    module: Any
    attribute: str
    hidden_dim: int

    @property
    def activation(self) -> Any:
        return getattr(self.module, self.attribute)

    def put(self, activation: Any) -> None:
        """Let the block use an activation, a module or a function."""
        if isinstance(self.activation, nn.Module) != isinstance(activation, nn.Module):
            delattr(self.module, self.attribute)  # modules and other attributes are kept apart
        setattr(self.module, self.attribute, activation)


def find_blocks(model: nn.Module) -> list[FeedForwardBlock]:
    """The plain two-layer feed-forward blocks of `model`, converted or not, in the order of modules."""
    found = []
    for name, module in model.named_modules():
        for attribute, first, second in PLAIN_BLOCKS:
            hidden_dim = _features(getattr(module, first, None), "out_features", "nf")
            ends = hidden_dim if second is None else _features(getattr(module, second, None), "in_features", "nx")
            if hidden_dim is not None and hidden_dim == ends and callable(getattr(module, attribute, None)):
                found.append(FeedForwardBlock(name, module, attribute, hidden_dim))
                break
    return found


def _features(layer: Any, *names: str) -> int | None:
    """A number of features of a linear layer, of PyTorch or as GPT-2 has them; of one with a gate they do not agree."""
    return next((value for name in names if isinstance(value := getattr(layer, name, None), int)), None)


def require_feed_forward(feed_forward: str | Mapping[str, Any]) -> float | int:
    """The budget in `"topk"` or `{"name": "topk", "keep": ...}`; 0.25 unless given.

    Raises:
        ValueError: another name or key, or an impossible budget.
    """
    spec = {"name": feed_forward} if isinstance(feed_forward, str) else dict(feed_forward)
    if spec.get("name") != "topk" or not spec.keys() <= {"name", "keep"}:
        raise ValueError(f"feed_forward must be topk or a mapping with name=topk and keep, got {feed_forward!r}.")
    return require_budget("feed_forward.keep", spec.get("keep", 0.25))


def require_blocks(model: nn.Module) -> list[FeedForwardBlock]:
    """`find_blocks(model)`.

    Raises:
        ValueError: there are none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"feed_forward=topk needs plain two-layer feed-forward blocks, as bert, gpt2, vit, bart and t5 have them, "
            f"got {type(model).__name__}, which has none that is known; blocks with a gate, as in llama, are not plain."
        )
    return blocks


def use_top_units(blocks: list[FeedForwardBlock], keep: float | int) -> None:
    """Let blocks use the top k of their hidden units."""
    for block in blocks:
        before = block.activation
        dense = before.activation if isinstance(before, TopKActivation) else before
        block.put(TopKActivation(dense, keep, block.hidden_dim).train(block.module.training))


def use_all_units(model: nn.Module) -> None:
    """Give every block of `model` its own activation back."""
    for block in find_blocks(model):
        if isinstance(block.activation, TopKActivation):
            block.put(block.activation.activation)


def converted_blocks(model: nn.Module) -> dict[str, float | int]:
    """Name -> budget of the blocks that use the top k of their hidden units."""
    return {b.name: b.activation.keep for b in find_blocks(model) if isinstance(b.activation, TopKActivation)}


def restore_blocks(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Let blocks use the budgets that `converted_blocks` has told.

    Raises:
        ValueError: a block that is not there, or an impossible budget; nothing is changed then.
    """
    blocks = {block.name: block for block in find_blocks(model)}
    for name, keep in saved.items():
        if name not in blocks:
            raise ValueError(f"the feed-forward block {name} is named, which the model does not have.")
        require_budget(f"feed_forward.{name}", keep)
    for name, keep in saved.items():
        use_top_units([blocks[name]], keep)
