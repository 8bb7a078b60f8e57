"""Models: shapes, padding, causality, what layers share, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from approx_attn.attention import attention_class, available_attention
from approx_attn.models import EncoderClassifier, LanguageModel, attention_mechanisms
from approx_attn.models.transformer import auxiliary_loss

LENGTH = 12
CAUSAL = [name for name in available_attention() if attention_class(name).capabilities.causal]


def tokens_and_keep(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (3, LENGTH), generator=generator)
    keep = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7], [1]])
    return tokens, keep


def classifier(**options: object) -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(20, 5, LENGTH, dim=16, num_heads=2, feed_forward_dim=32, **options).eval()  # type: ignore[arg-type]


def language_model(**options: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(20, LENGTH, dim=16, num_heads=2, feed_forward_dim=32, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", available_attention())
def test_classifier_ignores_what_stands_in_the_padding(name: str) -> None:
    model = classifier(attention=name)
    tokens, keep = tokens_and_keep()
    logits = model(tokens, keep)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model(torch.where(keep, tokens, 3), keep), logits)


def test_padded_equals_unpadded() -> None:
    model = classifier()
    tokens, keep = tokens_and_keep()
    torch.testing.assert_close(model(tokens, keep)[1], model(tokens[1:2, :7])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_model_does_not_see_later_tokens(name: str) -> None:
    model = language_model(attention=name, causal=True)
    tokens, _ = tokens_and_keep()
    changed = tokens.clone()
    changed[:, 8:] = 20 - changed[:, 8:]
    logits = model(tokens)
    assert logits.shape == (3, LENGTH, 20)
    torch.testing.assert_close(model(changed)[:, :8], logits[:, :8], atol=0, rtol=0)
    assert not torch.equal(model(changed)[:, 8:], logits[:, 8:])


class LargestArray(TorchDispatchMode):
    """Notes the size, in bytes, of the largest array that an operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, made.untyped_storage().nbytes())
        return result


def test_causal_model_makes_no_array_of_all_pairs_of_its_own() -> None:
    length = 2048
    model = LanguageModel(20, length, dim=8, num_heads=1, feed_forward_dim=8, causal=True, attention="uniform")
    with torch.no_grad(), LargestArray() as largest:
        model(torch.ones(1, length, dtype=torch.int64))
    assert largest.size < length * length


def test_masked_language_model_sees_both_sides() -> None:
    model = language_model(causal=False)
    tokens, _ = tokens_and_keep()
    changed = tokens.clone()
    changed[:, -1] = 20 - changed[:, -1]
    assert not torch.equal(model(changed)[:, 0], model(tokens)[:, 0])


def test_two_towers_use_both_sequences() -> None:
    model = classifier(two_towers=True)
    a, keep = tokens_and_keep(0)
    b, _ = tokens_and_keep(1)
    logits = model(a, keep, b, keep)
    assert logits.shape == (3, 5)
    assert not torch.allclose(model(a, keep, a, keep), logits)
    with pytest.raises(ValueError, match="two_towers"):
        model(a, keep)
    with pytest.raises(ValueError, match="two_towers"):
        classifier()(a, keep, b, keep)


def test_auxiliary_loss_is_of_both_towers() -> None:
    model = classifier(two_towers=True, depth=2, attention={"name": "eigen_row", "auxiliary_loss_weight": 1.0}).train()
    a, keep = tokens_and_keep(0)
    b, _ = tokens_and_keep(1)
    a, b = a % 10, b % 10 + 10  # no token in both
    model(a, keep, b, keep)
    loss = auxiliary_loss(attention_mechanisms(model))
    assert loss is not None
    loss.backward()
    gradient = model.encoder.token_embedding.weight.grad
    assert gradient is not None
    assert (gradient[:10] != 0).any()
    assert (gradient[10:] != 0).any()


def test_every_layer_has_its_own_mechanism_and_index() -> None:
    mechanisms = attention_mechanisms(classifier(depth=3))
    assert [mechanism.layer_index for mechanism in mechanisms] == [0, 1, 2]
    assert len({id(mechanism) for mechanism in mechanisms}) == 3
    assert all(mechanism.max_length == LENGTH for mechanism in mechanisms)


def test_layers_share_what_the_options_say() -> None:
    shared = classifier(depth=2, attention={"name": "eigen_row", "share": "model"})
    apart = classifier(depth=2, attention={"name": "eigen_row", "share": "layer"})
    assert sum(p.numel() for p in shared.parameters()) < sum(p.numel() for p in apart.parameters())


@pytest.mark.parametrize("feed_forward", ["dense", "topk"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_options_train(feed_forward: str, positions: str) -> None:
    model = classifier(feed_forward=feed_forward, positions=positions).train()
    model(*tokens_and_keep()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tied_embeddings_are_one_parameter() -> None:
    model = language_model(tie_embeddings=True)
    assert model.head.weight is model.decoder.token_embedding.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"model\.num_heads must divide model\.dim=16"),
        ({"depth": 0}, r"model\.depth"),
        ({"dropout": 1.5}, r"model\.dropout"),
        ({"feed_forward": "sparse"}, r"model\.feed_forward must be one of dense, topk"),
        ({"positions": "alibi"}, r"model\.positions must be one of learned, sinusoidal, rotary"),
        ({"dim": 6, "positions": "rotary"}, "rotary needs an even number of features per head, got 3"),
        ({"attention": "eksact"}, "did you mean 'exact'"),
    ],
)
def test_impossible_options_name_their_key(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderClassifier(20, 5, LENGTH, **{"dim": 16, "num_heads": 2, **options})


def test_non_causal_mechanism_is_refused_in_a_causal_model() -> None:
    with pytest.raises(ValueError, match="attention=linformer does not support causal attention"):
        language_model(attention="linformer", causal=True)


def test_longer_input_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"longer than model\.max_length=12"):
        classifier()(torch.ones(1, LENGTH + 1, dtype=torch.long))


@pytest.mark.parametrize("attention", ["exact", {"name": "gaussian", "gaussian_heads": 1}])
def test_points_are_a_set(attention: str | dict) -> None:
    model = language_model(causal=False, attention=attention, coordinate_dim=3)
    tokens, _ = tokens_and_keep()
    points, order = torch.randn(3, LENGTH, 3), torch.randperm(LENGTH)
    logits = model(tokens, coordinates=points)
    torch.testing.assert_close(model(tokens[:, order], coordinates=points[:, order]), logits[:, order])
    assert not torch.allclose(model(tokens, coordinates=2.0 * points), logits)
    with pytest.raises(ValueError, match=r"model\.coordinate_dim is, which is 3"):
        model(tokens)
    with pytest.raises(ValueError, match=r"model\.coordinate_dim is, which is None"):
        language_model()(tokens, coordinates=points)
