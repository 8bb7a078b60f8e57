"""`eigen_topk` written from its formula, one query at a time."""

import torch

from helpers import naive_cap

CASES = {
    "default": {},
    "drop": {"rest": "drop", "keep": 5},
    "mean": {"rest": "mean", "keep": 0.4, "rank": 3},
    "window": {"window": 2, "global_tokens": 1, "keep": 0.3, "select": "estimate", "chunk_size": 7},
    "heads": {"keep": [0.3, 6], "chunk_size": 7},
    "window_alone": {"window": 4, "keep": 1, "chunk_size": 5},
    "absolute": {"position_prior": "absolute", "share": "layer"},
    "relative": {"position_prior": "relative", "share": "model", "rest": "mean", "chunk_size": 10},
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
    bias = mask.finite_bias()
    bias = torch.zeros(b, h, n_q, n_k) if bias is None else bias.expand(b, h, n_q, n_k)
    output = torch.zeros(b, h, n_q, value.shape[-1], dtype=query.dtype)
    for s in range(b):
        for head in range(h):
            real = torch.ones(n_k, dtype=torch.bool) if mask.key_keep is None else mask.key_keep[s]
            one = OneHead(mechanism, head, query[s, head], key[s, head], value[s, head], mask, scale, real)
            output[s, head] = one.attend(keep[s, head], bias[s, head])
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

    def attend(self, keep, bias):
        output = torch.zeros(len(self.query), self.value.shape[-1], dtype=self.value.dtype)
        for i in range(len(self.query)):
            usable = keep[i].nonzero().flatten()
            if len(usable):
                output[i] = self.one_query(i, usable, bias[i, usable], self.choose(i, usable, bias[i, usable]))
        return output

    def estimate(self, i, usable, bias):
        position = i + self.mask.query_offset
        q, k = self.query[i], self.key[usable]
        mean = k.mean(0)
        low = (k - mean) @ self.b_map @ self.a_map.T @ q + mean @ q
        return naive_cap(self.scale * low + prior(self.options, self.head, position, usable), self.mask) + bias

    def choose(self, i, usable, bias):
        worth = self.estimate(i, usable, bias) + self.hidden[usable].log()
        worth[self.leading[usable] | self.near(i, usable)] = float("inf")
        budgets = self.options.budgets
        budget = budgets[self.head % len(budgets)]
        budget = budget if isinstance(budget, int) else max(1, round(budget * len(usable)))
        chosen = torch.zeros(len(usable), dtype=torch.bool)
        chosen[worth.argsort(descending=True)[: max(budget, int((worth == float("inf")).sum()))]] = True
        return chosen

    def near(self, i, keys):
        distance = (keys - i - self.mask.query_offset).abs()
        return (distance <= self.options.window) & (self.options.window > 0)

    def one_query(self, i, usable, bias, chosen):
        estimate = self.estimate(i, usable, bias)
        exact = naive_cap(self.scale * (self.key[usable] @ self.query[i]), self.mask) + bias
        weights = torch.where(chosen, exact.exp(), estimate.exp())
        if self.options.rest == "drop":
            weights[~chosen] = 0.0
        elif self.options.rest == "mean" and not chosen.all():
            weights[~chosen] = weights[~chosen].mean()
        sink = 0.0 if self.mask.sinks is None else self.mask.sinks[self.head].exp()
        return weights @ self.value[usable] / (weights.sum() + sink)


def prior(mechanism, head, position, usable):
    if mechanism.position_prior == "none":
        return 0.0
    entry = usable if mechanism.position_prior == "absolute" else usable - position + mechanism.max_length - 1
    table = mechanism.prior[head]
    return torch.stack([table[e] if 0 <= e < len(table) else table.new_zeros(()) for e in entry.tolist()])
