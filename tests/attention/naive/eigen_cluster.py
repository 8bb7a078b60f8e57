"""`eigen_cluster` written from its formula, one query at a time."""

import math

import torch

from helpers import naive_cap, naive_softmax

EXTRA_MASKS = False
SMALL = {"rank": 3, "block_size": 8, "cluster_size": 2}

CASES = {
    "default": {},
    "small": {**SMALL, "keep": 5},
    "share": {**SMALL, "keep": 0.3, "share": "layer"},
    "order_0": {**SMALL, "keep": 3, "order": 0},
    "order_2": {**SMALL, "keep": 0.4, "order": 2},
    "drop": {**SMALL, "keep": 9, "rest": "drop"},
    "single": {"rank": 1, "block_size": 4, "cluster_size": 1, "keep": 2, "order": 2},
    "uncut": {"rank": 2, "block_size": 4, "cluster_size": 4, "keep": 6},
    "odd": {"rank": 2, "block_size": 6, "cluster_size": 3, "keep": 0.5, "order": 2},
}


def prepare(mechanism):
    """Maps that are not each other's."""
    with torch.no_grad():
        mechanism.basis.query_map.add_(0.3 * torch.randn(mechanism.basis.query_map.shape))


def naive(mechanism, query, key, value, mask, scale):
    b, h, n_q, _ = query.shape
    n_k = key.shape[2]
    output = torch.zeros(b, h, n_q, value.shape[-1], dtype=query.dtype)
    for sample in range(b):
        open_keys = [j for j in range(n_k) if mask.key_keep is None or mask.key_keep[sample, j]]
        for head in range(h):
            one = OneHead(mechanism, head, key[sample, head], value[sample, head], open_keys, mask)
            for i in range(n_q):
                output[sample, head, i] = one.attend(query[sample, head, i] * scale, i)
    return output


class OneHead:
    def __init__(self, mechanism, head, key, value, open_keys, mask):
        self.options, self.head, self.key, self.value, self.mask = mechanism, head, key, value, mask
        expand = (mechanism.num_heads, -1, -1)
        self.a_map = mechanism.basis.query_map.expand(expand)[head]
        self.b_map = mechanism.basis.key_map.expand(expand)[head]
        self.runs = {}  # open keys by run
        for j in open_keys:
            self.runs.setdefault(j // mechanism.block_size, []).append(j)

    def attend(self, q, i):
        mask = self.mask
        far, near, paid = self.places(i, mask)
        position = i + mask.query_offset
        seen = [j for run in near for j in self.runs.get(run, []) if allowed(position, j, mask)]
        budget, usable = self.options.keep, sum(len(self.runs.get(run, [])) for run in far) + paid
        if not isinstance(budget, int):
            budget = math.inf if budget == 1.0 else budget * usable - 1e-6
        if budget >= usable:
            seen, far = [j for run in (*far, *near) for j in self.runs.get(run, []) if allowed(position, j, mask)], []
        clusters = [cluster for run in far for cluster in self.cut(self.runs.get(run, [])) if cluster]
        clusters.sort(key=lambda cluster: self.moments(q, cluster)[2], reverse=True)
        own = max(math.ceil((budget - paid) / self.options.cluster_size), 0) if clusters else 0
        seen += [j for cluster in clusters[:own] for j in cluster]
        terms = [(naive_cap(q @ self.key[j], mask), self.value[j]) for j in seen]
        if self.options.rest == "keep":
            terms += [self.moments(q, cluster)[:2] for cluster in clusters[own:]]
        if not terms:
            return torch.zeros_like(self.value[0])
        logits, values = zip(*terms, strict=True)
        return naive_softmax(torch.stack(logits), mask, self.head) @ torch.stack(values)

    def places(self, i, mask):
        """Far runs, near runs, and the keys that near runs are paid for."""
        size, n_k = self.options.block_size, len(self.key)
        positioned = mask.causal or mask.window is not None
        block = (i + mask.query_offset) // size if positioned else 0
        queries = range(block * size, (block + 1) * size)
        far, near = [], []
        for run in range(math.ceil(n_k / size)):
            keys = range(run * size, (run + 1) * size)
            pairs = [not positioned or allowed(p, j, mask) for p in queries for j in keys]
            before = not mask.causal or run < block  # a run that ends with the query's own position is near as well
            if all(pairs) and before:
                far.append(run)
            elif any(pairs):
                near.append(run)
        return far, near, len(near) * size

    def cut(self, keys):
        """Members of each cluster of one run, by halving at medians; missing keys stand last."""
        size, slots = self.options.block_size, [keys + [None] * (self.options.block_size - len(keys))]
        axis = 0
        while size > self.options.cluster_size:
            halves = []
            for slot in slots:
                here = axis % self.b_map.shape[1]
                real = sorted(
                    (j for j in slot if j is not None), key=lambda j: (float(self.key[j] @ self.b_map[:, here]), j)
                )
                ordered = real + [None] * (len(slot) - len(real))
                halves += [ordered[: size // 2], ordered[size // 2 :]]
            slots, size, axis = halves, size // 2, axis + 1
        return [[j for j in slot if j is not None] for slot in slots]

    def moments(self, q, cluster):
        """Logit, value and rating of a cluster."""
        k, v = self.key[cluster], self.value[cluster]
        z, a = (k - k.mean(0)) @ self.b_map, q @ self.a_map
        mean = q @ k.mean(0)
        if self.mask.softcap is not None:  # deviations count as the cap leaves them at the mean
            a = a * (1 - torch.tanh(mean / self.mask.softcap) ** 2)
        logit, value, rating = naive_cap(mean, self.mask) + math.log(len(cluster)), v.mean(0), 0.0
        if self.options.order > 0:
            variance = a @ (z.T @ z) @ a / len(cluster)
            logit, rating = logit + (variance / 2).clamp(max=2.0), variance.sqrt()
        if self.options.order == 2:
            value = value + a @ (z.T @ v) / len(cluster)
        return logit, value, logit + rating


def allowed(position, j, mask):
    return (not mask.causal or j <= position) and (mask.window is None or abs(position - j) < mask.window)
