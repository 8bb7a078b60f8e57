"""`approx_attn.MultiheadAttention` beside `torch.nn.MultiheadAttention`."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from approx_attn import AttentionMask, Capabilities, MultiheadAttention
from approx_attn.attention import AttentionShape
from helpers import MechanismPath

EMBED_DIM, NUM_HEADS, BATCH, N_QUERY, N_KEY = 16, 4, 3, 5, 7

CONSTRUCTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 6, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10, "batch_first": True},
}
MASKS = {
    "none": (),
    "padding": ("bool_padding",),
    "float_padding": ("float_padding",),
    "added_padding": ("added_padding",),
    "bool": ("bool_mask",),
    "float": ("float_mask",),
    "per_head": ("mask_3d",),
    "bool_and_padding": ("bool_mask", "bool_padding"),
    "float_and_padding": ("float_mask", "float_padding"),
}


class NoWeights(MechanismPath):
    name = "no_weights"
    capabilities = Capabilities(returns_weights=False, arbitrary_mask=False)


class WithParameters(MechanismPath):
    name = "with_parameters"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.num_heads, 1, 1))

    def attend(self, query, *rest):
        return super().attend(query * self.gain, *rest)


def make_masks(names):
    masks = {}
    padding = torch.zeros(BATCH, N_KEY, dtype=torch.bool)
    padding[0, -3:] = padding[2, :1] = True
    drop = torch.rand(N_QUERY, N_KEY) < 0.3
    drop[:, 1] = False  # no query without a key: PyTorch gives NaN there
    for name in names:
        if name == "bool_padding":
            masks["key_padding_mask"] = padding
        elif name == "float_padding":
            masks["key_padding_mask"] = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
        elif name == "added_padding":
            masks["key_padding_mask"] = torch.randn(padding.shape)
        elif name == "bool_mask":
            masks["attn_mask"] = drop
        elif name == "float_mask":
            masks["attn_mask"] = torch.randn(N_QUERY, N_KEY).masked_fill(drop, float("-inf"))
        elif name == "mask_3d":
            masks["attn_mask"] = torch.randn(BATCH * NUM_HEADS, N_QUERY, N_KEY).masked_fill(drop, float("-inf"))
    return masks


def make_inputs(layer):
    sizes = ((N_QUERY, layer.embed_dim), (N_KEY, layer.kdim), (N_KEY, layer.vdim))
    shapes = [(BATCH, n, dim) if layer.batch_first else (n, BATCH, dim) for n, dim in sizes]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def pair(attention, **options):
    """PyTorch's layer and ours with the same parameters."""
    theirs = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, **options)
    ours = MultiheadAttention(EMBED_DIM, NUM_HEADS, **options, attention=attention)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outputs_and_gradients(layer, inputs, **arguments):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    layer.zero_grad()
    torch.manual_seed(1)  # dropout
    output, weights = layer(*inputs, **arguments)
    total = output.square().sum() + (0.0 if weights is None else weights.square().sum())
    total.backward()
    parameters = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("attention.")}
    return output, weights, [x.grad for x in inputs], parameters


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("attention", ["exact", MechanismPath])
def test_equals_torch(attention, construction, masks):
    torch.manual_seed(0)
    theirs, ours = pair(attention, **CONSTRUCTIONS[construction])
    arguments = make_masks(MASKS[masks])
    inputs = make_inputs(theirs)
    tolerance = {"rtol": 0.0, "atol": 0.0} if attention == "exact" else {"rtol": 1e-4, "atol": 1e-5}
    for need_weights, average in ((True, True), (True, False), (False, True)):
        arguments |= {"need_weights": need_weights, "average_attn_weights": average}
        expected = outputs_and_gradients(theirs, inputs, **arguments)
        got = outputs_and_gradients(ours, inputs, **arguments)
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("attention", ["exact", MechanismPath])
@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_equals_torch(attention, need_weights):
    torch.manual_seed(0)
    theirs, ours = pair(attention, batch_first=True)
    query, key = torch.randn(N_QUERY, EMBED_DIM), torch.randn(N_KEY, EMBED_DIM)
    padding = torch.zeros(N_KEY, dtype=torch.bool)
    padding[-1] = True
    arguments = {"key_padding_mask": padding, "need_weights": need_weights}
    torch.testing.assert_close(ours(query, key, key, **arguments), theirs(query, key, key, **arguments))


@pytest.mark.parametrize("need_weights", [True, False])
def test_exact_drops_the_same_weights_as_torch(need_weights):
    torch.manual_seed(0)
    theirs, ours = pair("exact", dropout=0.5)
    inputs = make_inputs(theirs)
    expected = outputs_and_gradients(theirs, inputs, need_weights=need_weights)
    torch.testing.assert_close(outputs_and_gradients(ours, inputs, need_weights=need_weights), expected)


def test_mechanism_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, dropout=0.5, attention=MechanismPath)
    inputs = make_inputs(layer)
    first, weights = layer(*inputs, average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.7
    assert not torch.equal(first, layer(*inputs)[0])
    layer.eval()
    assert torch.equal(layer(*inputs)[0], layer(*inputs)[0])


@pytest.mark.parametrize("attention", ["exact", MechanismPath])
def test_inference_path_equals_torch(attention):
    torch.manual_seed(0)
    theirs, ours = pair(attention, batch_first=True)
    x = torch.randn(BATCH, N_KEY, EMBED_DIM)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, x, x), theirs.eval()(x, x, x))


BATCHED, UNBATCHED = torch.randn(4, 4, EMBED_DIM), torch.randn(4, EMBED_DIM)
WRONG_CALLS = {
    "key_unbatched": lambda layer: layer(BATCHED, UNBATCHED, BATCHED),
    "key_batched": lambda layer: layer(UNBATCHED, BATCHED, UNBATCHED),
    "value_length": lambda layer: layer(BATCHED, BATCHED, BATCHED[:3]),
    "query_features": lambda layer: layer(BATCHED[..., 1:], BATCHED, BATCHED),
    "padding_axes": lambda layer: layer(*[BATCHED] * 3, key_padding_mask=torch.zeros(4, dtype=torch.bool)),
    "padding_shape": lambda layer: layer(*[BATCHED] * 3, key_padding_mask=torch.zeros(4, 5, dtype=torch.bool)),
    "mask_axes": lambda layer: layer(*[BATCHED] * 3, attn_mask=torch.zeros(4, dtype=torch.bool)),
    "mask_shape": lambda layer: layer(*[BATCHED] * 3, attn_mask=torch.zeros(4, 5)),
    "mask_type": lambda layer: layer(*[BATCHED] * 3, attn_mask=torch.zeros(4, 4, dtype=torch.int64)),
    "hint_alone": lambda layer: layer(*[BATCHED] * 3, is_causal=True),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_errors_are_those_of_torch_or_clear(case):
    theirs, ours = pair("exact")
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        WRONG_CALLS[case](theirs)
    with pytest.raises(type(expected.value)) as got:
        WRONG_CALLS[case](ours)
    assert str(got.value) == str(expected.value)
    with pytest.raises(ValueError, match="must"):
        WRONG_CALLS[case](pair(MechanismPath)[1])


# -- masks arrive at the mechanism as structure ---------------------------------------------------------


def seen_mask(**arguments) -> AttentionMask:
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, attention=MechanismPath)
    x = torch.randn(BATCH, N_KEY, EMBED_DIM)
    layer(x, x, x, need_weights=False, **arguments)
    return layer.attention.seen


CAUSAL = torch.ones(N_KEY, N_KEY, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": CAUSAL},
        {"attn_mask": nn.Transformer.generate_square_subsequent_mask(N_KEY)},
        {"attn_mask": CAUSAL.expand(BATCH * NUM_HEADS, N_KEY, N_KEY)},
    ],
    ids=["hint", "bool", "float", "per_head"],
)
def test_causal_masks_become_structure(arguments):
    mask = seen_mask(**arguments)
    assert mask.causal
    assert mask.is_structured
    assert mask.query_offset == 0


@pytest.mark.parametrize("kind", ["bool_padding", "float_padding"])
def test_padding_becomes_structure_for_keys_and_queries(kind):
    padding = make_masks([kind])["key_padding_mask"]
    mask = seen_mask(key_padding_mask=padding, attn_mask=CAUSAL)
    expected = ~padding if padding.dtype == torch.bool else padding == 0
    assert mask.is_structured
    assert mask.causal
    assert torch.equal(mask.key_keep, expected)
    assert torch.equal(mask.query_keep, expected)


def test_queries_of_cross_attention_are_not_padded():
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=MechanismPath)
    layer(*make_inputs(layer), **make_masks(["bool_padding"]))
    assert layer.attention.seen.key_keep is not None
    assert layer.attention.seen.query_keep is None
    as_many = torch.randn(N_KEY, BATCH, EMBED_DIM), *make_inputs(layer)[1:]
    layer(*as_many, **make_masks(["bool_padding"]))
    assert layer.attention.seen.query_keep.all()  # said, as these could be taken for the tokens of the keys


def test_fully_masked_query_gives_zeros_and_finite_gradients():
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, bias=False, attention=MechanismPath)
    inputs = make_inputs(layer)
    drop = torch.zeros(N_QUERY, N_KEY, dtype=torch.bool)
    drop[2] = True
    output, weights, gradients, parameters = outputs_and_gradients(layer, inputs, attn_mask=drop)
    assert torch.equal(output[2], torch.zeros_like(output[2]))
    assert torch.equal(weights[:, 2], torch.zeros_like(weights[:, 2]))
    assert all(gradient.isfinite().all() for gradient in [*gradients, *parameters.values()])


def test_weights_are_refused_with_advice():
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=NoWeights)
    inputs = make_inputs(layer)
    with pytest.raises(ValueError, match="need_weights=False"):
        layer(*inputs)
    assert layer(*inputs, need_weights=False)[1] is None


def test_arbitrary_mask_is_refused_by_name():
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=NoWeights)
    with pytest.raises(ValueError, match="no_weights does not support an arbitrary"):
        layer(*make_inputs(layer), **make_masks(["bool_mask"]), need_weights=False)


# -- inside PyTorch's own layers ------------------------------------------------------------------------


def encoder(attention, *, norm_first=False, layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED_DIM, NUM_HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    if attention is not None:
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, attention)
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["exact", MechanismPath])
def test_inside_transformer_encoder(attention, training, norm_first):
    theirs = encoder(None, norm_first=norm_first).train(training)
    ours = encoder(attention, norm_first=norm_first).train(training)
    x = torch.randn(BATCH, N_KEY, EMBED_DIM)
    padding = torch.zeros(BATCH, N_KEY, dtype=torch.bool)
    padding[0, -3:] = True
    for arguments in ({}, {"mask": CAUSAL}, {"src_key_padding_mask": padding}):
        with torch.set_grad_enabled(training):
            expected, got = theirs(x, **arguments), ours(x, **arguments)
        kept = ~padding if "src_key_padding_mask" in arguments else torch.ones_like(padding)
        torch.testing.assert_close(got[kept], expected[kept])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_fused_encoder_inference_does_not_bypass_the_mechanism():
    ours = encoder(MechanismPath).eval()
    padding = torch.zeros(BATCH, N_KEY, dtype=torch.bool)
    padding[1, -2:] = True
    with torch.no_grad():
        ours(torch.randn(BATCH, N_KEY, EMBED_DIM), src_key_padding_mask=padding)
    for layer in ours.layers:
        assert torch.equal(layer.self_attn.attention.seen.key_keep, ~padding)


def test_inside_transformer_decoder_layer():
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(EMBED_DIM, NUM_HEADS, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention.from_torch(ours.self_attn, MechanismPath)
    ours.multihead_attn = MultiheadAttention.from_torch(ours.multihead_attn, MechanismPath)
    x, memory = torch.randn(BATCH, N_QUERY, EMBED_DIM), torch.randn(BATCH, N_KEY, EMBED_DIM)
    arguments = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(N_QUERY), "tgt_is_causal": True}
    torch.testing.assert_close(ours(x, memory, **arguments), theirs(x, memory, **arguments))
    assert ours.self_attn.attention.seen.is_structured


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_input_equals_its_rows(layout):
    torch.manual_seed(0)
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, attention=MechanismPath)
    rows = [torch.randn(4, EMBED_DIM), torch.randn(6, EMBED_DIM)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    output, _ = layer(nested, nested, nested, need_weights=False)
    for got, row in zip(output.unbind(), rows, strict=True):
        torch.testing.assert_close(got, layer(row, row, row, need_weights=False)[0])


# -- being a module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_state_dict_keys_are_those_of_torch(construction):
    theirs, ours = pair("exact", **CONSTRUCTIONS[construction])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)


def test_same_seed_same_parameters_as_torch():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS)
    torch.manual_seed(3)
    ours = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=WithParameters)
    torch.testing.assert_close(ours.in_proj_weight, theirs.in_proj_weight, rtol=0, atol=0)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_state_dict(layer):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=WithParameters)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("through", [copy.deepcopy, through_state_dict, through_pickle])
def test_round_trips(through):
    torch.manual_seed(0)
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=WithParameters)
    nn.init.normal_(layer.attention.gain)
    inputs = make_inputs(layer)
    other = through(layer)
    torch.testing.assert_close(other(*inputs), layer(*inputs), rtol=0, atol=0)
    assert other.attention.gain is not layer.attention.gain


def test_from_torch_and_back_share_parameters():
    theirs = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, kdim=6, add_bias_kv=True).eval()
    ours = MultiheadAttention.from_torch(theirs, WithParameters)
    assert not ours.training
    own = dict(ours.named_parameters())
    assert own.pop("attention.gain").requires_grad
    assert own.keys() == dict(theirs.named_parameters()).keys()
    assert all(own[name] is p for name, p in theirs.named_parameters())
    assert all(own[name] is p for name, p in ours.to_torch().named_parameters())


def test_device_and_dtype_reach_the_mechanism():
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=WithParameters, dtype=torch.float64)
    assert layer.attention.gain.dtype == torch.float64
    assert MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=WithParameters, device="meta").attention.gain.is_meta


def test_torch_script_compiles_exact_and_refuses_the_rest():
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, N_KEY, EMBED_DIM)
    torch.testing.assert_close(torch.jit.script(layer)(x, x, x), layer(x, x, x))
    with pytest.raises(ValueError, match=r"torch\.compile"):
        torch.jit.script(MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=MechanismPath))


@pytest.mark.parametrize("attention", ["exact", NoWeights])
def test_torch_compile(attention):
    layer = MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, attention=attention).eval()
    x = torch.randn(BATCH, N_KEY, EMBED_DIM)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    arguments = {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True}
    torch.testing.assert_close(compiled(x, x, x, **arguments), layer(x, x, x, **arguments))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("exacct", "did you mean 'exact'"),
        ({"name": "exact", "keep": 3}, "attention.keep is not an option of exact"),
        ({"keep": 3}, "must have the key 'name'"),
        (MechanismPath(AttentionShape(2, 8)), "num_heads=2 was given to a layer that needs num_heads=4"),
    ],
)
def test_bad_attention_is_refused(attention, message):
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(EMBED_DIM, NUM_HEADS, attention=attention)


def test_large_weights_that_nobody_may_have_wanted_are_said():
    layer = MultiheadAttention(16, 4, batch_first=True, device="meta")  # shapes, and no memory
    for length, need_weights, warned in ((8192, True, True), (8192, False, False), (1024, True, False)):
        x = torch.empty(1, length, 16, device="meta")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            layer(x, x, x, need_weights=need_weights)
        assert ["call the layer with need_weights=False" in str(warning.message) for warning in said] == [True] * warned


# -- coordinates -------------------------------------------------------------------------------------------


def gaussian_layer(**options):
    torch.manual_seed(0)
    return MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, attention="gaussian", **options)


def test_coordinates_reach_the_mechanism():
    layer, x = gaussian_layer(coordinate_dim=2), torch.randn(BATCH, N_KEY, EMBED_DIM)
    points = torch.stack([torch.arange(N_KEY), torch.zeros(N_KEY)], dim=-1).expand(BATCH, -1, -1)  # those of positions
    on_the_line, weights = layer(x, x, x)
    torch.testing.assert_close(layer(x, x, x, coordinates=points)[0], on_the_line)
    order = torch.randperm(N_KEY)
    _, shuffled = layer(x, x, x, coordinates=points[:, order])
    torch.testing.assert_close(shuffled, weights[:, order][:, :, order])


def test_another_mechanism_is_told_of_the_coordinates():
    layer = MultiheadAttention.from_torch(gaussian_layer(coordinate_dim=2), "gaussian")
    assert layer.attention.shape.coordinate_dim == 2


@pytest.mark.parametrize(
    ("options", "query", "points", "message"),
    [
        ({}, N_QUERY, N_KEY, "coordinates must come with self-attention"),
        ({}, N_KEY, N_QUERY, r"mask\.query_coordinates must be \(3, 7, any\), got \(3, 5, 2\)"),
        ({"add_bias_kv": True}, N_KEY, N_KEY, r"mask\.key_coordinates must be \(3, 8, any\)"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused(options, query, points, message):
    x = torch.randn(BATCH, N_KEY, EMBED_DIM)
    with pytest.raises(ValueError, match=message):
        gaussian_layer(**options)(
            x if query == N_KEY else x[:, :query], x, x, coordinates=torch.zeros(BATCH, points, 2)
        )
