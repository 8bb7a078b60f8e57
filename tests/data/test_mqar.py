"""Multi-query associative recall against its definition."""

import numpy as np
import pytest
import torch

from approx_attn.data.generators.mqar import MQARData, associative_recall, distinct
from approx_attn.data.packing import IGNORE

SETTING = {"vocab_size": 32, "length": 40, "num_pairs": 5, "power": 0.01, "random_filler": True}


@pytest.mark.parametrize("random_filler", [True, False])
def test_sequences_keep_the_definition(random_filler):
    options = {**SETTING, "random_filler": random_filler}
    tokens, labels = associative_recall(np.random.default_rng(0), 300, **options)
    assert tokens.shape == labels.shape == (300, 40)
    for sequence, target in zip(tokens, labels, strict=True):
        keys, values = sequence[0:10:2], sequence[1:10:2]
        recall = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert len(recall) == 5 == len(set(values.tolist()))
        assert all(1 <= key < 16 for key in keys)
        assert all(16 <= value < 32 for value in values)
        asked = np.flatnonzero(target != IGNORE)
        assert len(asked) == 5
        assert all(place >= 10 and place % 2 == 0 for place in asked)
        assert sorted(sequence[asked]) == sorted(keys)
        assert [recall[key] for key in sequence[asked].tolist()] == target[asked].tolist()
        if not random_filler:
            assert (np.delete(sequence[10:], asked - 10) == 0).all()


def test_gaps_follow_the_power_law():
    options = {**SETTING, "num_pairs": 1}
    _, labels = associative_recall(np.random.default_rng(0), 40_000, **options)
    slots = (np.argmax(labels != IGNORE, axis=1) - 2) // 2
    law = 0.01 * np.arange(1, 20) ** (0.01 - 1.0)
    expected = law / law.sum()
    np.testing.assert_allclose(np.bincount(slots, minlength=19) / 40_000, expected, atol=0.01)


def test_drawing_without_replacement_follows_successive_draws():
    weights = np.array([0.6, 0.3, 0.1])
    pairs = distinct(np.random.default_rng(1), 60_000, 2, np.log(weights))
    for first in range(3):
        for second in range(3):
            share = np.mean((pairs[:, 0] == first) & (pairs[:, 1] == second))
            expected = 0.0 if first == second else weights[first] * weights[second] / (1 - weights[first])
            assert share == pytest.approx(expected, abs=0.01)


def small(tmp_path, **options) -> MQARData:
    sizes = {"train_size": 64, "val_size": 16, "test_size": 16}
    return MQARData(cache_dir=str(tmp_path), batch_size=16, **{**sizes, **options})


def test_module_gives_seeded_splits_of_the_sizes_asked_for(tmp_path):
    data = small(tmp_path)
    data.prepare_data()
    data.setup()
    assert data.spec.num_items == (64, 16, 16)
    assert data.spec.causal
    assert data.spec.kind == "token_prediction"
    assert data.spec.num_classes == data.spec.vocab_size == 64
    val, test = (next(iter(loader())) for loader in (data.val_dataloader, data.test_dataloader))
    assert not torch.equal(val["tokens"], test["tokens"])
    again = next(iter(small(tmp_path / "elsewhere").test_dataloader()))
    other = next(iter(small(tmp_path, data_seed=1).test_dataloader()))
    assert torch.equal(test["tokens"], again["tokens"])
    assert torch.equal(test["labels"], again["labels"])
    assert not torch.equal(test["tokens"], other["tokens"])


def test_other_training_size_leaves_the_test_set_alone(tmp_path):
    few, many = (next(iter(small(tmp_path, train_size=size).test_dataloader())) for size in (16, 64))
    assert torch.equal(few["tokens"], many["tokens"])


def test_generated_once(tmp_path, monkeypatch):
    small(tmp_path).prepare_data()
    monkeypatch.setattr(MQARData, "generate", lambda *_: pytest.fail("made again"))
    small(tmp_path).setup()
    with pytest.raises(pytest.fail.Exception):
        small(tmp_path, num_pairs=3).setup()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"length": 63}, "data.length"),
        ({"length": 16, "num_pairs": 8}, "data.length"),
        ({"vocab_size": 12, "num_pairs": 8}, "data.vocab_size"),
        ({"power": 0}, "data.power"),
        ({"length": 64.0}, "data.length"),
        ({"random_filler": "yes"}, "data.random_filler"),
        ({"num_pairs": 0}, "data.num_pairs"),
        ({"train_size": 0}, "data.train_size"),
    ],
)
def test_impossible_options_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        MQARData(**options)


def test_unreadable_cache_entry_is_named(tmp_path):
    small(tmp_path).prepare_data()
    for file in tmp_path.rglob("*.arrow"):
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"data\.cache_dir holds .* delete it"):
        small(tmp_path).setup()
