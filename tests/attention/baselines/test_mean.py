"""Mean attention: that its averages are those of exact attention, whatever the batches, padding and lengths.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from approx_attn.attention import AttentionMask, build_attention


def build(**options):
    return build_attention("mean", **{"num_heads": 2, "head_dim": 4, "max_length": 6, **options}).double()


def draw(n=6, batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, n, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def weights_of(query, key):
    return (query @ key.transpose(-2, -1) / 2).softmax(-1)


def test_fits_the_average_of_exact_weights():
    mechanism = build()
    query, key, value = draw()
    mechanism.observe(query, key)
    mechanism.fit()
    average = weights_of(query, key).mean(0)
    output, weights = mechanism(query, key, value, need_weights=True)
    torch.testing.assert_close(weights, average.expand_as(weights))
    torch.testing.assert_close(output, average @ value)


def test_relative_average_is_over_all_pairs_of_an_offset():
    mechanism = build(alignment="relative")
    query, key, _ = draw()
    mechanism.observe(query, key)
    mechanism.fit()
    exact = weights_of(query, key)
    for offset in range(-5, 6):
        expected = exact.diagonal(offset, dim1=-2, dim2=-1).mean((0, 2))
        torch.testing.assert_close(mechanism.table.values[:, offset + 5].exp(), expected)


@pytest.mark.parametrize("alignment", ["absolute", "relative"])
def test_batches_and_padding_do_not_matter(alignment):
    """Samples of lengths 6, 4 and 3, padded together and one by one."""
    together, apart = build(alignment=alignment), build(alignment=alignment)
    query, key, _ = draw(batch=3)
    keep = torch.arange(6) < torch.tensor([[6], [4], [3]])
    garbage = ~keep[:, None, :, None]
    together.observe(
        query.masked_fill(garbage, 9.0), key.masked_fill(garbage, 9.0), AttentionMask(key_keep=keep, query_keep=keep)
    )
    together.fit()
    for sample, length in enumerate((6, 4, 3)):
        apart.observe(query[sample : sample + 1, :, :length], key[sample : sample + 1, :, :length])
    apart.fit()
    torch.testing.assert_close(together.table.values, apart.table.values)


def test_equals_exact_attention_where_that_is_the_same_for_all_inputs():
    mechanism = build(causal=True)
    query, key, value = draw(batch=1)
    mask = AttentionMask(causal=True)
    mechanism.observe(query, key, mask)
    mechanism.fit()
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(mechanism(query, key, value, mask)[0], expected)
    last = AttentionMask(causal=True, query_offset=4)  # decoding reads the rows where the queries stand
    torch.testing.assert_close(mechanism(query[:, :, 4:], key, value, last)[0], expected[:, :, 4:])


def test_lengths_other_than_the_table():
    mechanism = build()
    query, key, _ = draw(n=9)
    mechanism.observe(query, key)  # only its first 6 × 6 pairs have a place
    mechanism.fit()
    torch.testing.assert_close(mechanism.table.values.exp(), weights_of(query, key).mean(0)[:, :6, :6])
    mechanism = build()
    mechanism.observe(*(x[:, :, :2] for x in (query, key)))
    mechanism.fit()
    torch.testing.assert_close(mechanism.table.values[:, 2:].exp(), torch.full((2, 4, 6), 1 / 6, dtype=torch.float64))


def test_grouped_keys_and_a_second_fit():
    mechanism = build(num_key_value_heads=1)
    query, key, _ = draw()
    mechanism.observe(query, key[:, :1], scale=0.3)
    mechanism.fit()
    expected = (0.3 * query @ key[:, :1].transpose(-2, -1)).softmax(-1).mean(0)
    torch.testing.assert_close(mechanism.table.values.exp(), expected)
    with pytest.raises(ValueError, match="call observe"):
        mechanism.fit()


def test_fixed_or_trainable():
    assert not any(p.requires_grad for p in build(trainable=False).parameters())
    assert all(p.requires_grad for p in build().parameters())
    fixed, learned = build(trainable=False), build()
    learned.load_state_dict(fixed.state_dict())


def test_calibration_of_a_model_fits_its_layers():
    """The one pass of `calibrate` reaches every layer, with what exact attention sees there."""
    from approx_attn.conversion.calibration import calibrate
    from approx_attn.models import EncoderClassifier

    torch.manual_seed(0)
    model = EncoderClassifier(vocab_size=10, num_classes=3, max_length=7, attention="mean").eval()
    tokens = torch.randint(0, 10, (1, 7))
    exact = EncoderClassifier(vocab_size=10, num_classes=3, max_length=7, attention="exact").eval()
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "table" not in k or "positions" in k})
    assert not torch.allclose(model(tokens), exact(tokens), atol=1e-3)
    calibrate(model, [tokens], progress=False)
    torch.testing.assert_close(model(tokens), exact(tokens))  # the average over one sample is its own attention
