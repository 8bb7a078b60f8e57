"""What the pages are made of beside their Markdown: the configurations, files of the top folder, and formulas.

MkDocs calls these functions (`hooks` in mkdocs.yml). Nothing is written into the folder of the pages, so there is no
second copy of anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PICTURES = ROOT / ".github" / "assets"  # those of the README
KEY_LINE = re.compile(r"^ *[\w/]+:[^#]*(?:# (?P<meaning>.*))?$")

# Pages that are files of the top folder, and where their links to its other files lead.
TOP_FILES = {"results.md": "RESULTS.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

KEY_PAGES = {
    "reference/verbs.md": (
        "Command line",
        "What every verb of `approx-attn` takes. `approx-attn <verb> --help` shows the same in a terminal.",
        ["."],
    ),
    "reference/attention.md": (
        "Keys: mechanisms",
        "`attention=<name>` chooses a mechanism and `attention.<key>=<value>` sets one of its options. "
        "[Mechanisms](../concepts/mechanisms.md) says what each computes.",
        ["attention"],
    ),
    "reference/data.md": (
        "Keys: data and recipes",
        "`data=<name>` brings data with a model and a schedule that suit them; `experiment=<name>` is a recipe with a "
        "purpose and wins over `data=`.",
        ["data", "experiment"],
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    for place, name in TOP_FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for page, other in TOP_FILES.items():
            text = text.replace(f"]({other}", f"]({page}")
        files.append(File.generated(config, place, content=text.replace("](docs/", "](")))
    for picture in sorted(PICTURES.glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    shown = {group for _, _, groups in KEY_PAGES.values() for group in groups}
    others = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in shown)
    introduction = "One word chooses a file of a group, such as `optimizer=sgd`."
    pages = {**KEY_PAGES, "reference/groups.md": ("Keys: everything else", introduction, others)}
    for place, (title, text, groups) in pages.items():
        files.append(File.generated(config, place, content=key_page(title, text, groups)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    r"""Formulas, which arithmatex leaves as \(…\) and \[…\], become MathML: browsers draw it without a script."""

    def drawn(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()
        display = "block" if text.startswith(r"\[") else "inline"
        return f'<{match[1]} class="formula">{convert(text[2:-2].strip(), display=display)}</{match[1]}>'

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', drawn, content, flags=re.DOTALL)


# -- keys of the configurations --------------------------------------------------------------------------


def key_page(title: str, introduction: str, groups: list[str]) -> str:
    """Every file of some groups: what it is for, and a table of its keys."""
    parts = [f"# {title}", introduction, "This page is made from the YAML files in `configs/`."]
    for group in groups:
        if len(groups) > 1:
            parts.append(f"## {group}=")
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            parts += [f"{'###' if len(groups) > 1 else '##'} {path.stem}", purpose(path), key_table(path)]
    return "\n\n".join(part for part in parts if part) + "\n"


def purpose(path: Path) -> str:
    """The comment that a file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return "\n".join(map(with_command, lines))


def with_command(line: str) -> str:
    """A line as Markdown; the command at its end is code, and ends a paragraph."""
    match = re.search(r"(python scripts/\S+ |approx-attn )\S.*$", line)
    return f"{escaped(line[: match.start()])}`{match[0]}`\n" if match else escaped(line)


def key_table(path: Path) -> str:
    """Key, default and meaning of every value in a file; empty for a file without any."""
    text = path.read_text(encoding="utf-8")
    meanings = dict(comments(text))
    rows = [
        f"| `{key}` | {code(value)} | {escaped(meanings.get(key, ''))} |" for key, value in leaves(yaml.safe_load(text))
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) if rows else ""


def comments(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, meaning) of the lines with a comment, which may go on in lines of its own."""
    parents: list[tuple[int, str]] = []
    key, meaning = "", ""
    for line in text.splitlines():
        match = KEY_LINE.match(line)
        if match is None:
            if meaning and line.startswith("#"):
                meaning += " " + line.lstrip("# ")
            continue
        if meaning:
            yield key, meaning
        indent = len(line) - len(line.lstrip())
        parents = [parent for parent in parents if parent[0] < indent] + [(indent, line.split(":")[0].strip())]
        key, meaning = ".".join(name for _, name in parents), (match["meaning"] or "").strip()
    if meaning:
        yield key, meaning


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, without directives such as `_target_` and Hydra's list of defaults."""
    for key, value in (node or {}).items():
        if not prefix and key in ("defaults", "hydra"):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            yield f"{prefix}{key}", value


def code(value: Any) -> str:
    """A default as it is written on a command line."""
    if value == "???":
        return "must be set"
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n")
    return f"`{shown.strip()}`".replace("|", "\\|")


def escaped(text: str) -> str:
    """A comment as Markdown."""
    return re.sub(r"([<>|*])", r"\\\1", text)
