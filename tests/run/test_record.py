"""Records: addressed by content, written whole or not at all, locked while in use."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from approx_attn.run.record import (
    config_hash,
    environment,
    is_finished,
    read_result,
    run_folder,
    run_lock,
    source_commit,
    write_json_atomically,
)

CONFIG = {"seed": 1, "model": {"dim": 64}, "attention": {"keep": 0.25}, "paths": {"run_dir": "a"}}


def test_the_hash_follows_what_decides_the_outcome():
    same = {**dict(reversed(CONFIG.items())), "paths": {"run_dir": "b"}, "seed": 2}
    assert config_hash(CONFIG) == config_hash(same)
    assert config_hash(CONFIG) != config_hash({**CONFIG, "attention": {"keep": 0.5}})
    served = {**CONFIG, "data": {"batch_size": 8, "num_workers": 4, "num_proc": 2, "cache_dir": "elsewhere"}}
    assert config_hash({**CONFIG, "data": {"batch_size": 8}}) == config_hash(served)
    assert config_hash({**CONFIG, "data": {"batch_size": 4}}) != config_hash(served)


def test_options_that_are_younger_than_records_leave_the_hash_alone_where_they_do_nothing():
    assert config_hash({**CONFIG, "data": {"test_share": None}}) == config_hash({**CONFIG, "data": {}})
    assert config_hash({**CONFIG, "metrics": ["f1"]}) == config_hash(CONFIG), "they only look at a run"
    assert config_hash({**CONFIG, "data": {"test_share": 0.2}}) != config_hash({**CONFIG, "data": {}})
    loki = {"_target_": "approx_attn.attention.baselines.low_rank_topk.LowRankTopKAttention", "keep": 0.5}
    recorded = config_hash({**CONFIG, "attention": loki})
    assert config_hash({**CONFIG, "attention": {**loki, "in_training": "chosen"}}) == recorded
    assert config_hash({**CONFIG, "attention": {**loki, "in_training": "exact"}}) != recorded


def test_options_that_mechanisms_no_longer_have_play_no_part_in_the_hash():
    target = "approx_attn.attention.eigen.row.EigenRowAttention"
    now = {**CONFIG, "attention": {"_target_": target, "keep": 0.5, "noise": "shared"}}
    recorded = {**CONFIG, "attention": {"_target_": target, "keep": 0.5, "alignment": "absolute"}}
    assert config_hash(recorded) == config_hash(now)
    recorded["attention"]["alignment"] = "relative"
    assert config_hash(recorded) != config_hash(now)


def test_options_that_mechanisms_have_got_since_play_no_part_in_the_hash_at_their_defaults():
    recorded = {**CONFIG, "attention": {"_target_": "approx_attn.attention.eigen.matrix.EigenMatrixAttention"}}
    now = {**CONFIG, "attention": {**recorded["attention"], "basis_init": "dct", "basis": None}}
    assert config_hash(now) == config_hash(recorded)
    now["attention"]["basis_init"] = "random"
    assert config_hash(now) != config_hash(recorded)


def test_folders_differ_by_seed_and_configuration(tmp_path):
    def folder(config):
        return run_folder(tmp_path, config, data="digits", attention="exact")

    assert folder(CONFIG) == folder(dict(CONFIG))
    assert len({folder(CONFIG), folder({**CONFIG, "seed": 2}), folder({**CONFIG, "model": {"dim": 32}})}) == 3


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json_atomically(path, {"status": "finished"})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json_atomically(path, {"status": "other"})
    assert json.loads(path.read_text()) == {"status": "finished"}
    assert os.listdir(tmp_path) == ["result.json"]


def test_damaged_results_count_as_missing(tmp_path):
    (tmp_path / "result.json").write_text('{"status": "fini')
    assert read_result(tmp_path) is None
    assert not is_finished(tmp_path)
    write_json_atomically(tmp_path / "result.json", {"status": "failed"})
    assert not is_finished(tmp_path)


HOLD = """
import sys, time
from approx_attn.run.record import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path):
        pass


def test_environment_names_the_versions():
    assert environment()["packages"]["torch"].startswith("2.")


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    def look(folder):
        source_commit.cache_clear()
        return source_commit(folder)

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert look(package) is None
    git("init", "--quiet")
    git("add", "package")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert commit.startswith(look(package))
    assert look(installed) is None
    (package / "__init__.py").write_text("changed = True")
    assert look(package).endswith("-dirty")
