"""Loki: its principal directions, where they come from, and what the choice costs."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.baselines.low_rank_topk import key_scatter, principal_directions
from helpers import assert_cost_is_performed


def build(**options):
    return build_attention("low_rank_topk", **{"num_heads": 2, "head_dim": 6, **options}).double()


def draw(n_q=14, n_k=14, dim=6):
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    return [torch.randn(3, 2, n, dim, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k)]


def test_directions_are_those_of_scikit_learn():
    _, key, _ = draw()
    key_keep = torch.arange(14) < torch.tensor([14, 9, 14])[:, None]
    scatter, count = key_scatter(key, key_keep)
    found = principal_directions(scatter / count, 3)
    for b, length in enumerate((14, 9, 14)):
        expected = torch.from_numpy(PCA(3).fit(key[b, 1, :length].numpy()).components_)
        torch.testing.assert_close((found[b, 1].T @ expected.T).abs(), torch.eye(3, dtype=torch.float64))


def test_full_rank_chooses_as_topk_does():
    tensors = draw()
    expected, _ = build_attention("topk", num_heads=2, head_dim=6, keep=5)(*tensors)
    torch.testing.assert_close(build(rank=6, keep=5).eval()(*tensors)[0], expected)
    torch.testing.assert_close(build(rank=6, keep=5, basis="input")(*tensors)[0], expected)


def test_own_basis_finds_the_keys_that_matter():
    query, key, value = draw(dim=6)
    key = key * torch.tensor([0.01, 0.01, 0.01, 0.01, 3.0, 2.0], dtype=torch.float64)  # two dimensions count
    expected, _ = build_attention("topk", num_heads=2, head_dim=6, keep=4)(query, key, value)
    own, _ = build(rank=2, keep=4, basis="input")(query, key, value)
    untrained, _ = build(rank=2, keep=4).eval()(query, key, value)
    assert (own - expected).norm() < 0.05 * expected.norm() < (untrained - expected).norm()


def test_training_fits_the_running_basis():
    query, key, value = draw()
    key = key * torch.tensor([0.01, 0.01, 0.01, 0.01, 3.0, 2.0], dtype=torch.float64)
    mechanism = build(rank=2, keep=4).train()
    before = mechanism.covariance.clone()
    first, _ = mechanism(query, key, value)
    assert not torch.equal(mechanism.covariance, before)
    second, _ = mechanism.eval()(query, key, value)
    expected, _ = build_attention("topk", num_heads=2, head_dim=6, keep=4)(query, key, value)
    assert (second - expected).norm() < 0.05 * expected.norm() < (first - expected).norm()
    fitted = mechanism.covariance.clone()
    mechanism(query, key, value)
    assert torch.equal(mechanism.covariance, fitted), "evaluation must not fit"


def test_training_exactly_fits_the_same_basis():
    tensors = draw()
    chosen, exact = build(rank=2, keep=4).train(), build(rank=2, keep=4, in_training="exact").train()
    chosen(*tensors)
    trained, _ = exact(*tensors)
    torch.testing.assert_close(trained, scaled_dot_product_attention(*tensors))
    assert torch.equal(exact.covariance, chosen.covariance)
    assert torch.equal(exact.eval()(*tensors)[0], chosen.eval()(*tensors)[0])


def test_fitted_basis_is_in_the_checkpoint():
    mechanism = build(rank=2, keep=4).train()
    mechanism(*draw())
    loaded = build(rank=2, keep=4)
    loaded.load_state_dict(mechanism.state_dict())
    assert torch.equal(loaded.eval()(*draw())[0], mechanism.eval()(*draw())[0])
    assert not build(basis="input").state_dict()


def test_own_basis_ignores_padding_and_neighbours():
    query, key, value = draw()
    key_keep = torch.arange(14) < torch.tensor([14, 9, 14])[:, None]
    mechanism = build(rank=2, keep=0.3, basis="input")
    key[1, :, 9:] = float("nan")
    together, _ = mechanism(query, key, value, AttentionMask(key_keep=key_keep))
    alone, _ = mechanism(query[1:2], key[1:2, :, :9], value[1:2, :, :9])
    torch.testing.assert_close(together[1:2], alone)


def test_own_basis_refuses_a_causal_mask():
    with pytest.raises(ValueError, match=r"attention\.basis=input of low_rank_topk .* causal"):
        build(basis="input", causal=True)
    with pytest.raises(ValueError, match=r"attention\.basis=input of low_rank_topk .* causal"):
        build(basis="input")(*draw(), AttentionMask(causal=True))


def test_calibration_gives_the_directions_of_the_keys_that_were_seen():
    calibrated, own = build(rank=1, keep=2).eval(), build(rank=1, keep=2, basis="input").eval()
    query, key, value = (x[:1] for x in draw())
    key = torch.cat([key[..., :3], 10 * key[..., 3:]], dim=-1)  # most in dimensions that do not lead at the start
    expected = own(query, key, value)[0]
    assert not torch.allclose(calibrated(query, key, value)[0], expected)
    for _ in range(2):
        calibrated.observe(query, key)
    calibrated.fit()
    torch.testing.assert_close(calibrated(query, key, value)[0], expected)
    with pytest.raises(ValueError, match="got no observations"):
        calibrated.fit()


@pytest.mark.parametrize("basis", ["running", "input"])
def test_cost_counts_the_products(basis):
    mechanism = build(rank=2, basis=basis, chunk_size=5).eval()
    eigenvectors = 2 * 9 * 6**3 if basis == "input" else 0  # of two heads; the counter does not know them
    assert_cost_is_performed(mechanism, draw(14, 17), uncounted=eigenvectors)


def test_directions_are_found_again_only_when_the_covariance_has_changed():
    calls = []

    class CountEigh(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function) if function is torch.linalg.eigh else None
            return function(*args, **(kwargs or {}))

    mechanism, trained = build(rank=2), build(rank=2)
    trained.train()(*draw())
    mechanism.eval()
    with CountEigh():
        for _ in range(3):
            mechanism(*draw())
        assert len(calls) == 1
        mechanism.load_state_dict(trained.state_dict())
        loaded, _ = mechanism(*draw())
        assert len(calls) == 2
    assert torch.equal(loaded, trained.eval()(*draw())[0])
    assert list(mechanism.state_dict()) == ["covariance"]


@pytest.mark.parametrize("in_training", ["chosen", "exact"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant, in_training):
    def train(run):
        mechanism, gradients = build(rank=1, keep=2, in_training=in_training).train(), []
        for step in range(3):
            tensors = [x.requires_grad_() for x in draw(14, 14 + step)]
            run(mechanism, *tensors).square().sum().backward()
            gradients += [x.grad for x in tensors]
        return mechanism.covariance, gradients

    def attend(mechanism, *tensors):
        return mechanism(*tensors)[0]

    covariance, gradients = train(attend)
    again, same = train(lambda *inputs: checkpoint(attend, *inputs, use_reentrant=use_reentrant))
    assert torch.equal(again, covariance)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 0), ("keep", 1.5), ("basis", "pca"), ("in_training", "eval"), ("chunk_size", 0)]
)
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=rf"attention\.{option} must be"):
        build(**{option: value})
