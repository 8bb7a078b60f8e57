"""Spectral clustering of tokens by the features of all layers: do they group by where a token is, or by what it is?

After Zhang, Yunis and Maire (arXiv 2312.06716): an affinity between tokens of several inputs for every layer, once from
queries and keys, once from values, and one clustering of all layers that is best for their normalised cuts on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import attention_observed
from approx_attn.conversion.layers import CROSS_ATTENTION, DECODER
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.figures import grouped_bars, heat_map

FEATURES = ("query_key", "value")
TOKENS = 2048
"""Tokens that are clustered: affinities hold as many squared."""
ALL_LAYERS = "all"


@dataclass(frozen=True)
class LayerFeatures:
    """Queries and keys (N, h, d) and values (N, h, d_v) of a layer at N tokens, and the factor on the products."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def affinity(self, kind: str) -> Tensor:
        """(N, N) float64, symmetric, not negative, zero on the diagonal.

        Args:
            kind: `query_key`: the attention weights among all tokens, mean over heads and both directions. `value`:
                the cosine of the values of all heads, less their mean, where it is positive.
        """
        if kind == "value":
            values = self.value.flatten(1).double()
            values = nn.functional.normalize(values - values.mean(0), dim=-1)
            affinity = (values @ values.mT).clamp_min(0.0)
        else:
            affinity = torch.zeros(len(self.query), len(self.query), dtype=torch.float64)
            for head in range(self.query.shape[1]):
                scores = (self.query[:, head] @ self.key[:, head].mT).double() * self.scale
                affinity += scores.fill_diagonal_(-math.inf).softmax(-1)
            affinity = affinity + affinity.mT
        return affinity.fill_diagonal_(0.0)


@dataclass
class FeatureSample:
    """Tokens drawn from several inputs.

    Attributes:
        layers: features by name of the layer.
        labels: what is known of the tokens, (N,) integers each: `position`, and where known `token` (the id) and
            `class` (of the input).
    """

    layers: dict[str, LayerFeatures]
    labels: dict[str, Tensor]


def sample_features(
    model: nn.Module,
    batches: Sequence[Any],
    classes: Sequence[Tensor] = (),
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    progress: bool = True,
) -> FeatureSample:
    """Run a model and keep features of tokens drawn at random, equally many of every input.

    Args:
        model: any that `capture_attention_inputs` sees; stays as it is.
        batches: its inputs.
        classes: (b,) class of every input, by batch; empty if inputs have none.
        tokens: how many, padding included, which is dropped.
        seed: of the draw.

    Raises:
        ValueError: no layer attends from the tokens of an input to themselves.
    """
    total = sum(_inputs(batch) for batch in batches)
    drawing = _Drawing(max(2, round(tokens / max(total, 1))), torch.Generator().manual_seed(seed))
    for index, batch in enumerate(with_progress(batches, progress, "features")):
        drawing.start(batch, classes[index] if classes else None)
        with attention_observed(model, drawing):
            run_model(model, batch)
    return drawing.result()


def _inputs(batch: Any) -> int:
    parts = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    return next(len(part) for part in parts if isinstance(part, Tensor))


@dataclass
class _Drawing:
    """Callback of a capture: keeps what the layers see at the drawn tokens."""

    per_input: int
    generator: torch.Generator
    batch: Any = None
    classes: Tensor | None = None
    drawn: Tensor | None = None  # (b, m) positions
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    real: dict[str, list[Tensor]] = field(default_factory=dict)
    labels: dict[str, list[Tensor]] = field(default_factory=dict)

    def start(self, batch: Any, classes: Tensor | None) -> None:
        self.batch, self.classes, self.drawn = batch, classes, None

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        b, h, n, _ = query.shape
        of_decoder = "decoder_input_ids" in self.batch and DECODER.search(layer) is not None
        if key.shape[0] != b or key.shape[-2] != n or CROSS_ATTENTION.search(layer) or of_decoder:
            return
        if self.drawn is None:
            self.drawn = torch.rand(b, n, generator=self.generator).argsort(-1)[:, : self.per_input]
            self._add_labels(self.drawn, n)
        if self.drawn.shape[0] != b or int(self.drawn.max()) >= n:
            return
        at = self.drawn[:, None, :, None].to(query.device)  # (b, 1, m, 1)
        whole = (query, repeat_heads(key, h), repeat_heads(value, h))
        taken = (x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[-1])).transpose(1, 2) for x in whole)
        q, k, v = (x.flatten(0, 1).float().cpu() for x in taken)
        self.parts.setdefault(layer, []).append((q, k, v))
        self.scales[layer] = scale
        real = used_tokens(mask, query, key)[1].cpu().gather(1, self.drawn).flatten()
        self.real.setdefault(layer, []).append(real)

    def _add_labels(self, drawn: Tensor, length: int) -> None:
        found = {"position": drawn}
        for name in ("input_ids", "tokens"):
            ids = self.batch.get(name) if isinstance(self.batch, Mapping) else None
            if isinstance(ids, Tensor) and ids.shape == (len(drawn), length) and not ids.is_floating_point():
                found["token"] = ids.cpu().gather(1, drawn)
        if self.classes is not None:
            found["class"] = self.classes.cpu()[:, None].expand_as(drawn)
        for name, values in found.items():
            self.labels.setdefault(name, []).append(values.flatten())

    def result(self) -> FeatureSample:
        whole = max((len(parts) for parts in self.parts.values()), default=0)
        names = [name for name, parts in self.parts.items() if len(parts) == whole]
        if not names:
            raise ValueError("no layer attends from the tokens of an input to themselves, so none has their features.")
        real = torch.stack([torch.cat(self.real[name]) for name in names]).all(0)
        layers = {}
        for name in names:
            q, k, v = (torch.cat(parts)[real] for parts in zip(*self.parts[name], strict=True))
            layers[name] = LayerFeatures(q, k, v, self.scales[name])
        return FeatureSample(layers, {name: torch.cat(values)[real] for name, values in self.labels.items()})


# -- clustering ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clustering:
    """Groups of the tokens by features of one kind in one layer, or in all together.

    Attributes:
        features: one of `FEATURES`.
        layer: its name, or `ALL_LAYERS`.
        clusters: (N,) integers.
        agreement: by name of a label, the adjusted mutual information of clusters and label in units of the smaller
            entropy: 0 by chance, 1 where one decides the other.
    """

    features: str
    layer: str
    clusters: np.ndarray
    agreement: dict[str, float]

    @property
    def effective(self) -> float:
        """exp of the entropy of the clusters: their number if they are equally large."""
        shares = np.bincount(self.clusters) / len(self.clusters)
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))


def cluster_features(sample: FeatureSample, clusters: int, *, seed: int = 0) -> list[Clustering]:
    """Cluster tokens by every kind of features, layer by layer and in all layers together.

    The affinities of all layers enter together as the mean of D^(−½)·A·D^(−½), D the row sums of A, whose leading
    eigenvectors minimise the mean of the layers' normalised cuts.

    Args:
        clusters: how many groups.
        seed: of k-means.

    Raises:
        ValueError: not more tokens than clusters.
    """
    count = len(sample.labels["position"])
    if count <= clusters:
        raise ValueError(f"clusters must be below the {count} tokens that are clustered, got {clusters}.")
    found = []
    for kind in FEATURES:
        joint = torch.zeros(count, count, dtype=torch.float64)
        for name, layer in sample.layers.items():
            normalised = _normalised(layer.affinity(kind))
            joint += normalised / len(sample.layers)
            if len(sample.layers) > 1:
                found.append(_clustering(kind, name, normalised, sample.labels, clusters, seed))
        found.append(_clustering(kind, ALL_LAYERS, joint, sample.labels, clusters, seed))
    return found


def _normalised(affinity: Tensor) -> Tensor:
    root = affinity.sum(-1).clamp_min(1e-30).rsqrt()
    return affinity * root[:, None] * root


def _clustering(
    kind: str, layer: str, affinity: Tensor, labels: Mapping[str, Tensor], clusters: int, seed: int
) -> Clustering:
    # A trace of affinity between all tokens: groups without any between them are found, too.
    connected = (affinity + 1e-6 * affinity.mean()).numpy()
    model = SpectralClustering(clusters, affinity="precomputed", random_state=seed)
    groups = model.fit_predict(connected)
    agreement = {
        name: float(adjusted_mutual_info_score(known.numpy(), groups, average_method="min"))
        for name, known in labels.items()
    }
    return Clustering(kind, layer, groups, agreement)


# -- the report ------------------------------------------------------------------------------------------


def add_features(
    book: Book, sample: FeatureSample, found: Iterable[Clustering], labels: Mapping[str, str], clusters: int
) -> None:
    """Do queries and keys say where a token is, and values what it is?"""
    section, found = book.section("What and where"), list(found)
    known = [name for name in sample.labels if name != "position"]
    section.text(
        f"{len(sample.labels['position'])} tokens of all inputs in {clusters} groups by spectral clustering, with two "
        "affinities: attention weights of the tokens among one another, from queries and keys, and cosines of values; "
        "in every layer, and in all layers together. Where: how much of the groups a token's position decides. What: "
        f"how much {' and '.join(f'its {name}' for name in known) or 'nothing that is known here'} decides. 0 is "
        "chance, 1 means that one decides the other (adjusted mutual information over the smaller entropy)."
    )
    rows = [
        {
            "features": each.features,
            "layer": labels.get(each.layer, each.layer),
            "effective_clusters": each.effective,
            "where": each.agreement["position"],
            **{f"what_{name}": each.agreement[name] for name in known},
        }
        for each in found
    ]
    joint = {each.features: each for each in found if each.layer == ALL_LAYERS}
    section.figure(
        "features",
        grouped_bars(
            ["position", *known],
            {kind: [joint[kind].agreement[name] for name in ("position", *known)] for kind in FEATURES},
            x_title="what groups agree with",
            y_title="agreement",
        ),
        "Agreement of the groups by all layers with the position of a token and with what it is.",
    )
    section.table("features", rows, "effective clusters: exp of the entropy of the groups.")
    for kind in FEATURES:
        section.figure(
            f"features_{kind}",
            _positions_map(joint[kind].clusters, sample.labels["position"].numpy(), clusters),
            f"Share of the tokens at a position in each group by {kind} features of all layers. Columns of one dark "
            "field: position decides the group.",
        )


def _positions_map(groups: np.ndarray, positions: np.ndarray, clusters: int) -> Any:
    counts = np.zeros((clusters, int(positions.max()) + 1))
    np.add.at(counts, (groups, positions), 1)
    shares = counts / counts.sum(0).clip(min=1)
    names = [str(position) for position in range(counts.shape[1])]
    groups_by_place = np.argsort((shares * np.arange(counts.shape[1])).sum(1) / shares.sum(1).clip(min=1e-9))
    return heat_map(
        shares[groups_by_place],
        ("group", [str(group + 1) for group in range(clusters)]),
        ("position", names),
        scale="share of a position's tokens",
        limits=(0.0, 1.0),
    )
