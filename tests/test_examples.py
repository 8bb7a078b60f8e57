"""The programs, the package and the notebook of examples/ do what they are there to show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}


def run(*command: str, folder: Path = EXAMPLES) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_lightning_module_learns_with_a_mechanism_inside() -> None:
    output = run("own_module.py", "--attention", "eigen_topk")
    assert float(output.rpartition(": ")[2].rstrip("%\n")) > 80, "half is chance"


@pytest.mark.slow
def test_an_encoder_is_converted_and_fine_tuned() -> None:
    pytest.importorskip("transformers")
    output = run("convert_encoder.py", "--steps", "150")
    accuracy = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in output.splitlines()}
    assert accuracy.keys() == {"exact", "converted", "fine-tuned"}
    assert accuracy["exact"] > 90
    assert accuracy["fine-tuned"] > 90


@pytest.mark.slow
def test_the_first_token_and_those_after_it_are_timed() -> None:
    pytest.importorskip("transformers")
    output = run(
        "first_token.py", "--length", "200", "--layers", "1", "--width", "64", "--tokens", "2", "--rounds", "1"
    )
    assert [line.split()[0] for line in output.splitlines()[1:]] == ["exact", "converted"]


@pytest.mark.slow
def test_a_package_of_ones_own_is_trained_and_compared(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "my_package", tmp_path / "my_package")
    words = ["plugins=[my_package]", "data=last_marker", "progress_bar=false", "trainer.accelerator=cpu"]
    learned = run("-m", "approx_attn.cli", "train", *words, "attention=alibi", folder=tmp_path)
    assert float(learned.split("test/accuracy ")[1].split(",")[0]) > 0.5, "an eighth is chance"
    mechanisms = "attention=[exact,{name: alibi, slope: 0.25}]"
    table = run(
        "-m", "approx_attn.cli", "compare", *words, mechanisms, "seeds=[1]", "debug=fast", "measure.repeats=0",
        folder=tmp_path,
    )  # fmt: skip
    assert "alibi slope=0.25" in table


@pytest.mark.slow
def test_exchanged_languages_are_read_from_comparisons(tmp_path: Path) -> None:
    words = ["experiment=short_translation", "data.train_size=64", "attention=[exact]", "seeds=[1]", "debug=fast"]
    words += ["progress_bar=false", "trainer.accelerator=cpu", "measure.repeats=0"]
    compare = ["-m", "approx_attn.cli", "compare", *words]
    run(*compare, "name=pairs", folder=tmp_path)
    for side, number in (("source", 2), ("target", 3)):
        exchange = [f"data.{side}_language={number}", f"model.new_language={side}", "start_from=pairs"]
        run(*compare, f"name={side}", *exchange, folder=tmp_path)
    program = str(EXAMPLES / "exchanged_language.py")
    table = run(program, "source", "target", "--both", "source", "target", folder=tmp_path)
    assert [line.split()[1] for line in table.splitlines()[2:4]] == ["source", "target"]
    assert "a pair that neither has seen" in table


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "one_layer.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not kept: they grow old"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    errors = {line[:26].strip(): float(line[26:].split()[-1]) for line in printed.splitlines() if line.count(".") == 4}
    assert errors["eigen_topk"] < errors["eigen_topk, rest dropped"]
