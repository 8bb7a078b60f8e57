"""Conversion of models that are not of transformers: PyTorch's own, modules shaped like timm's, this package's."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from approx_attn import MultiheadAttention, available_attention, convert, describe, load_converted, revert
from approx_attn import save_converted as save
from approx_attn.attention.eigen.topk import EigenTopKAttention
from approx_attn.attention.registry import attention_class
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.models.encoder_classifier import EncoderClassifier

BATCH, LENGTH, DIM, HEADS = 2, 9, 16, 4


class VisionAttention(nn.Module):
    """Self-attention in the shape of timm's: one projection to q, k and v, and two ways to attend."""

    def __init__(self, fused_attn=True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = HEADS, DIM // HEADS, fused_attn
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # 3 x (b, h, n, d)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            x = (q @ k.mT / self.head_dim**0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(-2))


class VisionModel(nn.Module):
    def __init__(self, fused_attn=True):
        super().__init__()
        self.blocks = nn.ModuleList(VisionAttention(fused_attn) for _ in range(2))

    def forward(self, x, attn_mask=None):
        for block in self.blocks:
            x = x + block(x, attn_mask)
        return x


def encoder():
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS = {"torch": encoder, "timm": VisionModel, "timm_unfused": partial(VisionModel, fused_attn=False)}
FULL = [name for name in available_attention() if attention_class(name).full_budget(LENGTH, 4) is not None]


def build(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def make_inputs():
    torch.manual_seed(1)
    return torch.randn(BATCH, LENGTH, DIM)


@pytest.mark.parametrize("attention", FULL)
@pytest.mark.parametrize("kind", MODELS)
def test_full_budget_equals_exact_and_reverts(kind, attention):
    model, x = build(kind), make_inputs()
    expected = model(x)
    keys = list(model.state_dict())
    converted = convert(
        model, attention, calibration=None, max_length=LENGTH, **attention_class(attention).full_budget(LENGTH, 4)
    )
    assert converted is model
    assert {row.attention for row in describe(model)} == {attention}
    got = model(x)
    assert (got - expected).norm() < 1e-3 * expected.norm()
    assert revert(model) is model
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_the_mechanism_is_used(kind):
    model, x = build(kind), make_inputs()
    expected = model(x)
    assert (convert(model, "sliding_window", window=1)(x) - expected).norm() > 0.01 * expected.norm()
    with torch.no_grad():  # where PyTorch's encoder would take its fused path
        assert (model(x) - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_copies_and_modes_are_independent(kind):
    model, x = convert(build(kind), "eigen_topk", rank=2, keep=3, calibration=None), make_inputs()
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), model(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    assert not torch.allclose(other(x), model(x))
    mechanisms = [m for m in other.train().modules() if isinstance(m, EigenTopKAttention)]
    assert len(mechanisms) == 2
    assert all(m.training for m in mechanisms)
    assert any("query_map" in name for name, _ in other.named_parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_capture_sees_converted_layers_as_unconverted(kind):
    model, x = build(kind), make_inputs()

    def captured():
        calls = []
        with torch.no_grad(), capture_attention_inputs(model, lambda *call: calls.append(call)):
            output = model(x)
        torch.testing.assert_close(output, model(x).detach())
        return [(name, query, scale) for name, query, *_, scale in calls]

    model.blocks = getattr(model, "blocks", None) or model.layers
    if kind == "timm_unfused":
        convert(model, "exact")  # which takes the path that can be seen
    before = captured()
    assert len(before) == 2
    convert(model, "topk", keep=1.0)
    for (name, query, scale), (other_name, other_query, other_scale) in zip(before, captured(), strict=True):
        assert (name, scale) == (other_name, other_scale)
        torch.testing.assert_close(query, other_query)


def test_masks_reach_the_mechanism_as_structure():
    model, x = convert(build("timm"), "linear"), make_inputs()  # linear attention takes structured masks only
    keep = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    keep[1, ..., -3:] = False
    short = model(x[1:, :-3])
    torch.testing.assert_close(model(x, attn_mask=keep)[1:, :-3], short)


def test_layers_are_chosen_by_pattern():
    model = convert(build("torch"), "topk", layers="layers.1.*", keep=3)
    assert [row.attention for row in describe(model)] == ["exact", "topk"]
    convert(model, "sliding_window", layers=["layers.0.self_attn"], window=2)
    assert [row.attention for row in describe(model)] == ["sliding_window", "topk"]
    original = build("torch")
    revert(model)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)
    torch.testing.assert_close(model(make_inputs()), original(make_inputs()), rtol=0, atol=0)


def test_description_states_parameters_and_cost(capsys):
    rows = describe(convert(build("torch"), "eigen_topk", rank=2, keep=0.25, calibration=None), length=32)
    assert [row.layer for row in rows] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert rows[0].kind == "encoder-self"
    assert rows[0].options == {"rank": 2, "keep": 0.25}
    assert rows[0].parameters >= 2 * HEADS * 4 * 2
    assert rows[0].cost.exact_share == pytest.approx(0.25)
    assert rows[0].exact_cost.score_multiply_adds == HEADS * 32 * 32 * 4
    assert "eigen_topk" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_calibration_makes_the_estimate_better(kind):
    batches = [torch.randn(4, LENGTH, DIM) @ torch.diag(torch.arange(DIM) < 3).float() for _ in range(4)]
    expected = build(kind)(batches[0])
    options = {"rank": 2, "keep": 2, "seed": 0}

    def error(calibration):
        output = convert(build(kind), "eigen_topk", calibration=calibration, **options)(batches[0])
        return float((output - expected).norm() / expected.norm())

    assert error(iter(batches)) < 0.5 * error(None)


@pytest.mark.parametrize(
    "arguments", [{"attention": "low_rank_topk", "basis": "input"}, {"attention": "eigen_topk", "keep": 1.0}]
)
def test_mechanisms_that_need_no_calibration_are_not_asked_for_it(arguments):
    model, x = build("timm"), make_inputs()
    expected = model(x)
    error = (convert(model, **arguments)(x) - expected).norm() / expected.norm()
    assert error < (0.3 if "basis" in arguments else 1e-5)


def test_models_of_this_package_convert():
    torch.manual_seed(0)
    model = EncoderClassifier(vocab_size=11, max_length=16, num_classes=3, dim=DIM, depth=2, num_heads=HEADS).eval()
    tokens = torch.randint(0, 11, (2, 9))
    expected = model(tokens)
    convert(model, attention={"name": "topk", "keep": 1.0})
    assert all(isinstance(m, MultiheadAttention) for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    torch.testing.assert_close(model(tokens), expected)


def test_partial_of_a_mechanism_is_accepted():
    model = convert(build("torch"), partial(EigenTopKAttention, rank=2, keep=3), calibration=None)
    assert describe(model)[0].options == {"rank": 2, "keep": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "eigen_topkk"}, "did you mean"),
        ({"attention": "topk", "kep": 3}, "attention.kep is not an option of topk"),
        ({"attention": "exact", "keep": 3}, "attention.keep is not an option of exact"),
        ({"attention": "topk", "keep": 2.5}, "attention.keep must be"),
        ({"attention": "topk", "layers": "blocks.7"}, r"layers='blocks.7' means no attention layer.*blocks.0"),
        ({"attention": {"keep": 3}}, "with the key 'name'"),
        ({"attention": "topk", "calibration": [torch.zeros(1, 2, DIM)]}, "has no basis to fit"),
        ({"attention": "eigen_topk", "calibration": []}, "no batches"),
        ({"attention": "eigen_topk", "calibration": ["a text"]}, "of the model's inputs .* got 'a text'"),
        ({"attention": "eigen_topk"}, "attention=eigen_topk is of no use .* give calibration="),
        ({"attention": "low_rank_topk"}, "attention=low_rank_topk is of no use .* give calibration="),
        ({"attention": "linformer", "max_length": LENGTH}, "attention=linformer starts from .* calibration=None"),
        ({"attention": "nsa", "keep": 1.0}, "attention=nsa starts from .* calibration=None"),
    ],
)
def test_bad_input_changes_nothing(arguments, message):
    model, x = build("timm"), make_inputs()
    expected, keys = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear holds no attention layer"),
        (nn.MultiheadAttention(16, 4), "MultiheadAttention.from_torch"),
    ],
)
def test_models_that_cannot_be_converted_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        convert(model, "topk")


# -- saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["exact", "topk", "eigen_topk", "eigen_row"])
def test_saved_model_loads_with_equal_outputs(kind, attention, tmp_path):
    length = None if attention != "eigen_row" else 16
    model, x = convert(build(kind), attention, max_length=length, calibration=None), make_inputs()
    model.train()(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad) if parameter.grad is not None else None
    model.eval()
    assert save(model, tmp_path / "model") == tmp_path / "model"
    loaded = load_converted(tmp_path / "model", MODELS[kind]())
    assert torch.equal(loaded(x), model(x))
    assert [row.attention for row in describe(loaded)] == [attention] * 2
    assert not [path for path in (tmp_path / "model").iterdir() if path.suffix not in (".json", ".safetensors")]


def saved(tmp_path):
    return save(convert(build("torch"), "eigen_topk", rank=2, calibration=None), tmp_path)


def edit_header(folder, **changes):
    header = json.loads((folder / "approx_attn.json").read_text()) | changes
    (folder / "approx_attn.json").write_text(json.dumps(header))


def rename_mechanism(folder):
    header = json.loads((folder / "approx_attn.json").read_text())
    for entry in header["layers"].values():
        entry["attention"]["name"] = "os.system"
    edit_header(folder, **header)


DAMAGES = {
    "missing_header": (lambda f: (f / "approx_attn.json").unlink(), "not a folder that save_converted wrote"),
    "truncated_header": (lambda f: (f / "approx_attn.json").write_text('{"for'), "is not JSON"),
    "other_format": (lambda f: edit_header(f, format=7), "must have format 1"),
    "foreign_class": (lambda f: edit_header(f, library="transformers", model="system"), "must be left out"),
    "unknown_layer": (lambda f: edit_header(f, layers={"x.y": {}}), "names the layer x.y"),
    "foreign_mechanism": (rename_mechanism, "attention='os.system' is unknown"),
    "no_tensors": (lambda f: (f / "approx_attn.safetensors").unlink(), "approx_attn.safetensors cannot be read"),
    "truncated": (lambda f: (f / "approx_attn.safetensors").write_bytes(b"123"), "truncated or foreign"),
    "truncated_model": (lambda f: (f / "model.safetensors").write_bytes(b"123"), "truncated or foreign"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage, tmp_path):
    folder = saved(tmp_path)
    inflict, message = DAMAGES[damage]
    inflict(folder)
    with pytest.raises(ValueError, match=message):
        load_converted(folder, encoder())


def test_saving_and_loading_need_the_right_model(tmp_path):
    with pytest.raises(ValueError, match="is not converted"):
        save(build("torch"), tmp_path)
    folder = saved(tmp_path)
    with pytest.raises(ValueError, match="model= must be given"):
        load_converted(folder)
    with pytest.raises(ValueError, match="does not fit model=VisionModel"):
        load_converted(folder, VisionModel())
