"""Feed-forward blocks of models of transformers that are made to use part of their hidden units."""

import copy
import json

import pytest
import torch

from approx_attn import convert, describe, load_converted, revert, save_converted

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 20, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SEQ2SEQ |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}

FAMILIES = {
    "bert": ("BertModel", "BertConfig", SIZES | TEXT),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24} | TEXT,
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", SIZES | TEXT),
    "gpt2": ("GPT2Model", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": 20}),
    "vit": ("ViTModel", "ViTConfig", SIZES | {"image_size": 8, "patch_size": 4}),
    "bart": ("BartModel", "BartConfig", SEQ2SEQ | TEXT),
    "t5": ("T5Model", "T5Config", T5 | {"vocab_size": 20}),
    "gpt_neox": ("GPTNeoXModel", "GPTNeoXConfig", SIZES | TEXT),
}
SECOND = {  # by family, the name of the second layer of a block
    "bert": "output.dense",
    "distilbert": "lin2",
    "mpnet": "output.dense",
    "gpt2": "c_proj",
    "vit": "fc2",
    "bart": "fc2",
    "t5": "wo",
    "gpt_neox": "dense_4h_to_h",
}


def build(family):
    model_class, config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


def run(model, family):
    torch.manual_seed(1)
    tokens = torch.randint(3, 20, (2, 7))
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if family == "vit" else {"input_ids": tokens}
    inputs |= {"decoder_input_ids": tokens} if family in ("bart", "t5") else {}
    return model(**inputs)[0]


def hidden_units(model, family):
    """What enters the second layer of each block: (tokens, units)."""
    found, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith(SECOND[family]) and "attention" not in name and "attn" not in name:
            hooks.append(
                module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, -2)))
            )
    output = run(model, family)
    for hook in hooks:
        hook.remove()
    return found, output


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_uses_the_largest_of_its_units(family):
    model = build(family)
    (dense, *_), expected = hidden_units(model, family)
    convert(model, "exact", feed_forward={"name": "topk", "keep": 5})
    (kept, *others), output = hidden_units(model, family)
    assert len(others) == 1
    assert all((units != 0).sum(-1).le(5).all() for units in (kept, *others))
    # The first block has the inputs it had: its units are those of the dense model, or zero.
    assert torch.equal(kept, torch.where(kept != 0, dense, 0.0))
    floor = kept.masked_fill(kept == 0, float("inf")).amin(-1, keepdim=True)
    dropped = dense.masked_fill(kept != 0, float("-inf"))
    assert (dropped.amax(-1, keepdim=True) <= floor.clamp_min(0.0)).all()
    assert not torch.allclose(output, expected, atol=1e-3)
    convert(model, "exact", feed_forward={"name": "topk", "keep": 1.0})
    torch.testing.assert_close(run(model, family), expected)
    revert(convert(model, "topk", feed_forward="topk"))
    assert torch.equal(run(model, family), expected)


def test_description_and_gradients(capsys):
    model = convert(build("bert"), "topk", keep=3, feed_forward={"name": "topk", "keep": 0.25}).train()
    describe(model)
    shown = capsys.readouterr().out
    assert "encoder.layer.1.intermediate" in shown
    assert "topk (keep=0.25)" in shown
    run(model, "bert").square().mean().backward()
    assert model.encoder.layer[0].intermediate.dense.weight.grad.abs().max() > 0


@pytest.mark.parametrize("save", [save_converted, lambda model, folder: model.save_pretrained(folder)])
def test_saved_models_load_with_their_blocks(save, tmp_path):
    model = convert(build("gpt2"), "exact", feed_forward={"name": "topk", "keep": 4})
    save(model, tmp_path)
    loaded = load_converted(tmp_path)
    assert torch.equal(run(loaded, "gpt2"), run(model, "gpt2"))
    assert torch.equal(run(revert(loaded), "gpt2"), run(build("gpt2"), "gpt2"))


@pytest.mark.parametrize(("name", "keep"), [("h.7.mlp", 4), ("h.0.mlp", 0)])
def test_damaged_headers_are_refused(name, keep, tmp_path):
    save_converted(convert(build("gpt2"), "exact", feed_forward="topk"), tmp_path)
    header = json.loads((tmp_path / "approx_attn.json").read_text())
    (tmp_path / "approx_attn.json").write_text(json.dumps(header | {"feed_forward": {name: keep}}))
    with pytest.raises(ValueError, match=name):
        load_converted(tmp_path)


@pytest.mark.parametrize(
    ("feed_forward", "message"),
    [
        ("dense", "feed_forward must be topk .* got 'dense'"),
        ({"name": "topk", "kep": 3}, "feed_forward must be topk"),
        ({"name": "topk", "keep": 0}, "feed_forward.keep must be"),
    ],
)
def test_bad_options_change_nothing(feed_forward, message):
    model = build("bert")
    expected = run(model, "bert")
    with pytest.raises(ValueError, match=message):
        convert(model, "topk", feed_forward=feed_forward)
    assert torch.equal(run(model, "bert"), expected)
    assert not any("approx_attn" in name for name, _ in model.named_modules())


def test_blocks_with_a_gate_are_refused_by_name():
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **TEXT))
    with pytest.raises(ValueError, match=r"plain two-layer feed-forward blocks.* got LlamaModel.* with a gate"):
        convert(model, "topk", feed_forward="topk")
