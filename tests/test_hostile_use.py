"""What a careless or hostile user gives to every verb: one sentence that says so, and nothing written anywhere else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from approx_attn import cli
from helpers import TINY, save_tiny_bert

transformers = pytest.importorskip("transformers")

WORDS = [f"word{i}" for i in range(16)]
SMALL = ["length=16", "sequences=2", "batch_size=2", "progress_bar=false"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with things as they should be: a model with its tokenizer, texts, and a checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny_bert(folder / "model", WORDS, num_hidden_layers=1)
    (folder / "text.txt").write_text(" ".join(WORDS * 40))
    for split in ("train", "test"):
        (folder / "texts").mkdir(exist_ok=True)
        lines = [json.dumps({"text": " ".join(WORDS), "label": i % 2}) for i in range(8)]
        (folder / "texts" / f"{split}.jsonl").write_text("\n".join(lines))
    text = ["data=text_classification", f"data.path={folder / 'texts'}", "data.max_length=16", "data.val_share=0.25"]
    assert cli.main(["train", *TINY, *text, f"paths.run_dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def place(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wrong things, with the working and the temporary folder."""
    for name in ("here", "tmp", "empty_folder", "foreign_folder", "foreign_model"):
        (tmp_path / name).mkdir()
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "binary.parquet").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "foreign_folder" / "holiday.txt").write_text("sun")
    (tmp_path / "foreign_model" / "config.json").write_text("{}")
    (tmp_path / "foreign.ckpt").write_bytes(b"not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    whole = (good / "run" / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a hash of what files hold."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def refused(arguments: list[str], place: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a verb that must end with one sentence, which is returned, and leave everything as it was."""
    before = contents(place)
    code = cli.main([argument.format(good=good, place=place) for argument in arguments])
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    (line,) = said.strip().splitlines()
    assert line.startswith("error: ")
    assert contents(place) == before
    return line


# -- places to write -------------------------------------------------------------------------------------

MODEL = ["model={good}/model", "data={good}/text.txt", *SMALL]
COMPARE = ["compare", *TINY, "attention=[exact]", "seeds=[1]", "measure.repeats=0"]
FOLDERS = {
    "train": (["train", *TINY], "paths.runs"),
    "train run_dir": (["train", *TINY], "paths.run_dir"),
    "compare": ([*COMPARE, "paths.runs={place}/here/runs"], "results"),
    "compare runs": ([*COMPARE, "results={place}/here/results"], "paths.runs"),
    "analyze": (["analyze", *MODEL], "output"),
    "benchmark": (["benchmark", "attention=[topk]", "length=[16]", "repeats=1", "memory=false"], "output"),
}
FILES = {
    "calibrate": ["calibrate", *MODEL],
    "reconstruct": ["reconstruct", *MODEL, "test_sequences=2"],
    "embed": [
        "embed",
        "model={good}/model",
        "calibration={good}/texts",
        "data=[{good}/texts]",
        *SMALL,
        "test_sequences=2",
    ],
    "predict": ["predict", "checkpoint={good}/run/checkpoints/best.ckpt", "data={good}/text.txt"],
    "results": ["results", "{place}/empty_folder"],
}
NO_FOLDER = ["{place}/a_file", "{place}/a_file/below", "/proc/none/below", "/dev/full"]
NO_FILE = ["{place}/empty_folder", "{place}/a_file/below.csv", "/proc/none/below.csv", "/dev/full"]


@pytest.mark.parametrize("output", NO_FOLDER)
@pytest.mark.parametrize("verb", FOLDERS)
def test_no_folder_to_write_to(
    verb: str, output: str, place: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, key = FOLDERS[verb]
    assert key in refused([*arguments, f"{key}={output}"], place, good, capsys)


@pytest.mark.parametrize("output", NO_FILE)
@pytest.mark.parametrize("verb", FILES)
def test_no_file_to_write_to(
    verb: str, output: str, place: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "output=" in refused([*FILES[verb], f"output={output}"], place, good, capsys)


# -- what to read ----------------------------------------------------------------------------------------

TEXTS = [
    "{place}/missing.txt",
    "{place}/empty.txt",
    "{place}/binary.txt",
    "{place}/empty_folder",
    "{place}/columns.csv",
]
TABLES = [
    "{place}/missing.csv",
    "{place}/empty.txt",
    "{place}/binary.parquet",
    "{place}/empty_folder",
    "{place}/columns.csv",
]
OF_TEXT = {verb: [verb, "model={good}/model", *SMALL] for verb in ("analyze", "calibrate", "reconstruct")}
OF_TABLES = {
    "train": (["train", *TINY, "data=text_classification"], "data.path"),
    "train text_lm": (["train", "debug=fast", "data=text_lm", "trainer.accelerator=cpu"], "data.path"),
    "compare": ([*COMPARE, "data=text_classification"], "data.path"),
    "estimate": (["estimate", *TINY, "data=text_classification"], "data.path"),
    "embed": (["embed", "model={good}/model", "calibration={good}/texts", *SMALL, "test_sequences=2"], "data"),
    "embed calibration": (
        ["embed", "model={good}/model", "data=[{good}/texts]", *SMALL, "test_sequences=2"],
        "calibration",
    ),
    "evaluate": (["evaluate", "checkpoint={good}/run/checkpoints/best.ckpt"], "data.path"),
    "predict": (["predict", "checkpoint={good}/run/checkpoints/best.ckpt"], "data"),
}


def pairs(verbs: Iterable[str], things: list[str], whole: str) -> list:
    """One verb with every wrong thing, every verb with the first and the last; other pairs are slow tests."""
    return [
        pytest.param(verb, thing, marks=() if verb == whole or thing in (things[0], things[-1]) else pytest.mark.slow)
        for verb in verbs
        for thing in things
    ]


@pytest.mark.parametrize(("verb", "data"), pairs(OF_TEXT, TEXTS, "analyze"))
def test_no_text(verb: str, data: str, place: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data" in refused([*OF_TEXT[verb], f"data={data}"], place, good, capsys)


@pytest.mark.parametrize(("verb", "data"), pairs(OF_TABLES, TABLES, "train"))
def test_no_data_set(verb: str, data: str, place: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, key = OF_TABLES[verb]
    assert "data" in refused([*arguments, f"{key}={data}"], place, good, capsys)


MODELS = ["missing", "empty_folder", "foreign_folder", "foreign_model", "missing.ckpt", "empty.ckpt", "foreign.ckpt"]
MODELS += ["other.ckpt", "truncated.ckpt"]
OF_MODEL = {verb: ([verb, "data={good}/text.txt", *SMALL], "model") for verb in ("analyze", "calibrate", "reconstruct")}
OF_MODEL["embed"] = (["embed", "calibration={good}/texts", "data=[{good}/texts]", *SMALL, "test_sequences=2"], "model")
OF_MODEL["evaluate"] = (["evaluate"], "checkpoint")
OF_MODEL["predict"] = (["predict", "data={good}/text.txt"], "checkpoint")
OF_MODEL["train init_from"] = (["train", *TINY], "init_from")
OF_MODEL["train extend"] = (["train", *TINY], "extend")
OF_MODEL["benchmark"] = (
    ["benchmark", "data={good}/text.txt", "attention=[topk]", "length=[16]", "memory=false"],
    "source",
)
OF_MODEL["train"] = (
    ["train", "debug=fast", "data=sst2", "data.path={good}/texts"],
    "model.path",
)


@pytest.mark.parametrize(("verb", "model"), pairs(OF_MODEL, MODELS, "analyze"))
def test_no_model(verb: str, model: str, place: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, key = OF_MODEL[verb]
    if model.endswith(".ckpt") and key != "checkpoint":
        arguments = [argument for argument in arguments if not argument.startswith("data={good}")]
    assert key in refused([*arguments, f"{key}={{place}}/{model}"], place, good, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "folder={place}/missing"],
        ["runs", "folder={place}/a_file"],
        ["results", "{place}/missing"],
        ["results", "{place}/foreign_folder"],
        ["results", "{place}/a_file"],
        ["results", "output={place}/here/new.md"],
        ["list", "../a_file"],
        ["estimate", *TINY, "attention=tpok"],
    ],
    ids=" ".join,
)
def test_no_such_thing(arguments: list[str], place: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(arguments, place, good, capsys)


@pytest.mark.slow
def test_no_room_for_what_is_printed(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "approx_attn.cli", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output cannot be written: ")
    assert len(done.stderr.splitlines()) == 1
