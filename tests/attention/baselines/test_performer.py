"""Performer: the features, their redraws, convergence to exact attention, and another implementation of it.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.baselines.performer import log_positive_features, random_directions
from helpers import assert_cost_is_performed


def draw(n=32, dim=8, size=0.4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(2, 2, n, dim, generator=generator).to(dtype) for _ in range(3)]


def build(**options):
    return build_attention("performer", **{"num_heads": 2, "head_dim": 8, **options})


def mean_error(num_features, causal=False, **options):
    query, key, value = draw()
    exact = scaled_dot_product_attention(query, key, value, is_causal=causal)
    outputs = (
        build(num_features=num_features, seed=seed, **options)(query, key, value, AttentionMask(causal=causal))[0]
        for seed in range(30)
    )
    return sum(float((out - exact).norm() / exact.norm()) for out in outputs) / 30


@pytest.mark.parametrize("causal", [False, True])
def test_error_falls_as_one_over_root_m(causal):
    errors = [mean_error(m, causal) for m in (64, 1024)]  # 16 times the features: a quarter of the error
    assert errors[1] < 0.1
    assert 3.0 < errors[0] / errors[1] < 5.5


def test_orthogonal_directions_lower_the_error():
    assert mean_error(8) < 0.95 * mean_error(8, orthogonal=False)


def test_feature_products_are_unbiased():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 1, 6, dtype=torch.float64, generator=generator) * 0.5
    directions = random_directions(60_000, 6, True, generator)
    products = (log_positive_features(x, directions, 1.0) + log_positive_features(y, directions, 1.0)).exp()
    torch.testing.assert_close(products.mean(), (x @ y.T).exp().squeeze(), rtol=0.02, atol=0.0)


def test_directions_are_normal_and_orthogonal_in_groups():
    directions = random_directions(2000 * 5 + 3, 5, True, torch.Generator().manual_seed(0))
    assert directions.shape == (10_003, 5)
    groups = directions[:10_000].view(2000, 5, 5)
    gram = groups @ groups.transpose(-2, -1)
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4
    torch.testing.assert_close(directions.T @ directions / len(directions), torch.eye(5), rtol=0.0, atol=0.05)
    assert directions.mean(0).abs().max() < 0.05
    kurtosis = directions.pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((5,), 3.0), rtol=0.0, atol=0.4)  # normal, not only uncorrelated


def test_draws_follow_the_seed_the_layer_and_the_count():
    assert torch.equal(build().projection, build().projection)
    assert not torch.equal(build().projection, build(seed=1).projection)
    assert not torch.equal(build().projection, build(layer_index=1).projection)
    first, second = build(), build()
    before = first.projection.clone()
    first.redraw()
    assert not torch.equal(first.projection, before)
    second.load_state_dict(first.state_dict())
    first.redraw()
    second.redraw()  # a resumed run goes on with the draws of the one it resumes
    assert torch.equal(first.projection, second.projection)


def test_a_redraw_changes_nothing_but_the_directions():
    mechanism = build(num_features=4)
    query, key, value = draw()
    before, _ = mechanism(query, key, value)
    draws = int(mechanism.num_draws)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    mechanism.redraw()
    assert torch.equal(torch.rand(3), expected)  # the generator of the training loop is left alone
    assert int(mechanism.num_draws) == draws + 1
    assert not torch.allclose(mechanism(query, key, value)[0], before)


def directions_by_step(mechanism, steps):
    found = []
    for step in steps:
        mechanism.begin_step(step)
        found.append(mechanism.projection.clone())
    return found


def test_training_redraws_at_its_interval_as_a_function_of_the_step():
    found = directions_by_step(build(redraw_interval=3), range(8))
    changed = [step for step in range(1, 8) if not torch.equal(found[step], found[step - 1])]
    assert changed == [3, 6]
    assert torch.equal(found[0], build().projection)
    # Resumed before step 3, or started anew there, or told of a step twice: the same directions.
    assert torch.equal(directions_by_step(build(redraw_interval=3), [3, 3])[-1], found[3])
    assert torch.equal(directions_by_step(build(redraw_interval=3), [6])[-1], found[6])
    assert torch.equal(directions_by_step(build(), range(1001))[-1], found[0])


def test_a_training_run_redraws(tmp_path):
    from approx_attn.config.compose import compose_config
    from approx_attn.run.train import train

    tiny = ["model.dim=16", "model.depth=1", "trainer.max_epochs=1", "trainer.limit_train_batches=5"]
    quiet = ["progress_bar=false", "logger=csv", "trainer.accelerator=cpu", f"paths.runs={tmp_path}"]
    words = ["data=digits", "attention=performer", "attention.redraw_interval=2", "callbacks.best_checkpoint=null"]
    (mechanism,) = train(compose_config([*words, *tiny, *quiet])).task.mechanisms
    again = build(num_heads=4, head_dim=4, redraw_interval=2)
    assert int(mechanism.num_draws) == 3
    again.begin_step(4)
    assert torch.equal(mechanism.projection, again.projection)


def test_large_inputs_give_finite_outputs_and_gradients():
    """Norms at which every feature underflows or overflows in float32."""
    mechanism = build()
    for size in (30.0, 300.0):
        for causal in (False, True):
            tensors = [x.requires_grad_() for x in draw(size=size)]
            output, _ = mechanism(*tensors, AttentionMask(causal=causal))
            assert output.isfinite().all()
            assert output.abs().amax() > 1.0  # weights did not vanish
            output.sum().backward()
            assert all(x.grad.isfinite().all() for x in tensors)


def test_a_negative_scale_is_a_sign_of_the_query():
    mechanism = build().double()
    query, key, value = draw(dtype=torch.float64)
    torch.testing.assert_close(mechanism(query, key, value, scale=-0.3), mechanism(-query, key, value, scale=0.3))


def test_default_number_of_features():
    assert build().num_features == math.ceil(8 * math.log(8))
    assert build(head_dim=1).num_features == 1


def test_cost_counts_the_products():
    query, key, value = draw(n=40)
    assert_cost_is_performed(build(num_features=12), (query, key[:, :, :30], value[:, :, :30]))


def test_equals_performer_pytorch():
    theirs = pytest.importorskip("performer_pytorch.performer_pytorch")
    mechanism = build().double()
    query, key, value = draw(dtype=torch.float64)
    projection = mechanism.projection
    phi_query = theirs.softmax_kernel(query, projection_matrix=projection, is_query=True, eps=0.0)
    # Their maximum over the keys of one head, taken for all: the same for every feature, so it cancels.
    phi_key = theirs.softmax_kernel(key, projection_matrix=projection, is_query=False, eps=0.0)
    torch.testing.assert_close(mechanism(query, key, value)[0], theirs.linear_attention(phi_query, phi_key, value))
    torch.testing.assert_close(
        mechanism(query, key, value, AttentionMask(causal=True))[0],
        theirs.causal_linear_attention_noncuda(phi_query, phi_key, value, chunk_size=8, eps=0.0),
    )
