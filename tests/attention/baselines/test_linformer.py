"""Linformer: what the projections share, and that lengths and padding are kept to."""

import pytest
import torch

from approx_attn.attention import AttentionMask, AttentionShape, build_attention
from approx_attn.attention.exact import ExactAttention
from helpers import assert_cost_is_performed, draw


def build(**options):
    return build_attention("linformer", **{"num_heads": 4, "head_dim": 8, "max_length": 16, **options})


def test_identity_projections_are_exact_attention():
    mechanism = build(num_keys=1.0)
    for projection in mechanism.parameters():
        torch.nn.init.eye_(projection.data[0])
    tensors = draw(7, 16, 8, heads=4, dtype=torch.float32)
    torch.testing.assert_close(mechanism(*tensors)[0], ExactAttention(AttentionShape(4, 8))(*tensors)[0])


@pytest.mark.parametrize(
    ("share", "shapes"),
    [("none", [(4, 4, 16)] * 2), ("heads", [(1, 4, 16)] * 2), ("key_value", [(1, 4, 16)]), ("layer", [(1, 4, 16)])],
)
def test_sharing(share, shapes):
    assert [tuple(p.shape) for p in build(share=share).parameters()] == shapes


@pytest.mark.parametrize("share", ["none", "heads", "layer"])
def test_projections_start_at_the_scale_of_the_authors(share):
    projection = build(max_length=600, num_keys=150, share=share).key_projection
    torch.testing.assert_close(projection.std(), torch.tensor((600 + 150) ** -0.5), rtol=0.01, atol=0.0)


def test_layers_share_one_projection_on_request():
    first, second, apart = build(share="layer"), build(share="layer"), build(share="heads")
    second.tie_to(first)
    assert second.key_projection is first.key_projection
    apart.tie_to(build(share="heads"))
    assert not torch.equal(apart.key_projection, first.key_projection)


def test_grouped_heads_project_before_they_are_repeated():
    mechanism = build(num_key_value_heads=2, share="none")
    assert mechanism.key_projection.shape == (2, 4, 16)
    query, key, value = draw(5, 9, 8, heads=4, key_heads=2, dtype=torch.float32)
    wide = build(share="none")
    wide.key_projection.data = mechanism.key_projection.data.repeat_interleave(2, dim=0)
    wide.value_projection.data = mechanism.value_projection.data.repeat_interleave(2, dim=0)
    expected, _ = wide(query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(mechanism(query, key, value)[0], expected)


def test_a_sample_of_padding_only_gives_zeros():
    mask = AttentionMask(key_keep=torch.tensor([[True] * 9, [False] * 9]))
    output, _ = build()(*draw(5, 9, 8, heads=4, dtype=torch.float32), mask)
    assert (output[1] == 0).all()


def test_cost_counts_the_products():
    mechanism = build(num_keys=5, num_key_value_heads=2, share="none")
    assert_cost_is_performed(mechanism, draw(7, 9, 8, heads=4, key_heads=2, dtype=torch.float32))


def test_needs_max_length():
    with pytest.raises(ValueError, match="attention=linformer needs max_length"):
        build(max_length=None)


@pytest.mark.parametrize("share", ["heads", "key_value"])
@pytest.mark.parametrize("n", [16, 11])
def test_equals_another_implementation(share, n):
    linformer = pytest.importorskip("linformer")
    shared = share == "key_value"
    other = linformer.LinformerSelfAttention(32, 16, k=5, heads=4, share_kv=shared)
    mechanism = build(num_keys=5, share=share)
    mechanism.key_projection.data = other.proj_k.data.T[None]
    if not shared:
        mechanism.value_projection.data = other.proj_v.data.T[None]
    x = torch.randn(2, n, 32)
    maps = (other.to_q, other.to_k, other.to_k if shared else other.to_v)  # it shares the maps of keys and values too
    query, key, value = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in maps)
    output, _ = mechanism(query, key, value)
    torch.testing.assert_close(other.to_out(output.transpose(1, 2).flatten(2)), other(x))
