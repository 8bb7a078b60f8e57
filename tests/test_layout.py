"""The house itself: no import circle, few rooms, files that one can read, and a map that equals the tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from approx_attn.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "approx_attn"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("approx_attn"):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else str(node.module)


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_modules_import_each_other_without_a_circle():
    graph = {module: set(imported(path)) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from error


def test_rooms_import_each_other_without_a_circle():
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module != "approx_attn":  # the front door opens all rooms
            graph.setdefault(room(module), set()).update(room(name) for name in imported(path))
    try:
        TopologicalSorter({name: rooms - {name} for name, rooms in graph.items()}).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from error


def test_the_map_in_the_readme_equals_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Map")[1].split("```")[1]
    inside, beside = text.split("\nconfigs/")
    places = {word for word in inside.split() if word.endswith(".py")}
    places |= {line.split()[0] for line in inside.splitlines() if line.startswith("  ") and "/ " in line}
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert places == rooms | {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    for folder in filter(lambda word: word.endswith("/"), f"configs/{beside}".split()):
        assert (ROOT / folder).is_dir(), folder


def test_few_modules_stand_loose_and_files_can_be_read():
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 6
    assert {
        path.name: lines for path in PACKAGE.rglob("*.py") if (lines := len(path.read_text().splitlines())) > 400
    } == {}


def test_every_verb_has_a_script():
    doors = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert doors - {"gpu", "package"} == set(VERBS)
