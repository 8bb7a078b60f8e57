"""Predictions for new inputs: those of the test for the same items, and every unusable input named."""

from __future__ import annotations

import csv
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import approx_attn
from approx_attn.cli import main
from approx_attn.config.compose import compose_config
from approx_attn.data import SequenceDataModule
from approx_attn.data.cifar10 import Cifar10Data
from approx_attn.data.images import ImageClassificationData
from approx_attn.run.train import train
from helpers import QUIET, SMALL_MODEL

SMALL = [*QUIET, *SMALL_MODEL, "trainer.max_epochs=2", "trainer.max_steps=40", "optimizer.lr=0.01"]


def run_of(folder: Path, *overrides: str) -> Path:
    return train(compose_config([overrides[0], *SMALL, *overrides[1:], f"paths.run_dir={folder}"])).run_dir


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of texts and a run of a model of them."""
    folder = tmp_path_factory.mktemp("texts")
    for split, size in (("train", 160), ("test", 20)):
        rows = [
            (f"{split} {i}: {('good, ', 'poor ')[i % 2] * 3}", ("positive", "negative")[i % 2]) for i in range(size)
        ]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    data = ["data=text_classification", f"data.path={folder}", "data.max_length=32", "data.eval_batch_size=8"]
    run_of(folder / "run", *data, "attention=performer")
    return folder


def checkpoint(folder: Path) -> str:
    return f"checkpoint={folder / 'run' / 'checkpoints' / 'best.ckpt'}"


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "parquet"])
def test_texts_get_the_classes_of_the_test_by_name(
    texts: Path, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (texts / "test.csv").open(newline="") as file:
        lines = [row["text"] for row in csv.DictReader(file)]
    data = tmp_path / f"new.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_dict({"text": lines}).to_parquet(str(data))
    elif ending == "txt":
        data.write_text("\n".join(lines) + "\n")
    else:
        with data.open("w", newline="") as file:
            csv.writer(file, delimiter="," if ending == "csv" else "\t").writerows(
                [["text"], *([line] for line in lines)]
            )
    assert main(["predict", checkpoint(texts), f"data={data}", f"output={tmp_path / 'out' / 'classes.csv'}"]) == 0
    assert "20 predictions" in capsys.readouterr().out
    with (tmp_path / "out" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = np.load(texts / "run" / "test_predictions.npz")
    assert [row["input"] for row in rows] == lines
    assert [row["prediction"] for row in rows] == [("negative", "positive")[index] for index in kept["prediction"]]
    assert [float(row["probability"]) for row in rows] == pytest.approx(kept["probability"].tolist(), rel=1e-4)


def test_images_get_the_classes_of_their_model(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "data=digits")
    pixels = load_digits().images[:6]
    (tmp_path / "images").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    found = approx_attn.predict(path, tmp_path / "images")
    model = approx_attn.load_model(path)
    tokens = torch.from_numpy(pixels.reshape(6, 64)).long()
    with torch.no_grad():
        expected = model(tokens).softmax(-1).max(-1)
    assert [int(row.prediction) for row in found] == expected.indices.tolist()
    assert [row.probability for row in found] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert [Path(row.input).name for row in found] == [f"{index}.png" for index in range(6)]
    listed = approx_attn.predict(path, [tmp_path / "images" / "3.png", tmp_path / "images" / "1.png"], batch_size=1)
    assert [row.prediction for row in listed] == [found[3].prediction, found[1].prediction]


@pytest.mark.parametrize("kind", [Cifar10Data, ImageClassificationData])
def test_new_images_become_what_the_same_images_were_in_training(
    kind: type[SequenceDataModule], tmp_path: Path
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in pictures]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
        rows.to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    data = kind(path=str(tmp_path / "set"), resolution=4)  # type: ignore[call-arg]
    expected = next(iter(data.test_dataloader()))
    paths = [str(tmp_path / f"{index}.png") for index in range(6)]
    found = data.pack_inputs(paths, data.spec).__getitems__(range(6))
    expected.pop("labels")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("new.txt", b"fine\n\nfine\n", "line 2 of {} must hold a text"),
        ("new.txt", b"fine\nfine\n\xff\xfe\n", "line 3 of {} is not UTF-8 text"),
        ("new.txt", b"", "holds no text"),
        ("new.csv", b"body,id\na,1\n", "text_column='text' is not a column of {}, which has: body, id"),
        ("new.csv", b'id,text\n1,"two\nlines"\n2\n', "line 4 of {} must have 2 fields"),
        ("new.csv", b"id,text\n1,fine\n2, \n", "line 3 of {} must hold a text"),
        ("new.png", b"fine", None),
        ("nowhere.txt", None, "is not a file; this model takes a file of texts"),
    ],
)
def test_unusable_texts_are_named(
    texts: Path,
    name: str,
    content: bytes | None,
    message: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, output = tmp_path / name, tmp_path / "classes.csv"
    if content is not None:
        data.write_bytes(content)
    code = main(["predict", checkpoint(texts), f"data={data}", f"output={output}"])
    error = capsys.readouterr().err
    if message is None:
        assert code == 0, "any other ending is read as lines of text"
    else:
        assert (code, error.count("\n")) == (2, 1)
        assert message.format(data) in error
        assert not output.exists()


def test_what_predict_cannot_use_is_refused(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "new.txt"
    data.write_text("fine\n")
    generated = run_of(tmp_path / "run", "data=mqar", "data.train_size=64", "data.val_size=8", "data.test_size=8")
    digits = run_of(tmp_path / "digits" / "run", "data=digits", "trainer.limit_train_batches=1")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([checkpoint(generated.parent), f"data={data}"], "is of a model trained on mqar (MQARData); predict takes"),
        ([checkpoint(texts), f"data={data}", f"output={data}"], "must be a file of its own"),
        (
            [checkpoint(digits.parent), f"data={tmp_path / 'broken.png'}"],
            f"{tmp_path / 'broken.png'} cannot be read as",
        ),
        ([checkpoint(digits.parent), f"data={tmp_path / 'empty'}"], "holds no image"),
        ([checkpoint(digits.parent), f"data=[{tmp_path / 'a.png'}]"], "is no file or folder"),
        ([f"checkpoint={data}", f"data={data}"], "cannot be read"),
        ([checkpoint(texts), f"data={data}", "batch_size=0"], "batch_size must be a whole number of at least 1"),
    ):
        output = [] if "output" in " ".join(words) else [f"output={tmp_path / 'classes.csv'}"]
        assert main(["predict", *words, *output]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "classes.csv").exists()
    assert data.read_text() == "fine\n"
