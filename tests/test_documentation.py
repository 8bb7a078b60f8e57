"""The documentation: its code and commands run, its pictures are those of its script, and no mechanism is missing.

The commands of a page run one after the other in a folder of their own, with `debug=fast` where they train and with
small stand-ins for what a hub or a reader's disk has. What needs a cluster is composed but not run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from approx_attn import cli
from approx_attn.attention import available_attention
from approx_attn.attention.registry import attention_class
from approx_attn.config.compose import compose_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
SLOW = {"inspect", "reproduce", "finetune", "scale", "comparison", "founding_paper", "translation", "cross_attention"}
"""Pages whose commands take more than a few seconds."""

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported; nothing here may reach for a network

WORDS = ["a", "fine", "film", "dull", "plot", "and", "no", "joy", "great", "fun", "with"]
PREPARED = ("make", "source", "pip", "cd", "git", "pre-commit")
"""Commands about the environment, which the tests have; the targets of make must exist."""

SMALL = {
    "train": ["debug=fast", "progress_bar=false", "trainer.accelerator=cpu"],
    "compare": [
        "debug=fast",
        "progress_bar=false",
        "trainer.accelerator=cpu",
        "measure.repeats=1",
        "measure.warm_up=0",
        "seeds=[1]",
    ],
    "evaluate": ["progress_bar=false"],
    "estimate": ["steps=1", "trainer.accelerator=cpu"],
    "calibrate": ["length=16", "sequences=8", "progress_bar=false"],
    "allocate": ["length=16", "sequences=8", "progress_bar=false"],
    "perplexity": ["length=16", "sequences=4", "test_sequences=4", "progress_bar=false"],
    "reconstruct": ["length=16", "sequences=8", "test_sequences=8", "progress_bar=false"],
    "embed": ["length=16", "sequences=8", "test_sequences=8", "progress_bar=false"],
    "analyze": ["length=16", "sequences=8", "batch_size=4", "progress_bar=false"],
    "benchmark": ["length=[64]", "repeats=1", "warm_up=0", "memory=false", "progress_bar=false"],
}
"""What makes a command of each verb short."""

SIZES = {f"data.{split}_size" for split in ("train", "val", "test")} | {"sequences", "test_sequences", "batch_size"}
SIZES |= {"length", "table", "repeats", "warm_up", "memory", "debug", "steps", "seeds"}
"""Keys for which a test has no time, or its stand-ins not enough data."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in SLOW else ())
        for page in PAGES
        if "```bash" in page.read_text(encoding="utf-8") or "```python" in page.read_text(encoding="utf-8")
    ],
)
def test_what_a_page_says_runs(
    page: Path, reader: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    document = Sybil([_python_blocks, _shell_blocks], path=str(page.parent), patterns=[page.name]).parse(page)
    document.namespace["capsys"] = capsys
    document.namespace["batches"] = [{"input_ids": torch.randint(5, 16, (4, 12))}]  # a reader's own
    ran = 0
    for example in document.examples():
        example.evaluate()
        ran += 1
    assert ran > 0


def test_every_mechanism_is_explained() -> None:
    text = (ROOT / "docs" / "concepts" / "mechanisms.md").read_text(encoding="utf-8")
    own = [name for name in available_attention() if not _is_a_plugin(name)]
    assert sorted(re.findall(r"^### `(\w+)`$", text, re.MULTILINE)) == own
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        assert "$$" in section or "`low_rank_topk`" in section or "`dct`" in section, section.splitlines()[0]
        assert "**When:**" in section or section.startswith("`exact`"), section.splitlines()[0]


def test_pictures_are_those_of_their_script(tmp_path: Path) -> None:
    script = ROOT / "docs" / "pictures" / "draw.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in script.parent.glob("*.svg")}
    used = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(name in used for name in drawn)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = (tmp_path / "site" / "reference" / "attention.html").read_text(encoding="utf-8")
    assert "keys per cluster" in built
    method = (tmp_path / "site" / "concepts" / "method.html").read_text(encoding="utf-8")
    assert "<math" in method
    assert "arithmatex" not in method


# -- what a reader has at hand -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, texts and images under the names that the pages use."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("stand_ins")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"[unused{i}]" for i in range(300))]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"):
        config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
        transformers.BertModel(config).save_pretrained(folder / name)
        tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
        tokenizer.save_pretrained(folder / name)
    causal = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=len(vocabulary), **causal)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "openai-community/gpt2")
    tokenizer.save_pretrained(folder / "openai-community/gpt2")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(20, 40))) for _ in range(120)]
    table = Dataset.from_dict({"text": texts, "label": [int("dull" in text) for text in texts]})
    for place in ("SetFit/sst2", "reviews"):
        (folder / place).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            table.to_csv(folder / place / f"{split}.csv")
    for name in ("valid.txt", "wiki.txt"):
        (folder / name).write_text("\n".join(texts * 4), encoding="utf-8")
    (folder / "images").mkdir()
    PIL.Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / "images" / "a.png")
    return folder


@pytest.fixture
def reader(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader, who has the examples and what the pages name."""
    folder = tmp_path / "reader"
    shutil.copytree(stand_ins, folder)
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def _with_stand_ins(text: str) -> str:
    """The text of a block with the folders that a reader would put in; `<run>` is the newest run of its kind."""
    for place in re.findall(r"runs/[\w/]+/<run>", text):
        folder = Path("runs/debug") / Path(place).parent.relative_to("runs")  # where debug=fast puts runs
        newest = max(folder.glob("*-seed*"), key=os.path.getmtime)
        text = text.replace(place, str(newest))
    for name in ("reviews", "images"):
        text = text.replace(f"<{name}>", name)
    return text


# -- blocks of code ----------------------------------------------------------------------------------------


def _regions(document: Document, language: str) -> Iterable[Region]:
    return RawFencedCodeBlockLexer(re.compile(rf"{language}(?P<options>[^\n]*)\n"))(document)


def _python_blocks(document: Document) -> Iterator[Region]:
    for region in _regions(document, "python"):
        if "title=" not in region.lexemes["options"]:  # files of examples/, which have tests of their own
            yield Region(region.start, region.end, region.lexemes["source"], _run_python)


def _run_python(example: Example) -> None:
    lines = "\n" * (example.line + example.parsed.line_offset)  # an error names the line of the page
    exec(compile(lines + _with_stand_ins(example.parsed), example.path, "exec"), example.namespace)


def _shell_blocks(document: Document) -> Iterator[Region]:
    for region in _regions(document, "bash"):
        yield Region(region.start, region.end, region.lexemes["source"], _run_commands)


def _run_commands(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(_with_stand_ins(line), comments=True)
        if words and words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words and words[0] not in PREPARED:
            _run(words, line, example.namespace["capsys"])


def _run(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of approx-attn, shortened; one that is for other machines is composed only."""
    start = words.index("approx-attn")
    verb, *rest = words[start + 1 :]
    elsewhere = start > 0 or any(word.startswith(("trainer=", "launcher=slurm", "experiment=lra_")) for word in rest)
    if elsewhere and verb != "estimate":
        compose_config([word for word in rest if word != "-m" and "," not in word])
        return
    code = cli.main([verb, *(rest if "--help" in rest else shortened(verb, rest))])
    assert code == 0, f"{line}\n{capsys.readouterr().err}"


def shortened(verb: str, words: list[str]) -> list[str]:
    """The words of a command without its sizes, and with those that make it short."""
    fewer = {"refine": "refine=1", "seed": "seed=1"}
    kept = [fewer.get(word.partition("=")[0], word) for word in words]
    kept = [word for word in kept if word.partition("=")[0] not in SIZES]
    return [*kept, *SMALL.get(verb, [])]


def _is_a_plugin(name: str) -> bool:
    return not attention_class(name).__module__.startswith("approx_attn.")
