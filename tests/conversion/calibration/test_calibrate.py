"""calibrate on live models: what it fits, what it fills, what it leaves alone."""

import pytest
import torch
from torch import nn

import approx_attn
from approx_attn import AttentionMask
from approx_attn.attention import AttentionShape
from approx_attn.attention.exact import ExactAttention
from approx_attn.conversion.calibration import (
    Calibration,
    ContentMoments,
    PositionMoments,
    calibrate,
    needed_statistics,
)

H, D, N = 2, 4, 10


class Model(nn.Module):
    """Two attention layers over token embeddings."""

    def __init__(self, attention="exact"):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, H * D)
        self.layers = nn.ModuleList(
            approx_attn.MultiheadAttention(H * D, H, batch_first=True, attention=attention, max_length=N, layer_index=i)
            for i in range(2)
        )

    def forward(self, tokens, keep=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x, x, x, key_padding_mask=None if keep is None else ~keep, need_weights=False)[0]
        return x


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    keep = torch.arange(N) < torch.tensor([[N], [N - 3], [4]])
    return [{"tokens": torch.randint(20, (3, N), generator=generator), "keep": keep} for _ in range(count)]


def captured(model, layer, data):
    """Queries and keys of a layer, projected here: (b, h, n, d)."""
    queries, keys, masks = [], [], []
    for batch in data:
        x = model.embed(batch["tokens"])
        for i in range(layer):
            x = x + model.layers[i](x, x, x, key_padding_mask=~batch["keep"], need_weights=False)[0]
        attention = model.layers[layer]
        q, k, _ = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        queries.append(q.unflatten(-1, (H, D)).transpose(1, 2))
        keys.append(k.unflatten(-1, (H, D)).transpose(1, 2))
        masks.append(batch["keep"])
    return torch.cat(queries), torch.cat(keys), torch.cat(masks)


def test_streams_what_the_layers_of_an_exact_model_see():
    model = Model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = calibrate(model, batches(), statistics=["content", "relative"], rows=None, progress=False)
    assert [layer.name for layer in calibration.layers] == ["layers.0", "layers.1"]
    assert calibration.sequences == 12
    with torch.no_grad():
        for i in range(2):
            query, key, keep = captured(model, i, batches())
            mask = AttentionMask(key_keep=keep, query_keep=keep)
            content, position = ContentMoments(), PositionMoments("relative")
            content.update(query, key, mask)
            position.update(query, key, mask, D**-0.5)
            parts = calibration.tensors
            fit = content.fit()
            torch.testing.assert_close(
                parts[f"{i}.content.head.singular_values"], fit.singular_values.float(), rtol=1e-3, atol=1e-5
            )
            torch.testing.assert_close(parts[f"{i}.content.head.key_mean"], fit.key_mean.float(), rtol=1e-4, atol=1e-6)
            fitted = position.fit("layer")
            torch.testing.assert_close(
                parts[f"{i}.relative.layer.eigenvalues"], fitted.eigenvalues.float(), rtol=1e-3, atol=1e-5
            )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fills_the_mechanisms_of_a_model_in_place():
    attention = {"name": "eigen_topk", "rank": 2, "keep": 3, "basis_init": "calibrated"}
    model = Model(attention).train()
    assert needed_statistics(model) == ["content"]
    calibration = calibrate(model, batches(), progress=False)
    assert model.training
    for i, layer in enumerate(model.layers):
        (mechanism,) = (m for m in layer.modules() if isinstance(m, approx_attn.AttentionMechanism))
        assert torch.equal(mechanism.basis.key_map, calibration.tensors[f"{i}.content.head.key_map"][..., :2])
        assert "attend" not in vars(mechanism)  # exact attention was for the pass only
    assert model(**batches(1)[0]).isfinite().all()


def test_mechanisms_compute_exact_attention_meanwhile_unless_told_not_to():
    attention = {"name": "eigen_topk", "rank": 1, "keep": 1, "rest": "drop", "seed": 0}
    exact = calibrate(Model(), batches(), statistics=["content"], progress=False).tensors
    for meanwhile, same in ((True, True), (False, False)):
        got = calibrate(Model(attention), batches(), exact=meanwhile, progress=False).tensors
        name = "1.content.head.singular_values"  # the second layer sees what the first one made
        assert torch.allclose(got[name], exact[name], rtol=1e-4) == same


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize(("name", "kind"), [("eigen_row", "absolute"), ("eigen_matrix", "matrix")])
def test_fills_position_bases(name, kind, share):
    model = Model({"name": name, "rank": 3, "keep": 5, "share": share})
    before = [{key: part.clone() for key, part in layer.attention.state_dict().items()} for layer in model.layers]
    assert needed_statistics(model) == [kind]
    calibrate(model, batches(), max_rank=None, progress=False)
    after = [layer.attention.state_dict() for layer in model.layers]
    assert not any(torch.equal(after[i][key], before[i][key]) for i in range(2) for key in after[i])
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0]) == (share == "model")


@pytest.mark.parametrize("name", ["eigen_row", "eigen_matrix"])
def test_a_mechanism_starts_from_a_file_frozen_or_learned(tmp_path, name):
    path = tmp_path / "basis.safetensors"
    calibrate(Model(), batches(), path=path, statistics=["absolute", "matrix"], progress=False)
    options = {"name": name, "basis_init": "calibrated", "basis": str(path), "keep": 5, "rank": 3, "seed": 1}
    frozen, learned = (Model(options | {"train_basis": train}) for train in (False, True))
    for one, other in zip(frozen.layers, learned.layers, strict=True):
        assert not any(p.requires_grad for p in one.attention.parameters())
        assert all(p.requires_grad for p in other.attention.parameters())
        assert all(
            torch.equal(p, q) for p, q in zip(one.attention.parameters(), other.attention.parameters(), strict=True)
        )
    first, second = frozen.layers[0].attention.state_dict(), frozen.layers[1].attention.state_dict()
    assert not any(torch.equal(first[key], second[key]) for key in first)  # each from its own layer
    with pytest.raises(ValueError, match=r"attention\.basis_init=calibrated needs attention\.basis"):
        Model(options | {"basis": None})


def test_a_fixed_basis_stays_what_it_is():
    calibration = calibrate(Model(), batches(), statistics=["absolute"], progress=False)
    model = Model({"name": "dct", "keep": 5})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, batches(), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mechanism = approx_attn.build_attention("dct", num_heads=H, head_dim=D, max_length=N)
    with pytest.raises(ValueError, match="attention=dct has no basis to start from a file"):
        calibration.load_into(mechanism)


def test_a_better_start_than_random():
    """Calibrated, the outputs of a trained-like model are nearer to exact attention."""
    torch.manual_seed(0)
    mixing = torch.randn(H, D, D) * torch.tensor([3.0, 1.0, 0.3, 0.1])
    query, key, value = (torch.randn(4, H, N, D) @ m for m in (mixing, mixing, torch.eye(D)))
    moments = ContentMoments()
    moments.update(query, key, AttentionMask())
    fit = moments.fit()
    exact = ExactAttention(AttentionShape(H, D))(query, key, value)[0]
    errors = []
    for calibrated in (False, True):
        mechanism = approx_attn.build_attention("eigen_topk", num_heads=H, head_dim=D, rank=2, keep=2, seed=0)
        if calibrated:
            mechanism.load_content_basis(fit.query_map, fit.key_map, fit.key_mean)
        errors.append((mechanism(query, key, value)[0] - exact).norm())
    assert errors[1] < 0.5 * errors[0]


def test_tuples_and_tensors_are_batches_too_and_their_number_need_not_be_known():
    expected = calibrate(Model(), batches(2), progress=False).tensors
    stream = ((batch["tokens"], batch["keep"]) for batch in batches(2))
    got = calibrate(Model(), stream, progress=False).tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    assert calibrate(Model(), [batches(1)[0]["tokens"]], progress=False).sequences == 3


def test_mean_attention_takes_its_averages_in_the_same_pass():
    model = Model("mean")
    calibrate(model, batches(), progress=False)
    tables = [m.table.values for m in model.modules() if hasattr(m, "observe")]
    assert all(table.std() > 0 for table in tables)


def test_unconverted_hugging_face_model_gives_a_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval()
    keep = torch.ones(3, N, dtype=torch.int64)
    keep[1, :4] = 0  # padding on the left
    data = [{"input_ids": torch.randint(30, (3, N)), "attention_mask": keep}]
    path = tmp_path / "basis.safetensors"
    calibrate(model, data, path=path, source={"model": "tiny", "data": "random"}, progress=False)
    saved = Calibration.open(path)
    assert (saved.model, saved.data, saved.sequences) == ("tiny", "random", 3)
    assert saved.rows[0] >= 2 * N + 6  # queries that are not padding
    for i in range(2):
        mechanism = approx_attn.build_attention(
            "eigen_topk", num_heads=4, head_dim=4, num_key_value_heads=2, layer_index=i, rank=3, basis=str(path)
        )
        assert torch.equal(mechanism.basis.query_map, saved.tensors[f"{i}.content.head.query_map"][..., :3])


@pytest.mark.parametrize("texts", [["a text"], [["a text", "another"]]])
def test_texts_are_no_batches(texts):
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 1)
    message = r"calibration must be a list of batches.* got .*tokenize texts first"
    with pytest.raises(ValueError, match=message):
        calibrate(model, texts, progress=False)
    with pytest.raises(ValueError, match=message):
        approx_attn.convert(model, "eigen_topk", rank=2, calibration=texts)


def test_nothing_to_calibrate_on_is_refused():
    with pytest.raises(ValueError, match="no batches"):
        calibrate(Model(), [], progress=False)
    with pytest.raises(ValueError, match="nothing can be captured"):
        calibrate(nn.Linear(2, 2), [torch.zeros(1, 2)], progress=False)
    with pytest.raises(ValueError, match="statistics must be among content, absolute"):
        calibrate(Model(), batches(), statistics=["rows"], progress=False)
    with pytest.raises(ValueError, match="statistics must list at least one"):
        calibrate(Model(), batches(), statistics=[], progress=False)
