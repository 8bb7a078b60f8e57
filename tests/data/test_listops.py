"""ListOps against its definition, by a parser and a generator that share nothing with the fast ones."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from approx_attn.data.generators import listops
from approx_attn.data.generators.listops import ListOpsData
from approx_attn.data.generators.listops_trees import TOKEN_NAMES, VOCAB_SIZE, Expressions, random_expressions

SHORT = {"max_depth": 4, "max_args": 10, "min_length": 20, "max_length": 200}
FULL = {"max_depth": 10, "max_args": 10, "min_length": 500, "max_length": 2000}

EVALUATE = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def parse(words: list[str]) -> tuple[int, int, Counter]:
    """Value, depth and operators of an expression, by recursive descent."""
    operators: Counter = Counter()

    def expression(place: int) -> tuple[int, int, int]:  # value, depth, place after it
        word = words[place]
        if word not in EVALUATE:
            return int(word), 1, place + 1
        values, depth, place = [], 0, place + 1
        while words[place] != "]":
            value, below, place = expression(place)
            values.append(value)
            depth = max(depth, below)
        operators[word, len(values)] += 1
        return EVALUATE[word](values), depth + 1, place + 1

    value, depth, end = expression(0)
    assert end == len(words), "one expression and nothing behind it"
    return value, depth, operators


def words_of(drawn: Expressions) -> list[list[str]]:
    return [[TOKEN_NAMES[token] for token in tokens] for tokens in drawn.split()]


def draw_by_definition(rng: random.Random, depth: int, max_depth: int, max_args: int) -> list[str]:
    """One expression, straight from the definition."""
    if depth == max_depth or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    arguments = [draw_by_definition(rng, depth + 1, max_depth, max_args) for _ in range(rng.randint(2, max_args))]
    return [rng.choice(sorted(EVALUATE)), *(word for argument in arguments for word in argument), "]"]


@pytest.mark.parametrize("setting", [SHORT, FULL, {**SHORT, "max_args": 2, "max_depth": 6, "min_length": 5}])
def test_values_lengths_depths_and_arguments(setting):
    drawn = random_expressions(np.random.default_rng(0), 200, **setting)
    assert len(drawn.lengths) == len(drawn.values) == 200
    assert drawn.lengths.sum() == len(drawn.tokens)
    for words, length, value in zip(words_of(drawn), drawn.lengths, drawn.values, strict=True):
        parsed, depth, operators = parse(words)
        assert parsed == value
        assert len(words) == length
        assert setting["min_length"] < length < setting["max_length"]
        assert depth <= setting["max_depth"]
        assert all(2 <= count <= setting["max_args"] for _, count in operators)


def test_distribution_equals_the_definition():
    """Lengths, depths, values, operators and numbers of arguments against 4,000 naive draws."""
    setting = {"max_depth": 4, "max_args": 5, "min_length": 5, "max_length": 60}
    fast = words_of(random_expressions(np.random.default_rng(0), 20_000, **setting))
    rng, naive = random.Random(0), []
    while len(naive) < 4_000:
        words = draw_by_definition(rng, 1, 4, 5)
        if 5 < len(words) < 60:
            naive.append(words)

    def histograms(expressions: list[list[str]]) -> list[dict]:
        parsed = [parse(words) for words in expressions]
        operators = sum((found for _, _, found in parsed), Counter())
        arguments: Counter = Counter()
        names: Counter = Counter()
        for (name, count), times in operators.items():
            arguments[count] += times
            names[name] += times
        counts = (
            Counter(len(words) // 6 for words in expressions),
            Counter(depth for _, depth, _ in parsed),
            Counter(value for value, _, _ in parsed),
            arguments,
            names,
            Counter(words[0] for words in expressions),
        )
        return [{key: times / sum(count.values()) for key, times in count.items()} for count in counts]

    for ours, theirs in zip(histograms(fast), histograms(naive), strict=True):
        for key in set(ours) | set(theirs):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), abs=0.03)


def test_full_setting_equals_the_definition():
    """Lengths, depths and values at the size of the Long Range Arena against 400 naive draws."""
    fast = words_of(random_expressions(np.random.default_rng(0), 2_000, **FULL))
    rng, naive = random.Random(0), []
    while len(naive) < 400:
        words = draw_by_definition(rng, 1, 10, 10)
        if 500 < len(words) < 2000:
            naive.append(words)

    def figures(expressions: list[list[str]]) -> np.ndarray:
        parsed = [parse(words) for words in expressions]
        return np.array(
            [
                (len(words), depth, value, sum(operators.values()) / len(words))
                for words, (value, depth, operators) in zip(expressions, parsed, strict=True)
            ]
        )

    for ours, theirs in zip(figures(fast).T, figures(naive).T, strict=True):
        assert ks_2samp(ours, theirs).pvalue > 0.01


def test_operators_and_arguments_are_uniform_and_the_share_of_operators_is_a_quarter():
    # Without a bound on the length nothing is refused but roots that are digits.
    setting = {"max_depth": 3, "max_args": 10, "min_length": 1, "max_length": 10**6}
    expressions = words_of(random_expressions(np.random.default_rng(0), 20_000, **setting))
    operators = sum((parse(words)[2] for words in expressions), Counter())
    total = sum(operators.values())
    for name in EVALUATE:
        for count in range(2, 11):
            assert operators[name, count] / total == pytest.approx(1 / 36, abs=0.004)
    # Six arguments of the root on average, a quarter of them operators.
    assert total / len(expressions) == pytest.approx(1 + 6 / 4, abs=0.03)


def test_lengths_out_of_reach_are_refused():
    with pytest.raises(ValueError, match=r"data\.min_length=500"):
        random_expressions(np.random.default_rng(0), 1, max_depth=2, max_args=3, min_length=500, max_length=600)


def small(tmp_path, **options) -> ListOpsData:
    sizes = {"train_size": 60, "val_size": 20, "test_size": 20}
    return ListOpsData(cache_dir=str(tmp_path), batch_size=20, **{**sizes, **options})


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(listops, "SHARD_SIZE", 25)
    monkeypatch.setattr("approx_attn.data.shards.SECONDS_BEFORE_PARALLEL", 0.0)


def all_items(data: ListOpsData) -> list[tuple]:
    loaders = (data.train_dataloader, data.val_dataloader, data.test_dataloader)
    batches = [batch for loader in loaders for batch in loader()]
    return [
        (*tokens[keep].tolist(), label.item())
        for batch in batches
        for tokens, keep, label in zip(batch["tokens"], batch["keep"], batch["labels"], strict=True)
    ]


def test_module_gives_different_expressions_with_their_values(tmp_path):
    data = small(tmp_path, max_depth=3, max_args=3, min_length=5, max_length=12, pad_to_longest=True)
    data.prepare_data()
    data.setup()
    assert data.spec.num_items == (60, 20, 20)
    assert (data.spec.vocab_size, data.spec.num_classes) == (VOCAB_SIZE, 10)
    items = all_items(data)
    assert len({item[:-1] for item in items}) == 100
    assert all(parse([TOKEN_NAMES[token] for token in item[:-1]])[0] == item[-1] for item in items)


def test_result_does_not_depend_on_the_number_of_processes(tmp_path, small_shards):
    one, three = small(tmp_path / "1", num_proc=1), small(tmp_path / "3", num_proc=3)
    assert all_items(one) == all_items(three)
    assert all_items(one) != all_items(small(tmp_path / "1", data_seed=1))


def test_interrupted_generation_goes_on(tmp_path, small_shards, monkeypatch):
    expected = all_items(small(tmp_path / "whole"))
    made = []

    def failing(rng, options, count=listops.make_shard):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return count(rng, options)

    monkeypatch.setattr("approx_attn.data.shards.SECONDS_BEFORE_PARALLEL", 1e9)
    monkeypatch.setattr(listops, "make_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "broken").prepare_data()
    monkeypatch.setattr(
        listops,
        "make_shard",
        lambda rng, options, make=failing.__defaults__[0]: (made.append(1), make(rng, options))[1],
    )
    assert all_items(small(tmp_path / "broken")) == expected
    assert len(made) == 4, "the two shards that were finished were not made again"


GENERATE_SLOWLY = """
import sys, time
from approx_attn.data import shards
from approx_attn.data.generators import listops

def slowly(rng, options, make=listops.make_shard):
    time.sleep(0.05)
    return make(rng, options)

if __name__ == "__main__":
    listops.SHARD_SIZE, listops.make_shard, shards.SECONDS_BEFORE_PARALLEL = 25, slowly, 0.0
    listops.ListOpsData(cache_dir=sys.argv[1], train_size=960, val_size=20, test_size=20, num_proc=2).prepare_data()
"""


@pytest.mark.slow
def test_killed_generation_leaves_no_process_and_goes_on(tmp_path, small_shards, monkeypatch):
    sizes = {"train_size": 960, "num_proc": 1}
    expected = all_items(small(tmp_path / "whole", **sizes))
    (tmp_path / "generate.py").write_text(GENERATE_SLOWLY)
    command = [sys.executable, str(tmp_path / "generate.py"), str(tmp_path / "killed")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    wait_until(lambda: len(list(tmp_path.glob("killed/listops/*.work/shard-?????"))) >= 4)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)  # ends when all that write to its output have ended, workers too
    kept = len(list(tmp_path.glob("killed/listops/*.work/shard-?????")))
    made = []
    make = listops.make_shard
    monkeypatch.setattr(listops, "make_shard", lambda rng, options: (made.append(1), make(rng, options))[1])
    monkeypatch.setattr("approx_attn.data.shards.SECONDS_BEFORE_PARALLEL", 1e9)
    assert all_items(small(tmp_path / "killed", **sizes)) == expected
    assert 4 <= kept < 40
    assert len(made) == 40 - kept
    assert not list(tmp_path.glob("killed/listops/*.work"))


def wait_until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def test_too_few_different_expressions(tmp_path, small_shards):
    with pytest.raises(ValueError, match=r"data\.train_size"):
        small(tmp_path, max_depth=2, max_args=2, min_length=3, max_length=5, train_size=500, num_proc=1).setup()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"max_depth": 1}, "data.max_depth"),
        ({"max_args": 1}, "data.max_args"),
        ({"min_length": 0}, "data.min_length"),
        ({"min_length": 50, "max_length": 51}, "data.max_length"),
        ({"test_size": 0}, "data.test_size"),
        ({"num_proc": 0}, "data.num_proc"),
    ],
)
def test_impossible_options_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        ListOpsData(**options)


def test_batches(tmp_path):
    batch = next(iter(small(tmp_path).train_dataloader()))
    assert batch["tokens"].shape == batch["keep"].shape == (20, 200)
    assert batch["labels"].dtype == torch.int64
