"""The file of records: what is read is what was written, in a small part of its size and without a machine's places."""

import json

import numpy as np
import pytest

from approx_attn.comparison.aggregate import StepMeasurement, comparison_rows, disagreements
from approx_attn.comparison.records_file import StoredComparison, read_records, write_records
from approx_attn.comparison.statistics import mcnemar
from approx_attn.comparison.table import comparison_csv
from approx_attn.errors import ConfigError
from approx_attn.metrics import METRICS

ACCURACY = METRICS["accuracy"]
COST = {"exact_pairs": 10, "total_pairs": 100, "score_multiply_adds": 7, "value_multiply_adds": 7}
ITEMS = 360


def finished_run(folder, seed, correct, **changes):
    """A run with its folder, whose test predictions have these items right."""
    place = folder / f"{len(list(folder.iterdir()))}"
    place.mkdir()
    np.savez(place / "test_predictions.npz", prediction=correct.astype(int), label=np.ones(ITEMS, int))
    (place / "metrics.csv").write_text("step,val/accuracy\n10,0.1\n20,0.30000000000000004\n")
    (place / "result.json").write_text("{}")
    config = {"name": "digits", "seed": seed, "data": {"path": str(place)}, "paths": {"runs": "runs"}, "steps": 1.0}
    return {
        "name": "digits",
        "seed": seed,
        "status": "finished",
        "metrics": {"test/accuracy": float(np.float32(correct.mean()))},
        "cost": COST,
        "parameters": 1,
        "steps": 20,
        "spec": {"class_names": []},
        "environment": {"processor": "p", "torch_threads": 1, "packages": {"torch": "2"}, "commit": f"abc{seed}"},
        "config": config,
        "run_dir": str(place),
        "command": f"python scripts/train.py data.path={place} data.seed=1 seed={seed}",
        **changes,
    }


@pytest.fixture
def comparison(tmp_path):
    """Runs that say everything in another way than the run before: failed, missing, other types, keys more and less."""
    rng = np.random.default_rng(0)
    exact = {seed: rng.random(ITEMS) < 0.9 for seed in (1, 2, 3)}

    def shifted(correct):  # two items lost and one gained with every seed: a difference without spread over seeds
        changed = correct.copy()
        changed[np.flatnonzero(correct)[:2]] = False
        changed[np.flatnonzero(~correct)[:1]] = True
        return changed

    with_list = {"attention": {"name": "topk", "keep": [1, 1.0, True]}, "steps": 1}
    failed = {"status": "failed", "error": f"no file {tmp_path}/a", "seed": 2, "command": "train seed=2"}
    records = {
        "exact": {seed: finished_run(tmp_path, seed, correct) for seed, correct in exact.items()},
        f"topk basis={tmp_path}/topk.bin": {
            seed: finished_run(tmp_path, seed, shifted(correct), config=with_list) for seed, correct in exact.items()
        },
        "linear": {1: None, 2: failed, 3: finished_run(tmp_path, 3, exact[3], extends=None)},
    }
    steps = {
        label: {"relative_time": 1.0 + i, "spread": 0.1, "seconds": 1 / 3, "memory": 5}
        for i, label in enumerate(records)
    }
    measured = {"fingerprint": "x", "steps": steps, "environment": {"processor": "p"}}
    command = f"python scripts/compare.py paths.runs={tmp_path} data=digits"
    return StoredComparison("n", command, "exact", ACCURACY, ("f1",), measured, records)


def test_the_table_is_the_same_to_the_last_digit(comparison, tmp_path):
    write_records(tmp_path / "records.json", comparison)
    found = read_records(tmp_path / "records.json")
    measurements = {label: StepMeasurement(**fields) for label, fields in comparison.measurements["steps"].items()}
    rows = comparison_rows(comparison.records, "exact", ACCURACY, measurements)
    assert rows[1].difference.spread_of_items
    assert comparison_csv(found.rows(), ACCURACY) == comparison_csv(rows, ACCURACY).replace(f"{tmp_path}/", "")
    assert [row.missing for row in found.rows()] == [{}, {}, {1: "not run", 2: "no file <path>"}]
    (lost_two,) = {tuple(run["disagreement"]) for run in found.records["topk basis=topk.bin"].values()}
    assert lost_two == (1, 2, ITEMS)
    assert found.others == ("f1",)


def test_records_are_whole_but_for_the_places_of_the_machine(comparison, tmp_path):
    write_records(tmp_path / "records.json", comparison)
    text = (tmp_path / "records.json").read_text()
    assert str(tmp_path) not in text
    found = read_records(tmp_path / "records.json")
    assert found.command == "python scripts/compare.py data=digits"
    for label, by_seed in zip(found.records, comparison.records.values(), strict=True):
        for seed, run in by_seed.items():
            again = found.records[label][seed]
            if run is None:
                assert again is None
                continue
            read_beside = {"ended", "curve", "disagreement", "run_dir"}
            assert again.keys() - read_beside == run.keys() - read_beside
            same = run.keys() - {"command", "run_dir", "error", "config"}
            assert json.dumps({key: again[key] for key in same}) == json.dumps({key: run[key] for key in same})
            assert again["command"].endswith(f"seed={seed}")
    exact, other = found.records["exact"][3], found.records["topk basis=topk.bin"][3]
    assert exact["curve"] == [[11, 0.1], [21, 0.3]], "steps that were made: metrics.csv counts from 0"
    assert exact["config"]["data"] == {"path": "<digits folder>"}
    assert json.dumps(other["config"]) == json.dumps(
        {"steps": 1, "attention": {"name": "topk", "keep": [1, 1.0, True]}}
    )
    assert exact["command"] == "python scripts/train.py 'data.path=<digits folder>' data.seed=1 seed=3"


def test_what_all_runs_share_is_written_once(comparison, tmp_path):
    write_records(tmp_path / "records.json", comparison)
    text = (tmp_path / "records.json").read_text()
    assert text.count('"processor": "p"') == 2, "of runs and of step times"
    assert text.count('"total_pairs"') == 1
    write_records(tmp_path / "again.json", read_records(tmp_path / "records.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(text)


def test_basis_files_of_one_name_stay_apart(comparison, tmp_path):
    topk = comparison.records[f"topk basis={tmp_path}/topk.bin"]
    records = {"exact": comparison.records["exact"], "topk basis=/a/b": topk, "topk basis=/c/b": topk}
    write_records(tmp_path / "records.json", StoredComparison("n", "c", "exact", ACCURACY, (), {}, records))
    assert len(read_records(tmp_path / "records.json").records) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "n"}', '{"name": 1, "runs": {"exact": 3}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(ConfigError, match="does not hold the records of a comparison"):
        read_records(tmp_path / "records.json")


def test_mcnemar_is_that_of_the_predictions(comparison, tmp_path):
    label = f"topk basis={tmp_path}/topk.bin"
    before = disagreements(comparison.records[label], comparison.records["exact"])
    write_records(tmp_path / "records.json", comparison)
    records = read_records(tmp_path / "records.json").records
    after = disagreements(records["topk basis=topk.bin"], records["exact"])
    assert {s: mcnemar(d) for s, d in after.items()} == {s: mcnemar(d) for s, d in before.items()}
    assert len(after) == 3
