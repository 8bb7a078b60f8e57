"""Grey images from raw bytes and from image files."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from approx_attn.data.cifar10 import Cifar10Data

RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(256, size=(count, 8, 8), dtype=np.uint8) for name, count in (("train", 20), ("test", 5))}


@pytest.fixture
def folder(tmp_path):
    for name, images in PIXELS.items():
        columns = {"pixels": [image.tobytes() for image in images], "label": [i % 3 for i in range(len(images))]}
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / f"{name}.parquet"))
    return str(tmp_path)


def tokens_of(loader) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in loader])


def test_pixels_are_read_row_by_row(folder):
    data = Cifar10Data(path=folder, resolution=8)
    data.prepare_data()
    data.setup()
    assert data.spec.num_items == (18, 2, 5)
    assert (data.spec.num_classes, data.spec.max_length, data.spec.vocab_size) == (3, 64, 257)
    assert np.array_equal(tokens_of(data.test_dataloader()) - 1, PIXELS["test"].reshape(5, 64))
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [0, 1, 2, 0, 1]


def test_lower_resolution_averages_blocks(folder):
    data = Cifar10Data(path=folder, resolution=4)
    expected = [
        [np.rint(image[y : y + 2, x : x + 2].mean()) for y in range(0, 8, 2) for x in range(0, 8, 2)]
        for image in PIXELS["test"]
    ]
    assert np.array_equal(tokens_of(data.test_dataloader()) - 1, expected)


@pytest.mark.parametrize("column", ["image", "img"])
def test_image_columns_are_turned_grey(tmp_path, column):
    for name, images in PIXELS.items():
        features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
        columns = {
            column: [Image.fromarray(image).convert("RGB") for image in images],
            "label": [i % 2 for i in range(len(images))],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
    data = Cifar10Data(path=str(tmp_path), resolution=8)
    assert np.array_equal(tokens_of(data.test_dataloader()) - 1, PIXELS["test"].reshape(5, 64))
    assert data.spec.num_classes == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, r"data\.path"),
        ({"path": "/no/such/folder"}, r"data\.path"),
        ({"pixel_column": "raw"}, r"data\.pixel_column='raw'.* pixels, label"),
        ({"pixel_column": "label"}, r"data\.pixel_column='label'.* must hold images or bytes"),
        ({"label_column": "class"}, r"data\.label_column='class'"),
        ({"resolution": 3}, r"data\.resolution must divide .*got 3 for 8"),
        ({"resolution": 32}, r"data\.resolution must divide"),
        ({"val_split": "dev"}, r"data\.val_split='dev'"),
        ({"test_size": 6}, r"data\.test_size"),
    ],
)
def test_wrong_keys_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Cifar10Data(**{"path": folder, "resolution": 8, **options}).setup()


def test_no_known_column(tmp_path):
    datasets.Dataset.from_dict({"bitmap": [b"x"] * 9, "label": [0, 1, 0] * 3}).to_parquet(
        str(tmp_path / "train.parquet")
    )
    with pytest.raises(ValueError, match=r"data\.pixel_column .*bitmap, label"):
        Cifar10Data(path=str(tmp_path), test_split=None).setup()


def test_images_that_are_not_square(tmp_path):
    datasets.Dataset.from_dict({"pixels": [b"abc"] * 9, "label": [0, 1, 0] * 3}).to_parquet(
        str(tmp_path / "train.parquet")
    )
    with pytest.raises(ValueError, match=r"data\.pixel_column='pixels'.* 3 bytes"):
        Cifar10Data(path=str(tmp_path), test_split=None).setup()
