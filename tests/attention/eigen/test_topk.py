"""eigen_topk: which pairs are exact, gradients, the recomputing backward pass, memory, costs and the auxiliary loss.

Its output against the formula is in tests/test_contract.py with tests/attention/naive/eigen_topk.py.
"""

import pytest
import torch

from approx_attn.attention import AttentionMask, AttentionShape, build_attention
from approx_attn.attention.exact import ExactAttention
from helpers import assert_cost_is_performed, held_sizes

H, D = 2, 4


def build(**options):
    torch.manual_seed(0)
    mechanism = build_attention("eigen_topk", num_heads=H, head_dim=D, **({"rank": 2} | options)).double()
    with torch.no_grad():
        mechanism.basis.query_map.add_(0.3 * torch.randn(mechanism.basis.query_map.shape))
    return mechanism


def draw(n_q=12, n_k=12, batch=2, key_heads=H):
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    shapes = [(batch, H, n_q, D), (batch, key_heads, n_k, D), (batch, key_heads, n_k, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def exact_pairs(mechanism, tensors, mask):
    """Which pairs are exact, seen from outside: with rest=drop only they have a weight."""
    assert mechanism.rest == "drop"
    return mechanism(*tensors, mask, need_weights=True)[1] > 0


# -- which pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{"keep": 0.25}, {"keep": 5}, {"keep": 99}, {"keep": 0.5, "window": 2, "global_tokens": 1}]
)
def test_number_of_exact_pairs_is_what_the_cost_says(options, causal):
    mechanism = build(rest="drop", chunk_size=7, **options)
    tensors = draw(20, 20)
    exact = exact_pairs(mechanism, tensors, AttentionMask(causal=causal))
    for i in range(20):
        usable = i + 1 if causal else 20
        keep = options["keep"]
        budget = min(keep, usable) if isinstance(keep, int) else max(1, round(keep * usable))
        assert (exact[:, :, i].sum(-1) >= budget).all()
    assert exact.sum() == 2 * mechanism.cost(20, causal=causal).exact_pairs
    assert mechanism.cost(20, causal=causal).total_pairs == H * (210 if causal else 400)


@pytest.mark.parametrize("causal", [False, True])
def test_every_head_may_have_a_budget_of_its_own(causal):
    mask, tensors = AttentionMask(causal=causal), draw(20, 20)
    mechanism = build(rest="drop", keep=[0.25, 9], chunk_size=7)
    exact = exact_pairs(mechanism, tensors, mask)
    for head, keep in enumerate([0.25, 9]):
        assert torch.equal(exact[:, head], exact_pairs(build(rest="drop", keep=keep), tensors, mask)[:, head])
    assert exact.sum() == 2 * mechanism.cost(20, causal=causal).exact_pairs
    with pytest.raises(ValueError, match=r"attention\.keep must be one budget, or a list of one for each of 2 heads"):
        build(keep=[0.25])


def test_window_and_global_tokens_count_in_the_budget_and_are_never_cut():
    tensors = draw(20, 20)
    wide = exact_pairs(build(rest="drop", keep=3, window=3, global_tokens=2), tensors, AttentionMask())
    near = (torch.arange(20) - torch.arange(20)[:, None]).abs() <= 3
    near[:, :2] = True
    assert (wide == near).all()  # the window alone is more than the budget of 3
    roomy = exact_pairs(build(rest="drop", keep=12, window=3, global_tokens=2), tensors, AttentionMask())
    assert roomy[:, :, near].all()
    assert (roomy.sum(-1) == 12).all()


def test_padding_does_not_count_in_a_share():
    mechanism, tensors = build(rest="drop", keep=0.5), draw(20, 20)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, 10:] = False
    exact = exact_pairs(mechanism, tensors, AttentionMask(key_keep=keep))
    assert (exact[0].sum(-1) == 10).all()
    assert (exact[1].sum(-1) == 5).all()


@pytest.mark.parametrize(("select", "chosen"), [("estimate", (0, 2)), ("error", (1, 4))])
def test_expected_error_prefers_keys_that_the_basis_does_not_see(select, chosen):
    # The one direction of the basis sees little differences; what it does not see differs in size.
    key = torch.zeros(1, H, 8, D, dtype=torch.float64)
    key[..., 0] = torch.tensor([0.02, 0.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0])
    key[..., 1] = torch.tensor([1.0, 9.0, -1.0, 1.0, -9.0, 1.0, 1.0, 1.0])
    query = torch.rand(1, H, 3, D, dtype=torch.float64) + 0.1
    mechanism = build(rest="drop", keep=2, select=select, rank=1)
    direction = torch.zeros(H, D, 1, dtype=torch.float64)
    direction[:, 0] = 1.0
    mechanism.load_content_basis(direction, direction, torch.zeros(H, D))
    expected = torch.zeros(8, dtype=torch.bool)
    expected[list(chosen)] = True
    assert (exact_pairs(mechanism, (query, key, key), AttentionMask()) == expected).all()


def test_ties_at_the_edge_of_the_budget_are_exact_together():
    key = torch.ones(1, H, 6, D, dtype=torch.float64)
    mechanism = build(rest="drop", keep=2, select="estimate")
    assert exact_pairs(mechanism, (key, key, key), AttentionMask()).all()


# -- the rest --------------------------------------------------------------------------------------------


def test_row_means_of_the_scores_are_exact():
    # With r = 1 and equal keys but one, the far pairs' common score is exact although the basis sees nothing.
    query = torch.randn(1, H, 5, D, dtype=torch.float64)
    key = torch.randn(1, H, 1, D, dtype=torch.float64).repeat(1, 1, 9, 1)
    value = torch.randn(1, H, 9, D, dtype=torch.float64)
    mechanism = build(keep=1, rank=1)
    expected = ExactAttention(AttentionShape(H, D))(query, key, value)[0]
    torch.testing.assert_close(mechanism(query, key, value)[0], expected)


def test_the_mean_keeps_the_total_weight_of_the_rest():
    tensors = draw(10, 16)
    kept, mean = (build(keep=4, rest=rest)(*tensors, need_weights=True)[1] for rest in ("keep", "mean"))
    exact = exact_pairs(build(keep=4, rest="drop"), tensors, AttentionMask())
    torch.testing.assert_close(kept * exact, mean * exact)
    far = mean[~exact].reshape(*mean.shape[:-1], 12)
    torch.testing.assert_close(far, far.mean(-1, keepdim=True).expand_as(far))


# -- gradients -------------------------------------------------------------------------------------------


def test_gradients_with_fewer_key_heads_and_an_additive_mask():
    torch.manual_seed(0)
    mechanism = build_attention("eigen_topk", num_heads=H, head_dim=D, num_key_value_heads=1, rank=2, keep=3).double()
    bias = torch.randn(1, H, 5, 6, dtype=torch.float64).requires_grad_()
    inputs = (*draw(5, 6, batch=1, key_heads=1), bias)
    assert torch.autograd.gradcheck(lambda q, k, v, b: mechanism(q, k, v, AttentionMask(bias=b))[0], inputs)


def test_recomputing_backward_equals_plain_autograd():
    gradients = []
    for chunk_size in (4, 12):  # only several chunks are recomputed
        mechanism, tensors = build(chunk_size=chunk_size, window=1), draw()
        learned = [p for p in mechanism.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(mechanism(*tensors)[0].square().sum(), [*tensors, *learned]))
    for chunked, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_dropout_is_the_same_when_recomputed():
    mechanism, tensors = build(chunk_size=3).train(), draw(8, 8, batch=1)

    def run(*inputs):
        torch.manual_seed(2)
        return mechanism(*inputs, dropout_p=0.4)[0]

    assert torch.autograd.gradcheck(run, tensors)


def test_holds_nothing_of_size_n_times_n_for_the_backward_pass():
    n = 96
    mechanism, tensors = build(chunk_size=8, keep=6), draw(n, n)
    sizes = held_sizes(mechanism, *tensors)
    assert max(sizes) < 2 * H * n * n / 8


def test_frozen_basis_gets_no_gradient():
    mechanism = build(train_basis=False, position_prior="absolute", max_length=12)
    mechanism(*draw())[0].sum().backward()
    assert all(p.grad is None for p in mechanism.parameters())


# -- budget, cost, loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["keep", "drop", "mean"])
@pytest.mark.parametrize("keep", [1.0, 12, 500])
def test_full_budget_is_exact(rest, keep):
    tensors, mask = draw(), AttentionMask(causal=True)
    mechanism = build(rest=rest, keep=keep, chunk_size=5)
    torch.testing.assert_close(mechanism(*tensors, mask)[0], ExactAttention(AttentionShape(H, D))(*tensors, mask)[0])


@pytest.mark.parametrize("options", [{}, {"select": "estimate", "chunk_size": 8}])
@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_what_is_performed(options, causal):
    row_offsets = H * 32 * (D + 2)  # sums of products that are no matrix products
    with torch.no_grad():
        assert_cost_is_performed(build(keep=0.25, **options), draw(32, 32), AttentionMask(causal=causal), row_offsets)


def test_auxiliary_loss_is_zero_for_a_perfect_basis_and_reaches_only_the_basis():
    tensors = draw()
    mechanism = build(auxiliary_loss_weight=2.0).train()
    mechanism(*tensors)
    assert mechanism.auxiliary_loss > 0
    mechanism.auxiliary_loss.backward()
    assert all(t.grad is None for t in tensors)
    assert mechanism.basis.query_map.grad.abs().sum() > 0
    mechanism.eval()(*tensors)
    assert mechanism.auxiliary_loss is None
    identity = torch.eye(D).expand(H, D, D)
    perfect = build(auxiliary_loss_weight=2.0, rank=D).train()
    perfect.load_content_basis(identity, identity, torch.randn(H, D))
    for mask in (AttentionMask(), AttentionMask(causal=True)):
        perfect(*tensors, mask)
        assert perfect.auxiliary_loss < 1e-10


def test_auxiliary_loss_ignores_what_stands_in_the_padding():
    query, key, value = (t.detach() for t in draw())
    keep = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    keep[:, -2:] = False
    losses = []
    for padding in (0.0, float("nan")):
        torch.manual_seed(0)
        mechanism = build(auxiliary_loss_weight=1.0).train()
        given = (t.masked_fill(~keep[:, None, :, None], padding) for t in (query, key, value))
        torch.manual_seed(1)
        mechanism(*given, AttentionMask(key_keep=keep, query_keep=keep))
        mechanism.auxiliary_loss.backward()
        assert mechanism.basis.query_map.grad.isfinite().all()
        losses.append(mechanism.auxiliary_loss.item())
    assert losses[0] == losses[1] > 0.0


def test_exact_pairs_of_cross_attention_are_counted_from_the_first_key_on():
    mechanism, tensors = build(window=3, global_tokens=2, keep=1, rest="drop"), draw(4, 12, batch=1)
    assert mechanism.cost(4, 12).exact_pairs == int(exact_pairs(mechanism, tensors, AttentionMask()).sum())


def test_auxiliary_loss_trains_towards_the_scores():
    mechanism, tensors = build(auxiliary_loss_weight=1.0, keep=1).train(), [t.detach() for t in draw()]
    optimizer = torch.optim.Adam(mechanism.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        mechanism(*tensors)
        losses.append(mechanism.auxiliary_loss.item())
        optimizer.zero_grad()
        mechanism.auxiliary_loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


# -- what is refused, and half precision --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.5}, "attention.keep"),
        ({"rank": 0}, "attention.rank"),
        ({"rest": "zero"}, "attention.rest must be one of keep, drop, mean"),
        ({"select": "best"}, "attention.select"),
        ({"share": "all"}, "attention.share"),
        ({"basis_init": "dct"}, "attention.basis_init"),
        ({"window": -1}, "attention.window"),
        ({"auxiliary_loss_weight": -1.0}, "attention.auxiliary_loss_weight"),
        ({"position_prior": "absolute"}, "max_length"),
        ({"basis": "nowhere.safetensors"}, "attention.basis=nowhere.safetensors is not a file"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("weight", [-1, "a", float("nan"), True])
def test_a_weight_of_the_auxiliary_loss_that_is_none_is_refused(weight):
    for name, options in (("eigen_topk", {}), ("eigen_row", {"max_length": 8})):
        with pytest.raises(ValueError, match=r"attention\.auxiliary_loss_weight must be a number of at least 0"):
            build_attention(name, num_heads=H, head_dim=D, auxiliary_loss_weight=weight, **options)
