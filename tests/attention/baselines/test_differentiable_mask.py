"""Differentiable mask: gates in value and derivative, the loss that closes them, and that they learn.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.baselines.differentiable_mask import gated_softmax
from helpers import assert_cost_is_performed, held_sizes


def build(**options):
    return build_attention("differentiable_mask", **{"num_heads": 2, "head_dim": 4, "max_length": 8, **options})


def draw(n=8, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, 2, n, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def test_with_every_gate_open_it_is_exact_attention():
    query, key, value = draw()
    mechanism = build().eval()
    torch.testing.assert_close(mechanism(query, key, value)[0], scaled_dot_product_attention(query, key, value))
    assert mechanism.auxiliary_loss is None
    assert mechanism.cost(8).exact_share == 1.0


@pytest.mark.parametrize("alignment", ["relative", "absolute"])
def test_closed_gates_close_their_pairs(alignment):
    mechanism = build(alignment=alignment).eval()
    with torch.no_grad():
        if alignment == "relative":
            mechanism.gates.values[:, 7 + 2 :] = -1.0  # offsets of 2 and more
        else:
            mechanism.gates.values.copy_(1.0 - 2.0 * torch.ones(8, 8).triu(2))
    query, key, value = draw()
    window = torch.ones(8, 8, dtype=torch.bool).tril(1)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=window)
    torch.testing.assert_close(mechanism(query, key, value)[0], expected)
    assert mechanism.cost(8).exact_pairs == 2 * int(window.sum())
    causal = mechanism.cost(8, causal=True)
    assert causal.exact_pairs == causal.total_pairs  # what is closed lies in the future


def test_closed_rows_give_zeros_and_finite_gradients():
    mechanism = build().train()
    torch.nn.init.constant_(mechanism.gates.values, -50.0)
    query, key, value = (x.requires_grad_() for x in draw())
    output, _ = mechanism(query, key, value)
    assert (output == 0).all()
    (output.sum() + mechanism.auxiliary_loss).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (query, key, value, *mechanism.parameters()))


def test_training_draws_gates_and_charges_for_them():
    torch.manual_seed(0)
    mechanism = build(alignment="absolute", initial_open=0.7, penalty=0.5, max_length=64).train()
    tensors = draw(64)
    _, first = mechanism(*tensors, need_weights=True)
    _, second = mechanism(*tensors, need_weights=True)
    assert not torch.equal(first > 0, second > 0)
    assert float(mechanism.open_fraction) == pytest.approx(0.7, abs=0.02)
    assert mechanism.auxiliary_loss.item() == pytest.approx(0.5 * float(mechanism.open_fraction))
    assert float((second > 0).float().mean()) == pytest.approx(float(mechanism.open_fraction))


def build_causal_gates():
    """In training, with gates so sure of themselves that every draw is the same: the future is closed."""
    mechanism = build(penalty=2.0).train()
    with torch.no_grad():
        mechanism.gates.values.fill_(50.0)
        mechanism.gates.values[:, 8:] = -50.0
    return mechanism


def test_loss_and_share_are_over_allowed_pairs():
    mechanism = build_causal_gates()
    keep = torch.arange(8) < torch.tensor([[8], [8], [3]])
    for mask, share in (
        (AttentionMask(causal=True), 1.0),
        (AttentionMask(), 36 / 64),
        (AttentionMask(key_keep=keep), (36 + 36 + 6 + 3 * 5) / (64 + 64 + 24)),
    ):
        mechanism(*draw(), mask)
        assert float(mechanism.open_fraction) == pytest.approx(share)
        assert mechanism.auxiliary_loss.item() == pytest.approx(2.0 * share)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_loss_and_share_do_not_depend_on_padding(causal):
    mechanism = build_causal_gates()
    keep = (torch.arange(8) < 5).expand(3, -1)
    mechanism(*draw(), AttentionMask(key_keep=keep, query_keep=keep, causal=causal))
    padded = float(mechanism.open_fraction)
    mechanism(*(x[:, :, :5] for x in draw()), AttentionMask(causal=causal))
    assert padded == pytest.approx(float(mechanism.open_fraction))
    mechanism(*draw(), AttentionMask(query_keep=keep, causal=causal))
    assert float(mechanism.open_fraction) == pytest.approx(1.0 if causal else 15 / 40)


@pytest.mark.parametrize("kept", [1.0, 0.1], ids=["dense", "sparse"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_cost_counts_the_products_of_fixed_gates(causal, kept):
    mechanism = build(max_length=80, alignment="absolute").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        is_open = torch.rand(mechanism.gates.values.shape, generator=generator) < kept
        mechanism.gates.values.copy_(is_open.float() - 0.5)
    query, key, value = draw(80)
    mask = AttentionMask(causal=causal, query_offset=-3 if causal else 0)
    assert_cost_is_performed(mechanism, (query, key[:, :, :77], value[:, :, :77]), mask)
    cost = mechanism.cost(80)
    assert cost.exact_pairs == int(is_open.sum())
    assert (cost.computed_share < 0.25) == (kept < 1.0)  # gaps are filled up, but most of what is closed is skipped


def test_frozen_gates_are_not_drawn_and_train_the_rest_at_the_cost_of_what_they_keep():
    mechanism = build(max_length=64, initial_open=0.5, freeze_step=3).train()
    with torch.no_grad():
        mechanism.gates.values.fill_(-1.0)
        mechanism.gates.values[:, 63:65] = 1.0  # a token and the next
    mechanism.begin_step(2)
    mechanism(*draw(64))
    assert mechanism.auxiliary_loss is not None
    mechanism.begin_step(3)
    inputs = [x.requires_grad_() for x in draw(64)]
    output, weights = mechanism(*inputs, need_weights=True)
    assert mechanism.auxiliary_loss is None
    window = torch.ones(64, 64, dtype=torch.bool).tril(1).triu()
    assert torch.equal(weights > 0, window.expand_as(weights))
    expected = [x.detach().requires_grad_() for x in inputs]
    scaled_dot_product_attention(*expected, attn_mask=window).square().sum().backward()
    output.square().sum().backward()
    for mine, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert mechanism.gates.values.grad is None
    assert max(held_sizes(mechanism, *inputs)) < weights.numel()  # no array of all pairs


def test_a_pattern_follows_its_gates():
    """What was laid out for one state of the gates is not used for the next."""
    mechanism = build(max_length=64, initial_open=0.1).eval()
    tensors = draw(64)
    for offset in (0, 1):
        with torch.no_grad():
            mechanism.gates.values.fill_(-1.0)
            mechanism.gates.values[:, 63 + offset] = 1.0
        value = tensors[2].roll(-offset, dims=2).clone()
        value[:, :, 64 - offset :] = 0.0  # no such key
        torch.testing.assert_close(mechanism(*tensors)[0], value)


def test_the_learning_rate_of_gates_is_a_multiple_of_the_models():
    gates = []
    for multiplier in (1.0, 20.0):
        torch.manual_seed(0)
        mechanism = build(lr_multiplier=multiplier).train()
        before = mechanism.logits(8, 8)
        optimizer = torch.optim.Adam(mechanism.parameters(), lr=0.01)
        (mechanism(*draw())[0].square().sum() + mechanism.auxiliary_loss).backward()
        optimizer.step()
        gates.append(mechanism.logits(8, 8) - before)
    torch.testing.assert_close(gates[1], 20.0 * gates[0], rtol=1e-3, atol=1e-5)
    assert float(gates[0].abs().max()) == pytest.approx(0.01, rel=1e-3)


def test_derivative_of_open_and_closed_gates():
    """Of Σ g·e·v / Σ g·e at gates of one, two-sided, and at gates of zero, from above."""
    generator = torch.Generator().manual_seed(0)
    scores, direction = torch.randn(2, 1, 1, 3, 5, generator=generator, dtype=torch.float64)
    scores[..., 4] = -2.0  # the closed ones are weaker than the strongest open one: no limit on their part
    gate = torch.ones(1, 3, 5, dtype=torch.float64)
    gate[..., 4] = 0.0
    gate.requires_grad_()
    (gated_softmax(scores, gate, None) * direction).sum().backward()

    def loss(gates):
        parts = gates * scores[0].exp()
        return float((parts / parts.sum(-1, keepdim=True) * direction[0]).sum())

    for i in range(3):
        for j in range(5):
            step = torch.zeros_like(gate)
            step[0, i, j] = 1e-6
            base, ahead = gate.detach(), gate.detach() + step
            numeric = (loss(ahead) - loss(base)) / 1e-6
            assert float(gate.grad[0, i, j]) == pytest.approx(numeric, abs=1e-5)


def test_a_loud_closed_pair_neither_overflows_nor_counts():
    scores = torch.tensor([[[[0.0, 1.0, 1e4]]]], requires_grad=True)
    gate = torch.tensor([[[1.0, 1.0, 0.0]]], requires_grad=True)
    weights = gated_softmax(scores, gate, None)
    torch.testing.assert_close(weights[..., :2], scores[..., :2].softmax(-1))
    weights[..., 0].sum().backward()
    assert scores.grad[..., 2] == 0
    assert gate.grad.isfinite().all()
    assert gate.grad[..., 2] != 0  # it can open again


def test_learns_which_offsets_are_needed():
    """The target looks at offsets −1 and 0; every other gate only costs."""
    torch.manual_seed(0)
    mechanism = build(penalty=0.1, initial_open=0.7).train()
    optimizer = torch.optim.Adam(mechanism.parameters(), lr=0.1)
    window = torch.ones(8, 8, dtype=torch.bool).tril() & torch.ones(8, 8, dtype=torch.bool).triu(-1)
    for _ in range(150):
        query, key, value = (torch.randn(8, 2, 8, 4) for _ in range(3))
        target = scaled_dot_product_attention(query, key, value, attn_mask=window)
        loss = (mechanism(query, key, value)[0] - target).square().mean() + mechanism.auxiliary_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    is_open = mechanism.gates.values > 0
    assert is_open[:, 6:8].all()
    assert int(is_open.sum()) == 4  # two offsets of two heads
