"""allocate: budgets from measured errors; what convert, describe and files make of them."""

import copy
import json

import pytest
import torch
from torch import nn

import approx_attn
from approx_attn import Allocation, allocate, convert, describe
from approx_attn.conversion.calibration import calibrate
from approx_attn.diagnosis.reconstruction import reconstruct

LENGTH, DIM, HEADS = 32, 32, 4


def encoder(depth=3, sharpness=(1.0, 3.0, 6.0), **changes):
    """Layers whose scores are ever larger, so that they need ever more pairs."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, changes.get("heads", HEADS), 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
    for block, factor in zip(model.layers, sharpness, strict=False):
        block.self_attn.in_proj_weight.data[: 2 * DIM] *= factor
        block.self_attn.in_proj_weight.data[: DIM // HEADS] *= 3  # a head that needs more than the others
    return model


def inputs(seed=0, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, LENGTH, DIM, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def shared():
    """Budgets of a quarter of all pairs."""
    return allocate(encoder(), inputs(), {"name": "eigen_topk", "rank": 2}, mean_share=0.25, progress=False)


def test_a_share_is_spent_where_it_helps_most(shared):
    model, taken = encoder(), inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def moved(**arguments):
        converted = convert(copy.deepcopy(model), calibration=taken, **arguments)
        with torch.no_grad():
            return sum(float((converted(x) - model(x)).square().sum()) for x in taken) ** 0.5

    assert 0.23 < shared.exact_share <= 0.25
    assert moved(budgets=shared) < 0.9 * moved(attention="eigen_topk", rank=2, keep=0.25)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_errors_and_shares_are_those_of_the_converted_layers(shared):
    model = encoder()
    fitted = calibrate(model, inputs(), statistics=["content"], progress=False)
    mechanisms = {name: layer.attention for name, layer in shared.layers.items()}
    (described, *_) = rows = describe(convert(encoder(), budgets=shared, calibration=inputs()), LENGTH)
    assert [row.cost.exact_share for row in rows] == pytest.approx([b.exact_share for b in shared.layers.values()])
    assert described.options["keep"] == mechanisms[described.layer]["keep"]
    for row in reconstruct(model, inputs(), mechanisms, fitted, progress=False):
        # One measures heads and sequences by themselves and the other all together.
        assert row.layers[row.label].output == pytest.approx(sum(shared.layers[row.label].head_errors) / HEADS, rel=0.1)
    assert any(isinstance(spec["keep"], list) for spec in mechanisms.values())


def test_every_layer_keeps_to_a_target_and_bad_ones_stay_exact():
    model, target = encoder(sharpness=(1.0, 1.0, 9.0)), 0.05
    loose, tight = (
        allocate(model, inputs(), "topk", target_error=error, progress=False) for error in (4 * target, target)
    )
    assert loose.exact_share < tight.exact_share
    assert all(layer.error <= 4 * target for layer in loose.layers.values())
    kept = allocate(model, inputs(), {"name": "topk", "keep": 0.25}, target_error=0.2, progress=False)
    names = [layer.attention["name"] for layer in kept.layers.values()]
    assert set(names) == {"topk", "exact"}
    converted = convert(copy.deepcopy(model), budgets=kept)
    assert [row.attention for row in describe(converted, LENGTH)] == names


def test_each_layer_gets_the_best_of_several_mechanisms():
    both = allocate(encoder(), inputs(), ["sliding_window", "eigen_topk"], mean_share=0.2, progress=False)
    window = allocate(encoder(), inputs(), "sliding_window", mean_share=0.2, progress=False)
    assert {layer.attention["name"] for layer in both.layers.values()} == {"eigen_topk"}
    assert both.exact_share <= 0.2
    assert sum(b.error for b in both.layers.values()) < sum(b.error for b in window.layers.values())


def test_a_converted_model_is_saved_with_its_budgets(shared, tmp_path):
    path = shared.save(tmp_path / "budgets.json")
    model = convert(encoder(), budgets=path, calibration=inputs())
    approx_attn.save_converted(model, tmp_path / "model")
    loaded = approx_attn.load_converted(tmp_path / "model", encoder())
    (x,) = inputs(5, 1)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert [row.options for row in describe(loaded)] == [row.options for row in describe(model)]


def test_refined_bases_come_with_the_conversion(shared):
    model, taken = encoder(), inputs()
    fitted, refined = (convert(copy.deepcopy(model), budgets=shared, calibration=taken, refine=n) for n in (0, 40))
    changed = [name for name, part in fitted.state_dict().items() if not torch.equal(part, refined.state_dict()[name])]
    assert changed
    assert all(name.endswith(("basis.query_map", "basis.key_map")) for name in changed)
    spec = {"name": "eigen_topk", "rank": 2, "keep": 0.25}
    for part in ({"refine": 5}, {"refine": 5, "attention": "topk"}, {"refine": -1}):
        with pytest.raises(ValueError, match="refine"):
            convert(copy.deepcopy(model), **{"attention": spec, "calibration": None} | part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of target_error and mean_share must be given, got None and None"),
        ({"mean_share": 0.1, "target_error": 0.1}, "one of target_error and mean_share"),
        ({"target_error": 0.0}, r"target_error must be a number above 0 and at most 1, got 0\.0"),
        ({"target_error": 1e-7}, "target_error=1e-07 is reached in no layer: the least error of one is"),
        ({"mean_share": 0.001}, "cannot be reached: the least budgets are 0.03"),
        ({"mean_share": 0.1, "attention": "linformer"}, "attention=linformer has no keep to allocate"),
        ({"mean_share": 0.1, "attention": "low_rank_topk"}, "attention=low_rank_topk cannot be allocated"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(encoder(1), inputs(), **{"attention": "topk", "progress": False} | arguments)


def test_budgets_of_another_model_are_refused_and_the_model_stays(shared, tmp_path):
    for other, message in (
        (encoder(2), r"TransformerEncoder with 3 attention layers, this TransformerEncoder has 2; layers\.2"),
        (encoder(heads=2), "whose layers.0.self_attn has .*'num_heads': 4.*; here it has .*'num_heads': 2"),
    ):
        keys = list(other.state_dict())
        with pytest.raises(ValueError, match=message):
            convert(other, budgets=shared, calibration=inputs())
        assert list(other.state_dict()) == keys
    with pytest.raises(ValueError, match="every layer gets: leave these out"):
        convert(encoder(), "eigen_topk", budgets=shared)
    with pytest.raises(ValueError, match="allocate needs the model as it was"):
        allocate(convert(encoder(), "topk"), inputs(), mean_share=0.1)
    whole = json.loads(shared.save(tmp_path / "budgets.json").read_text())
    for text, message in (("{", "not JSON"), ("[]", "not a file of budgets"), (whole | {"layers": [1]}, "is damaged")):
        (tmp_path / "bad.json").write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(ValueError, match=message):
            Allocation.open(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="is not a file"):
        Allocation.open(tmp_path / "nothing.json")
