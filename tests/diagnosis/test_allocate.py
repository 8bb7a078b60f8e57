"""The verb allocate: a file that converts the same model with another head, a table and a picture."""

import pytest
import torch

from approx_attn import Allocation, convert
from approx_attn.diagnosis.allocate import main
from approx_attn.diagnosis.embed import main as embed_main
from helpers import save_tiny_bert

transformers = pytest.importorskip("transformers")
WORDS = [f"word{i}" for i in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_bert(tmp_path_factory.mktemp("model"), WORDS, initializer_range=0.5)
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(16, (30,), generator=generator)) for _ in range(24)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def arguments(folder, **more):
    given = {"model": folder, "data": folder / "text.txt", "length": 16, "sequences": 6, "progress_bar": "false"}
    return [f"{key}={value}" for key, value in (given | more).items()]


def test_budgets_are_written_drawn_and_measured(folder, tmp_path, capsys):
    path = tmp_path / "out" / "budgets.json"
    attention = "{name: eigen_topk, rank: 2}"
    assert main(arguments(folder, output=path, mean_share=0.3, attention=attention)) == 0
    assert "of the pairs exact" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    budgets = Allocation.open(path)
    assert budgets.exact_share <= 0.3
    model = transformers.BertForMaskedLM.from_pretrained(folder)  # the same layers under longer names
    convert(model, budgets=path, example={"input_ids": torch.ones(1, 8, dtype=torch.long)}, calibration=None)
    table = tmp_path / "table.csv"
    words = [f"model={folder}", f"calibration={folder / 'text.txt'}", f"data={folder / 'text.txt'}"]
    sizes = ["length=16", "sequences=4", "test_sequences=4", "progress_bar=false", "keep=0.25", "rank=2", "refine=1"]
    assert embed_main([*words, *sizes, f"budgets={path}", "attention=eigen_topk", f"output={table}"]) == 0
    labels = [line.partition(",")[0] for line in table.read_text().splitlines()]
    assert labels == ["label", *(f'"{x}' if "," in x else x for x in ("eigen_topk keep=0.25",)), *labels[2:]]
    assert "budgets=budgets.json" in labels


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "one of target_error and mean_share must be given"),
        ({"target_error": 1e-9, "attention": "topk"}, "target_error=1e-09 is reached in no layer"),
        ({"mean_share": 0.1, "attention": "magic"}, "attention='magic' is unknown"),
        ({"mean_share": 0.1, "data": "nothing.txt"}, "data=nothing.txt is not a file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(folder, tmp_path, capsys, wrong, message):
    path = tmp_path / "budgets.json"
    assert main(arguments(folder, output=path, **wrong)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
