"""refine_basis: the maps of a trained model's layers learn from the error of their output."""

import pytest
import torch
from torch import nn

import approx_attn
from approx_attn.attention.eigen.cluster import EigenClusterAttention
from approx_attn.conversion.calibration import calibrate
from approx_attn.conversion.calibration.refinement import refine_basis
from approx_attn.diagnosis.reconstruction import reconstruct

SPEC = {"name": "eigen_cluster", "keep": 0.25, "cluster_size": 4, "block_size": 16, "rank": 2}


def encoder():
    """Two layers whose scores are large, so that attention is far from uniform."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for block in model.layers:
        block.self_attn.in_proj_weight.data[:64] *= 3
    return model


def inputs(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0.5, -1.5, 32)  # a few directions carry most, as in trained models
    return [torch.randn(4, 32, 32, generator=generator) * spectrum for _ in range(count)]


@pytest.mark.parametrize("share", ["head", "layer"])
def test_refined_maps_reconstruct_better_and_the_model_stays(share):
    model, spec = encoder(), {"name": "eigen_topk", "keep": 4, "rank": 2, "share": share}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitted = calibrate(model, inputs(1), statistics=["content"], progress=False)
    refined = refine_basis(model, inputs(1), fitted, spec, steps=60, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mechanisms = {"fitted": spec, "refined": spec, "random": spec | {"seed": 0}}
    rows = reconstruct(model, inputs(1), mechanisms, fitted, bases={"refined": refined, "random": None}, progress=False)
    closed_form, learned, random = (row.error for row in rows)
    assert learned < 0.97 * closed_form
    assert closed_form < random


def test_a_file_with_refined_maps_starts_a_conversion(tmp_path):
    model = encoder()
    fitted = calibrate(model, inputs(1), statistics=["content"], progress=False)
    refined = refine_basis(model, inputs(1), fitted, SPEC, steps=2, progress=False)
    path = refined.save(tmp_path / "basis.safetensors")
    approx_attn.convert(model, SPEC | {"basis": str(path)}, example=inputs(1)[0])
    maps = [m.basis.query_map for m in model.modules() if isinstance(m, EigenClusterAttention)]
    for i, query_map in enumerate(maps):
        assert torch.equal(query_map, refined.tensors[f"{i}.content.head.query_map"])
        assert not torch.equal(query_map, fitted.tensors[f"{i}.content.head.query_map"][..., :2])
    assert len(maps) == 2


@pytest.mark.parametrize(
    "spec", [SPEC | {"train_basis": False}, SPEC | {"share": "model"}, {"name": "topk"}, {"name": "eigen_row"}]
)
def test_without_maps_that_learn_there_is_nothing_to_refine(spec):
    model = encoder()
    fitted = calibrate(model, inputs(1), progress=False)
    with pytest.raises(ValueError, match="refine needs a content basis that learns"):
        refine_basis(model, inputs(1), fitted, spec, steps=1, progress=False)
    with pytest.raises(ValueError, match="refine got no batches"):
        refine_basis(model, [], fitted, SPEC, steps=1, progress=False)
