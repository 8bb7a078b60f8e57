"""The verb analyze: a report with every figure and table, files beside it, and refusals."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.feather
import pytest
import torch

from approx_attn import cli
from approx_attn.config.compose import compose_config
from approx_attn.diagnosis.analysis.command import main
from approx_attn.run.train import train
from helpers import TINY, save_tiny_bert

transformers = pytest.importorskip("transformers")
WORDS = ["the", "a", "cat", "dog", "sat", "ran", ".", ",", "on", "mat", "and", "or", "big", "red", "(", ")"]
FIGURES = {
    "row_spectrum",
    "effective_rank",
    "eigenvectors",
    "matrix_spectrum",
    "overlap_by_rank",
    "overlap_layers",
    "overlap_heads",
    "random_tokens",
    "overlap_models",
    "norm_shares",
    "norm_lengths",
    "norm_correlation",
    "reconstruction",
}
SHOWN_TABLES = {
    "layers",
    "row_spectrum_centred",
    "row_spectrum_raw",
    "matrix_spectrum_pooled",
    "overlap",
    "random_tokens",
    "overlap_models",
    "norms",
    "norms_by_token",
    "reconstruction",
}
KEPT_TABLES = {"row_spectrum", "row_eigenvalues", "matrix_spectrum", "overlap_heads", "norms_by_head"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_bert(folder / "one", WORDS, initializer_range=0.3)
    save_tiny_bert(folder / "two", WORDS, seed=1, num_hidden_layers=3, initializer_range=0.3)
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (600,), generator=generator)]
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def arguments(folder: Path, **more: Any) -> list[str]:
    given = {"model": folder / "one", "data": folder / "text.txt", "length": 16, "sequences": 6, "batch_size": 4}
    given |= {"ranks": "[1,2,4]", "matrices": 3, "calibration_sequences": 4, "test_sequences": 2, "keep": "[0.5,0.25]"}
    given |= {"attention": "[eigen_topk,eigen_row,topk,sliding_window]", "progress_bar": "false", **more}
    return [f"{key}={value}" for key, value in given.items()]


class Page(HTMLParser):
    """What a reader finds on a page."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, Any]] = []
        self.tables: list[int] = []
        self.headings: list[str] = []
        self.captions = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag == "table":
            self.tables.append(0)
        elif tag == "tr":
            self.tables[-1] += 1
        for name, value in attrs:
            assert not (name in ("src", "href") and str(value).startswith("http")), "the page must need no network"

    def handle_data(self, data: str) -> None:
        if self._inside == "h2" and data.strip():
            self.headings.append(data.strip())
        if self._inside in ("caption", "figcaption"):
            self.captions += data


def test_the_report_holds_every_figure_and_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, output=tmp_path / "out", other_model=folder / "two")) == 0
    printed = capsys.readouterr().out
    assert "effective rank" in printed
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.headings) == 9
    assert len(page.images) == len(FIGURES)
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") and image["alt"] for image in page.images)
    assert all(f"figures/{name}.png" in page.captions for name in FIGURES)
    assert {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")} == FIGURES
    assert len(page.tables) == len(SHOWN_TABLES)
    assert min(page.tables) > 1
    assert all(f"tables/{name}.csv" in page.captions for name in SHOWN_TABLES)
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["options"]["sequences"] == 6
    for name in SHOWN_TABLES | KEPT_TABLES | {"reconstruction_layers"}:
        with (tmp_path / "out" / "tables" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        arrow = pyarrow.feather.read_table(tmp_path / "out" / "tables" / f"{name}.arrow").to_pylist()
        assert len(rows) == len(arrow) == len(numbers["tables"][name]) > 0
        assert list(rows[0]) == list(arrow[0])
    special = [row for row in numbers["tables"]["norms"] if row["category"] == "special"]
    assert [row["tokens"] for row in special] == pytest.approx([2 / 16] * 2)
    by_token = {row["category"]: row for row in numbers["tables"]["norms_by_token"] if row["layer"] == "0"}
    assert set(by_token) == {"[CLS]", "[SEP]", "comma", "period", "other punctuation", "other"}
    assert by_token["[CLS]"]["tokens"] == pytest.approx(1 / 16)
    assert by_token["[CLS]"]["weight"] + by_token["[SEP]"]["weight"] == pytest.approx(special[0]["weight"])
    spectra = numbers["tables"]["row_spectrum"]
    assert {row["data"] for row in spectra} == {"data", "random tokens"}
    assert "two layers, random tokens" in {row["pairs"] for row in numbers["tables"]["overlap"]}
    pooled = next(r for r in spectra if (r["layer"], r["head"], r["kind"]) == ("0", "all", "centred"))
    assert (pooled["samples"], pooled["dimensions"]) == (6 * 2 * 16, 15)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_causal_and_cross_attention(folder: Path, tmp_path: Path, family: str) -> None:
    """Mechanisms that cannot take part are left out and named; layers are told apart by kind."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_head=2, n_layer=2, bos_token_id=2, eos_token_id=3)
        model = transformers.GPT2Model(config)
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
        model = transformers.T5Model(transformers.T5Config(**sizes, decoder_start_token_id=0))
    for path in (folder / "one").glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(tmp_path)
    out = tmp_path / "out"
    words = {"attention": "null", "keep": "[0.5]", "parts": "[norms,reconstruction]", "random_tokens": "false"}
    assert main(arguments(folder, model=tmp_path, output=out, **words)) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Left out, as they cannot do" in page
    tables = json.loads((out / "numbers.json").read_text())["tables"]
    assert {row["mechanism"].split()[0] for row in tables["reconstruction"]} >= {"eigen_topk", "topk"}
    labels = [row["layer"] for row in tables["layers"]]
    assert labels == (["0", "1"] if family == "gpt2" else ["encoder 0", "decoder 0", "cross 0"])
    assert {row["layer"] for row in tables["norms"]} == set(labels)


def test_images(tmp_path: Path) -> None:
    """A vision transformer on a table of grey images as bytes."""
    pytest.importorskip("approx_attn.data.images")
    import datasets

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=1)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    generator = torch.Generator().manual_seed(0)
    pixels = [bytes(row.tolist()) for row in torch.randint(256, (40, 64), generator=generator)]
    data = datasets.Dataset.from_dict({"img": pixels, "label": [i % 2 for i in range(40)]})
    (tmp_path / "images").mkdir()
    data.to_parquet(tmp_path / "images" / "train.parquet")
    data.select(range(8)).to_parquet(tmp_path / "images" / "test.parquet")
    options = {"model": tmp_path / "vit", "data": tmp_path / "images", "sequences": 8, "output": tmp_path / "out"}
    assert main([f"{k}={v}" for k, v in options.items()] + ["parts=[spectrum,norms]", "progress_bar=false"]) == 0
    tables = json.loads((tmp_path / "out" / "numbers.json").read_text())["tables"]
    assert [row["keys"] for row in tables["layers"]] == [17, 17]
    special = [row["tokens"] for row in tables["norms"] if row["category"] == "special"]
    assert special == pytest.approx([1 / 17] * 2)


def test_a_checkpoint_whose_tokens_are_of_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"the cat sat .,{i % 2}" if i % 3 else f"a dog ran on,{i % 2}" for i in range(60))
    (tmp_path / "reviews.csv").write_text(f"text,label\n{rows}\n")
    words = ["data=text_classification", f"data.path={tmp_path / 'reviews.csv'}", "data.test_split=null"]
    words += [f"data.tokenizer={folder / 'one'}", "data.max_length=8", f"paths.run_dir={tmp_path / 'run'}"]
    train(compose_config([*TINY, *words]))
    model = tmp_path / "run" / "checkpoints" / "best.ckpt"
    options = ["parts=[norms]", "sequences=8", "progress_bar=false", f"output={tmp_path / 'out'}"]
    assert main([f"model={model}", *options]) == 0
    rows = json.loads((tmp_path / "out" / "numbers.json").read_text())["tables"]["norms_by_token"]
    assert {row["category"] for row in rows} == {"[CLS]", "[SEP]", "period", "other"}


def test_parts_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, output=tmp_path / "out", parts="norms", random_tokens="false")) == 0
    assert {p.stem for p in (tmp_path / "out" / "figures").glob("*.png")} == {n for n in FIGURES if "norm_" in n}


def test_noise_and_features(folder: Path, tmp_path: Path) -> None:
    words = {"parts": "[noise,features]", "clusters": 3, "rank": 2, "random_tokens": "false"}
    assert main(arguments(folder, output=tmp_path / "out", **words)) == 0
    tables = json.loads((tmp_path / "out" / "numbers.json").read_text())["tables"]
    assert [row["rows"] for row in tables["noise"]] == [2 * 2 * 16] * 2
    assert len(tables["noise_by_position"]) == 2 * 2 * 16
    assert [row["layer"] for row in tables["features"]] == ["0", "1", "all"] * 2
    assert {"where", "what_token"} <= set(tables["features"][0])
    figures = {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert figures == {"noise", "features", "features_query_key", "features_value"}


def test_what_is_shown_is_escaped(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<b>odd"
    odd.mkdir()
    for path in (folder / "one").iterdir():
        (odd / path.name).symlink_to(path)
    assert main(arguments(folder, model=odd, output=tmp_path / "out", parts="[norms]", random_tokens="false")) == 0
    assert "<b>odd" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": "[spectra]"}, "parts must be among spectrum, matrices, overlap, norms, reconstruction"),
        ({"ranks": "[0]"}, "ranks[0] must be a whole number"),
        ({"ranks": "[]"}, "ranks must list at least one, got []"),
        ({"matrices": 0}, "matrices must be a whole number"),
        ({"clusters": 0}, "clusters must be a whole number"),
        ({"keep": "[1.5]"}, "keep must list shares in (0, 1], got 1.5"),
        ({"attention": "[magic]"}, "attention=magic cannot be measured here"),
        ({"data": "nowhere.txt"}, "data=nowhere.txt is not a file"),
        ({"rank_": 3}, "rank_ is not a key of analyze"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any], message: str
) -> None:
    assert main(arguments(folder, output=tmp_path / "out", **wrong)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_shows_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "--help"]) == 0
    assert "random_tokens:" in capsys.readouterr().out
