"""What calibration asks of the mechanisms that it can fit to the inputs of a model's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from approx_attn.attention.base import AttentionMechanism
from approx_attn.attention.mask import AttentionMask

SHARES = ("head", "layer", "model")
"""What may use one basis."""


class CalibratedMechanism(AttentionMechanism):
    """A mechanism that calibration can fit, in one of the two ways below."""


class ObservingMechanism(CalibratedMechanism):
    """A mechanism that takes statistics of its own: it observes batches and is then fitted to them."""

    def observe(
        self, query: Tensor, key: Tensor, mask: AttentionMask | None = None, *, scale: float | None = None
    ) -> None:
        """Take in what a batch shows.

        Args:
            query: (b, h, n_q, d).
            key: (b, h_kv, n_k, d).
            mask: as in `forward`; what it closes plays no part.
            scale: factor on query-key products, 1/sqrt(d) if None.
        """
        raise NotImplementedError

    def fit(self) -> None:
        """Start from what was observed, and forget it.

        Raises:
            ValueError: if nothing was observed.
        """
        raise NotImplementedError


class BasisMechanism(CalibratedMechanism):
    """A mechanism that starts from a basis which calibration fits, keeps in a file and reads from it.

    Attributes:
        basis_kind: name of that basis in calibrations and their files.
        fit_type: dataclass of tensors that holds a fitted one.
        share: what uses one basis, one of `SHARES`.
        rank: columns of the basis that it uses.
    """

    basis_kind: ClassVar[str]
    fit_type: ClassVar[type]
    share: str
    rank: int

    @property
    def fitted_columns(self) -> int:
        """Columns that a basis should be fitted with for this mechanism."""
        return self.rank

    def load_fit(self, fitted: Callable[[str], Any]) -> None:
        """Start from a fitted basis.

        Args:
            fitted: gives the `fit_type` that calibration found for a `head`, for the `layer`, or for the `model`.

        Raises:
            ValueError: another shape; nothing is changed then.
        """
        raise NotImplementedError
