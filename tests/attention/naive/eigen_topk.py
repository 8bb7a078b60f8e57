"""`eigen_topk` written from its formula, one query at a time; with tiles, one block of queries chooses at a time."""

import math
from dataclasses import replace

import torch

TILES = {"block_size": 4, "keep": 0.4, "rank": 3}
POOLS_QUERIES = ("tiles", "tiles_first", "tiles_drop", "tiles_mean")

CASES = {
    "default": {},
    "drop": {"rest": "drop", "keep": 5},
    "mean": {"rest": "mean", "keep": 0.4, "rank": 3},
    "window": {"window": 2, "global_tokens": 1, "keep": 0.3, "select": "estimate", "chunk_size": 7},
    "window_alone": {"window": 4, "keep": 1, "chunk_size": 5, "scoring": "gather"},
    "absolute": {"position_prior": "absolute", "share": "layer", "scoring": "gather"},
    "relative": {"position_prior": "relative", "share": "model", "rest": "mean", "chunk_size": 10},
    "tiles": TILES,
    "tiles_first": {**TILES, "window": 2, "global_tokens": 3, "keep": 5, "block_size": 3, "position_prior": "relative"},
    "tiles_drop": {**TILES, "rest": "drop", "block_size": 5, "chunk_size": 10},
    "tiles_mean": {**TILES, "rest": "mean", "select": "estimate", "chunk_size": 8},
}


def prepare(mechanism):
    """A mean key and a prior that are not zero, and maps that are not each other's."""
    with torch.no_grad():
        for tensor in (mechanism.basis.query_map, mechanism.basis.key_mean, mechanism.prior):
            if tensor is not None:
                tensor.add_(0.3 * torch.randn(tensor.shape))


def naive(mechanism, query, key, value, mask, scale):
    b, h, n_q, _ = query.shape
    n_k = key.shape[-2]
    keep = mask.dense_keep(n_q, n_k, query.device)
    keep = torch.ones(b, h, n_q, n_k, dtype=torch.bool) if keep is None else keep.expand(b, h, n_q, n_k)
    apart = replace(mask, causal=False).dense_keep(n_q, n_k, query.device)  # what a probe may look at, if it is past
    apart = torch.ones(b, h, n_q, n_k, dtype=torch.bool) if apart is None else apart.expand(b, h, n_q, n_k)
    bias = mask.finite_bias()
    bias = torch.zeros(b, h, n_q, n_k) if bias is None else bias.expand(b, h, n_q, n_k)
    query_keep = mask.real_queries(n_q)
    query_keep = torch.ones(b, n_q, dtype=torch.bool) if query_keep is None else query_keep
    output = torch.zeros(b, h, n_q, value.shape[-1], dtype=query.dtype)
    for s in range(b):
        for head in range(h):
            real = torch.ones(n_k, dtype=torch.bool) if mask.key_keep is None else mask.key_keep[s]
            one = OneHead(mechanism, head, query[s, head], key[s, head], value[s, head], mask, scale, real)
            output[s, head] = one.attend(keep[s, head], apart[s, head], bias[s, head], query_keep[s])
    return output


class OneHead:
    def __init__(self, mechanism, head, query, key, value, mask, scale, real):
        self.leading = real.cumsum(0) <= mechanism.global_tokens
        self.options, self.head, self.mask, self.scale = mechanism, head, mask, scale
        self.query, self.key, self.value = query, key, value
        basis = mechanism.basis
        self.a_map = basis.query_map.expand(mechanism.num_heads, -1, -1)[head]
        self.b_map = basis.key_map.expand(mechanism.num_heads, -1, -1)[head]
        centred = key - basis.key_mean.repeat_interleave(mechanism.num_heads // len(basis.key_mean), 0)[head]
        self.hidden = (centred - centred @ self.b_map @ self.a_map.T).norm(dim=-1)
        if mechanism.select == "estimate":
            self.hidden = torch.ones_like(self.hidden)

    def attend(self, keep, apart, bias, query_keep):
        tiles = self.options.block_size is not None and self.options.keep != 1.0
        if tiles:
            chosen = self.choose_tiles(keep, apart, bias, query_keep)
        output = torch.zeros(len(self.query), self.value.shape[-1], dtype=self.value.dtype)
        for i in range(len(self.query)):
            usable = keep[i].nonzero().flatten()
            if len(usable):
                own = chosen[i, usable] if tiles else self.choose(i, usable, bias[i, usable])
                output[i] = self.one_query(i, usable, bias[i, usable], own)
        return output

    def estimate(self, i, usable, bias):
        position = i + self.mask.query_offset
        q, k = self.query[i], self.key[usable]
        mean = k.mean(0)
        low = (k - mean) @ self.b_map @ self.a_map.T @ q + mean @ q
        return self.scale * low + bias + prior(self.options, self.head, position, usable)

    def choose(self, i, usable, bias):
        worth = self.estimate(i, usable, bias) + self.hidden[usable].log()
        worth[self.leading[usable] | self.near(i, usable)] = float("inf")
        budget = self.options.keep
        budget = budget if isinstance(budget, int) else max(1, round(budget * len(usable)))
        chosen = torch.zeros(len(usable), dtype=torch.bool)
        chosen[worth.argsort(descending=True)[: max(budget, int((worth == float("inf")).sum()))]] = True
        return chosen

    def near(self, i, keys):
        distance = (keys - i - self.mask.query_offset).abs()
        return (distance <= self.options.window) & (self.options.window > 0)

    def always(self, i, keys):
        return (keys < self.options.global_tokens) | self.near(i, keys)

    def choose_tiles(self, keep, apart, bias, query_keep):
        """(n_q, n_k) bool. Blocks are cut over all positions; padding is in them but counts for nothing."""
        size, causal, offset = self.options.block_size, self.mask.causal, self.mask.query_offset
        (n_q, n_k), chosen = keep.shape, torch.zeros(keep.shape, dtype=torch.bool)
        b_q, b_k = min(size, n_q), min(size, n_k)
        blocks = [torch.arange(left, min(left + b_k, n_k)) for left in range(0, n_k, b_k)]
        for start in range(0, n_q, b_q):
            members = torch.arange(start, min(start + b_q, n_q))
            probes = range(start - b_q + 1, start + 1) if causal else members.tolist()
            at = start + offset
            first, usable, seen = [], [], 0
            for index, block in enumerate(blocks):
                if (causal and block[0] >= at + b_q) or not keep[members][:, block].any():
                    continue
                usable.append(index)
                seen += not causal or int(block[0]) <= at
                full = torch.arange(index * b_k, (index + 1) * b_k)
                places = [
                    self.always(i, full[full <= i + offset] if causal else full) for i in range(start, start + b_q)
                ]
                on_diagonal = causal and (index + 1) * b_k > at + 1
                if on_diagonal or any(bool(place.any()) for place in places):
                    first.append(index)
            far = [i for i in range(len(blocks)) if not causal or (i + 1) * b_k <= at + 1]
            worth = dict.fromkeys(range(len(blocks)), 0.0)
            for probe in probes:
                if far and 0 <= probe < n_q and query_keep[probe]:
                    self.add_worth(worth, probe, [blocks[i] for i in far], far, apart[probe], bias[probe])
            budget = self.options.keep
            budget = -(-budget // b_k) if isinstance(budget, int) else max(1, math.ceil(budget * seen - 1e-6))
            order = first + sorted((i for i in usable if i not in first), key=lambda i: -worth[i])
            for index in order[: max(budget, len(first))]:
                chosen[members[:, None], blocks[index]] = True
        return chosen

    def add_worth(self, worth, probe, blocks, far, apart, bias):
        """To every far tile, what leaving it at its estimates is expected to cost this query."""
        keys = torch.cat(blocks)
        keys = keys[apart[keys]]
        if len(keys):
            cost = self.estimate(probe, keys, bias[keys]).softmax(0) * self.hidden[keys]
            for i, block in zip(far, blocks, strict=True):
                worth[i] += float(cost[torch.isin(keys, block)].sum().detach())

    def one_query(self, i, usable, bias, chosen):
        estimate = self.estimate(i, usable, bias)
        exact = self.scale * (self.key[usable] @ self.query[i]) + bias
        weights = torch.where(chosen, exact.exp(), estimate.exp())
        if self.options.rest == "drop":
            weights[~chosen] = 0.0
        elif self.options.rest == "mean" and not chosen.all():
            weights[~chosen] = weights[~chosen].mean()
        if not weights.any():  # no usable key in the tiles of its block, and the rest dropped
            return torch.zeros_like(self.value[0])
        return weights @ self.value[usable] / weights.sum()


def prior(mechanism, head, position, usable):
    if mechanism.position_prior == "none":
        return 0.0
    entry = usable if mechanism.position_prior == "absolute" else usable - position + mechanism.max_length - 1
    table = mechanism.prior[head]
    return torch.stack([table[e] if 0 <= e < len(table) else table.new_zeros(()) for e in entry.tolist()])
