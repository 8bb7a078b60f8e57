"""Code of one's own, in a package that the person names: every verb uses it, and nothing else has it imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from approx_attn import cli
from approx_attn.attention import AttentionMechanism
from approx_attn.config import files, trust
from approx_attn.config.compose import compose_config
from approx_attn.errors import ConfigError
from approx_attn.metrics import METRICS
from approx_attn.run.evaluate import evaluate, load_task
from approx_attn.run.train import train

PACKAGE = "package_of_mine"
CODE = """
from approx_attn import Metric, register_attention, register_metric
from approx_attn.attention.baselines.topk import TopKAttention
from approx_attn.data.digits import DigitsData
from approx_attn.models import EncoderClassifier
from pytorch_lightning import Callback

@register_attention("mine")
class MyAttention(TopKAttention):
    pass

class MyData(DigitsData):
    pass

class MyModel(EncoderClassifier):
    pass

class MyCallback(Callback):
    def on_train_start(self, trainer, pl_module):
        print("my callback was called")

register_metric(Metric("my_error", percent=True, higher_is_better=False, label="error of mine",
                       compute=lambda counts: 1 - counts.correct.sum() / counts.labelled.sum()))
"""
FILES = {
    "__init__.py": CODE,
    "configs/attention/mine.yaml": f"_target_: {PACKAGE}.MyAttention\n_partial_: true\nkeep: 0.5 # budget of mine\n",
    "configs/data/my_digits.yaml": (
        "# @package _global_\ndefaults: [digits]\nname: my_digits\n"
        f"data:\n  _target_: {PACKAGE}.MyData\nmodel:\n  _target_: {PACKAGE}.MyModel\n"
    ),
}
WORD = f"plugins=[{PACKAGE}]"
TINY = [
    *("data=my_digits", "debug=fast", "progress_bar=false", "logger=csv", "trainer.accelerator=cpu"),
    *("model.dim=8", "model.num_heads=2", "model.depth=1", "metrics=[accuracy,my_error]"),
]
CHECKPOINT = "run/checkpoints/best.ckpt"
FEW = ["sequences=8", "progress_bar=false"]


def forget() -> None:
    """Take the package out of this process again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    trust._plugins.clear()
    files.FOLDERS.clear()
    AttentionMechanism.registered.pop("mine", None)
    METRICS.pop("my_error", None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the package, a run of it and an image."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (folder / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / PACKAGE / name).write_text(text)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "image.png")
    path = list(sys.path)
    forget()  # what other tests of this process have trusted
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", WORD, *TINY, "attention=mine", "paths.run_dir=run"]) == 0
    forget()
    yield folder
    sys.path[:] = path


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same as the current folder, the package not yet imported."""
    monkeypatch.chdir(place)
    forget()
    yield place
    forget()


VERBS = {
    "train": (
        ["train", *TINY, "attention=mine", f"+callbacks.mine={{_target_: {PACKAGE}.MyCallback}}", "paths.runs=runs"],
        ["my callback was called", "my_digits · mine · seed 1: trained", "test/my_error"],
    ),
    "train --help": (["train", "--help", "attention=mine"], ["attention.keep=0.5", "budget of mine", "my_digits"]),
    "evaluate": (["evaluate", f"checkpoint={CHECKPOINT}", "progress_bar=false"], ["test/my_error"]),
    "predict": (
        ["predict", f"checkpoint={CHECKPOINT}", "data=image.png", "output=classes.csv"],
        ["classes.csv, 1 predictions"],
    ),
    "compare": (
        ["compare", *TINY, "attention=[exact,mine]", "seeds=[1]", "measure.repeats=0", "metric=my_error"],
        ["error of mine", "mine seed 1"],
    ),
    "reconstruct": (
        ["reconstruct", f"model={CHECKPOINT}", "attention=[{name: mine}]", "keep=[0.25]", *FEW, "test_sequences=8"],
        ["mine"],
    ),
    "calibrate": (["calibrate", f"model={CHECKPOINT}", *FEW, "statistics=[content]"], ["basis.safetensors"]),
    "analyze": (["analyze", f"model={CHECKPOINT}", *FEW, "parts=[spectrum]", "output=analysis"], ["analysis"]),
    "benchmark": (["benchmark", "attention=[mine]", "length=[16]", "repeats=1", "memory=false"], ["mine"]),
    "estimate": (["estimate", *TINY, "attention=mine", "steps=1"], ["attention=mine"]),
    "runs": (["runs", "folder=run", "attention=mine"], ["my_digits"]),
    "list": (["list"], ["mine"]),
    "list mine": (["list", "mine"], ["attention.keep", "budget of mine"]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_uses_a_package_that_the_command_line_names(
    verb: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, told = VERBS[verb]
    code = cli.main([*words, WORD])
    said = capsys.readouterr()
    assert code == 0, said.err
    for text in told:
        assert text in said.out, text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_package_that_is_not_there_is_refused_by_every_verb(
    verb: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, "plugins=[no_such_package]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: plugins: 'no_such_package' cannot be imported (ModuleNotFoundError: ")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("broken", "1 / 0", r"'broken' cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("taken", "import approx_attn as a; a.register_attention('topk')(a.AttentionMechanism)", "'topk' is taken"),
        ("again", "import approx_attn as a; a.register_metric(a.Metric('f1', True, True))", "the name 'f1' is taken"),
        ("not-a-name", "", "plugins must be names of packages, got 'not-a-name'"),
    ],
)
def test_a_package_that_cannot_be_used_is_one_sentence(name: str, code: str, message: str, here: Path) -> None:
    (here / f"{name}.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        trust.trust(name)


def test_python_trusts_by_a_call_and_the_run_is_found_again(here: Path) -> None:
    trust.trust(PACKAGE)
    config = compose_config([*TINY, "attention=mine", "paths.run_dir=run", "resume=true"])
    result = train(config)
    assert result.task is None, "the command line has run it"
    assert result.record["environment"]["plugins"] == [PACKAGE]
    assert evaluate(CHECKPOINT)["test/my_error"] == pytest.approx(result.metrics["test/my_error"])


def test_a_checkpoint_or_a_configuration_never_has_code_imported(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"_target_ must lie in .*add plugins=\[{PACKAGE}\] to the command line"):
        load_task(CHECKPOINT)
    saved = torch.load(CHECKPOINT, weights_only=True)
    saved["hyper_parameters"]["config"]["plugins"] = [PACKAGE]
    torch.save(saved, tmp_path / "hostile.ckpt")
    with pytest.raises(ConfigError, match=rf"hostile.ckpt' must not name plugins; .* add plugins=\[{PACKAGE}\]"):
        load_task(tmp_path / "hostile.ckpt")
    with pytest.raises(ConfigError, match=rf"a configuration must not name plugins; .* add plugins=\[{PACKAGE}\]"):
        train({**compose_config(["data=digits"]), "plugins": [PACKAGE]})
    assert PACKAGE not in sys.modules


def test_a_trusted_package_lends_no_class_of_another(here: Path) -> None:
    trust.trust(PACKAGE)
    config = compose_config([*TINY, "attention=mine"])
    config.model._target_ = f"{PACKAGE}.Callback"
    with pytest.raises(ConfigError, match=r"model\._target_ must name a SequenceModel"):
        train(config)
