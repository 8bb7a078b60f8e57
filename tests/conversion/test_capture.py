"""Capture of queries, keys and values: they must be the ones that the model's attention used."""

import pytest
import torch
from torch import nn

from approx_attn import MultiheadAttention
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.conversion.capture import capture_attention_inputs


def captured(model, *args, **kwargs):
    """The calls [(name, exact attention of what was captured, mask)] of one forward pass, and its output."""
    calls = []

    def callback(name, query, key, value, mask, scale):
        assert not query.requires_grad
        calls.append((name, exact_attention_with_weights(query, key, value, mask, scale, 0.0)[0], mask))

    with capture_attention_inputs(model, callback):
        output = model(*args, **kwargs)
    return calls, output


def test_multihead_inputs_reproduce_the_output():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True)
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 6), torch.randn(2, 7, 10)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, -2:] = True
    model = nn.ModuleDict({"attention": layer})
    model.forward = lambda *args, **kwargs: layer(*args, **kwargs)
    calls, (output, _) = captured(model, query, key, value, key_padding_mask=padding)
    (name, attended, mask), *others = calls
    assert name == "attention"
    assert not others
    assert torch.equal(mask.key_keep, ~padding)
    torch.testing.assert_close(layer.out_proj(attended.transpose(1, 2).flatten(-2)), output)


def test_coordinates_are_captured():
    layer = MultiheadAttention(16, 4, batch_first=True, attention="gaussian", coordinate_dim=3)
    x, points = torch.randn(2, 5, 16), torch.randn(2, 5, 3)
    model = nn.ModuleDict({"attention": layer})
    model.forward = lambda x, points: layer(x, x, x, coordinates=points)
    ((_, _, mask),), _ = captured(model, x, points)
    assert torch.equal(mask.query_coordinates, points)
    assert torch.equal(mask.key_coordinates, points)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", [None, "exact"])
def test_encoder_layers_are_seen_in_order_and_unchanged(attention, training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    if attention is not None:
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, attention)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, -2:] = True
    with torch.set_grad_enabled(training):
        expected = encoder(x, src_key_padding_mask=padding)
        calls, output = captured(encoder, x, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], expected[~padding])
    assert [name for name, *_ in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(torch.equal(mask.key_keep, ~padding) for *_, mask in calls)


def test_nothing_is_left_behind():
    layer = nn.MultiheadAttention(16, 4)
    x = torch.randn(5, 2, 16)
    with capture_attention_inputs(layer, lambda *call: None):
        layer(x, x, x)
    assert not layer._forward_pre_hooks


def test_model_without_attention_is_refused():
    with (
        pytest.raises(ValueError, match="nothing can be captured"),
        capture_attention_inputs(nn.Linear(2, 2), lambda *call: None),
    ):
        pass


# -- transformers ---------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 50}


def build(family, implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        model = transformers.LlamaModel._from_config(config, attn_implementation=implementation)
    elif family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 37, "vocab_size": 50}
        model = transformers.T5Model._from_config(transformers.T5Config(**sizes), attn_implementation=implementation)
    else:
        model = transformers.BertModel._from_config(
            transformers.BertConfig(**SIZES), attn_implementation=implementation
        )
    return model.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_interface_inputs_reproduce_the_attention(family, side, implementation):
    model = build(family, implementation)
    tokens, keep = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    keep[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    arguments = {"input_ids": tokens, "attention_mask": keep}
    if family == "t5":
        arguments["decoder_input_ids"] = tokens[:, :5]
    used = []

    def record(module, args, output):
        used.append(args[0])

    names = {"bert": "attention.output.dense", "llama": "o_proj", "t5": ".o"}
    for name, module in model.named_modules():
        if name.endswith(names[family]):  # what enters the output projection is the attention's output
            module.register_forward_hook(record)
    with torch.no_grad():
        expected = model(**arguments)[0]
        reference, used = used, []
        calls, output = captured(model, **arguments)
    assert torch.equal(output[0], expected)
    assert len(calls) == len(reference) == (6 if family == "t5" else 2)
    for (name, attended, mask), entered in zip(calls, reference, strict=True):
        attended = attended.transpose(1, 2).flatten(-2)
        rows = torch.ones(attended.shape[:2], dtype=torch.bool)
        if mask.query_keep is not None:
            rows = mask.query_keep
        torch.testing.assert_close(attended[rows], entered[rows], msg=lambda m, name=name: f"{name}: {m}")
        assert mask.pair_keep is None
        assert mask.causal == (family == "llama" or ("decoder" in name and "SelfAttention" in name))


def test_scale_is_that_of_the_call():
    scales = []
    model = build("t5", "sdpa")
    with capture_attention_inputs(model, lambda *call: scales.append(call[-1])), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]), decoder_input_ids=torch.tensor([[1]]))
    assert scales == [1.0] * 6
    x = torch.randn(1, 3, 16)
    with capture_attention_inputs(layer := nn.MultiheadAttention(16, 4), lambda *call: scales.append(call[-1])):
        layer(x, x, x)
    assert scales[-1] == pytest.approx(0.5)
