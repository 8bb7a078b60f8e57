"""Basis files: round trip, and refusals that name both sides and load nothing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from approx_attn import AttentionMask, build_attention
from approx_attn.conversion.calibration import Calibration, ContentMoments, LayerShape, PositionMoments, load_basis_into

H, D, N = 2, 6, 8


@pytest.fixture
def path(tmp_path):
    """A file of two layers with content and absolute position bases."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(2):
        query, key = (torch.randn(4, H, N, D, generator=generator) for _ in range(2))
        content, position = ContentMoments(), PositionMoments("absolute")
        content.update(query, key, AttentionMask())
        position.update(query, key, AttentionMask(), 0.5)
        for pool in ("head", "layer"):
            tensors |= {f"{i}.content.{pool}.{k}": v.float() for k, v in vars(content.fit(pool)).items()}
            tensors |= {f"{i}.absolute.{pool}.{k}": v.float() for k, v in vars(position.fit(pool, 5)).items()}
    layers = [LayerShape(f"layer.{i}", H, H, D, N) for i in range(2)]
    calibration = Calibration(tensors, layers, ["content", "absolute"], model="m", data="d", sequences=4, rows=[32, 32])
    return calibration.save(tmp_path / "deep" / "basis.safetensors")


def eigen_topk(**options):
    return build_attention("eigen_topk", **({"num_heads": H, "head_dim": D, "rank": 3} | options))


def eigen_row(**options):
    return build_attention(
        "eigen_row", **({"num_heads": H, "head_dim": D, "max_length": N, "keep": 6, "rank": 3} | options)
    )


def test_round_trip(path):
    first = Calibration.open(path)
    second = Calibration.open(first.save(path.with_name("again.safetensors")))
    assert vars(first).keys() == vars(second).keys()
    assert (first.layers, first.rows, first.model) == (second.layers, second.rows, "m")
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("share", ["head", "layer"])
def test_mechanisms_start_from_their_layer(path, layer, share):
    tensors = Calibration.open(path).tensors
    topk = eigen_topk(layer_index=layer, share=share, basis=str(path))
    assert torch.equal(topk.basis.query_map, tensors[f"{layer}.content.{share}.query_map"][..., :3])
    assert torch.equal(topk.basis.key_mean, tensors[f"{layer}.content.head.key_mean"])
    row = eigen_row(layer_index=layer, share=share, basis=str(path), basis_init="calibrated")
    torch.testing.assert_close(row.position.mean, tensors[f"{layer}.absolute.{share}.mean"])


WRONG = {
    "heads": (lambda: eigen_topk(num_heads=4), "2 heads, 2 key heads, head_dim 6 .*4 heads, 4 key heads, head_dim 6"),
    "key heads": (lambda: eigen_topk(num_key_value_heads=1), "2 key heads.*has 2 heads, 1 key heads"),
    "head_dim": (lambda: eigen_topk(head_dim=8), "head_dim 6 .*head_dim 8"),
    "layer": (lambda: eigen_topk(layer_index=2), "holds 2 layers, layer_index=2"),
    "length": (lambda: eigen_row(max_length=12), r"shape \(2, 8\), the mechanism needs \(2, 12\)"),
    "rank": (lambda: eigen_row(rank=6), "5 columns, rank=6"),
    "share": (lambda: eigen_topk(share="model"), "no basis for the model"),
    "mechanism": (lambda: build_attention("exact", num_heads=H, head_dim=D), "attention=exact has no basis"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_basis_that_does_not_fit_is_refused_and_nothing_is_changed(path, case):
    make, message = WRONG[case]
    mechanism = make()
    before = {name: tensor.clone() for name, tensor in mechanism.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_basis_into(mechanism, path)
    assert str(path) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mechanism.state_dict().items())


def test_a_file_of_the_position_kind_alone_is_refused_by_eigen_topk(path):
    calibration = Calibration.open(path)
    calibration.statistics = ["absolute"]
    calibration.save(path)
    with pytest.raises(ValueError, match="holds absolute; attention=eigen_topk needs content"):
        eigen_topk(basis=str(path))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_truncated_files(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        eigen_topk(basis=str(path))


def test_foreign_files(path):
    for content in (b"", b"not a basis", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            eigen_topk(basis=str(path))
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a basis file of version 1"):
        eigen_topk(basis=str(path))
    for header in ("[]", "{", json.dumps({"format": "approx_attn.basis", "version": 1, "layers": [{"name": "a"}]})):
        save_file({"weight": torch.zeros(2)}, path, metadata={"approx_attn.basis": header})
        with pytest.raises(ValueError, match=r"attention\.basis="):
            eigen_topk(basis=str(path))
    with pytest.raises(ValueError, match="is not a file"):
        eigen_topk(basis=str(path.parent))


def test_a_file_that_lacks_tensors_its_header_promises(path):
    calibration = Calibration.open(path)
    del calibration.tensors["0.content.head.key_map"]
    calibration.save(path)
    mechanism = eigen_topk()
    before = mechanism.basis.query_map.clone()
    with pytest.raises(ValueError, match=r"is damaged.*key_map"):
        load_basis_into(mechanism, path)
    calibration = Calibration.open(path)
    calibration.tensors["1.content.head.key_map"][0, 0, 0] = float("nan")
    calibration.save(path)
    with pytest.raises(ValueError, match="key_map must be finite"):
        load_basis_into(eigen_topk(layer_index=1), path)
    assert torch.equal(mechanism.basis.query_map, before)
