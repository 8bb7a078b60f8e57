"""`eigen_block` written from its formula, one query at a time."""

import math

import torch

POOLS_QUERIES = True
EXTRA_MASKS = False
BLOCKS = {"block_size": 4, "rank": 3}

CASES = {
    "default": {},
    "probes": {**BLOCKS, "keep": 0.3, "probes": 4},
    "small_blocks": {**BLOCKS, "keep": 0.3, "probes": 2},
    "order_0": {**BLOCKS, "order": 0, "keep": 4, "probes": 1},
    "order_1": {**BLOCKS, "order": 1, "keep": 0.3},
    "query_blocks": {**BLOCKS, "order": 2, "query_block_size": 8, "keep": 5, "probes": 4},
    "narrow_query_blocks": {"rank": 2, "block_size": 6, "query_block_size": 2, "keep": 1, "probes": 1},
    "always": {**BLOCKS, "neighbours": 1, "first_block": True, "keep": 0.5, "share": "layer"},
    "uneven": {"rank": 2, "block_size": 5, "query_block_size": 3, "keep": 0.4, "probes": 3, "order": 2},
}


def prepare(mechanism):
    """Maps that are not each other's, and a mean key that is not zero."""
    with torch.no_grad():
        for tensor in (mechanism.basis.query_map, mechanism.basis.key_mean):
            tensor.add_(0.3 * torch.randn(tensor.shape))


def naive(mechanism, query, key, value, mask, scale):
    b, h, n_q, _ = query.shape
    n_k = key.shape[2]
    key_keep = torch.ones(b, n_k, dtype=torch.bool) if mask.key_keep is None else mask.key_keep
    query_keep = mask.real_queries(n_q)
    query_keep = torch.ones(b, n_q, dtype=torch.bool) if query_keep is None else query_keep
    output = torch.zeros(b, h, n_q, value.shape[-1], dtype=query.dtype)
    for sample in range(b):
        for head in range(h):
            one = OneHead(mechanism, head, query[sample, head] * scale, key[sample, head], value[sample, head])
            output[sample, head] = one.attend(key_keep[sample], query_keep[sample], mask.causal, mask.query_offset)
    return output


class OneHead:
    def __init__(self, mechanism, head, query, key, value):
        self.options = mechanism
        self.query, self.key, self.value = query, key, value
        expand = (mechanism.num_heads, -1, -1)
        self.a_map = mechanism.basis.query_map.expand(expand)[head]
        self.b_map = mechanism.basis.key_map.expand(expand)[head]

    def attend(self, key_keep, query_keep, causal, offset):
        size = self.options.block_size
        query_size = self.options.query_block_size or size
        n_q, n_k = len(self.query), len(self.key)
        blocks = [[j for j in range(left, min(left + size, n_k)) if key_keep[j]] for left in range(0, n_k, size)]
        output = torch.zeros(n_q, self.value.shape[-1], dtype=self.value.dtype)
        for start in range(0, n_q, query_size):
            members = range(start, min(start + query_size, n_q))
            exact, far = self.choose(start, query_size, blocks, query_keep, causal, offset)
            for i in members:
                exact_keys = [j for block in exact for j in blocks[block] if not causal or j <= i + offset]
                if exact_keys or far:
                    output[i] = self.one_query(self.query[i], exact_keys, [blocks[block] for block in far])
        return output

    def one_query(self, q, exact_keys, far_blocks):
        weights = [(q @ self.key[j]).exp() for j in exact_keys]
        values = [self.value[j] for j in exact_keys]
        a = q @ self.a_map
        for block in far_blocks:
            k, v = self.key[block], self.value[block]
            z = (k - k.mean(0)) @ self.b_map
            exponent, mean = q @ k.mean(0), v.mean(0)
            if self.options.order > 0:
                mean = mean + a @ (z.T @ v) / len(block)
            if self.options.order == 2:
                exponent = exponent + (a @ (z.T @ z) @ a / len(block) / 2).clamp(max=2.0)
            weights.append(len(block) * exponent.exp())
            values.append(mean)
        weights = torch.stack(weights)
        return weights @ torch.stack(values) / weights.sum()

    def choose(self, start, query_size, blocks, query_keep, causal, offset):
        """The exact and the far blocks of the query block that begins at `start`."""
        size, options = self.options.block_size, self.options.selection
        first, last = start + offset, start + offset + query_size - 1  # positions, also of queries that are not there
        usable = [c for c, block in enumerate(blocks) if block and (not causal or c * size <= last)]
        past = [c for c in usable if not causal or (c + 1) * size - 1 <= first]
        positioned = causal or len(self.query) == len(self.key)
        always = set()
        for c in usable:
            near = c * size <= last + options.neighbours * size and (c + 1) * size > first - options.neighbours * size
            if (positioned and near) or c not in past or (options.first_block and c == 0):
                always.add(c)
        if isinstance(options.keep, int):
            budget = math.ceil(options.keep / size)
        else:
            seen = [c for c in usable if not causal or c * size <= first]
            budget = max(1, math.ceil(options.keep * len(seen) - 1e-6))
        mass = self.mass(start, query_size, blocks, past, query_keep, causal)
        order = sorted(past, key=lambda c: (c in always, mass.get(c, 0.0)), reverse=True)
        diagonal = [c for c in usable if c not in past]
        # The diagonal is paid for in full, also where the sequence ends before it does.
        paid = sum(c * size <= last and (c + 1) * size - 1 > first for c in range(last // size + 1)) if causal else 0
        exact = diagonal + order[: max(budget - paid, len(always) - len(diagonal))]
        return exact, [c for c in past if c not in exact]

    def mass(self, start, query_size, blocks, past, query_keep, causal):
        """Mean over the probes of their share of weight on each past block."""
        probe = math.ceil(query_size / self.options.probes)
        begin = start - query_size + 1 if causal else start
        shares = []
        for left in range(begin, begin + query_size, probe):
            members = [i for i in range(left, left + probe) if 0 <= i < len(self.query) and query_keep[i]]
            if members and past:
                q = self.query[members].mean(0)
                weights = torch.stack([(self.key[blocks[c]] @ q).exp().sum() for c in past])
                shares.append(weights / weights.sum())
        return dict(zip(past, torch.stack(shares).mean(0).tolist(), strict=True)) if shares else {}
