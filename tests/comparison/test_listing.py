"""`approx-attn runs`: what is listed, by which words, and what is deleted."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml

from approx_attn import cli
from approx_attn.comparison import listing
from approx_attn.run.record import mark_run, run_lock


def add_run(root: Path, attention: str, seed: int, status: str | None = "finished", **options: object) -> Path:
    folder = root / "digits" / attention / f"{len(list(root.rglob('config.yaml'))):010d}-seed{seed}"
    folder.mkdir(parents=True)
    mark_run(folder)
    if attention == "topk":
        options = {"keep": 0.25, **options}
    config = {
        "name": "digits",
        "seed": seed,
        "attention": {"_target_": "approx_attn.attention.baselines.topk.TopKAttention", **options},
        "optimizer": {"lr": 0.004, "nesterov": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if status is not None:
        result = {"status": status, "attention": attention, "config": config, "seconds": 3.0}
        result |= {"metrics": {"test/accuracy": 0.9 + seed / 100}} if status == "finished" else {"error": "lost"}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_run(tmp_path, "topk", 1)
    add_run(tmp_path, "topk", 2, keep=0.5)
    add_run(tmp_path, "exact", 1, "failed")
    add_run(tmp_path, "exact", 2, None)
    return tmp_path


def listed(root: Path, *words: str) -> list[str]:
    own, filters = listing.split_words([f"folder={root}", *words])
    return [f"{run.attention} {run.seed} {run.status}" for run in listing.chosen_runs(own, filters)]


def test_every_run_is_listed_with_what_became_of_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(root) == ["exact 1 failed", "exact 2 unfinished", "topk 1 finished", "topk 2 finished"]
    assert cli.main(["runs", f"folder={root}"]) == 0
    text = capsys.readouterr().out
    assert "4 runs in" in text
    assert "keep=0.5" in text
    assert "keep=0.25" not in text, "a default says nothing"
    assert "92.00" in text
    assert "lost" in text
    assert "2 finished, 1 failed, 0 running, 1 unfinished" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["attention=topk"], ["topk 1 finished", "topk 2 finished"]),
        (["attention=topk", "seed=2"], ["topk 2 finished"]),
        (["seed=[2,3]"], ["exact 2 unfinished", "topk 2 finished"]),
        (["status=[failed,unfinished]"], ["exact 1 failed", "exact 2 unfinished"]),
        (["attention.keep=0.5"], ["topk 2 finished"]),
        (["optimizer.lr=0.004", "data=digits", "attention=exact", "seed=1"], ["exact 1 failed"]),
        (["optimizer.nesterov=1"], []),
        (["data=imdb"], []),
        (["sort=accuracy", "attention=topk"], ["topk 1 finished", "topk 2 finished"]),
        (["older_than=1"], []),
    ],
)
def test_words_choose(root: Path, words: list[str], expected: list[str]) -> None:
    assert listed(root, *words) == expected


def test_what_sets_rows_apart_is_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["runs", f"folder={root}"])
    assert "differs in" not in capsys.readouterr().out, "seeds and options have columns of their own"
    other = add_run(root, "topk", 2, keep=0.5)
    result = json.loads((other / "result.json").read_text())
    result["config"]["optimizer"]["lr"] = 0.5
    (other / "result.json").write_text(json.dumps(result))
    own, filters = listing.split_words([f"folder={root}"])
    apart = listing.distinctions(listing.chosen_runs(own, filters))
    assert apart == ["", "", "optimizer.lr=0.004", "optimizer.lr=0.004", "optimizer.lr=0.5"]
    cli.main(["runs", f"folder={root}"])
    assert "differs in" in capsys.readouterr().out


def test_runs_of_mechanisms_and_options_that_are_gone_say_what_they_were(root: Path) -> None:
    add_run(root, "eigen_block", 1, keep=0.5, query_block_size=None)
    add_run(root, "eigen_topk", 1, block_size=8)
    own, filters = listing.split_words([f"folder={root}"])
    said = {run.attention: run.options for run in listing.chosen_runs(own, filters) if run.seed == 1}
    assert said["eigen_block"] == "keep=0.5"
    assert said["eigen_topk"] == "block_size=8"
    assert listed(root, "attention=eigen_block", "attention.keep=0.5") == ["eigen_block 1 finished"]


def test_nothing_found_is_said_and_is_no_success(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", f"folder={root}", "attention=exact", "seed=7"]) == 1
    assert f"error: no run in {root} has attention=exact and seed=7." in capsys.readouterr().err


def prune(root: Path, *words: str) -> int:
    return cli.main(["runs", f"folder={root}", "prune=true", "confirm=true", *words])


def test_prune_deletes_what_was_listed_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = root.parent / f"{root.name}-other"
    kept = add_run(outside, "topk", 9, "failed")
    (root / "digits" / "exact" / "link").symlink_to(kept)
    assert cli.main(["runs", f"folder={root}", "status=failed"]) == 0
    assert "prune=true deletes these" in capsys.readouterr().out
    assert len(listed(root)) == 4, "listing deletes nothing"
    assert prune(root, "status=[failed,unfinished]") == 0
    assert "2 of 2 runs deleted" in capsys.readouterr().out
    assert listed(root) == ["topk 1 finished", "topk 2 finished"]
    assert sorted(path.name for path in (root / "digits").iterdir()) == ["exact", "topk"]  # exact: of the link
    assert kept.is_dir()


def test_prune_is_confirmed_by_a_word_or_at_the_terminal(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["runs", f"folder={root}", "status=failed", "prune=true"]
    assert cli.main(words) == 2
    shown, error = capsys.readouterr()
    assert "seed1: failed, 0." in shown
    assert "confirm=true deletes 1 runs, 0." in error
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert cli.main(words) == 0
    assert "exact 1 failed" in listed(root)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert cli.main(words) == 0
    assert "exact 1 failed" not in listed(root)


def test_prune_leaves_what_no_run_made(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old,) = (run.folder for run in listing.find_runs(root) if run.status == "unfinished")
    (old / ".approx-attn-run").unlink()  # as runs of earlier versions are
    (failed,) = (run.folder for run in listing.find_runs(root) if run.status == "failed")
    for name in ("checkpoints/best.ckpt", "checkpoints/mine.ckpt", "notes.txt", ".git/x.part"):
        (failed / name).parent.mkdir(exist_ok=True)
        (failed / name).write_text("x")
    settings = json.loads((failed / "result.json").read_text())
    settings["config"]["callbacks"] = {"best": {"_target_": "x.ModelCheckpoint", "filename": "best"}}
    (failed / "result.json").write_text(json.dumps(settings))
    project = root / "project"  # of somebody else
    (project / "src").mkdir(parents=True)
    (project / "config.yaml").write_text("lr: 1")
    assert "exact 2 unfinished" in listed(root)
    assert prune(root, "older_than=0", "attention=exact") == 0
    assert "notes.txt was not written by a run" in capsys.readouterr().out
    assert (old / "config.yaml").is_file()
    assert sorted(str(p.relative_to(failed)) for p in failed.rglob("*") if p.is_file()) == [
        ".git/x.part",
        "checkpoints/mine.ckpt",
        "notes.txt",
    ]
    assert (project / "src").is_dir()


def test_prune_never_deletes_the_folder_that_is_searched(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (failed,) = (run.folder for run in listing.find_runs(root) if run.status == "failed")
    assert prune(failed, "status=failed") == 0
    assert "is the folder that is searched: it stays" in capsys.readouterr().out
    assert (failed / "result.json").is_file()


def test_a_run_that_is_running_is_never_deleted(root: Path) -> None:
    (folder,) = (run.folder for run in listing.find_runs(root) if run.status == "unfinished")
    with run_lock(folder):
        assert "exact 2 running" in listed(root)
        prune(root, "status=[running,unfinished]")
        prune(root, "older_than=0", "attention=exact")
        assert listed(root, "attention=exact") == ["exact 2 running"]


def test_old_runs_are_found_by_when_they_were_written(root: Path) -> None:
    (folder,) = (run.folder for run in listing.find_runs(root) if run.status == "failed")
    for path in folder.iterdir():
        os.utime(path, (time.time() - 10 * listing.DAY,) * 2)
    assert listed(root, "older_than=9.5") == ["exact 1 failed"]


def test_damaged_runs_are_listed_too(root: Path) -> None:
    first, second, *_ = (run.folder for run in listing.find_runs(root))
    (first / "result.json").write_text("{half")
    (second / "config.yaml").write_text("a: [")
    assert len(listed(root)) == 4
    assert cli.main(["runs", f"folder={root}"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status=finnished"], "did you mean 'finished'"),
        (["prune=true"], "prune=true needs status=failed"),
        (["prune=yes please", "status=failed"], "prune must be true or false"),
        (["older_than=-1"], "older_than must be a number of days"),
        (["sort=size"], "sort='size' is unknown"),
        (["optimizer.lrr=1"], "optimizer.lrr is not a key of any run here; did you mean 'optimizer.lr'?"),
        (["attention=tpok"], "attention=tpok is unknown; did you mean 'topk'?"),
        (["data=[digits,digitz]"], "data=digitz is unknown; did you mean 'digits'?"),
        (["failed"], "write key=value"),
        (["folder=nowhere"], "is not a folder"),
    ],
)
def test_bad_words_are_one_sentence(
    root: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["runs", f"folder={root}", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_help_shows_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--help"]) == 0
    assert "older_than" in capsys.readouterr().out
