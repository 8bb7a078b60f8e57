"""Conversion of tiny random models of many families of transformers."""

import copy
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from approx_attn import available_attention, convert, describe, load_converted, revert, save_converted
from approx_attn.attention import AttentionMechanism
from approx_attn.attention.registry import attention_class
from approx_attn.conversion.capture import capture_attention_inputs

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCABULARY = 2, 9, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = SIZES | {"num_key_value_heads": 2}
VISION = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
MODERNBERT = SIZES | {
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "reference_compile": False,
}
GEMMA3 = LLAMA_LIKE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"]}
SLIDING_QWEN2 = LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
GEMMA2 = GEMMA3 | {"attn_logit_softcapping": 2.0}
GPT_OSS = LLAMA_LIKE | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
GPT_OSS |= {"intermediate_size": 40, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
CLIP = {"text_config": SIZES, "vision_config": VISION, "projection_dim": 16}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
WAV2VEC2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
WAV2VEC2 |= {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (4, 2), "num_conv_pos_embeddings": 4}
WAV2VEC2 |= {"num_conv_pos_embedding_groups": 2}
WHISPER = SEQ2SEQ | {"num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 32}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}
DISTILBERT |= {"max_position_embeddings": 32}
ELECTRA = SIZES | {"embedding_size": 16}

FAMILIES = {
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTILBERT),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", SIZES),
    "electra": ("ElectraModel", "ElectraConfig", ELECTRA),
    "modernbert": ("ModernBertModel", "ModernBertConfig", MODERNBERT),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "clip": ("CLIPModel", "CLIPConfig", CLIP),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA_LIKE | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA_LIKE),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS),
    "qwen2 sliding": ("Qwen2ForCausalLM", "Qwen2Config", SLIDING_QWEN2),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", WAV2VEC2),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}
GENERATORS = [
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "gemma3",
    "gemma2",
    "gpt_oss",
    "qwen2 sliding",
    "t5",
    "bart",
    "whisper",
]
EAGER_ONLY = ("mpnet", "gemma2", "gpt_oss")
WINDOWS = {"mistral": [4, 4], "gemma3": [4, None], "qwen2 sliding": [None, 4], "modernbert": [None, 3]}  # by layer
WINDOWS |= {"gemma2": [4, None], "gpt_oss": [4, None]}
FULL = [name for name in available_attention() if attention_class(name).full_budget(LENGTH, 8) is not None]
CAUSAL = [name for name in available_attention() if attention_class(name).capabilities.causal]


def mostly_slow(families, *fast):
    """Parameters of which all but `fast` are left to the slow run."""
    return [pytest.param(family, marks=() if family in fast else pytest.mark.slow) for family in families]


def build(family, implementation="sdpa"):
    model_class, config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
    implementation = "eager" if family in EAGER_ONLY else implementation
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():  # larger than at initialisation, so that attention is not uniform
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


def make_inputs(family, padding=None):
    """Inputs of a family; the second sequence padded by three tokens on one side if asked."""
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    keep = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if padding is not None:
        keep[1, slice(0, 3) if padding == "left" else slice(LENGTH - 3, LENGTH)] = 0
        tokens = tokens.masked_fill(keep == 0, 0)
    if family == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8)}
    if family == "wav2vec2":
        return {"input_values": torch.randn(BATCH, 8 * LENGTH)}
    if family == "whisper":
        return {"input_features": torch.randn(BATCH, 4, 20), "decoder_input_ids": tokens}
    inputs = {"input_ids": tokens} if padding is None else {"input_ids": tokens, "attention_mask": keep}
    if family == "clip":
        inputs["pixel_values"] = torch.randn(BATCH, 3, 8, 8)
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = tokens[:, :5]
    return inputs


def outputs(model, inputs):
    """All float outputs of a model, those at padded positions cleared."""
    result = model(**inputs)
    keep = inputs.get("attention_mask")
    found = {}
    for name, value in result.items():
        if not torch.is_tensor(value) or not value.is_floating_point():
            continue
        if keep is not None and value.shape[:2] == keep.shape:
            value = value * keep[..., None]
        found[name] = value
    return found


ARBITRARY, CROSS = "arbitrary or additive", "the cross-attention of a causal decoder"
REFUSED = {  # what a family needs and a mechanism may refuse
    "t5": (ARBITRARY, CROSS),
    **dict.fromkeys(("bart", "whisper"), (CROSS,)),
    "mpnet": (ARBITRARY,),
    **dict.fromkeys(WINDOWS, ("a window of",)),
}
REFUSED["gemma2"] += ("scores that are soft-capped",)
REFUSED["gpt_oss"] += ("attention sinks",)


@contextmanager
def refusals(family):
    """Refusals by name are accepted for what the family really needs."""
    try:
        yield
    except ValueError as error:
        needs = REFUSED.get(family, ()) + (("causal", "queries over") if family in (*GENERATORS, "clip") else ())
        if not any(f"does not support {need}" in str(error) or f"an {need}" in str(error) for need in needs):
            raise


def loss(model, inputs):
    return sum(value.square().mean() for value in outputs(model, inputs).values())


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_sdpa(family, padding):
    inputs = make_inputs(family, padding)
    model = build(family)
    converted = convert(copy.deepcopy(model), "exact")
    torch.testing.assert_close(outputs(converted, inputs), outputs(model, inputs))
    loss(model, inputs).backward()
    loss(converted, inputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close({name: p.grad for name, p in converted.named_parameters()}, gradients)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_exact_equals_eager_where_that_was_in_use(family):
    inputs, model = make_inputs(family, "right"), build(family, "eager")
    torch.testing.assert_close(outputs(convert(copy.deepcopy(model), "exact"), inputs), outputs(model, inputs))


def test_eager_masks_are_followed_where_the_causal_flag_says_otherwise():
    config = transformers.SplinterConfig(**SIZES)  # no causal flag, which elsewhere means causal
    model, inputs = transformers.SplinterModel(config).eval(), make_inputs("bert", "right")
    assert model.config._attn_implementation == "eager"
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(convert(model, "exact"), inputs), expected)
    torch.testing.assert_close(outputs(convert(model, "topk", keep=1.0), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", "topk"), *(pytest.param(name, "exact", marks=pytest.mark.slow) for name in ("bert", "llama"))],
)
def test_compiles_without_graph_breaks(family, attention):
    check_compiled(family, attention, fullgraph=True)


@pytest.mark.slow
def test_compiles_with_dense_masks():
    check_compiled("llama", "topk", fullgraph=False)  # transformers makes a dense causal mask when it is compiled


def check_compiled(family, attention, fullgraph):
    model, inputs = convert(build(family), attention), make_inputs(family)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)(**inputs, use_cache=False).logits
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("attention", FULL)
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "bert", "mpnet", "gpt2", "gemma2", "gpt_oss", "t5"))
def test_full_budget_equals_exact(family, attention):
    length = {"vit": 5, "wav2vec2": 9}.get(family, LENGTH)
    options = attention_class(attention).full_budget(length, 8)
    # Against padding on the left of its memory, what a decoder's position means there is up to the mechanism.
    for padding in (None, "right") if family in ("t5", "bart") else (None, "left", "right"):
        inputs = make_inputs(family, padding)
        model = build(family)
        expected = outputs(model, inputs)
        with refusals(family):
            converted = convert(model, attention, max_length=length, calibration=None, **options)
            with torch.no_grad():
                got = outputs(converted, inputs)
            for name, value in expected.items():
                assert (got[name] - value).norm() < 1e-3 * value.norm(), name


def generate(model, inputs, **options):
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", GENERATORS)
def test_exact_generates_the_same_tokens(family, padding):
    model, inputs = build(family), make_inputs(family, padding)
    expected = generate(model, inputs)
    assert torch.equal(generate(convert(model, "exact"), inputs), expected)


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("family", mostly_slow(GENERATORS, "gpt2", "t5"))
def test_every_causal_mechanism_generates(family, attention):
    inputs = make_inputs(family, "left")
    with refusals(family):
        model = convert(build(family), attention, layers="decoder-self", max_length=32, calibration=None)
        assert generate(model, inputs).shape[0] == BATCH


# -- weights, families, layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["exact", "topk"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "llama", "gemma2", "t5", "bart", "vit"])
def test_weights_are_returned(family, attention):
    inputs = make_inputs(family, None if family == "vit" else "right")
    expected = build(family, "eager")(**inputs, output_attentions=True)
    model = convert(build(family), attention, **({} if attention == "exact" else {"keep": 1.0}))
    got = model(**inputs, output_attentions=True)
    names = [name for name in expected if name.endswith("attentions") and expected[name]]
    assert names
    for name in names:
        assert len(got[name]) == len(expected[name]) == 2
        for mine, theirs in zip(got[name], expected[name], strict=True):
            rows = theirs.isfinite() & (theirs.sum(-1, keepdim=True) > 0)
            torch.testing.assert_close(mine[rows], theirs[rows], rtol=1e-4, atol=1e-5)
    assert not model(**inputs).get("attentions")


def test_weights_are_refused_where_there_are_none():
    model = convert(build("bert"), "nystromformer")
    with pytest.raises(ValueError, match="does not support returning attention weights"):
        model(**make_inputs("bert"), output_attentions=True)


def test_structure_of_masks_survives():
    seen = []
    for family, padding in (("llama", None), ("llama", "left"), ("bert", "right"), ("gpt2", "left")):
        model = convert(build(family), "topk")
        with torch.no_grad(), capture_attention_inputs(model, lambda *call: seen.append(call[4])):
            model(**make_inputs(family, padding))
    assert all(mask.is_structured for mask in seen)
    assert [mask.causal for mask in seen] == [True] * 4 + [False] * 2 + [True] * 2
    assert all(torch.equal(mask.query_keep, mask.key_keep) for mask in seen[2:])


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_are_structure(family, padding):
    inputs, model = make_inputs(family, padding), build(family)
    expected, seen = outputs(model, inputs), []
    convert(model, "eigen_topk", keep=1.0)
    with torch.no_grad(), capture_attention_inputs(model, lambda *call: seen.append(call[4])):
        got = outputs(model, inputs)
    assert all(mask.is_structured for mask in seen)
    assert [mask.window for mask in seen] == WINDOWS[family]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_windows_are_refused_only_where_they_close_a_pair():
    model, tokens = convert(build("mistral"), "performer"), make_inputs("mistral")["input_ids"]
    keep = torch.tensor([[1] * 4, [0, 0, 1, 1]])
    model(input_ids=tokens[:, :4], attention_mask=keep)
    with pytest.raises(ValueError, match="attention=performer does not support a window of 4 keys in the mask"):
        model(input_ids=tokens[:, :5])


def test_queries_of_cross_attention_are_not_taken_for_the_keys():
    inputs = make_inputs("bart", "right")
    inputs["decoder_input_ids"] = inputs["input_ids"]  # of the same length, and yet not the same tokens
    model, seen = convert(build("bart"), "topk", layers="cross"), []
    with torch.no_grad(), capture_attention_inputs(model, lambda *call: seen.append(call[4])):
        model(**inputs)
    crossed = [mask for mask in seen[2:] if not mask.causal]  # after those of the encoder
    assert len(crossed) == 2
    for mask in crossed:
        assert not mask.key_keep.all()
        assert mask.query_keep.all()


@pytest.mark.parametrize(("family", "sinks"), [("llama", 2), ("mistral", 0), ("gemma3", 0)])
def test_cache_decoding_equals_one_pass(family, sinks):
    model = convert(build(family), "sliding_window", window=2, global_tokens=sinks)
    tokens = make_inputs(family)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        cache, steps = None, []
        for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
            output = model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache, steps = output.past_key_values, [*steps, output.logits]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_static_cache_generates_the_same_tokens(family):
    inputs = make_inputs(family, "left")
    model = convert(build(family), "topk", keep=3)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), generate(model, inputs))


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("t5", "encoder", {"encoder-self": 2}),
        ("t5", "decoder", {"decoder-self": 2, "decoder-cross": 2}),
        ("bart", "cross", {"decoder-cross": 2}),
        ("bart", "self", {"encoder-self": 2, "decoder-self": 2}),
        ("whisper", ["encoder", "decoder-cross"], {"encoder-self": 2, "decoder-cross": 2}),
        ("clip", "vision_model.*", {"encoder-self": 2}),
        ("llama", "model.layers.1.*", {"decoder-self": 1}),
    ],
)
def test_layers_are_chosen_by_kind_or_pattern(family, layers, expected):
    model = build(family)
    before, inputs = outputs(model, make_inputs(family)), make_inputs(family)
    convert(model, "topk", layers=layers, keep=2)
    kinds = [row.kind for row in describe(model) if row.attention == "topk"]
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    changed = outputs(model, inputs)
    assert any(not torch.allclose(changed[name], before[name], atol=1e-4) for name in before)
    revert(model)
    after = outputs(model, inputs)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "clip", "t5", "llama"])
def test_revert_restores_bit_for_bit(family, implementation):
    model, inputs = build(family, implementation), make_inputs(family)
    expected, keys = outputs(model, inputs), list(model.state_dict())
    implementations = {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}
    convert(model, "eigen_topk", rank=2, calibration=None)
    convert(model, "topk", layers="self")
    revert(model)
    after = {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}
    assert after == implementations
    assert list(model.state_dict()) == keys
    got = outputs(model, inputs)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["gpt_neo", "bloom", "deberta-v2", "xlnet"])
def test_families_outside_the_interface_are_refused_by_name(family):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_layers": 1, "num_heads": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 8, "vocab_size": 10, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}
    small |= {"attention_types": [[["global"], 1]]} if family == "gpt_neo" else {}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **small))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=rf"model_type={family}\) .*outside the attention interface"):
        convert(model, "topk")
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"attention": "linformer"}, "linformer does not support causal attention"),
        # In cross-attention a word would see those that come after it by way of their queries.
        (
            "bart",
            {"attention": "nystromformer", "layers": "cross"},
            "nystromformer does not support the cross",
        ),
    ],
)
def test_mechanisms_that_look_ahead_are_refused_in_decoders_before_anything_changes(family, options, message):
    model = build(family)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert model.config._attn_implementation == implementation
    assert not any("approx_attn" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "uniform does not support scores that are soft-capped at 2"),
        ("gpt_oss", "uniform .* attention sinks"),
    ],
)
def test_soft_caps_and_sinks_are_refused_by_name(family, message):
    model = convert(build(family), "uniform")
    with pytest.raises(ValueError, match=message):
        model(**make_inputs(family))


@pytest.mark.parametrize("attention", ["eigen_cluster", "sliding_window", "topk"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_reach_the_mechanism(family, attention):
    """Without them the same mechanism gives something else; calibration and decoding know them as well."""
    inputs = make_inputs(family, "left")
    options = {"keep": 4, **({"block_size": 4, "cluster_size": 2} if attention == "eigen_cluster" else {})}
    options |= {"calibration": [inputs]} if attention == "eigen_cluster" else {}
    model, seen = convert(build(family), attention, **options), []
    with torch.no_grad(), capture_attention_inputs(model, lambda *call: seen.append(call)):
        model(**inputs)
    assert [(mask.softcap, mask.sinks is not None) for *_, mask, _ in seen] == 2 * [
        (2.0, False) if family == "gemma2" else (None, True)
    ]
    _, query, key, value, mask, scale = seen[0]
    mechanism = next(m for m in model.modules() if isinstance(m, AttentionMechanism))
    with torch.no_grad():
        plain = mechanism(query, key, value, replace(mask, softcap=None, sinks=None), scale=scale)[0]
        assert not torch.allclose(mechanism(query, key, value, mask, scale=scale)[0], plain, atol=1e-3)
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@pytest.mark.parametrize(("family", "share"), [("bert", 0.7), ("mpnet", 0.9)])
def test_calibration_makes_the_estimate_better(family, share):
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (4, 16))} for _ in range(6)]
    expected = build(family)(**batches[0]).logits

    def error(calibration):
        model = convert(build(family), "eigen_topk", rank=2, keep=4, calibration=calibration)
        return float((model(**batches[0]).logits - expected).norm())

    assert error(batches) < share * error(None)


@pytest.mark.parametrize("family", ["bert", "mpnet", "t5", "llama", "gpt_oss", "clip"])
def test_gradients_reach_the_mechanism_and_training_runs(family):
    model = convert(build(family), "eigen_topk", layers="self", rank=2, keep=2, calibration=None).train()
    loss(model, make_inputs(family, "right")).backward()
    mechanisms = {name: p for name, p in model.named_parameters() if ".approx_attn." in name}
    assert mechanisms
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mechanisms.values())
    assert any(p.grad.abs().max() > 0 for p in mechanisms.values())


# -- saving ----------------------------------------------------------------------------------------------

RELOAD = """
import sys, torch
from approx_attn import load_converted
for folder in sys.argv[1:]:
    with torch.no_grad():
        logits = load_converted(folder)(**torch.load(f"{folder}/inputs.pt")).logits
    torch.save(logits, f"{folder}/logits.pt")
"""


@pytest.mark.slow
def test_trained_models_load_in_a_fresh_process(tmp_path):
    inputs, trained = make_inputs("bert", "right"), {}
    for attention in ("eigen_topk", "eigen_row", "topk", "exact"):
        model, folder = convert(build("bert"), attention, calibration=None), tmp_path / attention
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        loss(model, inputs).backward()
        optimizer.step()
        save_converted(model.eval(), folder)
        torch.save(inputs, folder / "inputs.pt")
        trained[folder] = model
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, trained)], check=True, capture_output=True, timeout=120)
    keep = inputs["attention_mask"].bool()
    for folder, model in trained.items():
        with torch.no_grad():
            expected = model(**inputs).logits
        assert torch.equal(torch.load(folder / "logits.pt")[keep], expected[keep]), folder.name


def test_saved_folder_opens_as_the_original_model_where_that_is_asked_for(tmp_path):
    model, inputs = build("llama"), make_inputs("llama")
    expected = model(**inputs).logits
    save_converted(convert(model, "eigen_topk", layers="model.layers.0.*", calibration=None), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    torch.testing.assert_close(plain(**inputs).logits, expected)
    loaded = load_converted(tmp_path)
    assert [row.attention for row in describe(loaded)] == ["eigen_topk", "exact"]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("layers", [None, "text_model.*"])
def test_save_pretrained_keeps_the_conversion_and_is_not_opened_as_exact_in_silence(layers, tmp_path):
    model, inputs = build("clip"), make_inputs("clip")
    expected = outputs(convert(model, "topk", keep=2, layers=layers), inputs)
    for part, folder in ((model, tmp_path / "model"), (model.text_model, tmp_path / "part")):
        part.save_pretrained(folder, max_shard_size="10KB")
        with pytest.raises(ValueError, match=r"open its folder with approx_attn\.load_converted"):
            type(part).from_pretrained(folder)
        assert {row.attention for row in describe(load_converted(folder))} >= {"topk"}
    got = outputs(load_converted(tmp_path / "model"), inputs)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    revert(copy.deepcopy(model)).save_pretrained(tmp_path / "reverted")
    reverted = outputs(transformers.CLIPModel.from_pretrained(tmp_path / "reverted"), inputs)
    assert all(torch.equal(value, reverted[name]) for name, value in outputs(build("clip"), inputs).items())


def test_position_biases_of_mpnet_are_seen_and_saved_and_refused_by_name(tmp_path):
    inputs, seen = make_inputs("mpnet", "right"), []
    model = convert(build("mpnet"), "topk", keep=3)
    for one in (build("mpnet"), model):
        with torch.no_grad(), capture_attention_inputs(one, lambda *call: seen.append(call)):
            one(**inputs)
    (name, *before, mask, scale), (other, *after, other_mask, other_scale) = seen[0], seen[2]
    assert name == other == "mpnet.encoder.layer.0.attention.attn"
    assert scale == other_scale == pytest.approx(8**-0.5)
    torch.testing.assert_close(after, before)
    assert mask.key_keep.tolist() == other_mask.key_keep.tolist() == inputs["attention_mask"].bool().tolist()
    bias = model.mpnet.encoder.compute_position_bias(inputs["input_ids"][..., None])
    torch.testing.assert_close(mask.bias, bias.detach())
    model.save_pretrained(tmp_path)
    assert torch.equal(load_converted(tmp_path)(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="eigen_cluster does not support an arbitrary or additive attention mask"):
        convert(build("mpnet"), "eigen_cluster", calibration=None)(**inputs)


@pytest.mark.parametrize("name", ["os", "AutoModel", "NoSuchModel"])
def test_a_header_that_names_another_class_is_refused(name, tmp_path):
    save_converted(convert(build("bert"), "topk"), tmp_path)
    header = json.loads((tmp_path / "approx_attn.json").read_text())
    (tmp_path / "approx_attn.json").write_text(json.dumps(header | {"model": name}))
    with pytest.raises(ValueError, match=f"model class '{name}', which transformers does not have"):
        load_converted(tmp_path)


def test_description_follows_a_switch_by_hand():
    model = convert(build("bert"), "topk")
    model.set_attn_implementation("sdpa")
    assert {row.attention for row in describe(model)} == {"exact"}
    model.set_attn_implementation("approx_attn")
    assert {row.attention for row in describe(model)} == {"topk"}


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_copies_share_nothing(family):
    model, inputs = convert(build(family), "eigen_topk", rank=2, keep=2, calibration=None), make_inputs(family)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)
    revert(other)
    assert {row.attention for row in describe(model)} == {"eigen_topk"}
    assert {row.attention for row in describe(other)} == {"exact"}
