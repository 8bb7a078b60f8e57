"""The verbs calibrate and reconstruct on a tiny Hugging Face model and a text file."""

import csv

import pytest
import torch

from approx_attn import cli
from approx_attn.command import settings
from approx_attn.conversion.calibration import Calibration
from approx_attn.diagnosis.calibrate import chosen_mechanisms, main, reconstruct_main
from approx_attn.errors import ConfigError
from helpers import save_tiny_bert

transformers = pytest.importorskip("transformers")
WORDS = [f"word{i}" for i in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random two-layer BERT, its tokenizer, and a text file."""
    folder = save_tiny_bert(tmp_path_factory.mktemp("model"), WORDS)
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (600,), generator=generator)]
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def arguments(folder, **more):
    given = {"model": folder, "data": folder / "text.txt", "length": 16, "sequences": 6, "batch_size": 4}
    return [f"{key}={value}" for key, value in (given | {"progress_bar": "false"} | more).items()]


def test_calibrate_writes_a_file(folder, tmp_path, capsys):
    path = tmp_path / "basis.safetensors"
    assert main(arguments(folder, output=path, statistics="[content,relative]")) == 0
    saved = Calibration.open(path)
    assert (saved.sequences, saved.statistics, saved.layers[0].length) == (6, ["content", "relative"], 16)
    assert saved.model == str(folder)
    assert "head_dim" in capsys.readouterr().out


def test_reconstruct_prints_and_writes_the_errors_of_every_layer(folder, tmp_path, capsys):
    path = tmp_path / "out" / "table.csv"
    names = "[eigen_topk,topk,sliding_window]"
    assert reconstruct_main(arguments(folder, test_sequences=4, keep="[1.0,0.25]", attention=names, output=path)) == 0
    with path.open() as file:
        rows = {row["mechanism"]: row for row in csv.DictReader(file)}
    assert {label.split()[0] for label in rows} == {"eigen_topk", "topk", "sliding_window"}
    layers = [key for key in rows["topk keep=1"] if "layer" in key]
    assert len(layers) == 2
    assert float(rows["eigen_topk keep=1"]["error"]) < 1e-5
    assert float(rows["topk keep=0.25"]["exact_share"]) == pytest.approx(0.25)
    for row in rows.values():
        assert float(row["error"]) == pytest.approx(sum(float(row[layer]) for layer in layers) / 2)
    kept, dropped = (float(rows[f"eigen_topk keep=0.25{rest}"]["error"]) for rest in ("", " rest=drop"))
    assert kept < dropped
    assert "eigen_topk keep=0.25" in capsys.readouterr().out


def test_reconstruct_shows_what_random_and_refined_bases_are_worth(folder, tmp_path):
    path = tmp_path / "table.csv"
    attention = "[{name: eigen_cluster, cluster_size: 2, block_size: 8},topk]"
    words = {"test_sequences": 4, "keep": 0.5, "rank": 2, "refine": 2, "attention": attention, "output": path}
    assert reconstruct_main(arguments(folder, **words)) == 0
    with path.open() as file:
        errors = {row["mechanism"]: float(row["error"]) for row in csv.DictReader(file)}
    label = "eigen_cluster cluster_size=2 block_size=8 keep=0.5"
    assert list(errors) == ["topk keep=0.5", label, f"{label}, random basis", f"{label}, refined"]
    assert len(set(errors.values())) == 4


def test_calibrate_refines_the_basis_of_one_mechanism(folder, tmp_path):
    closed, refined = tmp_path / "closed.safetensors", tmp_path / "refined.safetensors"
    attention = "{name: eigen_cluster, keep: 0.5, cluster_size: 2, block_size: 8, rank: 3}"
    assert main(arguments(folder, output=closed)) == 0
    assert main(arguments(folder, output=refined, refine=2, attention=attention)) == 0
    before, after = Calibration.open(closed).tensors, Calibration.open(refined).tensors
    assert after["1.content.head.key_map"].shape == (2, 8, 3)
    assert not torch.equal(after["1.content.head.key_map"], before["1.content.head.key_map"][..., :3])
    assert torch.equal(after["1.content.layer.key_map"], before["1.content.layer.key_map"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"refine": -1}, "refine must be a whole number of at least 0, got -1"),
        ({"refine": 2}, "refine=2 needs attention=<the mechanism that the basis is for>"),
        ({"attention": "eigen_topk"}, "attention=eigen_topk is what refine=<steps> is for, got refine=0"),
        ({"refine": 2, "attention": "{name: eigen_topk, rnk: 2}"}, "attention.rnk is not an option of eigen_topk"),
        ({"refine": 2, "attention": "topk"}, "refine needs a content basis that learns"),
        ({"data": "nowhere.txt"}, "data=nowhere.txt is not a file"),
        ({"length": 0}, "length must be a whole number"),
        ({"sequences": 900}, "gives 21 of 900 sequences of 16 tokens"),
        ({"model": "nowhere/nothing"}, "model=nowhere/nothing cannot be loaded"),
        ({"model": "run.ckpt"}, "a checkpoint brings its own data"),
        ({"statistics": "[rows]"}, "statistics must be among content"),
        ({"ranks": 3}, "ranks is not a key of calibrate; did you mean"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(folder, tmp_path, capsys, wrong, message):
    path = tmp_path / "basis.safetensors"
    assert main(arguments(folder, output=path, **wrong)) != 0
    error = capsys.readouterr().err
    assert message in error
    assert not path.exists()


def test_a_file_that_is_not_text_is_named_with_its_line(folder, tmp_path, capsys):
    (tmp_path / "binary.txt").write_bytes(b"one line\n\x80\x81")
    assert reconstruct_main(arguments(folder, data=tmp_path / "binary.txt")) != 0
    assert f"data: line 2 of {tmp_path / 'binary.txt'} is not UTF-8 text" in capsys.readouterr().err


def test_bad_budgets_and_names_of_reconstruct(folder, capsys):
    assert reconstruct_main(arguments(folder, keep="[1.5]")) != 0
    assert "keep must list shares in (0, 1]" in capsys.readouterr().err
    assert reconstruct_main(arguments(folder, attention="[magic]")) != 0
    assert "attention=magic cannot be measured here; accepted: eigen_" in capsys.readouterr().err
    assert reconstruct_main(arguments(folder, attention="[{name: eigen_row}]", keep="[0.125]", test_sequences=4)) == 2
    assert capsys.readouterr().err.startswith(
        "error: attention.rank=8 is more than the 2 keys that attention.keep=0.125"
    )


def test_one_budget_and_one_name_need_no_list():
    options = settings("reconstruct", ["model=m", "keep=0.25", "attention=topk"])
    assert list(chosen_mechanisms(options)) == ["topk keep=0.25"]
    for key in ("keep", "attention"):
        with pytest.raises(ConfigError, match=f"{key} must list at least one"):
            chosen_mechanisms(settings("reconstruct", ["model=m", f"{key}=[]"]))


def test_reconstruct_leaves_out_what_a_causal_model_refuses_unless_asked_for(folder, tmp_path, capsys):
    causal, path = tmp_path / "causal", tmp_path / "table.csv"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(causal)
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    transformers.GPT2Model(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(causal)
    words = arguments(folder, model=causal, test_sequences=2, keep=0.25, output=path)
    assert reconstruct_main(words) == 0
    with path.open() as file:
        measured = {row["mechanism"].split()[0] for row in csv.DictReader(file)}
    assert measured == {"eigen_topk", "eigen_cluster", "eigen_row", "topk", "sliding_window"}
    assert "Not measured, for lack of causal attention: low_rank_topk" in capsys.readouterr().out
    assert reconstruct_main([*words, "attention=mra"]) != 0
    assert "attention=mra does not support causal attention" in capsys.readouterr().err


def test_reconstruct_without_anything_to_measure_says_so(folder, capsys):
    assert reconstruct_main(arguments(folder, test_sequences=0)) != 0
    assert "reconstruct got no batches" in capsys.readouterr().err


def test_settings_are_the_file_with_arguments_on_top():
    options = settings("calibrate", ["model=m", "sequences=3", "statistics=[content]"])
    assert (options["model"], options["sequences"], options["statistics"]) == ("m", 3, ["content"])
    with pytest.raises(ConfigError, match="model must be set"):
        settings("calibrate", [])
    with pytest.raises(ConfigError, match="write key=value"):
        settings("calibrate", ["model"])


def test_help_shows_the_keys(capsys):
    assert cli.main(["calibrate", "--help"]) == 0
    assert "sequences:" in capsys.readouterr().out
