"""Improved clustered attention: when it is exact, what its clusters are, memory and cost."""

import pytest
import torch

from approx_attn.attention import AttentionShape, build_attention
from approx_attn.attention.exact import ExactAttention
from helpers import assert_cost_is_performed, draw, held_sizes


def build(**options):
    return build_attention("clustered", **{"num_heads": 2, "head_dim": 4, "keep": 3, **options})


def exact(*tensors):
    return ExactAttention(AttentionShape(2, 4))(*tensors)[0]


def test_queries_that_are_alike_share_a_row_without_loss():
    """Three directions, each of several lengths of one: clusters hold equal queries, whose mean they are."""
    query, key, value = draw(30)
    query = query[:, :, :3].repeat(1, 1, 10, 1)
    torch.testing.assert_close(build(num_clusters=3)(query, key, value)[0], exact(query, key, value))


def test_more_recomputed_keys_come_nearer_to_exact():
    query, key, value = draw(96)
    errors = [
        (build(num_clusters=8, keep=k)(2 * query, key, value)[0] - exact(2 * query, key, value)).norm()
        for k in (1, 12, 48)
    ]
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2]


def test_the_seed_and_the_layer_draw_the_planes_and_a_checkpoint_holds_them():
    planes = [build(**options).planes for options in ({}, {"seed": 1}, {"layer_index": 1})]
    assert not any(torch.equal(planes[0], other) for other in planes[1:])
    other = build(seed=1)
    other.load_state_dict(build().state_dict())
    assert torch.equal(other.planes, planes[0])


def test_gradients_with_dropout():
    mechanism = build(num_clusters=3).train()

    def run(*tensors):
        torch.manual_seed(0)
        return mechanism(*tensors, dropout_p=0.3)[0]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in draw(9)])


def test_holds_nothing_of_size_n_times_n():
    n, clusters, keep = 256, 8, 16
    tensors = [x.requires_grad_() for x in draw(n)]
    assert max(held_sizes(build(num_clusters=clusters, keep=keep), *tensors)) <= 2 * 2 * n * max(clusters, keep)


@pytest.mark.parametrize("keep", [6, 0.25])
def test_cost_counts_the_products(keep):
    """Of one cluster, whose tiles are full, and one iteration."""
    assert_cost_is_performed(build(keep=keep, num_clusters=1, iterations=1, bits=7), draw(64, 40))
