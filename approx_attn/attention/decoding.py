"""What a mechanism keeps beside a key/value cache, so that a step of decoding reads few of the keys."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from approx_attn.attention.mask import AttentionMask


class DecodingCache(ABC):
    """Kept beside the keys and values that one layer has cached; see `AttentionMechanism.start_cache`.

    Whoever owns the keys says what becomes of them: samples that are reordered, repeated or left out (`select`), last
    keys that are taken back (`crop`). New ones are found by `attend`.
    """

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        *,
        first: int = 0,
        window: int | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What the mechanism gives for these arguments, as if all earlier keys were there.

        Args:
            query, key, value, mask, scale, dropout_p, need_weights: as in `AttentionMechanism.forward`; keys and values
                are those that are cached, the newest included.
            first: position of the first of these keys in the sequence; above 0 where a sliding cache has dropped some.
            window: of a sliding cache, for masks that do not say it since the dropped keys are all that it closes.
        """

    @abstractmethod
    def select(self, samples: Tensor) -> None:
        """Sample i becomes what sample `samples[i]` was; int64 of the new batch size."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget what depends on keys from position `length` on."""
