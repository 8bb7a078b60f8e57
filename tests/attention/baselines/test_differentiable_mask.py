"""Differentiable mask: gates in value and derivative, the loss that closes them, and that they learn.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.baselines.differentiable_mask import gated_softmax


def build(**options):
    return build_attention("differentiable_mask", **{"num_heads": 2, "head_dim": 4, "max_length": 8, **options})


def draw(n=8, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, 2, n, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def test_with_every_gate_open_it_is_exact_attention():
    query, key, value = draw()
    mechanism = build().eval()
    torch.testing.assert_close(mechanism(query, key, value)[0], scaled_dot_product_attention(query, key, value))
    assert mechanism.open_fraction == 1.0
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
    assert mechanism.open_fraction == pytest.approx(float(window.float().mean()))
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


def test_loss_and_share_are_over_allowed_pairs():
    mechanism = build(penalty=1.0).eval()
    with torch.no_grad():
        mechanism.gates.values[:, 8:] = -1.0  # the future is closed
    keep = torch.arange(8) < torch.tensor([[8], [8], [3]])
    for mask, share in (
        (AttentionMask(causal=True), 1.0),
        (AttentionMask(), 36 / 64),
        (AttentionMask(key_keep=keep), (36 + 36 + 6 + 3 * 5) / (64 + 64 + 24)),
    ):
        mechanism(*draw(), mask)
        assert float(mechanism.open_fraction) == pytest.approx(share)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_loss_and_share_do_not_depend_on_padding(causal):
    mechanism = build(penalty=1.0).eval()
    with torch.no_grad():
        mechanism.gates.values[:, 8:] = -1.0  # later keys are closed
    keep = (torch.arange(8) < 5).expand(3, -1)
    mechanism(*draw(), AttentionMask(key_keep=keep, query_keep=keep, causal=causal))
    padded = float(mechanism.open_fraction)
    mechanism(*(x[:, :, :5] for x in draw()), AttentionMask(causal=causal))
    assert padded == pytest.approx(float(mechanism.open_fraction))
    mechanism(*draw(), AttentionMask(query_keep=keep, causal=causal))
    assert float(mechanism.open_fraction) == pytest.approx(1.0 if causal else 15 / 40)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_cost_counts_the_products(causal):
    mechanism = build().train()
    query, key, value = draw(batch=1)
    with FlopCounterMode(display=False) as counter:
        mechanism(query, key[:, :, :7], value[:, :, :7], AttentionMask(causal=causal, query_offset=-1))
    assert 2 * mechanism.cost(8, 7, causal=causal).multiply_adds == counter.get_total_flops()


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


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"penalty": -1.0}, "attention.penalty"),
        ({"temperature": 0.0}, "attention.temperature"),
        ({"initial_open": 1.0}, "attention.initial_open"),
        ({"initial_open": 0.0}, "attention.initial_open"),
        ({"penalty": float("nan")}, "attention.penalty"),
    ],
)
def test_impossible_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)
