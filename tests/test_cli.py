"""The console command: verbs, exit codes, one-sentence errors, the scripts as doors."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import approx_attn
from approx_attn import cli
from approx_attn.attention import available_attention
from helpers import TINY

ROOT = Path(__file__).resolve().parents[1]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in cli.VERBS)


def test_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "'trian' is not a verb; did you mean 'train'?" in capsys.readouterr().err


def test_list_shows_every_mechanism(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in available_attention())
    assert cli.main(["list", "topk"]) == 0
    text = capsys.readouterr().out
    assert "attention.keep" in text
    assert "k: share of the keys that a query may use" in text
    assert cli.main(["list", "topc"]) == 2
    assert "did you mean 'topk'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["train", *TINY, "attention=topk", f"paths.run_dir={folder / 'run'}"]) == 0
    assert "digits · topk · seed 1: trained, test/accuracy" in said.getvalue()
    return folder / "run" / "checkpoints" / "best.ckpt"


def test_evaluate_prints_the_figures(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", f"checkpoint={best}", "progress_bar=false"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_a_figure_that_is_not_finite_is_no_success(
    best: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = torch.load(best, weights_only=True)
    for weight in saved["state_dict"].values():
        weight.fill_(float("nan"))
    torch.save(saved, tmp_path / "nan.ckpt")
    assert cli.main(["evaluate", f"checkpoint={tmp_path / 'nan.ckpt'}", "progress_bar=false"]) == 1
    assert "error: test/loss is nan, so there is no result.\n" in capsys.readouterr().err


def test_sweep_runs_every_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert cli.main(["train", "-m", *TINY, "attention=exact,topk", f"paths.runs={runs}"]) == 0
    assert {path.parent.parent.name for path in runs.glob("digits/*/*/result.json")} == {"exact", "topk"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "attention=eksact"], "attention=eksact is unknown; did you mean 'exact'?"),
        (["train", "attention=topk", "attention.keep=1.5"], "attention.keep"),
        (["train", "seed=1,2"], "add -m"),
        (["train", "data=mqar", "attention=linformer"], "does not support causal attention"),
        (["train", "-m", "attention=exact,linformer", "data=mqar"], "does not support causal attention"),
        (["train", "-m", "attention=glob(zzz*)"], "attention=glob(zzz*) means no value at all."),
        (["train", "-m", "--cfg", "job"], "train: -m and --cfg cannot be given together"),
        (["train", "--bogus"], "train: unrecognized arguments: --bogus."),
        (["train", "--config-dir", "missing"], "missing is not a folder."),
        (["train", "--config-path", "missing"], "use --config-dir to add a folder"),
        (["compare", "--cfg", "job"], "compare takes key=value and --help, got '--cfg'"),
        (["compare", "-m", "data=digits,mqar"], "compare takes key=value and --help, got '-m'"),
        (["evaluate"], "checkpoint must be set"),
        (["evaluate", "checkpoint=missing.ckpt"], "checkpoint='missing.ckpt' is not a file."),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([arguments[0], *arguments[1:]]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_files_of_another_folder_are_found_and_swept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "attention").mkdir(parents=True)
    for name in ("mine_wide", "mine_narrow"):
        text = "_target_: approx_attn.attention.baselines.topk.TopKAttention\n_partial_: true\nkeep: 0.5\n"
        (folder / "attention" / f"{name}.yaml").write_text(text.replace("0.5", "0.1") if "narrow" in name else text)
    words = ["train", *TINY, "-m", "--config-dir", str(folder), "attention=glob(mine_*)", f"paths.runs={tmp_path}/runs"]
    assert cli.main(words) == 0
    assert len(list(tmp_path.glob("runs/digits/topk/*/result.json"))) == 2
    (folder / "attention" / "topk.yaml").write_text("keep: 0.5\n")
    assert cli.main(["train", "--config-dir", str(folder), "--cfg", "job"]) == 2
    assert "has the name of a file that is there already" in capsys.readouterr().err


def test_help_says_what_keys_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "data=mqar", "attention=topk"]) == 0
    text = capsys.readouterr().out
    for said in ("data=mqar ", "attention.keep=0.25 .* # k: share of the keys", "model.dim=.* # features of a token"):
        assert re.search(said, text), said
    assert cli.main(["--version"]) == cli.main(["train", "--version"]) == 0
    assert capsys.readouterr().out == f"approx-attn {approx_attn.__version__}\n" * 2


def test_output_that_cannot_show_unicode_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["list"]) == 0
    sys.stdout.flush()
    assert b"n??d" in written.getvalue()


@pytest.mark.parametrize("script", ["train", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_scripts_are_doors_to_the_verbs(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "foo=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: foo is not a key")
    assert "Traceback" not in done.stderr


def test_help_of_list_is_no_mechanism(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--help"]) == 0
    assert "usage: approx-attn list" in capsys.readouterr().out


def test_what_compare_cannot_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for word, message in (
        ("launcher=slurm", "launcher is not used by compare"),
        ("resume=false", "resume must be true"),
    ):
        assert cli.main(["compare", "data=digits", "attention=[exact]", word]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_replaces_options_of_the_checkpoint(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"checkpoint={best}", "progress_bar=false"]
    found = []
    for more in (["data.eval_batch_size=100"], ["+data.eval_batch_size=100"], ["trainer.limit_test_batches=1.0"]):
        assert cli.main(["evaluate", *words, *more, "metrics=[f1]"]) == 0
        found.append(next(line for line in capsys.readouterr().out.splitlines() if "test/f1" in line))
    assert found[0] == found[1] != found[2], "two batches of 100, of the same items, and all 360"
    assert cli.main(["evaluate", *words, "data.batchsize=4"]) == 2
    assert "data.batchsize is not an option of DigitsData; did you mean 'batch_size'?" in capsys.readouterr().err
