"""Names, options and specifications of mechanisms."""

import functools

import pytest

from approx_attn.attention import (
    AttentionMechanism,
    AttentionShape,
    attention_class,
    attention_options,
    available_attention,
    build_attention,
    register_attention,
    resolve_attention,
)
from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.registry import SHAPE_ARGUMENTS


def test_names_are_sorted_and_hold_the_reference():
    names = available_attention()
    assert names == sorted(names)
    assert "exact" in names
    assert attention_class("exact") is ExactAttention


def test_every_class_knows_its_name():
    for name in available_attention():
        assert attention_class(name).name == name


def test_unknown_name_gets_a_hint():
    with pytest.raises(ValueError, match="attention='exakt' is unknown; did you mean 'exact'") as error:
        build_attention("exakt", num_heads=1, head_dim=1)
    assert "topk" in str(error.value)


def test_unknown_option_gets_a_hint():
    with pytest.raises(ValueError, match=r"attention\.keeep is not an option of topk; did you mean 'keep'"):
        build_attention("topk", num_heads=1, head_dim=1, keeep=0.5)


def test_a_name_of_earlier_versions_says_what_has_replaced_it():
    with pytest.raises(ValueError, match=r"^attention='eigen_block' is unknown; eigen_cluster has replaced it\.$"):
        build_attention("eigen_block", num_heads=1, head_dim=1)


def test_an_option_of_earlier_versions_plays_no_part_where_it_was_off():
    build_attention("eigen_topk", num_heads=1, head_dim=2, rank=1, block_size=None)
    build_attention("eigen_row", num_heads=1, head_dim=2, max_length=4, alignment="absolute")
    for name, option, value in (
        ("eigen_topk", "block_size", 8),
        ("low_rank_topk", "scoring", "gather"),
        ("eigen_row", "alignment", "relative"),
    ):
        with pytest.raises(ValueError, match=rf"^attention\.{option} is no longer an option of {name}; .*\.$"):
            build_attention(name, num_heads=1, head_dim=2, max_length=4, **{option: value})


def test_options_leave_out_what_the_layer_decides():
    assert set(attention_options("topk")) == {"keep", "chunk_size"}
    for name in available_attention():
        assert not set(attention_options(name)) & set(SHAPE_ARGUMENTS)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'exact' is taken by ExactAttention"):
        register_attention("exact")(type("Other", (AttentionMechanism,), {}))


@pytest.mark.parametrize(
    "spec",
    [
        "topk",
        {"name": "topk", "keep": 0.25},
        functools.partial(build_attention, "topk", keep=0.25),
        functools.partial(attention_class("topk"), keep=0.25),
    ],
)
def test_ways_to_say_what_a_layer_uses(spec):
    built = resolve_attention(spec, AttentionShape(2, 4, max_length=16))
    assert built.name == "topk"
    assert built.keep == 0.25
    assert (built.num_heads, built.head_dim, built.max_length) == (2, 4, 16)
    assert resolve_attention(built, AttentionShape(9, 4)) is built


def test_a_mapping_needs_a_name():
    with pytest.raises(ValueError, match="must have the key 'name'"):
        resolve_attention({"keep": 0.5}, AttentionShape(2, 4))
