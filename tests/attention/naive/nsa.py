"""Native sparse attention, query by query: three softmaxes from their formulas, summed by their gates."""

import math
from types import SimpleNamespace

import torch

from helpers import naive_reference

CASES = {
    "small": {"keep": 0.5, "block_size": 4, "compress_size": 4, "stride": 2},
    "count": {"keep": 9, "block_size": 2, "compress_size": 2, "stride": 1},
    "many": {"keep": 0.9, "block_size": 3, "compress_size": 3, "stride": 3},
}
BFLOAT16_TOLERANCE = 0.3  # nearly equal blocks change places


def prepare(mechanism):
    for parameter in mechanism.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def compressed(phi, x):
    """One vector for the `size` consecutive ones of x (size, d)."""
    hidden = phi.hidden.weight @ (x + phi.position).flatten() + phi.hidden.bias
    return x.mean(0) + phi.out.weight @ torch.nn.functional.gelu(hidden) + phi.out.bias


def choose(mechanism, probability, blocks, position, causal):
    """The blocks of one query, from the probabilities of compressed keys by their first position."""
    size, stride = mechanism.block_size, mechanism.stride
    score = {}
    for number in blocks:
        score[number] = 0.0
        for cell in range(number * size, (number + 1) * size, stride):
            score[number] += sum(p for t, p in probability.items() if t <= cell < t + mechanism.compress_size)
    usable = {number: keys for number, keys in blocks.items() if not causal or number * size <= position}
    own = position // size
    for number in usable:
        if number in (min(blocks), own - 1, own) or (number == own + 1 and not causal):
            score[number] = math.inf
    keep = mechanism.keep
    if isinstance(keep, int):
        count = math.ceil((keep - keep // 3) / size)
    else:
        count = math.ceil(keep * 2 / 3 * len(usable) - 1e-9)
    return sorted(usable, key=lambda number: -score[number])[: max(count, 4 if causal else 5)]


def naive(mechanism, query, key, value, mask, scale):
    keep, n_k = mechanism.keep, key.shape[-2]
    share = keep / 3 if isinstance(keep, float) else max(1, keep // 3)
    window = SimpleNamespace(global_tokens=0, random=SimpleNamespace(count=0), num_heads=mechanism.num_heads)
    window.window = SimpleNamespace(budget=share, half_width=None)
    near = naive_reference("sliding_window").naive(window, query, key, value, mask, scale)
    output = torch.zeros_like(near)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        q, k, v, position = query[b, h, i], key[b, h], value[b, h], i + mask.query_offset
        kept = range(n_k) if mask.key_keep is None else mask.key_keep[b].nonzero()[:, 0].tolist()
        starts = range(0, n_k - mechanism.compress_size + 1, mechanism.stride)
        runs = {t: list(range(t, t + mechanism.compress_size)) for t in starts}
        runs = {t: run for t, run in runs.items() if set(run) <= set(kept) and (not mask.causal or run[-1] <= position)}
        parts, probability = [torch.zeros_like(v[0]) for _ in range(2)], {}
        if runs:
            keys = torch.stack([compressed(mechanism.compress_key, k[run]) for run in runs.values()])
            values = torch.stack([compressed(mechanism.compress_value, v[run]) for run in runs.values()])
            weights = torch.softmax(scale * keys @ q, dim=0)
            parts[0], probability = weights @ values, dict(zip(runs, weights.tolist(), strict=True))
        blocks = {}
        for j in kept:
            blocks.setdefault(j // mechanism.block_size, []).append(j)
        chosen = choose(mechanism, probability, blocks, position, mask.causal)
        seen = [j for number in chosen for j in blocks[number] if not mask.causal or j <= position]
        if seen:
            parts[1] = torch.softmax(scale * k[seen] @ q, dim=0) @ v[seen]
        gates = torch.sigmoid(mechanism.gate_weight[h] @ q + mechanism.gate_bias[h])
        output[b, h, i] = gates[0] * parts[0] + gates[1] * parts[1] + gates[2] * near[b, h, i]
    return output
