"""Vector norms: against the direct definition, array by array and in live models of every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.diagnosis.analysis.collect import collect
from approx_attn.diagnosis.analysis.norms import NormMoments, head_products, summed_norms, transformed_norms
from approx_attn.diagnosis.analysis.projections import find_output_projections
from approx_attn.models import EncoderClassifier

LENGTH, WIDTH, HEADS = 7, 16, 4
BERT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 16}
TEXT = {"vocab_size": 30}


def test_functions_equal_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 5, 4, generator=generator).double()
    projection = torch.randn(3, 4, 6, generator=generator).double()
    weights = torch.rand(2, 3, 7, 5, generator=generator).double()
    f = torch.einsum("bhjd,hdm->bhjm", value, projection)
    products = head_products(value, projection)
    torch.testing.assert_close(transformed_norms(products), f.norm(dim=-1))
    direct = torch.einsum("bhij,bhjm->bijm", weights, f).norm(dim=-1)
    torch.testing.assert_close(summed_norms(weights, products), direct)


def test_accumulator_equals_the_definition() -> None:
    """Every sum written out over the full (b, h, n, n, d) array, batch by batch, with a closed pattern."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(4, 3, 6, generator=generator)
    moments = NormMoments(("a", "b", "c"))
    alphas, norms, categories, sums, token_norms = [], [], [], [], []
    for _ in range(2):
        keep = torch.rand(2, 1, 5, 6, generator=generator) < 0.7
        keep[..., 0] = True
        keep[0, :, :, 4:] = False  # padded keys
        value = torch.randn(2, 2, 6, 3, generator=generator)  # two key heads for four query heads
        value[0, :, 4:] = float("nan")
        weights = torch.rand(2, 4, 5, 6, generator=generator) * keep
        category = torch.randint(3, (2, 6), generator=generator)
        moments.update(weights, value, projection, category, keep)
        full = value.repeat_interleave(2, 1)[:, :, None] @ projection[:, None]  # (b, h, 1, n_k, D)
        products = (weights[..., None] * full).double()  # (b, h, n_q, n_k, D)
        pairs = keep.expand(weights.shape)
        alphas.append(weights[pairs].double())
        norms.append(full.norm(dim=-1).expand(weights.shape)[pairs].double())
        heads = torch.arange(4)[None, :, None, None].expand(weights.shape)[pairs]
        categories.append(torch.stack([heads, category[:, None, None].expand(weights.shape)[pairs]], -1))
        summed = products.sum(1).norm(dim=-1)[keep[:, 0]]
        sums.append(torch.stack([summed, category[:, None].expand(2, 5, 6)[keep[:, 0]].double()], -1))
        used = keep.any(1).any(1)
        lengths = full[:, :, 0].norm(dim=-1).transpose(1, 2)[used]
        token_norms.append(torch.cat([lengths, category[used][:, None]], -1))
    alpha, norm, label, total, token = map(torch.cat, (alphas, norms, categories, sums, token_norms))
    for h in range(4):
        mine = label[:, 0] == h
        expected = np.corrcoef(alpha[mine], norm[mine])[0, 1]
        assert float(moments.correlation()[h]) == pytest.approx(expected, rel=1e-4)
        for c in range(3):
            chosen = mine & (label[:, 1] == c)
            assert float(moments.weight[h, c]) == pytest.approx(float(alpha[chosen].sum()), rel=1e-5)
            assert float(moments.weighted_norm[h, c]) == pytest.approx(float((alpha * norm)[chosen].sum()), rel=1e-5)
            of_tokens = token[token[:, -1] == c]
            assert float(moments.mean_norm()[h, c]) == pytest.approx(float(of_tokens[:, h].mean()), rel=1e-5)
    together = moments.grouped({"ab": (0, 1), "c": (2,)})
    assert together.categories == ("ab", "c")
    torch.testing.assert_close(together.weight_share()[:, 0], moments.weight_share()[:, :2].sum(-1))
    of_ab = token[token[:, -1] < 2]
    torch.testing.assert_close(together.mean_norm()[:, 0], of_ab[:, :4].mean(0).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(together.correlation(), moments.correlation())
    for c in range(3):
        assert float(moments.summed_norm[c]) == pytest.approx(float(total[total[:, 1] == c, 0].sum()), rel=1e-5)
        assert float(moments.pairs[c]) == float((label[label[:, 0] == 0, 1] == c).sum())


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 30, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def family(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """A tiny random model, a padded batch, and by attention layer the module that applies W_O."""
    import transformers as hf

    torch.manual_seed(0)
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[1, 5:] = 0
    text = {"input_ids": tokens(), "attention_mask": padding}
    both = {**text, "decoder_input_ids": tokens(1)[:, :4]}
    llama: dict[str, Any] = {**BERT, **TEXT, "num_key_value_heads": 2}
    bart = {
        "d_model": WIDTH,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        **TEXT,
        "pad_token_id": 1,
    }
    t5 = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": HEADS, **TEXT}
    distil = {"dim": WIDTH, "n_heads": HEADS, "n_layers": 2, "hidden_dim": 16, **TEXT}
    image = {**BERT, "image_size": 8, "patch_size": 4}
    builders: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor], dict[str, str]]]] = {
        "bert": lambda: (hf.BertModel(hf.BertConfig(**BERT, **TEXT)), text, {"self": "output.dense"}),
        "roberta": lambda: (hf.RobertaModel(hf.RobertaConfig(**BERT, **TEXT)), text, {"self": "output.dense"}),
        "distilbert": lambda: (hf.DistilBertModel(hf.DistilBertConfig(**distil)), text, {"": "out_lin"}),
        "gpt2": lambda: (
            hf.GPT2Model(hf.GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=2, **TEXT)),
            text,
            {"": "c_proj"},
        ),
        "llama": lambda: (hf.LlamaModel(hf.LlamaConfig(**llama)), text, {"": "o_proj"}),
        "t5": lambda: (hf.T5Model(hf.T5Config(**t5)), both, {"": "o"}),
        "bart": lambda: (hf.BartModel(hf.BartConfig(**bart)), both, {"": "out_proj"}),
        "vit": lambda: (hf.ViTModel(hf.ViTConfig(**image)), {"pixel_values": torch.randn(2, 3, 8, 8)}, {}),
    }
    model, batch, places = builders[name]()
    return model.eval(), batch, places


FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5", "bart", "vit")


@pytest.mark.parametrize("name", FAMILIES)
def test_identities_in_live_models(name: str) -> None:
    """Σ_h Σ_j α f + b_O is what the model's own W_O puts out, and the sums are those of the definition."""
    pytest.importorskip("transformers")
    model, batch, places = family(name)
    projections = find_output_projections(model, batch)
    captured: dict[str, tuple[Any, ...]] = {}
    given: dict[str, Tensor] = {}
    owners = {layer: owner_of(model, projection) for layer, projection in projections.items()}
    for layer, (owner_name, _) in owners.items():
        for inside, end in places.items():
            assert owner_name == f"{layer.removesuffix(inside).rstrip('.')}.{end}"

    def record(layer: str, *inputs: Any) -> None:
        captured[layer] = inputs

    with torch.no_grad(), capture_attention_inputs(model, record):
        handles = [owner.register_forward_hook(partial(keep_output, given, key)) for key, (_, owner) in owners.items()]
        model(**batch)
    for handle in handles:
        handle.remove()
    assert projections.keys() == captured.keys()
    statistics = collect(model, [batch], parts=["norms"], progress=False)
    assert {layer.name for layer in statistics.layers} == captured.keys()
    for layer in statistics.layers:
        bias = getattr(owners[layer.name][1], "bias", None)
        assert layer.norms is not None
        check_layer(layer.norms, projections[layer.name], bias, given[layer.name], *captured[layer.name])


def keep_output(given: dict[str, Tensor], layer: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    given[layer] = output


def owner_of(model: nn.Module, projection: Tensor) -> tuple[str, nn.Module]:
    """Name and module of the linear layer that holds this very matrix, either way round."""
    matrix = projection.flatten(0, 1)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            for candidate in (weight, weight.mT):
                if candidate.shape == matrix.shape and torch.equal(candidate, matrix):
                    return name, module
    raise AssertionError("no module holds the matrix")


def check_layer(
    norms: NormMoments,
    projection: Tensor,
    bias: Tensor | None,
    given: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
) -> None:
    _, weights = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    f = torch.einsum("bhjd,hdm->bhjm", value, projection)
    parts = weights[..., None] * f[:, :, None]  # (b, h, n_q, n_k, D), which the package never forms
    real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    if mask.query_keep is not None:
        real = mask.query_keep
    output = parts.sum((1, 3)) + (0.0 if bias is None else bias)
    torch.testing.assert_close(output[real], given.reshape(output.shape)[real], rtol=1e-3, atol=1e-5)
    alone = parts.norm(dim=-1).masked_fill(~real[:, None, :, None], 0.0).sum((0, 2, 3))
    together = parts.sum(1).norm(dim=-1).masked_fill(~real[:, :, None], 0.0).sum()
    torch.testing.assert_close(norms.weighted_norm.sum(-1).float(), alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms.summed_norm.sum().float(), together, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms.weight.sum(-1), real.sum().double().expand(query.shape[1]), rtol=1e-4, atol=1e-4)


def test_models_of_this_package() -> None:
    torch.manual_seed(0)
    model = EncoderClassifier(20, 2, 8, dim=WIDTH, num_heads=HEADS, depth=2).eval()
    batch = {"tokens": torch.randint(1, 20, (2, 8))}
    projections = find_output_projections(model, batch)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert projections.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(projections[name].flatten(0, 1), layer.out_proj.weight.mT)


def test_layers_with_something_before_the_projection_are_left_out() -> None:
    """A gate between attention and W_O: no linear layer takes the attention output as it is."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.inputs(x).chunk(3, -1))
            output = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(output.sigmoid())

    statistics = collect(nn.Sequential(Gated()), [torch.randn(2, 5, 8)], parts=["norms"], progress=False)
    assert [layer.norms for layer in statistics.layers] == [None]
