"""What a basis costs that was not fitted to the layer it serves: of another layer, of another model, cosines, random.

Every basis is measured in `eigen_row` and `eigen_matrix` on the queries, keys and values of the unchanged model. A
layer's heads share one basis, as heads of two layers or models do not correspond. A basis from elsewhere comes with the
mean and the variances that were found there. Cosines and random directions have neither, so they get the layer's own
mean and the variances that its own scores have along them: only the directions are foreign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention.eigen.basis_file import Calibration, as_float32
from approx_attn.attention.eigen.matrix import starting_factors
from approx_attn.attention.eigen.position_basis import dct_basis, random_basis
from approx_attn.attention.eigen.position_fit import PositionFit
from approx_attn.diagnosis.reconstruction import reconstruct

KINDS = {"eigen_row": "absolute", "eigen_matrix": "matrix"}
OWN, OTHER_LAYER, OTHER_MODEL, COSINES, RANDOM = "own", "another layer", "another model", "cosines", "random"


def transfer_errors(
    model: nn.Module,
    batches: Sequence[Any],
    own: Calibration,
    other: Calibration | None,
    *,
    budgets: Sequence[float],
    rank: int,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Relative error of the attention output by mechanism, budget and where the basis is from; a row per layer.

    Args:
        model: of one length of attention in all layers; stays as it is.
        batches: its inputs, other than those that bases were fitted to.
        own: bases of kinds `absolute` and `matrix` of the model.
        other: those of another model of as many layers of the same shape; None leaves it out.
        budgets: shares of exact pairs.
        rank: columns of the bases; fewer where fewer pairs are observed.
        seed: of random directions.
    """
    bases = sources(own, other, rank, seed)
    specs, chosen = {}, {}
    for name, options in mechanisms(own.layers[0].length, rank, budgets).items():
        for source, versions in bases.items():
            for number, basis in enumerate(versions):
                label = f"{name}|{source}|{number}"
                specs[label], chosen[label] = options, basis
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for found in reconstruct(model, batches, specs, own, bases=chosen, progress=progress):
        name, source, _ = found.label.split("|")
        for layer, errors in found.layers.items():
            place = {"mechanism": name.split()[0], "exact_pairs": found.exact_share, "basis": source, "layer": layer}
            row = rows.setdefault((name, source, layer), {**place, "error": 0.0})
            row["error"] += errors.output / len(bases[source])
    return list(rows.values())


def mechanisms(length: int, rank: int, budgets: Sequence[float]) -> dict[str, dict[str, Any]]:
    """`eigen_row` and `eigen_matrix` at every budget, with as many columns as it can determine."""
    table: dict[str, dict[str, Any]] = {}
    for keep in budgets:
        row = {"name": "eigen_row", "keep": keep, "rank": min(rank, max(1, round(keep * length)))}
        matrix = {"name": "eigen_matrix", "keep": keep, "rank": rank, "factor_rank": length}
        table |= {f"{spec['name']} {keep}": spec | {"share": "layer"} for spec in (row, matrix)}
    return table


def sources(own: Calibration, other: Calibration | None, rank: int, seed: int) -> dict[str, list[Calibration]]:
    """The bases by where they are from; several where the errors of several are averaged."""
    found = {OWN: [own], OTHER_LAYER: [shifted(own, by) for by in range(1, len(own.layers))]}
    if other is not None:
        found[OTHER_MODEL] = [other]
    found[COSINES] = [with_directions(own, lambda kind, length, layer: cosines(kind, length, rank))]
    found[RANDOM] = [
        with_directions(own, lambda kind, length, layer: random_directions(kind, length, rank, seed + layer))
    ]
    return {source: versions for source, versions in found.items() if versions}


def shifted(calibration: Calibration, by: int) -> Calibration:
    """Every layer gets the bases of the layer `by` further on, the last ones those of the first."""
    count = len(calibration.layers)
    tensors = {}
    for name, tensor in calibration.tensors.items():
        layer, _, rest = name.partition(".")
        tensors[f"{(int(layer) - by) % count}.{rest}" if layer.isdigit() else name] = tensor
    return replace(calibration, tensors=tensors)


def with_directions(calibration: Calibration, directions: Callable[[str, int, int], Tensor]) -> Calibration:
    """The same means and variances, other directions.

    Args:
        directions: (kind, length, layer) -> (P, r), orthonormal.
    """
    tensors = dict(calibration.tensors)
    for layer, shape in enumerate(calibration.layers):
        for kind in calibration.statistics:
            prefix = f"{layer}.{kind}.layer."
            parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            fit = PositionFit(**{name: part.double() for name, part in parts.items()})
            tensors |= as_float32(prefix, along(fit, directions(kind, shape.length, layer)))
    return replace(calibration, tensors=tensors)


def along(fit: PositionFit, directions: Tensor) -> PositionFit:
    """A fit with other directions (P, r) and the variances that its own model of the data has along them.

    That model is probabilistic PCA with all stored columns: what they leave out is spread evenly over the rest.
    """
    shares = (fit.vectors.mT @ directions).square()  # (g, R, r)
    stored = fit.eigenvalues.sum(-1)
    left = (fit.dimensions - fit.eigenvalues.shape[-1]).clamp_min(1.0)
    noise = (fit.variance - stored).clamp_min(0.0) / left
    variances = (fit.eigenvalues[..., None] * shares).sum(-2) + noise[:, None] * (1.0 - shares.sum(-2))
    return replace(fit, vectors=directions.expand(len(fit.mean), -1, -1).contiguous(), eigenvalues=variances)


def cosines(kind: str, length: int, rank: int) -> Tensor:
    """(P, rank): the slow cosines that mechanisms start from, as orthonormal directions."""
    if kind == "absolute":
        return torch.linalg.qr(dct_basis(length, rank)).Q
    left, right = (part[:-1, :, 0].double() for part in starting_factors(length, rank, 1, seed=0))
    return torch.linalg.qr(torch.einsum("ri,rj->ijr", left, right).flatten(0, 1)).Q


def random_directions(kind: str, length: int, rank: int, seed: int) -> Tensor:
    """(P, rank): independent directions, constant in no row of scores."""
    size = length if kind == "absolute" else length**2
    drawn = random_basis(size, rank, seed).unflatten(0, (-1, length))
    return torch.linalg.qr((drawn - drawn.mean(1, keepdim=True)).flatten(0, 1)).Q


def refusal(own: Calibration, other: Calibration | None) -> str | None:
    """Why bases cannot be exchanged; None if they can."""
    shapes = {(str(layer), layer.length) for layer in own.layers}
    if len(shapes) != 1:
        return "The layers of the model differ in shape or length, so their bases cannot be exchanged."
    if other is not None and ({(str(layer), layer.length) for layer in other.layers} != shapes):
        return "The other model has attention of another shape or length, so the bases cannot be exchanged."
    if other is not None and len(other.layers) != len(own.layers):
        return "The other model has another number of layers, so the bases cannot be exchanged."
    return None


def means_over_layers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per mechanism and budget, a column per source of the basis."""
    table: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows:
        errors = table.setdefault((row["mechanism"], row["exact_pairs"]), {})
        errors.setdefault(row["basis"], []).append(row["error"])
    return [
        {"mechanism": name, "exact_pairs": share} | {source: sum(each) / len(each) for source, each in errors.items()}
        for (name, share), errors in table.items()
    ]
