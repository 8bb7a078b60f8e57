"""Clusters of tokens by features: groups that were planted are found, and labels belong to the tokens drawn."""

import pytest
import torch
from torch import Tensor, nn

import approx_attn
from approx_attn.diagnosis.analysis.features import (
    ALL_LAYERS,
    FeatureSample,
    LayerFeatures,
    cluster_features,
    sample_features,
)

N, GROUPS, D = 240, 4, 8


def planted(noise: float) -> FeatureSample:
    """Two layers, whose queries and keys tell the position of a token and whose values tell what it is."""
    generator = torch.Generator().manual_seed(0)
    position, token = (torch.randint(GROUPS, (N,), generator=generator) for _ in range(2))

    def layer() -> LayerFeatures:
        codes = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:GROUPS]
        query, key, value = (noise * torch.randn(N, 2, D, generator=generator) for _ in range(3))
        where, what = codes[position][:, None], codes[token][:, None]
        return LayerFeatures(query + 4 * where, key + 4 * where, value + what, 0.5)

    return FeatureSample({"a": layer(), "b": layer()}, {"position": position, "token": token})


def test_planted_groups_are_found():
    found = {(each.features, each.layer): each for each in cluster_features(planted(0.2), GROUPS)}
    assert set(found) == {(kind, layer) for kind in ("query_key", "value") for layer in ("a", "b", ALL_LAYERS)}
    for (kind, _), each in found.items():
        mine, other = ("position", "token") if kind == "query_key" else ("token", "position")
        assert each.agreement[mine] == pytest.approx(1.0, abs=1e-6)
        assert abs(each.agreement[other]) < 0.05
        assert each.effective == pytest.approx(GROUPS, rel=0.1)


def test_layers_together_say_more_than_one_where_features_are_noisy():
    found = {(each.features, each.layer): each.agreement["token"] for each in cluster_features(planted(0.7), GROUPS)}
    assert found["value", ALL_LAYERS] > max(found["value", "a"], found["value", "b"]) > 0.2


def test_as_many_groups_as_tokens_are_refused():
    sample = planted(0.2)
    with pytest.raises(ValueError, match="clusters must be below the 240 tokens that are clustered, got 240"):
        cluster_features(sample, N)


class Codes(nn.Module):
    """A layer whose values are the codes of its tokens, and queries and keys those of their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = approx_attn.MultiheadAttention(2 * D, 1, bias=False, batch_first=True)
        self.token, self.position = torch.eye(D), torch.eye(D)
        half = torch.diag(torch.arange(2 * D) < D).float()
        with torch.no_grad():
            self.layer.in_proj_weight.copy_(torch.cat([half, half, torch.eye(2 * D) - half]))

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        place = self.position[: tokens.shape[1]].expand(len(tokens), -1, -1)
        x = torch.cat([place, self.token[tokens]], dim=-1)
        return self.layer(x, x, x, key_padding_mask=~keep, need_weights=False)[0]


def test_labels_and_features_belong_to_the_same_tokens_and_padding_is_dropped():
    generator = torch.Generator().manual_seed(1)
    batches, classes = [], []
    for size in (3, 2):
        tokens = torch.randint(D, (size, 6), generator=generator)
        keep = torch.arange(6) < torch.randint(2, 6, (size, 1), generator=generator)
        batches.append({"tokens": tokens, "keep": keep})
        classes.append(tokens[:, 0])  # the first token is the class
    sample = sample_features(Codes(), batches, classes, tokens=30, progress=False)
    kept = sum(int(batch["keep"].sum()) for batch in batches)
    layer, labels = sample.layers["layer"], sample.labels
    assert len(layer.query) == kept == len(labels["position"])
    assert torch.equal(layer.query[:, 0].argmax(-1), labels["position"])
    assert torch.equal(layer.value[:, 0].argmax(-1) - D, labels["token"])
    first = labels["position"] == 0
    assert torch.equal(labels["class"][first], labels["token"][first])
