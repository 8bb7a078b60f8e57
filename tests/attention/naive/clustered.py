"""Improved clustered attention, one sample and head at a time: clusters of whole numbers, then a row per query."""

import torch

CASES = {
    "few": {"num_clusters": 3, "bits": 8, "keep": 4},
    "default": {},
    "share": {"num_clusters": 5, "bits": 5, "keep": 0.3, "iterations": 2},
}
POOLS_QUERIES = True
BFLOAT16_TOLERANCE = 0.3  # queries on a plane change clusters


def clusters(mechanism, queries):
    """The cluster of each query (n, d), by Lloyd's iterations on its bits."""
    hashes = [[int(plane[:-1] @ q + plane[-1] > 0) for plane in mechanism.planes] for q in queries]
    centres = hashes[: mechanism.num_clusters]
    for _ in range(mechanism.iterations):
        distances = [[sum(x != y for x, y in zip(code, c, strict=True)) for c in centres] for code in hashes]
        nearest = [row.index(min(row)) for row in distances]
        for c in range(len(centres)):
            members = [code for code, number in zip(hashes, nearest, strict=True) if number == c]
            if members:
                centres[c] = [int(2 * sum(bits) > len(members)) for bits in zip(*members, strict=True)]
    return torch.tensor(nearest)


def naive(mechanism, query, key, value, mask, scale):
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h in torch.cartesian_prod(*map(torch.arange, query.shape[:2])).tolist():
        real = range(query.shape[-2]) if mask.query_keep is None else mask.query_keep[b].nonzero()[:, 0].tolist()
        kept = range(key.shape[-2]) if mask.key_keep is None else mask.key_keep[b].nonzero()[:, 0].tolist()
        q, k, v = query[b, h, list(real)], key[b, h, list(kept)], value[b, h, list(kept)]
        cluster = clusters(mechanism, q)
        keep = mechanism.keep if isinstance(mechanism.keep, int) else max(1, round(mechanism.keep * len(k)))
        for position, own, number in zip(real, q, cluster, strict=True):
            weights = torch.softmax(scale * k @ q[cluster == number].mean(0), dim=0)
            top = weights.argsort(descending=True)[:keep]
            mass = weights[top].sum()
            weights[top] = mass * torch.softmax(scale * k[top] @ own, dim=0)
            output[b, h, position] = weights @ v
    return output
