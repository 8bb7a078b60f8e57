"""Pretrained models in ordinary runs: fine-tuning, zero-shot tests, freezing, checkpoints without the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from approx_attn.config.compose import compose_config, plain
from approx_attn.errors import ConfigError
from approx_attn.models.pretrained import (
    PretrainedClassifier,
    PretrainedImageClassifier,
    PretrainedLanguageModel,
    attention_block,
)
from approx_attn.run.evaluate import evaluate, load_task
from approx_attn.run.train import train

transformers = pytest.importorskip("transformers")

WORDS = ["a", "fine", "film", "dull", "plot", "and", "no", "joy", "great", "fun"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"[unused{i}]" for i in range(300))]
IMAGES = Features({"image": ImageFeature(), "label": ClassLabel(3)})
SHAPE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random BERT without a classification head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SHAPE)).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(TOKENS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts of 2 to 9 words; those with `dull` are negative."""
    folder = tmp_path_factory.mktemp("sentences")
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        texts = [" ".join(rng.choice(WORDS, rng.integers(2, 10))) for _ in range(48)]
        labels = [int("dull" not in text.split()) for text in texts]
        Dataset.from_dict({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def config(runs: Path, encoder: str, sentences: str, *overrides: str) -> dict[str, Any]:
    small = ["data.max_length=16", "data.batch_size=8", "trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    quiet = ["progress_bar=false", "logger=csv", "trainer.accelerator=cpu", f"paths.runs={runs}"]
    source = ["experiment=finetune", f"model.path={encoder}", f"data.path={sentences}", "model.calibrate=2"]
    return plain(compose_config([*source, *small, *quiet, *overrides]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, encoder: str, sentences: str) -> Any:
    """A fine-tuned model, whose source is gone afterwards."""
    moved = tmp_path_factory.mktemp("moved") / "encoder"
    shutil.copytree(encoder, moved)
    result = train(config(tmp_path_factory.mktemp("runs"), str(moved), sentences, "attention=eigen_topk"))
    shutil.rmtree(moved)
    return result


def classifier(encoder: str, **options: Any) -> PretrainedClassifier:
    return PretrainedClassifier(len(TOKENS), 2, 16, path=encoder, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(5, len(TOKENS), (3, 12))
    return tokens, torch.arange(12) < torch.tensor([[12], [7], [4]])


def test_exact_is_the_unconverted_model(encoder: str) -> None:
    torch.manual_seed(3)
    model = classifier(encoder).eval()
    torch.manual_seed(3)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2).eval()
    other.load_state_dict(model.network.state_dict())
    tokens, keep = batch()
    expected = other(input_ids=tokens, attention_mask=keep.long()).logits
    torch.testing.assert_close(model(tokens, keep), expected)


@pytest.mark.parametrize("name", ["exact", "topk", "eigen_topk", "eigen_row", "sliding_window"])
def test_every_layer_has_a_cost_and_padding_changes_nothing(encoder: str, name: str) -> None:
    model = classifier(encoder, attention=name).eval()
    assert [mechanism.name for mechanism in model.mechanisms] == [name, name]
    assert model.mechanisms[0].cost(16).total_pairs == 2 * 16 * 16
    tokens, keep = batch()
    changed = tokens.masked_fill(~keep, 7)
    torch.testing.assert_close(model(tokens, keep), model(changed, keep))


def test_the_head_does_not_depend_on_the_mechanism(encoder: str) -> None:
    heads = []
    for name in ("exact", "eigen_topk"):
        torch.manual_seed(5)
        heads.append(classifier(encoder, attention=name).network.classifier.weight)
    torch.testing.assert_close(heads[0], heads[1])


def test_bases_are_fitted_on_training_batches(run: Any, encoder: str, sentences: str, tmp_path: Path) -> None:
    """With a learning rate of almost nothing, what differs from the start is what calibration set."""
    options = ["attention=eigen_topk", "optimizer.lr=1e-12", "trainer.limit_train_batches=1"]
    maps = []
    for batches in (0, 2):
        result = train(config(tmp_path, encoder, sentences, *options, f"model.calibrate={batches}"))
        maps.append(dict(result.task.mechanisms[0].named_parameters()))
    assert any((maps[0][key] - maps[1][key]).abs().max() > 1e-3 for key in maps[0])


def test_checkpoint_needs_only_itself_and_data(run: Any, encoder: str) -> None:
    checkpoint = run.run_dir / "checkpoints" / "best.ckpt"
    assert not Path(run.record["config"]["model"]["path"]).exists()
    figures = evaluate(checkpoint, data={"tokenizer": encoder}, trainer={"accelerator": "cpu"})
    assert figures["test/accuracy"] == pytest.approx(run.metrics["test/accuracy"])
    assert figures["test/loss"] == pytest.approx(run.metrics["test/loss"], rel=1e-5)


def test_checkpoint_holds_plain_containers_that_name_no_code(run: Any) -> None:
    saved = torch.load(run.run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    architecture = saved["hyper_parameters"]["config"]["model"]["architecture"]
    assert json.loads(json.dumps(architecture)) == architecture
    assert architecture["model_type"] == "bert"
    assert not any(key.startswith("_") or key == "auto_map" for key in architecture)
    # The record stays what was asked for, so that the run is found again by its configuration.
    assert run.record["config"]["model"]["architecture"] is None


def test_zero_shot_tests_a_checkpoint_with_another_mechanism(
    run: Any, encoder: str, sentences: str, tmp_path: Path
) -> None:
    options = [f"model.path={run.run_dir / 'checkpoints' / 'best.ckpt'}", f"data.tokenizer={encoder}"]
    options += ["trainer.max_epochs=0"]
    full = train(config(tmp_path, encoder, sentences, *options, "attention=eigen_topk", "attention.keep=1.0"))
    exact = train(config(tmp_path, encoder, sentences, *options, "attention=exact"))
    assert exact.record["steps"] == 0
    assert full.metrics["test/loss"] == pytest.approx(exact.metrics["test/loss"], rel=1e-4)
    trained = load_task(run.run_dir / "checkpoints" / "best.ckpt").model.network.classifier.weight
    torch.testing.assert_close(exact.task.model.network.classifier.weight.cpu(), trained)


def test_freezing_leaves_attention_and_head(encoder: str) -> None:
    model = classifier(encoder, attention="eigen_topk", train="attention_only").network
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained
    assert "bert.encoder.layer.0.attention.self.query.weight" in trained
    assert "bert.encoder.layer.1.attention.output.dense.weight" in trained  # the output projection is attention too
    assert any(".approx_attn." in name for name in trained)
    assert not any(".intermediate." in name or ".embeddings." in name for name in trained)


def test_freezing_leaves_cross_attention_of_encoder_decoders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "d_model": 16, "max_position_embeddings": 32}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    transformers.BartForSequenceClassification(transformers.BartConfig(**shape)).save_pretrained(tmp_path)
    model = PretrainedClassifier(99, 3, 16, path=str(tmp_path), attention="topk", train="cross_attention_only")
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    assert "model.decoder.layers.0.encoder_attn.q_proj.weight" in trained
    assert all(".encoder_attn." in name or name.startswith("classification_head") for name in trained)
    assert sum(mechanism.causal for mechanism in model.mechanisms) == 1  # the decoder's self-attention
    tokens, keep = torch.full((2, 8), 2).masked_fill(torch.arange(8) < 7, 5), torch.ones(2, 8, dtype=torch.bool)
    assert model(tokens, keep).shape == (2, 3)


def test_attention_block_holds_the_output_projection(encoder: str) -> None:
    network = classifier(encoder).network
    block = attention_block(network, "bert.encoder.layer.0.attention.self")
    assert block is network.bert.encoder.layer[0].attention


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models_do_not_look_ahead(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        settings = transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    else:
        settings = transformers.LlamaConfig(**SHAPE | {"vocab_size": 99, "num_key_value_heads": 1})
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    model = PretrainedLanguageModel(99, 16, path=str(tmp_path), attention="eigen_topk").eval()
    tokens = torch.randint(0, 99, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 99
    logits, other = model(tokens), model(changed)
    assert logits.shape == (2, 16, 99)
    torch.testing.assert_close(logits[:, :10], other[:, :10])
    assert not torch.allclose(logits[:, 10:], other[:, 10:])
    with pytest.raises(ValueError, match=r"data\.objective=causal"):
        PretrainedLanguageModel(99, 16, causal=False, path=str(tmp_path))


def test_image_classifier_counts_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key not in ("vocab_size", "max_position_embeddings")}
    settings = transformers.ViTConfig(**shape, image_size=8, patch_size=2, num_channels=1)
    transformers.ViTForImageClassification(settings).save_pretrained(tmp_path)
    model = PretrainedImageClassifier(5, 64, path=str(tmp_path), attention="eigen_topk")
    assert model.attention_length == 17
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    assert any(name.startswith("classifier") for name in model.new_parameters)  # it had two classes
    with pytest.raises(ValueError, match="data: the model does not take these inputs"):
        PretrainedImageClassifier(5, 100, path=str(tmp_path))


def test_images_are_classified_end_to_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key not in ("vocab_size", "max_position_embeddings")}
    settings = transformers.ViTConfig(**shape, image_size=8, patch_size=2)
    transformers.ViTForImageClassification(settings).save_pretrained(tmp_path / "vit")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = [PIL.Image.fromarray(rng.integers(0, 255, (10, 10, 3), np.uint8)) for _ in range(16)]
        data = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(16)]}, IMAGES)
        data.to_parquet(tmp_path / "images" / f"{split}.parquet")
    source = ["experiment=finetune_image", f"model.path={tmp_path / 'vit'}", f"data.path={tmp_path / 'images'}"]
    small = ["data.resolution=8", "data.batch_size=4", "trainer.max_epochs=1", "model.calibrate=1"]
    quiet = ["progress_bar=true", "logger=csv", "trainer.accelerator=cpu", f"paths.runs={tmp_path / 'runs'}"]
    result = train(plain(compose_config([*source, *small, *quiet, "attention=eigen_topk"])))
    assert result.record["cost"]["total_pairs"] == 2 * 2 * 17 * 17
    figures = evaluate(result.run_dir / "checkpoints" / "best.ckpt")
    assert figures["test/loss"] == pytest.approx(result.metrics["test/loss"], rel=1e-5)


def test_language_models_are_trained_end_to_end(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    settings = transformers.GPT2Config(vocab_size=len(TOKENS), eos_token_id=3, bos_token_id=2, **shape)
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path / "gpt2")
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(WORDS, 2000)))
    source = ["experiment=finetune_lm", f"model.path={tmp_path / 'gpt2'}", f"data.tokenizer={encoder}"]
    small = [
        f"data.path={tmp_path / 'text.txt'}",
        "data.max_length=16",
        "model.calibrate=1",
        "model.train=attention_only",
    ]
    quiet = ["progress_bar=false", "logger=csv", "trainer.accelerator=cpu", f"paths.runs={tmp_path / 'runs'}"]
    result = train(plain(compose_config([*source, *small, *quiet, "attention=eigen_topk"])))
    assert result.record["spec"]["causal"]
    assert result.record["spec"]["vocab_size"] == len(TOKENS)
    assert np.isfinite(result.metrics["test/loss"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=null", "data.tokenizer=null"], r"model\.path must be"),
        (["model.path=/nowhere/at/all"], r"model\.path='/nowhere/at/all' cannot be loaded"),
        (["model.train=some"], r"model\.train must be one of"),
        (["model.train=cross_attention_only"], r"needs a network with cross-attention"),
        (["model.calibrate=-1"], r"model\.calibrate must be"),
        (["model.layers=cross"], r"layers='cross' means no attention layer"),
        (["data.max_length=64"], r"data\.max_length must be at most the 32 positions"),
        (["trainer.max_epochs=0"], r"trainer\.max_epochs=0 tests a model that was trained before; .* no fitting"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    overrides: list[str], message: str, encoder: str, sentences: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "runs", encoder, sentences, *overrides))
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt' is not a checkpoint of a pretrained model"):
        PretrainedClassifier(99, 2, 16, path=str(tmp_path / "other.ckpt"))
