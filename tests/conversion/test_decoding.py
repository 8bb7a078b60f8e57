"""Generating with caches after conversion to `eigen_cluster`: the same tokens as without a cache, from few keys."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from approx_attn import convert, load_converted, revert, save_converted
from approx_attn.attention.eigen.cluster import EigenClusterAttention

transformers = pytest.importorskip("transformers")

PROMPT, NEW = 21, 24
OPTIONS = {"block_size": 8, "cluster_size": 2, "keep": 10, "rank": 3, "seed": 1, "calibration": None}
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": None}
# One layer where a window closes keys: in the second, keys would depend on the length at which they are computed.
SLIDING = GROUPED | {"sliding_window": 20, "num_hidden_layers": 1}

GEMMA2 = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
GEMMA2 |= {"layer_types": ["full_attention", "full_attention"], "tie_word_embeddings": False}
GPT_OSS = GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 40}
GPT_OSS |= {"layer_types": GEMMA2["layer_types"], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS),
    "mistral": ("MistralForCausalLM", "MistralConfig", SLIDING),
}


def build(family: str = "llama", **options: object) -> nn.Module:
    """A converted model in float64, in which no choice turns on how a sum was rounded."""
    model_class, config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
    words = {"attn_implementation": "eager" if family in ("gemma2", "gpt_oss") else "sdpa"}
    words |= {"experts_implementation": "eager"} if family == "gpt_oss" else {}  # the other knows no float64
    model = getattr(transformers, model_class)._from_config(config, **words)
    for parameter in model.parameters():  # larger than at initialisation, so that attention is not uniform
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return convert(model.double().eval(), "eigen_cluster", **{**OPTIONS, **options})


def prompt(padded: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens, keep = torch.randint(3, 40, (2, PROMPT)), torch.ones(2, PROMPT, dtype=torch.int64)
    if padded:
        keep[1, :10] = 0
    return {"input_ids": tokens * keep, "attention_mask": keep}


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: object) -> Tensor:
    words = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **{**words, **options})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of queries of the passes over all keys."""
    found, attend = [], EigenClusterAttention.attend

    def counted(self, query, *rest):
        found.append(query.shape[2])
        return attend(self, query, *rest)

    monkeypatch.setattr(EigenClusterAttention, "attend", counted)
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_gives_the_same_tokens_as_without_a_cache(family, padded, passes):
    model, inputs = build(family), prompt(padded)
    expected = generate(model, inputs, use_cache=False)
    passes.clear()
    assert torch.equal(generate(model, inputs), expected)
    assert set(passes) == {PROMPT}
    assert not torch.equal(generate(revert(model), inputs), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_of_a_first_pass_have_a_gradient(family):
    output = build(family)(**prompt(False), use_cache=True, output_attentions=True)
    output.attentions[0].retain_grad()
    output.logits.sum().backward()
    assert output.attentions[0].grad.abs().max() > 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_static_caches_give_the_same_tokens(family, padded):
    model, inputs = build(family), prompt(padded)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_beams_take_their_moments_along(family, passes):
    model, inputs = build(family), prompt(padded=True)
    expected = generate(model, inputs, use_cache=False, num_beams=3)
    passes.clear()
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert set(passes) == {PROMPT}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_guesses_that_are_taken_back(family, passes):
    model, inputs = build(family), {name: x[:1] for name, x in prompt().items()}
    expected = generate(model, inputs, use_cache=False)
    passes.clear()
    # Guesses repeat what followed the same tokens before: most are wrong here and are cropped from the cache.
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=5, max_matching_ngram_size=1), expected)
    assert set(passes) == {PROMPT + 5}


def test_a_model_that_was_saved_decodes_as_before(tmp_path):
    model, inputs = build(), prompt()
    save_converted(model, tmp_path)
    assert torch.equal(generate(load_converted(tmp_path).double(), inputs), generate(model, inputs, use_cache=False))


@torch.no_grad()
def test_a_cache_that_another_model_has_filled_and_one_that_is_copied():
    model, (first, rest) = build(keep=4), prompt()["input_ids"].split([18, PROMPT - 18], dim=1)
    other = build(keep=4, seed=2)  # of the same weights, with another basis
    cache = transformers.DynamicCache(config=model.config)
    other(first[:, :17], past_key_values=cache)
    other(first[:, 17:], past_key_values=cache)  # a step, which leaves moments of the other basis
    copied = copy.deepcopy(cache)
    keys = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    fresh = transformers.DynamicCache(keys)
    expected = model(rest, past_key_values=fresh).logits
    torch.testing.assert_close(model(rest, past_key_values=cache).logits, expected)
    torch.testing.assert_close(model(rest, past_key_values=copied).logits, expected)


def test_training_with_a_cache_reaches_the_basis():
    model, tokens = build().train(), prompt()["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    model(tokens[:, :20], past_key_values=cache)
    model(tokens[:, 20:], past_key_values=cache).logits.square().mean().backward()
    basis = model.model.layers[1].self_attn.approx_attn.mechanism.basis
    assert basis.query_map.grad.abs().max() > 0
    assert basis.key_map.grad.abs().max() > 0
