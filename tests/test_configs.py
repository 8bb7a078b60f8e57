"""Every YAML file: it composes, its keys are options of its class, and the recipes run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from approx_attn.attention import attention_class, available_attention
from approx_attn.config.compose import ConfigError, available_choices, compose_config, config_dir, load_config, plain
from approx_attn.config.instantiate import target_class
from approx_attn.run.train import check_run, run_folder
from helpers import QUIET

NEEDS = {
    "text_classification": ["data.path=somewhere"],
    "parallel_text": ["data.path=somewhere"],
    "lra_retrieval": ["data.path=somewhere"],
}
# Recipes of pretrained models, with the configuration and the class of a tiny random one.
PRETRAINED = {
    "sst2": ("BertConfig", "BertModel"),
    "finetune": ("BertConfig", "BertModel"),
    "token_lm": ("GPT2Config", "GPT2LMHeadModel"),
    "finetune_lm": ("GPT2Config", "GPT2LMHeadModel"),
    "images": ("ViTConfig", "ViTForImageClassification"),
    "finetune_image": ("ViTConfig", "ViTForImageClassification"),
}
# Options of the recipe's own model that another one does not have.
WITHOUT = {"attention_pooling": ["~model.depth", "~model.feed_forward_dim"]}
# Where a mechanism that cannot be causal is tried.
NOT_CAUSAL = "digits"


def test_every_mechanism_has_a_file_and_every_file_a_mechanism() -> None:
    assert available_choices("attention") == available_attention()


@pytest.mark.parametrize("name", available_attention())
def test_every_mechanism_fits_a_recipe(name: str) -> None:
    data = "mqar" if attention_class(name).capabilities.causal else NOT_CAUSAL
    check_run(compose_config([*QUIET, f"data={data}", f"attention={name}"]))


def needs(name: str, folder: Path) -> list[str]:
    """What a recipe has no default for."""
    if name not in PRETRAINED:
        return NEEDS.get(name, [])
    transformers = pytest.importorskip("transformers")
    settings, model = (getattr(transformers, part) for part in PRETRAINED[name])
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model(settings(**shape, vocab_size=300, eos_token_id=1, bos_token_id=1)).save_pretrained(folder)
    return [f"model.path={folder}"]


@pytest.mark.parametrize("name", available_choices("data"))
def test_every_data_recipe_can_run(name: str, tmp_path: Path) -> None:
    config = load_config([*QUIET, f"data={name}", *needs(name, tmp_path)])
    assert config["name"] == name
    check_run(config)


@pytest.mark.parametrize("name", available_choices("experiment"))
def test_every_experiment_can_run_and_leaves_the_mechanism_alone(name: str, tmp_path: Path) -> None:
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    assert "attention" not in content
    assert "attention" not in content.get("model", {})
    check_run(compose_config([*QUIET, f"experiment={name}", *needs(name, tmp_path)]))


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in ("model", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger", "launcher", "debug")
        for name in available_choices(group)
    ],
)
def test_every_other_choice_composes(group: str, name: str) -> None:
    load_config([f"{group}={name}"])


def own_choices(group: str) -> list[str]:
    """Files of a group, without those of packages that other tests have named as plugins."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def model_of(recipe: str) -> str | None:
    """The file in `model/` that a recipe of data chooses; None where another recipe chooses for it."""
    defaults = yaml.safe_load((config_dir() / "data" / f"{recipe}.yaml").read_text())["defaults"]
    return next((entry["override /model"] for entry in defaults if "override /model" in entry), None)


@pytest.mark.parametrize("group", ["model", "data"])
def test_files_state_every_option_of_their_class(group: str) -> None:
    for name in own_choices(group):
        over = [f"data={name}", *NEEDS.get(name, [])]
        if group == "model":  # with a recipe made for it; others state options that it does not have
            recipe = next((recipe for recipe in own_choices("data") if model_of(recipe) == name), "digits")
            over = [f"data={recipe}", *NEEDS.get(recipe, []), f"model={name}", *WITHOUT.get(name, [])]
        node = load_config(over)[group]
        parameters = inspect.signature(target_class(node, group, object)).parameters
        given = (
            {"vocab_size", "num_classes", "max_length", "two_towers", "causal", "pad_id", "coordinate_dim"}
            if group == "model"
            else set()
        )
        assert set(parameters) - given == set(node) - {"_target_"}, name


def test_every_file_says_what_it_is() -> None:
    for path in config_dir().rglob("*.yaml"):
        lines = path.read_text().splitlines()
        first = lines[1] if lines[0].startswith("# @package") else lines[0]
        assert first.startswith("# "), path
        assert len(first) > 20, path


def test_the_page_names_every_file_in_its_group_and_no_other() -> None:
    named: dict[str, list[str]] = {}
    group = ""
    for line in (config_dir() / "README.md").read_text().splitlines():
        if heading := re.match(r"#+ `([a-z.]+)/?`", line):
            group = heading[1]
        elif row := re.match(r"\| (`[^|]+`) \|", line):
            named.setdefault(group, []).extend(re.findall(r"`(\w+)`", row[1]))
    there: dict[str, list[str]] = {}
    for path in config_dir().rglob("*.yaml"):
        there.setdefault(str(path.parent.relative_to(config_dir())), []).append(path.stem)
    assert {group: sorted(names) for group, names in named.items()} == {g: sorted(n) for g, n in there.items()}


def test_data_recipe_yields_to_the_command_line_and_experiments_to_both() -> None:
    assert load_config(["data=mqar"])["model"]["_target_"].endswith("LanguageModel")
    assert load_config(["data=digits", "optimizer.lr=0.5"])["optimizer"]["lr"] == 0.5
    experiment = load_config(["experiment=lra_listops", "data.train_size=10"])
    assert experiment["data"]["max_length"] == 2000
    assert experiment["data"]["train_size"] == 10


# Steps, warm-up and batch of the small-model reference setup; they are what makes results comparable.
REFERENCE = {
    "lra_listops": (5000, 1000, 32, 2000),
    "lra_text": (20000, 8000, 32, 4000),
    "lra_retrieval": (30000, 800, 32, 4000),
    "lra_image": (35000, 175, 256, 1024),
    "lra_pathfinder": (62400, 312, 256, 1024),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_experiments_are_the_small_model_setup(name: str) -> None:
    config = load_config([f"experiment={name}", *NEEDS.get(name, [])])
    steps, warmup, batch, length = REFERENCE[name]
    assert (config["trainer"]["max_steps"], config["scheduler"]["warmup"]) == (steps, warmup)
    assert config["scheduler"]["decay"] == "linear"
    assert config["optimizer"]["lr"] == 1e-4
    assert config["optimizer"]["weight_decay"] == 0.0
    assert config["data"]["batch_size"] == batch
    assert config["callbacks"]["early_stopping"] is None
    data = config["data"]
    assert (data["resolution"] ** 2 if "resolution" in data else data["max_length"]) == length
    model = {key: config["model"][key] for key in ("depth", "dim", "feed_forward_dim", "num_heads")}
    assert model == {"depth": 2, "dim": 64, "feed_forward_dim": 128, "num_heads": 2}
    assert config["model"]["dropout"] == config["model"]["attention_dropout"] == 0.1


def test_swapping_the_mechanism_changes_nothing_else() -> None:
    exact, topk = (load_config(["data=digits", f"attention={name}"]) for name in ("exact", "topk"))
    for config in (exact, topk):
        config.pop("attention")
        config["model"].pop("attention")
    assert exact == topk


def test_run_folder_depends_on_what_decides_the_outcome_alone(tmp_path: Path) -> None:
    def folder(*overrides: str) -> Path:
        return run_folder(load_config([f"paths.runs={tmp_path}", *overrides]))

    assert folder("resume=true", "progress_bar=false", "verbose=true", "logger=csv") == folder()
    assert len({folder(), folder("seed=2"), folder("optimizer.lr=0.1"), folder("attention=topk")}) == 4
    assert folder("paths.run_dir=here") == Path("here")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention=eksact"], "attention=eksact is unknown; did you mean 'exact'? Accepted: "),
        (["data=digitz"], "data=digitz is unknown; did you mean 'digits'? Accepted: "),
        (["atention=topk"], "atention is not a key; did you mean 'attention'?"),
        (["attention=topk", "attention.kep=.1"], "attention.kep is not a key of attention=topk; did you mean 'keep'?"),
        (["data=mqar", "data.lenght=3"], "data.lenght is not a key of data=mqar; did you mean 'length'?"),
        (["modle.dim=3"], "modle is not a key; did you mean 'model'?"),
        (["trainer.max_epoch=3"], "trainer.max_epoch is not a key of trainer=default; did you mean 'max_epochs'?"),
        (["data=text_classification"], "data.path must be set"),
        (["scheduler=null"], "scheduler=null: scheduler takes one of constant, cosine, one_cycle"),
        (["+seed=1"], "seed is in the configuration already"),
        (["~seeed"], "'seeed' does not exist"),
        (["seed"], "override 'seed' cannot be read"),
        (["seed=[1"], "override 'seed=[1' cannot be read"),
    ],
)
def test_wrong_words_are_one_sentence_with_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plain(compose_config(overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_composing_inside_a_hydra_program_leaves_its_state(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        load_config(["data=mqar"])
        inner: Any = compose("train", overrides=["data=digits"])
    assert inner.name == "digits"
