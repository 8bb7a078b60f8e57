"""How far the embeddings of texts move when an encoder's attention is replaced, with nothing fine-tuned.

Unlike `reconstruct`, which measures every layer on its own, the whole model runs with the mechanism here, so that
errors of one layer go on through the next. The embedding of a text is the mean of its last hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention import Cost, build_attention
from approx_attn.conversion.calibration.fitting import calibrate, with_progress
from approx_attn.conversion.calibration.refinement import basis_variants
from approx_attn.conversion.convert import attention_spec, convert
from approx_attn.conversion.installing import find_layers
from approx_attn.conversion.layers import SLOT

Batch = dict[str, Tensor]


@dataclass
class EmbeddingPreservation:
    """One mechanism on one set of texts.

    Attributes:
        label: what the table calls the mechanism.
        data: what it calls the texts.
        cosine: mean over texts of the cosine between the embedding of the original and of the converted model.
        lowest: the least of these cosines.
        exact_share: share of the pairs whose exact score enters the result, at the longest text.
        score_ratio: multiply-adds of scores and selection relative to exact attention's scores, likewise.
    """

    label: str
    data: str
    cosine: float
    lowest: float
    exact_share: float
    score_ratio: float


def preserve_embeddings(
    model: nn.Module,
    calibration: Sequence[Batch],
    texts: Mapping[str, Sequence[Batch]],
    mechanisms: Mapping[str, Mapping[str, Any]],
    *,
    refine: int = 0,
    progress: bool = True,
) -> list[EmbeddingPreservation]:
    """Cosine between the embeddings of an encoder and of the same encoder with another attention.

    Args:
        model: an encoder of transformers, not converted; stays as it is.
        calibration: batches of inputs that bases are fitted on: `input_ids` and `attention_mask`, both (b, n).
        texts: by name, batches to measure on.
        mechanisms: by label, `{"name": ..., **options}`.
        refine: steps of gradient; more than 0 adds mechanisms with a random and with a refined content basis.
        progress: show progress bars.

    Returns:
        One result per mechanism and set of texts, in their order.

    Raises:
        ValueError: an unknown mechanism or option, or a model that cannot be converted.
    """
    original = {name: embeddings(model, batches, progress) for name, batches in texts.items()}
    longest = {name: max(batch["input_ids"].shape[1] for batch in batches) for name, batches in texts.items()}
    length = max(*longest.values(), *(batch["input_ids"].shape[1] for batch in calibration))
    fitted = calibrate(model, calibration, statistics=["content", "absolute"], progress=progress)
    mechanisms, bases = basis_variants(model, calibration, mechanisms, fitted, refine, progress)
    results = []
    for label, spec in mechanisms.items():
        converted = convert(copy.deepcopy(model), attention_spec(spec, {}), calibration=None, max_length=length).eval()
        basis = bases.get(label, fitted)
        if basis is not None:
            basis.load_into_model(converted)
        for name, batches in texts.items():
            cosines = F.cosine_similarity(embeddings(converted, batches, progress), original[name], dim=-1)
            own, exact = costs(converted, longest[name])
            results.append(
                EmbeddingPreservation(
                    label=label,
                    data=name,
                    cosine=float(cosines.mean()),
                    lowest=float(cosines.min()),
                    exact_share=own.exact_share,
                    score_ratio=own.score_multiply_adds / exact.score_multiply_adds,
                )
            )
    return results


def embeddings(model: nn.Module, batches: Iterable[Batch], progress: bool = False) -> Tensor:
    """(texts, dim) float64: the mean of the last hidden states over the real tokens of every text."""
    device = next(model.parameters()).device
    pooled = []
    with torch.no_grad():
        for batch in with_progress(batches, progress, "embedding"):
            inputs = {key: part.to(device) for key, part in batch.items()}
            hidden = model(**inputs).last_hidden_state.double()  # (b, n, dim)
            keep = inputs["attention_mask"][..., None].double()  # (b, n, 1)
            pooled.append((hidden * keep).sum(dim=1) / keep.sum(dim=1))
    return torch.cat(pooled).cpu()


def costs(model: nn.Module, length: int) -> tuple[Cost, Cost]:
    """Cost of all converted layers of a model at a length, and of exact attention in their place."""
    own, exact = [], []
    for layer in find_layers(model):
        mechanism = getattr(layer.module, SLOT).mechanism
        shape = vars(layer.shape)
        reference = build_attention("exact", **shape).cost(length)
        own.append(reference if mechanism is None else mechanism.cost(length))
        exact.append(reference)
    return sum(own[1:], start=own[0]), sum(exact[1:], start=exact[0])
