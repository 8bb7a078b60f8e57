"""Every mechanism on every task: it learns a batch, or refuses in one sentence; and the reference experiments run.

A mechanism is taken as users take it, by its word in the configuration, at sizes that keep the whole matrix fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from datasets import ClassLabel, Dataset, Features, Image

from approx_attn.attention import attention_class, available_attention
from approx_attn.config.compose import available_choices, compose_config
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError
from approx_attn.run import train as training
from helpers import QUIET, SMALL_MODEL

STEPS = 3
WORDS = ["a", "fine", "film", "dull", "plot", "and", "no", "joy", "great", "fun"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"[unused{i}]" for i in range(300))]

OWN_MODEL = [*SMALL_MODEL, "model.dropout=0", "model.attention_dropout=0"]
PRETRAINED = ["model.calibrate=1"]
# Task -> its recipe at tiny sizes. {folder} holds what `sources` makes; data.batch_size is that of one training batch.
TASKS: dict[str, list[str]] = {
    "digits": ["data=digits", *OWN_MODEL],
    "mqar": ["data=mqar", "data.length=16", "data.num_pairs=2", "data.train_size=16", *OWN_MODEL],
    "listops": [
        *("experiment=lra_listops", "data.max_depth=3", "data.max_args=4", "data.min_length=5", "data.max_length=24"),
        *("data.train_size=16", "data.val_size=8", "data.test_size=8", *OWN_MODEL),
    ],
    "pathfinder": [
        *("experiment=lra_pathfinder", "data.resolution=12", "data.train_size=16", "data.val_size=8"),
        *("data.test_size=8", *OWN_MODEL),
    ],
    "cifar10": ["experiment=lra_image", "data.path={folder}/squares", "data.resolution=8", *OWN_MODEL],
    "imdb": ["experiment=lra_text", "data.path={folder}/texts", "data.max_length=40", *OWN_MODEL],
    "retrieval": ["experiment=lra_retrieval", "data.path={folder}/pairs", "data.max_length=40", *OWN_MODEL],
    "retrieval_sample": ["data=retrieval", "data.max_length=40", "data.train_size=16", *OWN_MODEL],
    "translation": ["data=translation", "data.max_clauses=1", "data.train_size=16", *OWN_MODEL],
    "text_lm": ["data=text_lm", "data.path={folder}/running/train.txt", "data.max_length=32", *OWN_MODEL],
    "masked_lm": ["experiment=masked_lm", "data.path={folder}/running/train.txt", "data.max_length=32", *OWN_MODEL],
    "text_classification": [
        *("data=text_classification", "data.path={folder}/texts", "data.tokenizer={folder}/bert"),
        *("data.max_length=16", *OWN_MODEL),
    ],
    "sst2": [
        *("experiment=finetune", "data.path={folder}/texts", "model.path={folder}/bert", "data.val_split=null"),
        *("data.max_length=16", *PRETRAINED),
    ],
    "token_lm": [
        *("experiment=finetune_lm", "data.path={folder}/running/train.txt", "model.path={folder}/gpt2"),
        *("data.tokenizer={folder}/bert", "data.max_length=16", *PRETRAINED),
    ],
    "images": [
        *("experiment=finetune_image", "data.path={folder}/images", "model.path={folder}/vit"),
        *("data.resolution=12", *PRETRAINED),
    ],
}
NEEDS_TRANSFORMERS = {"text_classification", "sst2", "token_lm", "images"}
GENERATED = {"mqar", "listops", "pathfinder", "retrieval_sample", "translation"}
CAUSAL = {"mqar", "text_lm", "token_lm"}
# Each task with these, and each mechanism on these; other pairs bring nothing but themselves and are slow tests.
KINDS = {"exact", "eigen_row", "eigen_topk"}
TYPICAL = {"mqar", "sst2"}  # a causal task with a model of its own, and a padded one with a pretrained model
LRA = {name: task for task, words in TASKS.items() for name in [words[0].removeprefix("experiment=")] if "lra_" in name}

Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets of every kind and tiny random pretrained models, as files in one folder."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    make_texts(folder / "texts", rng)
    make_pairs(folder / "pairs", rng)
    make_images(folder, rng)
    return folder


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(3, 12)))


def make_texts(folder: Path, rng: np.random.Generator) -> None:
    """Classified sentences, and a running text beside them."""
    folder.mkdir()
    for split, count in (("train", 24), ("test", 8)):
        texts = [sentence(rng) for _ in range(count)]
        labels = [int("dull" not in text.split()) for text in texts]
        Dataset.from_dict({"text": texts, "label": labels}).to_parquet(str(folder / f"{split}.parquet"))
    running = folder.parent / "running"
    running.mkdir()
    (running / "train.txt").write_text("\n".join(sentence(rng) for _ in range(120)))


def make_pairs(folder: Path, rng: np.random.Generator) -> None:
    """Pairs of documents as the ACL Anthology Network has them."""
    folder.mkdir()
    for split, count in (("train", 20), ("eval", 8), ("test", 8)):
        lines = [f"{i % 2}.0\tA{i}\tB{i}\t{sentence(rng)}\t{sentence(rng)}" for i in range(count)]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n")


def make_images(folder: Path, rng: np.random.Generator) -> None:
    """Grey 8×8 images as bytes (squares) and colour images as files (images)."""
    features = Features({"image": Image(), "label": ClassLabel(3)})
    for split, count in (("train", 20), ("test", 8)):
        labels = [i % 3 for i in range(count)]
        grey = rng.integers(256, size=(count, 8, 8), dtype=np.uint8)
        colour = rng.integers(256, size=(count, 12, 12, 3), dtype=np.uint8)
        for name, data in (
            ("squares", Dataset.from_dict({"pixels": [image.tobytes() for image in grey], "label": labels})),
            ("images", Dataset.from_dict({"image": list(colour), "label": labels}, features)),
        ):
            (folder / name).mkdir(exist_ok=True)
            data.to_parquet(str(folder / name / f"{split}.parquet"))


@pytest.fixture(scope="module")
def pretrained(sources: Path) -> None:
    """Tiny random models of transformers, and a tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vocab = {token: index for index, token in enumerate(TOKENS)}
    transformers.BertTokenizerFast(vocab=vocab).save_pretrained(sources / "bert")
    bert = transformers.BertConfig(**size, vocab_size=len(TOKENS), max_position_embeddings=16)
    transformers.BertModel(bert).save_pretrained(sources / "bert")
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=len(TOKENS))
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(sources / "gpt2")
    vit = transformers.ViTConfig(**size, image_size=12, patch_size=3, num_labels=3)
    transformers.ViTForImageClassification(vit).save_pretrained(sources / "vit")


@pytest.fixture(scope="module")
def words(sources: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Words:
    """Function of a task and further overrides: the command line of its recipe."""
    runs, cache = (tmp_path_factory.mktemp(name) for name in ("runs", "cache"))

    def command_line(task: str, *more: str) -> list[str]:
        if task in NEEDS_TRANSFORMERS:
            request.getfixturevalue("pretrained")
        recipe = [word.format(folder=sources) for word in TASKS[task]]
        generated = [f"data.cache_dir={cache}"] if task in GENERATED else []
        return [*recipe, *generated, *QUIET, f"paths.runs={runs}", "data.batch_size=8", "optimizer.lr=0.003", *more]

    return command_line


@pytest.fixture(scope="module")
def data_of(words: Words) -> Callable[[str], SequenceDataModule]:
    """Function of a task: its data, read or generated once."""
    made: dict[str, SequenceDataModule] = {}

    def data(task: str) -> SequenceDataModule:
        if task not in made:
            made[task] = training.check_run(compose_config(words(task)))
            training.make_splits(made[task])
        return made[task]

    return data


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")  # no trainer watches these steps
@pytest.mark.parametrize(
    ("task", "name"),
    [
        pytest.param(task, name, marks=() if name in KINDS or task in TYPICAL else pytest.mark.slow)
        for task in TASKS
        for name in available_attention()
    ],
)
def test_every_mechanism_learns_every_task(
    task: str, name: str, words: Words, data_of: Callable[[str], SequenceDataModule]
) -> None:
    """A few steps on one batch lower its loss; or a causal task is refused in a sentence that names the mechanism."""
    data = data_of(task)
    assert data.spec.causal == (task in CAUSAL)
    config = training.check_config(compose_config(words(task, f"attention={name}")))
    pl.seed_everything(1, verbose=False)
    capabilities = attention_class(name).capabilities
    if data.spec.causal and not capabilities.causal:
        with pytest.raises(ConfigError, match=rf"^[^\n]*{name}[^\n]* does not support causal[^\n]*\.$"):
            training.build_task(config, data.spec)
        return
    if data.spec.kind == "translation" and not (capabilities.causal and capabilities.independent_queries):
        with pytest.raises(ConfigError, match=rf"^[^\n]*{name}[^\n]* does not support [^\n]*causal[^\n]*\.$"):
            training.build_task(config, data.spec)
        return
    built = training.build_task(config, data.spec)
    training.fit_bases(built, data, config)
    losses = train_on_one_batch(built, next(iter(data.train_dataloader())))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    learned = [parameter for mechanism in built.mechanisms for parameter in mechanism.parameters()]
    assert capabilities.has_parameters or not learned
    for parameter in learned:
        assert parameter.grad is None or parameter.grad.isfinite().all()


def train_on_one_batch(task: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """The loss before every step."""
    task.train()
    optimizer = task.build_optimizer()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = task.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_every_reference_experiment_is_among_the_tasks() -> None:
    assert {name for name in available_choices("experiment") if name.startswith("lra_")} == set(LRA)


@pytest.mark.parametrize("experiment", sorted(LRA))
def test_reference_experiments_run_from_data_to_record(experiment: str, words: Words) -> None:
    result = training.train(compose_config([*words(LRA[experiment], "debug=fast", "attention=eigen_topk")]))
    assert result.record["status"] == "finished"
    assert result.record["name"] == experiment
    assert result.record["steps"] in (2, 3)
    assert 0.0 <= result.metrics["test/accuracy"] <= 1.0
