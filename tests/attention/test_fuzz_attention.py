"""Whatever the options, shapes and masks: what every mechanism keeps, or refuses in a sentence.

`test_contract.py` tries chosen cases against references; here hypothesis draws them. A mechanism enters by
existing; an option with a name that is new needs an entry in `OPTIONS`.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism, attention_options, available_attention
from approx_attn.attention.registry import attention_class, build_attention

counts = st.integers(1, 40)
shares = st.floats(0.01, 1.0)
seeds = st.integers(0, 5)
rank = st.integers(1, 12)
rank_or_none = st.none() | rank

# What an option takes, by its name; by mechanism and name where mechanisms differ.
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "alignment": st.sampled_from(["absolute", "relative"]),
    "auxiliary_loss_weight": st.sampled_from([0.0, 0.5]),
    "basis": st.none(),
    "basis_init": st.just("random"),
    "bits": st.integers(1, 40),
    "block_size": st.integers(1, 20),
    "chunk_size": st.integers(1, 40),
    "cluster_size": st.sampled_from([1, 2, 3, 4, 8]),
    "compress_size": st.integers(1, 8),
    "closed_offsets": st.lists(st.integers(-3, 3), max_size=3),
    "conv_kernel": st.none() | st.sampled_from([1, 3, 5]),
    "coordinates": st.none(),
    "factor_rank": st.integers(1, 6),
    "freeze_step": st.none() | st.integers(0, 2),
    "gaussian_heads": st.none() | st.integers(1, 4),
    "global_tokens": st.integers(0, 6),
    "grid_width": st.none() | st.integers(1, 7),
    "in_training": st.sampled_from(["chosen", "exact"]),
    "initial_open": st.floats(0.1, 0.95),
    "iterations": st.integers(1, 5),
    "keep": shares | counts,
    "lengths": st.sampled_from(["truncate", "interpolate"]),
    "lr_multiplier": st.floats(0.1, 30.0),
    "noise": st.sampled_from(["shared", "position"]),
    "num_clusters": st.integers(1, 20),
    "num_features": st.none() | st.integers(1, 20),
    "num_keys": shares | counts,
    "num_landmarks": st.integers(1, 40),
    "order": st.integers(0, 2),
    "orthogonal": st.booleans(),
    "penalty": st.floats(0.0, 1.0),
    "pinv_iterations": st.integers(1, 8),
    "position_prior": st.sampled_from(["none", "absolute", "relative"]),
    "random_blocks": st.integers(0, 3),
    "rank": rank,
    "redraw_interval": st.none() | st.integers(1, 3),
    "rest": st.sampled_from(["keep", "mean", "drop"]),
    "seed": seeds,
    "select": st.sampled_from(["error", "estimate"]),
    "selection": st.sampled_from(["strided", "random"]),
    "share": st.sampled_from(["head", "layer", "model"]),
    "sigma": st.none() | st.floats(0.1, 20.0),
    "stride": st.sampled_from([1, 2, 3]),
    "temperature": st.floats(0.2, 2.0),
    "train_basis": st.booleans(),
    "train_sigma": st.booleans(),
    "trainable": st.booleans(),
    "window": st.integers(0, 8),
    "eigen_row.rank": rank_or_none,
    "eigen_row.selection": st.sampled_from(["strided", "random", "greedy"]),
    "eigen_row.basis_init": st.sampled_from(["dct", "random"]),
    "eigen_matrix.rank": rank_or_none,
    "eigen_matrix.selection": st.sampled_from(["rows_and_columns", "random", "greedy"]),
    "eigen_cluster.block_size": st.sampled_from([2, 4, 6, 8, 12, 16, 24]),
    "dct.rank": rank_or_none,
    "dct.selection": st.sampled_from(["strided", "random", "greedy"]),
    "linformer.share": st.sampled_from(["none", "heads", "key_value", "layer"]),
    "low_rank_topk.basis": st.sampled_from(["running", "input"]),
    "mra.rest": st.sampled_from(["coarse", "drop"]),
    "nsa.block_size": st.sampled_from([4, 8, 12]),
    "nsa.compress_size": st.sampled_from([2, 4]),
    "scatterbrain.window": st.none() | st.integers(0, 8),
    "sliding_window.window": st.none() | st.integers(0, 8),
}

COMPILED = ("eigen_cluster",)  # run kernels of their own in float32


@dataclass(repr=False)
class Problem:
    """A mechanism with queries, keys, values and a mask."""

    words: dict[str, Any]  # what it was drawn from
    mechanism: AttentionMechanism
    tensors: tuple[Tensor, Tensor, Tensor]
    mask: AttentionMask
    lengths: list[int] | None  # real tokens of each sample, where the mask is one of right padding

    def __repr__(self) -> str:
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        masks = [key for key, part in vars(self.mask).items() if part is not None and part is not False]
        where = f"offset {self.mask.query_offset} window {self.mask.window}"
        return f"{self.words} {shapes} {self.tensors[0].dtype} {masks} {where} {self.lengths}"


def option_values(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options of a mechanism, set."""
    known = {key: OPTIONS.get(f"{name}.{key}", OPTIONS.get(key)) for key in attention_options(name)}
    assert None not in known.values(), f"{name} has an option that OPTIONS does not know: {known}"
    return st.fixed_dictionaries({}, optional=known)  # type: ignore[arg-type]


@st.composite
def problems(draw: st.DrawFn, name: str) -> Problem | str:
    """A problem, or the sentence with which the mechanism refuses it."""
    can = attention_class(name).capabilities
    heads, dim, value_dim = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    batch, n_q = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    n_k = draw(st.integers(1, 40)) if can.cross and draw(st.booleans()) else n_q
    max_length = draw(st.integers(1, 32)) if can.variable_length else max(n_q, n_k)
    causal = can.causal and draw(st.booleans())
    shape = {
        "num_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([h for h in range(1, heads + 1) if heads % h == 0])),
        "head_dim": dim,
        "value_dim": value_dim,
        "max_length": max_length,
        "causal": causal,
        "layer_index": draw(st.integers(0, 2)),
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype, scale = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from([1.0, 1e-3, 30.0]))
    options = draw(option_values(name))
    torch.manual_seed(0)
    try:
        mechanism = build_attention(name, **shape, **options).to(dtype)
    except ValueError as error:
        return str(error)
    with torch.no_grad():
        for parameter in mechanism.parameters():  # as training might leave them
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def normal(n: int, h: int, d: int) -> Tensor:
        return torch.randn(batch, h, n, d, generator=generator, dtype=torch.float64).to(dtype)

    kv = mechanism.num_key_value_heads
    tensors = (scale * normal(n_q, heads, dim), normal(n_k, kv, dim), normal(n_k, kv, value_dim))
    mask, lengths = AttentionMask(), None
    if can.padding_mask and draw(st.booleans()):
        if n_q == n_k and draw(st.booleans()):
            lengths = draw(st.lists(st.integers(0, n_k), min_size=batch, max_size=batch))
            keep = torch.arange(n_k) < torch.tensor(lengths)[:, None]
            mask = replace(mask, key_keep=keep, query_keep=keep)
        else:
            mask = replace(mask, key_keep=torch.rand(batch, n_k, generator=generator) < draw(st.floats(0.0, 1.0)))
    if causal:
        offset = draw(st.sampled_from([0, n_k - n_q])) if can.cross else 0
        mask = replace(mask, causal=True, query_offset=offset)
    if can.window and draw(st.booleans()):
        mask = replace(mask, window=draw(st.integers(1, 40)))
    if can.arbitrary_mask and draw(st.booleans()):
        pairs = torch.rand(draw(st.sampled_from([1, batch])), 1, n_q, n_k, generator=generator)
        mask = replace(mask, pair_keep=pairs < draw(st.floats(0.0, 1.0)))
    if can.arbitrary_mask and draw(st.booleans()):
        bias = torch.randn(1, heads, n_q, n_k, generator=generator, dtype=torch.float64).to(dtype)
        mask = replace(mask, bias=bias.masked_fill(bias > 1.5, float("-inf")))
    if can.softcap and draw(st.booleans()):
        mask = replace(mask, softcap=draw(st.sampled_from([0.5, 5.0])))
    if can.sinks and draw(st.booleans()):
        mask = replace(mask, sinks=torch.randn(heads, generator=generator, dtype=torch.float64).to(dtype))
    return Problem({"name": name, **shape, **options, "scale": scale}, mechanism, tensors, mask, lengths)


def solve(problem: Problem, *tensors: Tensor, mask: AttentionMask | None = None) -> Tensor:
    return problem.mechanism(*(tensors or problem.tensors), problem.mask if mask is None else mask)[0]


def check_refusal(message: str) -> None:
    assert message.startswith(("attention.", "attention=")), message
    assert "\n" not in message


def check_everything(problem: Problem | str, row: int) -> None:
    """All that holds for any mechanism, on one problem; `row` picks a query."""
    if isinstance(problem, str):
        return check_refusal(problem)
    query, key, value = problem.tensors
    (batch, heads, n_q, _), n_k = query.shape, key.shape[-2]
    problem.mechanism.eval()
    try:
        output = solve(problem)
    except ValueError as error:  # an option that does not go with this mask
        return check_refusal(str(error))
    assert output.shape == (batch, heads, n_q, value.shape[-1])
    assert output.dtype == query.dtype
    assert output.isfinite().all(), "output"
    keep = problem.mask.dense_keep(n_q, n_k, query.device)
    if keep is not None:
        blind = ~keep.expand(batch, heads, n_q, n_k).any(-1)
        assert (output[blind] == 0).all(), "a query without a key gives zeros"
    if query.dtype == torch.float32 and problem.words["name"] in COMPILED:
        check_precision(problem, output)
    if query.dtype == torch.float64:  # in float32 a near tie may be decided otherwise
        check_padding(problem, output)
        check_batch_invariance(problem, output)
    check_weights(problem, output)
    check_gradients(problem, row % n_q)  # last: training may move statistics
    return None


def check_gradients(problem: Problem, row: int) -> None:
    """Finite everywhere, and zero from what a causal mask hides."""
    query, key, value = (tensor.clone().requires_grad_() for tensor in problem.tensors)
    problem.mechanism.train()
    output = solve(problem, query, key, value)
    inputs = [query, key, value]
    if problem.mask.causal and output.requires_grad:
        position = row + problem.mask.query_offset
        grads = torch.autograd.grad(output[:, :, row].sum(), inputs, retain_graph=True, allow_unused=True)
        for gradient, ahead in zip(grads, (row, position, position), strict=True):
            if gradient is not None:
                hidden = gradient[:, :, max(ahead + 1, 0) :]
                assert (hidden == 0).all(), f"gradient of output {row} from later inputs"
    loss = output.square().sum()
    if problem.mechanism.auxiliary_loss is not None:
        loss = loss + problem.mechanism.auxiliary_loss
    if loss.requires_grad:
        loss.backward()
    for name, tensor in [("input", x) for x in inputs] + list(problem.mechanism.named_parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all(), f"gradient of {name}"


def check_precision(problem: Problem, output: Tensor) -> None:
    """A compiled kernel against PyTorch's operators in float64."""
    double = replace(problem, mechanism=copy.deepcopy(problem.mechanism).double())
    expected = solve(double, *(x.double() for x in problem.tensors))
    assert (output.double() - expected).norm() <= 1e-3 * expected.norm(), "float32 and float64"


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{what}: {text}")


def check_padding(problem: Problem, output: Tensor) -> None:
    """What stands in the padding plays no part; padded equals unpadded."""
    mask = problem.mask
    if mask.key_keep is None:
        return
    query, key, value = problem.tensors
    padded = ~mask.key_keep[:, None, :, None]
    key, value = (x.masked_fill(padded, float("nan")) for x in (key, value))
    if mask.query_keep is not None:
        query = query.masked_fill(~mask.query_keep[:, None, :, None], float("nan"))
    got = solve(problem, query, key, value)
    real = torch.ones(output.shape[0], output.shape[2], dtype=torch.bool)
    real = (real if mask.query_keep is None else mask.query_keep)[:, None, :, None]
    close(got.masked_fill(~real, 0.0), output.masked_fill(~real, 0.0), "garbage in the padding")
    if problem.lengths is None or mask.pair_keep is not None or mask.bias is not None:
        return
    if problem.words.get("lengths") == "interpolate":
        return  # a basis stretched to the number of keys given, padding among them, as documented
    for sample, length in enumerate(problem.lengths):
        if length and mask.query_offset == 0:
            alone = (x[sample : sample + 1, :, :length] for x in problem.tensors)
            short = solve(problem, *alone, mask=replace(mask, key_keep=None, query_keep=None))
            close(output[sample : sample + 1, :, :length], short, "padded and unpadded")


def check_batch_invariance(problem: Problem, output: Tensor) -> None:
    mask = problem.mask

    def first(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None else tensor[:1]

    one = replace(
        mask,
        key_keep=first(mask.key_keep),
        query_keep=first(mask.query_keep),
        pair_keep=first(mask.pair_keep),
        bias=first(mask.bias),
    )
    close(solve(problem, *(x[:1] for x in problem.tensors), mask=one), output[:1], "alone and in a batch")


def check_weights(problem: Problem, output: Tensor) -> None:
    if not problem.mechanism.capabilities.returns_weights:
        return
    again, weights = problem.mechanism(*problem.tensors, problem.mask, need_weights=True)
    sums = weights.sum(-1)
    expected = (weights != 0).any(-1).to(sums.dtype)
    if problem.mask.sinks is None:
        torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-3, msg="rows of weights sum to one")
    assert (sums <= expected + 1e-3).all(), "with sinks to less"
    torch.testing.assert_close(again, output, rtol=1e-3, atol=1e-3, msg="output with and without weights")


def fuzz(name: str, examples: int) -> None:
    """The same problems every time: what fails is a change's doing, never chance."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(problem=problems(name), row=st.integers(0, 39))
    def run(problem: Problem | str, row: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_everything(problem, row)

    run()


@pytest.mark.parametrize("name", [n for n in available_attention() if attention_class(n).capabilities.cross])
def test_more_queries_than_keys_of_which_none_is_usable(name: str) -> None:
    """Found by drawing: under a causal mask the last queries stand beyond all keys."""
    can = attention_class(name).capabilities
    if can.padding_mask and can.causal:
        torch.manual_seed(0)
        mechanism = build_attention(name, num_heads=1, head_dim=4, max_length=8, causal=True).eval()
        mask = AttentionMask(key_keep=torch.zeros(1, 3, dtype=torch.bool), causal=True)
        tensors = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
        output, weights = mechanism(*tensors, mask, need_weights=can.returns_weights)
        assert (output == 0).all()
        assert weights is None or (weights == 0).all()


@pytest.mark.parametrize("name", available_attention())
def test_any_problem(name: str) -> None:
    fuzz(name, examples=12)


@pytest.mark.slow
@pytest.mark.parametrize("name", available_attention())
def test_many_problems(name: str) -> None:
    fuzz(name, examples=150)
