"""Options that make no sense are refused by name."""

import pytest

from approx_attn.attention import build_attention

NAN, INFINITY = float("nan"), float("inf")
REFUSED = {
    "clustered": {"keep": [0, 1.5], "num_clusters": [0], "bits": [0], "iterations": [0], "seed": [-1]},
    "differentiable_mask": {
        "penalty": [-1.0, NAN],
        "temperature": [0.0],
        "initial_open": [0.0, 1.0],
        "lr_multiplier": [0.0, NAN],
        "freeze_step": [-1, 0.5],
        "closed_offsets": [[0.5], [True]],
    },
    "gaussian": {
        "sigma": [0.0, [1.0], [1.0, -1.0], [1.0, "wide"], NAN, "wide", True],
        "gaussian_heads": [0, 3, 1.5],
        "grid_width": [0],
        "coordinates": [[], [[0.0], [1.0, 2.0]], [0.0, 1.0], [[INFINITY]]],
    },
    "linformer": {"num_keys": [0, 1.5], "share": ["all"]},
    "moba": {"keep": [0, 1.5], "block_size": [0]},
    "mra": {"keep": [0], "block_size": [0], "rest": ["mean"]},
    "nsa": {"keep": [0, 1.5], "block_size": [0], "compress_size": [0, 5], "stride": [0, 5]},
    "nystromformer": {"num_landmarks": [0], "pinv_iterations": [0], "conv_kernel": [0, 4]},
    "performer": {"num_features": [0, 2.5], "seed": [-1], "redraw_interval": [0]},
    "scatterbrain": {"keep": [0], "window": [-1], "num_features": [0], "seed": [-1]},
    "sliding_window": {"keep": [2.0], "window": [-1, 0.5], "global_tokens": [-1]},
    "topk": {"keep": [0, 0.0, 1.5], "chunk_size": [0]},
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, key, value) for name, options in REFUSED.items() for key, values in options.items() for value in values],
)
def test_impossible_options_are_refused(name, option, value):
    with pytest.raises(ValueError, match=rf"attention\.{option}"):
        build_attention(name, num_heads=2, head_dim=4, max_length=8, **{option: value})


def test_a_grid_and_coordinates_exclude_each_other():
    with pytest.raises(ValueError, match="exclude"):
        build_attention("gaussian", num_heads=1, head_dim=4, coordinates=[[0.0]], grid_width=2)
