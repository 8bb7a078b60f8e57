"""eigen_row and dct against a reference written row by row from the formula, in float64."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, attention_options, build_attention
from approx_attn.attention.eigen.row import EigenRowAttention

B, H, D = 2, 2, 4

spec = importlib.util.spec_from_file_location("naive_row", Path(__file__).parents[1] / "naive" / "eigen_row.py")
naive_row = importlib.util.module_from_spec(spec)
spec.loader.exec_module(naive_row)


def reference(
    mechanism: EigenRowAttention, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> tuple[Tensor, Tensor]:
    """Output and reconstructed scores, row by row."""
    return naive_row.reconstruct(mechanism, query, key, value, mask or AttentionMask(), 1 / math.sqrt(D))


def build(
    max_length: int = 9, name: str = "eigen_row", dtype: torch.dtype = torch.float64, **options
) -> EigenRowAttention:
    mechanism = build_attention(name, num_heads=H, head_dim=D, max_length=max_length, **options)
    assert isinstance(mechanism, EigenRowAttention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the start, where the mean is zero and groups are alike
        for parameter in mechanism.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    mechanism.select_greedily()
    return mechanism.to(dtype)


def qkv(n_q: int, n_k: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    n_k = n_q if n_k is None else n_k
    return tuple(torch.randn(B, H, n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (n_q, n_k, n_k))


def padding(n: int) -> Tensor:
    keep = torch.ones(B, n, dtype=torch.bool)
    keep[0, n - 2 :] = False
    keep[1, 0] = False
    return keep


def masked_inputs(kind: str, n_q: int, n_k: int) -> AttentionMask:
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(1, H, n_q, n_k, generator=generator, dtype=torch.float64)
    bias[..., 3] = float("-inf")
    return {
        "none": AttentionMask(),
        "padding": AttentionMask(key_keep=padding(n_k)),
        "causal": AttentionMask(causal=True, query_offset=n_k - n_q),
        "causal padding": AttentionMask(key_keep=padding(n_k), causal=True, query_offset=n_k - n_q),
        "pairs": AttentionMask(pair_keep=torch.rand(B, 1, n_q, n_k, generator=generator) < 0.6),
        "bias": AttentionMask(bias=bias),
        "key bias": AttentionMask(bias=bias[:, :, :1]),
    }[kind]


MASKS = ["none", "padding", "causal", "causal padding", "pairs", "bias", "key bias"]


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("extras", [{}, {"window": 1}, {"global_tokens": 2, "selection": "greedy"}])
def test_equals_the_reference(mask_kind: str, extras: dict) -> None:
    mechanism = build(keep=0.34, rank=2, **extras)
    query, key, value = qkv(9)
    mask = masked_inputs(mask_kind, 9, 9)
    expected, _ = reference(mechanism, *cleared(query, key, value, mask), mask)
    output, _ = mechanism(query, key, value, mask)
    weighted, weights = mechanism(query, key, value, mask, need_weights=True)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weighted, expected, rtol=1e-9, atol=1e-10)
    with torch.no_grad():  # another form of the bias
        torch.testing.assert_close(mechanism(query, key, value, mask)[0], expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weights @ cleared(query, key, value, mask)[2], expected, rtol=1e-9, atol=1e-10)


def cleared(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor, Tensor]:
    if mask.key_keep is None:
        return query, key, value
    padded = ~mask.key_keep[:, None, :, None]
    return query, key.masked_fill(padded, 0.0), value.masked_fill(padded, 0.0)


@pytest.mark.parametrize("selection", ["strided", "random", "greedy"])
@pytest.mark.parametrize("share", ["head", "layer"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_selection_and_sharing(selection: str, share: str, causal: bool) -> None:
    mechanism = build(selection=selection, share=share, keep=3, rank=3, basis_init="random")
    query, key, value = qkv(9)
    mask = AttentionMask(causal=causal)
    assert len(mechanism.columns(9)) == 3
    torch.testing.assert_close(
        mechanism(query, key, value, mask)[0], reference(mechanism, query, key, value, mask)[0], rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize(("n_q", "n_k"), [(9, 9), (4, 7), (11, 5), (1, 9), (14, 14)])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"selection": "greedy"}])
@pytest.mark.parametrize("mask_kind", ["none", "causal"])
def test_lengths_other_than_learned(n_q: int, n_k: int, options: dict, mask_kind: str) -> None:
    mechanism = build(keep=0.5, rank=3, **options)
    query, key, value = qkv(n_q, n_k)
    mask = masked_inputs(mask_kind, n_q, n_k)
    torch.testing.assert_close(
        mechanism(query, key, value, mask)[0], reference(mechanism, query, key, value, mask)[0], rtol=1e-9, atol=1e-10
    )


def test_rows_are_processed_in_blocks_without_a_seam() -> None:
    """More queries than one block of any kind holds, with a window that crosses the seams."""
    for options in ({"window": 3}, {"window": 40}):
        mechanism = build(max_length=70, keep=0.1, rank=3, **options)
        query, key, value = qkv(70)
        mask = AttentionMask(causal=True, key_keep=padding(70))
        expected, _ = reference(mechanism, *cleared(query, key, value, mask), mask)
        torch.testing.assert_close(mechanism(query, key, value, mask)[0], expected, rtol=1e-9, atol=1e-10)


def test_row_form_is_attention_over_interpolated_keys() -> None:
    """Ŝ = s·Q·(R K_Ω)ᵀ + bias, with R from the constant column's flat prior; observed keys stay themselves."""
    mechanism = build(max_length=12, keep=4, rank=2)
    query, key, value = qkv(12)
    observed = list(mechanism.columns(12))
    outputs = []
    for h in range(H):
        position = mechanism.position
        basis = torch.cat([position.basis[h], torch.ones(12, 1, dtype=torch.float64)], dim=1)
        prior = torch.diag(F.pad(position.log_noise[h].exp() / position.log_eigenvalues[h].exp(), (0, 1)))
        seen = basis[observed]
        interpolation = basis @ torch.linalg.solve(seen.T @ seen + prior, seen.T)  # (n, m)
        keys = interpolation @ key[:, h, observed]
        bias = position.mean[h] - interpolation @ position.mean[h, observed]
        keys[:, observed], bias[observed] = key[:, h, observed], 0.0
        outputs.append(F.scaled_dot_product_attention(query[:, h], keys, value[:, h], attn_mask=bias.expand(B, 12, 12)))
    expected = torch.stack(outputs, dim=1)
    torch.testing.assert_close(mechanism(query, key, value)[0], expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(reference(mechanism, query, key, value)[0], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mask_kind", ["none", "padding", "causal", "bias"])
@pytest.mark.parametrize(
    "options", [{"keep": 1.0}, {"keep": 9}, {"keep": 2, "window": 8}, {"keep": 2, "global_tokens": 9}]
)
def test_all_observed_is_exact(mask_kind: str, options: dict) -> None:
    mechanism = build(rank=2, **options)
    exact = build_attention("exact", num_heads=H, head_dim=D)
    query, key, value = qkv(9)
    mask = masked_inputs(mask_kind, 9, 9)
    torch.testing.assert_close(mechanism(query, key, value, mask)[0], exact(query, key, value, mask)[0])


def test_rank_zero_is_the_mean_row_and_the_offset() -> None:
    mechanism = build(rank=0, keep=3)
    query, key, value = qkv(9)
    for mask in (AttentionMask(), AttentionMask(causal=True)):
        torch.testing.assert_close(
            mechanism(query, key, value, mask)[0], reference(mechanism, query, key, value, mask)[0]
        )


def test_interpolation_stretches_the_axis() -> None:
    mechanism = build(max_length=5, rank=2, keep=1.0, lengths="interpolate")
    prior, long = mechanism.position.prior(5), mechanism.position.prior(9)
    torch.testing.assert_close(long.mean[:, ::2], prior.mean)
    torch.testing.assert_close(long.factor[:, ::2], prior.factor)
    torch.testing.assert_close(long.factor[:, 1::2], (prior.factor[:, 1:] + prior.factor[:, :-1]) / 2)


@pytest.mark.parametrize("n", [1, 3, 9, 20])
@pytest.mark.parametrize("options", [{}, {"selection": "greedy"}, {"selection": "random"}])
def test_interpolated_lengths_run(n: int, options: dict) -> None:
    mechanism = build(lengths="interpolate", keep=0.5, rank=2, **options)
    output, weights = mechanism(*qkv(n), need_weights=True)
    assert len(mechanism.columns(n)) == max(1, round(0.5 * n))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, n, dtype=torch.float64))
    torch.testing.assert_close(mechanism(*qkv(n))[0], output)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"selection": "greedy"}, {"selection": "random"}])
def test_decoding_with_a_cache_equals_one_pass(options: dict) -> None:
    mechanism = build(keep=0.34, rank=2, causal=True, **options)
    query, key, value = qkv(13)  # also beyond what was learned
    whole, _ = mechanism(query, key, value, AttentionMask(causal=True))
    for stop in range(1, 14):
        mask = AttentionMask(causal=True, query_offset=stop - 1)
        step, _ = mechanism(query[:, :, stop - 1 : stop], key[:, :, :stop], value[:, :, :stop], mask)
        torch.testing.assert_close(step, whole[:, :, stop - 1 : stop])


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"rank": 0}])
@pytest.mark.parametrize("mask_kind", ["none", "padding", "causal", "pairs"])
def test_gradients(options: dict, mask_kind: str) -> None:
    mechanism = build(max_length=5, **{"keep": 3, "rank": 2, **options})
    mask = masked_inputs(mask_kind, 5, 5)
    names = [name for name, parameter in mechanism.position.named_parameters() if parameter.numel()]
    parameters = [getattr(mechanism.position, name).detach().clone().requires_grad_() for name in names]
    query, key, value = (x[:1, :, :, :].clone().requires_grad_() for x in qkv(5))
    mask = AttentionMask(
        key_keep=None if mask.key_keep is None else mask.key_keep[:1],
        causal=mask.causal,
        pair_keep=None if mask.pair_keep is None else mask.pair_keep[:1],
    )

    def run(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> Tensor:
        state = {f"position.{name}": v for name, v in zip(names, values, strict=True)}
        return torch.func.functional_call(mechanism, state, (query, key, value, mask))[0]

    assert torch.autograd.gradcheck(run, (query, key, value, *parameters), fast_mode=True)


def test_every_parameter_learns_from_the_output() -> None:
    for mask in (AttentionMask(), AttentionMask(causal=True)):
        mechanism = build(keep=0.34, rank=2)
        mechanism(*qkv(9), mask)[0].square().sum().backward()
        for name, parameter in mechanism.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"selection": "greedy"}])
def test_no_gradient_from_the_future(options: dict) -> None:
    mechanism = build(keep=0.34, rank=2, causal=True, **options)
    query, key, value = (x.requires_grad_() for x in qkv(9))
    output, _ = mechanism(query, key, value, AttentionMask(causal=True))
    for i in range(9):
        gradients = torch.autograd.grad(output[:, :, i].sum(), (key, value), retain_graph=True)
        assert all(bool((g[:, :, i + 1 :] == 0).all()) for g in gradients)


@pytest.mark.parametrize("options", [{}, {"window": 1}])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(options: dict, causal: bool) -> None:
    mechanism = build(keep=3, rank=2, **options)
    query, key, value = qkv(6)
    mask = AttentionMask(causal=causal)
    alone, _ = mechanism(query, key, value, mask)
    key_keep = F.pad(torch.ones(B, 6, dtype=torch.bool), (0, 3))
    padded = [F.pad(x, (0, 0, 0, 3), value=float("nan")) for x in (key, value)]
    output, _ = mechanism(F.pad(query, (0, 0, 0, 3)), *padded, AttentionMask(key_keep=key_keep, causal=causal))
    torch.testing.assert_close(output[:, :, :6], alone)


@pytest.mark.parametrize("options", [{}, {"window": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_usable_keys(options: dict, dtype: torch.dtype) -> None:
    mechanism = build(keep=3, rank=2, dtype=torch.float32, **options)
    query, key, value = (x.requires_grad_() for x in qkv(9, dtype=dtype))
    key_keep = torch.ones(B, 9, dtype=torch.bool)
    key_keep[0] = False
    output, _ = mechanism(query, key, value, AttentionMask(key_keep=key_keep))
    assert bool((output[0] == 0).all())
    assert bool(output.isfinite().all())
    output.float().square().sum().backward()
    for tensor in (query, key, value, *mechanism.parameters()):
        assert bool(tensor.grad.isfinite().all())


def test_row_with_no_evidence_falls_back_to_the_mean() -> None:
    mechanism = build(keep=2, rank=2)
    query, key, value = qkv(9)
    pair_keep = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    pair_keep[..., list(mechanism.columns(9))] = False
    _, weights = mechanism(query, key, value, AttentionMask(pair_keep=pair_keep), need_weights=True)
    expected = mechanism.position.mean.masked_fill(~pair_keep[0, 0, :1], float("-inf")).softmax(-1)  # (h, n)
    torch.testing.assert_close(weights, expected[None, :, None].expand(B, H, 9, 9))


def test_low_precision_stays_near_the_reference() -> None:
    mechanism = build(max_length=32, keep=0.25, rank=4)
    query, key, value = qkv(32)
    for mask in (AttentionMask(), AttentionMask(causal=True)):
        expected, _ = reference(mechanism, query, key, value, mask)
        single = build(max_length=32, keep=0.25, rank=4, dtype=torch.float32)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            inputs = [x.to(dtype) for x in (query, key, value)]
            output, _ = single(*inputs, mask)
            assert output.dtype == dtype
            assert (output.double() - expected).norm() / expected.norm() < tolerance
            with torch.autocast("cpu", torch.bfloat16):
                output, _ = single(*inputs, mask)
            assert (output.double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("causal", [False, True])
def test_auxiliary_loss(causal: bool) -> None:
    mechanism = build(keep=0.34, rank=2, auxiliary_loss_weight=2.0)
    query, key, value = qkv(9)
    mask = AttentionMask(causal=causal, key_keep=padding(9))
    torch.manual_seed(0)
    losses = []
    for _ in range(200):
        mechanism(query, key, value, mask)
        losses.append(mechanism.auxiliary_loss)
    clean = cleared(query, key, value, mask)
    _, scores = reference(mechanism, *clean, mask)
    exact = clean[0] @ clean[1].transpose(-2, -1) / math.sqrt(D)
    keep = mask.dense_keep(9, 9, query.device).expand_as(scores)
    expected = 2.0 * (scores - exact)[keep].square().mean()
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=0.05, atol=0.0)
    losses[0].backward()
    assert mechanism.position.basis.grad.abs().max() > 0
    mechanism.eval()
    mechanism(query, key, value, mask)
    assert mechanism.auxiliary_loss is None


def test_share_model_ties_layers() -> None:
    first, second = (build(share="model", rank=2, selection="greedy") for _ in range(2))
    second.tie_to(first)
    assert second.position is first.position
    assert first.position.mean.shape[0] == 1
    alone = build(share="layer", rank=2)
    alone.tie_to(first)
    assert alone.position is not first.position


def test_train_basis_false_freezes() -> None:
    assert not any(p.requires_grad for p in build(train_basis=False).parameters())
    assert all(p.requires_grad for p in build().parameters())


def test_loading_a_basis() -> None:
    mechanism = build(rank=2, selection="greedy")
    fitted = torch.arange(9.0), torch.randn(9, 2), torch.tensor([2.0, 1.0]), torch.tensor([0.5])
    mean, basis, eigenvalues, noise = fitted[0][None], fitted[1][None], fitted[2][None], fitted[3]
    mechanism.load_position_basis(mean, basis, eigenvalues, noise)
    torch.testing.assert_close(mechanism.position.basis, basis.double().expand(H, 9, 2))
    torch.testing.assert_close(mechanism.position.log_eigenvalues.exp(), eigenvalues.double().expand(H, 2))
    before = {k: v.clone() for k, v in mechanism.state_dict().items()}
    with pytest.raises(ValueError, match=r"basis .*\(1, 8, 2\).*\(2, 9, 2\)"):
        mechanism.load_position_basis(mean + 1, basis[:, :8], eigenvalues, noise)
    with pytest.raises(ValueError, match=r"mean .*\(3, 9\).*\(2, 9\)"):
        mechanism.load_position_basis(mean.expand(3, 9), basis, eigenvalues, noise)
    with pytest.raises(ValueError, match=r"noise .*finite"):
        mechanism.load_position_basis(mean + 1, basis, eigenvalues, noise * float("nan"))
    with pytest.raises(ValueError, match=r"eigenvalues .*negative"):
        mechanism.load_position_basis(mean + 1, basis, -eigenvalues, noise)
    assert all(torch.equal(v, before[k]) for k, v in mechanism.state_dict().items())


def test_greedy_columns_travel_with_the_state() -> None:
    source, target = (
        build(rank=2, selection="greedy"),
        build_attention("eigen_row", num_heads=H, head_dim=D, max_length=9, rank=2, selection="greedy").double(),
    )
    target.load_state_dict(source.state_dict())
    assert target.columns(9) == source.columns(9)
    torch.testing.assert_close(target(*qkv(9))[0], source(*qkv(9))[0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": 0.0}, "attention.keep"),
        ({"keep": 1.5}, "attention.keep"),
        ({"rank": 4, "keep": 3}, "attention.rank=4 .*attention.keep"),
        ({"rank": 8, "keep": 0.25}, "attention.rank=8 .*attention.keep"),
        ({"rank": -1}, "attention.rank"),
        ({"selection": "best"}, "attention.selection .*strided, random, greedy"),
        ({"share": "all"}, "attention.share"),
        ({"lengths": "cut"}, "attention.lengths"),
        ({"basis_init": "pca"}, "attention.basis_init"),
        ({"basis_init": "calibrated"}, "attention.basis"),
        ({"window": -1}, "attention.window"),
        ({"global_tokens": -1}, "attention.global_tokens"),
        ({"auxiliary_loss_weight": -1.0}, "attention.auxiliary_loss_weight"),
        ({"max_length": None}, "max_length"),
    ],
)
def test_bad_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_attention("eigen_row", **{"num_heads": H, "head_dim": D, "max_length": 9, **options})


@pytest.mark.parametrize("max_length", [1, 2, 5, 65])
def test_defaults_fit_any_length(max_length: int) -> None:
    for name in ("eigen_row", "dct"):
        for causal in (False, True):
            mechanism = build_attention(name, num_heads=H, head_dim=D, max_length=max_length, causal=causal).double()
            assert mechanism(*qkv(max_length), AttentionMask(causal=causal))[0].isfinite().all()
    assert mechanism.rank == min(8, max(1, round(max_length / 4)))


def test_dct_learns_nothing_and_is_eigen_row() -> None:
    dct = build_attention("dct", num_heads=H, head_dim=D, max_length=9).double()
    assert not any(p.requires_grad for p in dct.parameters())
    row = build_attention("eigen_row", num_heads=H, head_dim=D, max_length=9).double()
    torch.testing.assert_close(dct(*qkv(9))[0], row(*qkv(9))[0])
    assert set(attention_options("dct")) < set(attention_options("eigen_row"))


def test_a_smooth_row_is_recovered_from_a_quarter_of_the_keys() -> None:
    """Planted truth: rows that lie in the span of the basis are reconstructed as the noise goes to zero."""
    n, r = 32, 4
    mechanism = build_attention("eigen_row", num_heads=1, head_dim=r, max_length=n, keep=0.25, rank=r).double()
    key = mechanism.position.basis.detach()[None]  # (1, 1, n, r): every row of scores is in the span
    query = torch.randn(1, 1, n, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.randn(1, 1, n, r, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        mechanism.position.log_noise.fill_(math.log(1e-10))
    expected = F.scaled_dot_product_attention(query, key, value)
    for mask in (AttentionMask(), AttentionMask(bias=torch.zeros(1, 1, n, n, dtype=torch.float64))):
        torch.testing.assert_close(mechanism(query, key, value, mask)[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"share": "layer"}, {"window": 4}, {"rank": 0}])
@pytest.mark.parametrize("causal", [False, True])
def test_cost_counts_what_is_multiplied(options: dict, causal: bool) -> None:
    n = 40
    mechanism = build_attention("eigen_row", num_heads=H, head_dim=D, max_length=n, causal=causal, **options).double()
    query, key, value = (torch.randn(1, H, n, D, dtype=torch.float64) for _ in range(3))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mechanism(query, key, value, AttentionMask(causal=causal))
    cost = mechanism.cost(n)
    groups, r = mechanism.position.mean.shape[0], mechanism.rank
    systems = n if options.get("window") else len(mechanism.columns(n)) if causal else 1
    solves = groups * r**3 * systems  # which are not products that the counter sees
    counted = counter.get_total_flops() / 2
    assert counted == pytest.approx(cost.multiply_adds - solves, rel=0.02)


def test_cost_counts_exact_pairs() -> None:
    n = 12
    for options, causal in itertools.product(({}, {"window": 2}, {"global_tokens": 3}), (False, True)):
        mechanism = build(max_length=n, causal=causal, **options)
        columns = set(mechanism.columns(n))
        pairs = sum(
            1
            for i in range(n)
            for j in range(n if not causal else i + 1)
            if j in columns or abs(i - j) <= options.get("window", -1)
        )
        cost = mechanism.cost(n)
        assert cost.exact_pairs == H * pairs
        assert cost.total_pairs == H * (n * (n + 1) // 2 if causal else n * n)


@pytest.mark.parametrize("options", [{}, {"selection": "random", "window": 1}])
@pytest.mark.parametrize("causal", [False, True])
def test_compiles(options: dict, causal: bool) -> None:
    torch.compiler.reset()  # what other tests compiled of the same frame counts towards its limit
    mechanism = build(rank=2, **options)
    mask = AttentionMask(causal=causal)
    compiled = torch.compile(mechanism, backend="eager", fullgraph=True)
    for length in (9, 7):  # the second makes the compiler try a symbolic length
        torch.testing.assert_close(compiled(*qkv(length), mask)[0], mechanism(*qkv(length), mask)[0])
