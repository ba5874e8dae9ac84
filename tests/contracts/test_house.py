"""The figures of the house: how many rooms a module needs, how long the way to a prompt is, who knows PEFT."""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from softprompt.bundled import complaints
from softprompt.cli.main import run

PACKAGE = Path(__file__).parents[2] / "src" / "softprompt"
MOST_IMPORTS, MOST_LINES, MOST_FILES, LONGEST_CHAIN = 3.8, 49_600, 84, 7
TRIVIAL = 120
"""Bytes below which a module holds no code of its own."""


def module_name(path):
    parts = ("softprompt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


DOORS = {
    name: path.with_suffix(".pyi").read_text(encoding="utf-8")
    for name, path in MODULES.items()
    if path.with_suffix(".pyi").exists()
}


def type_checking_nodes(tree):
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def imports_of(name):
    """Return the own modules that a module imports at run time; a facade counts as one."""
    tree, found = TREES[name], set()
    skipped = type_checking_nodes(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softprompt"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                of_the_door = f" as {alias.name}\n" in DOORS.get(node.module, "")  # a function called as its module
                found.add(inner if inner in MODULES and not of_the_door else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return {each for each in found if each in MODULES and each != name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def test_a_module_imports_few_others():
    code = [name for name, path in MODULES.items() if path.stat().st_size > TRIVIAL]
    mean = sum(len(IMPORTS[name]) for name in code) / len(code)
    assert mean <= MOST_IMPORTS


def test_the_source_stays_readable_in_a_day():
    assert sum(path.read_text().count("\n") for path in MODULES.values()) <= MOST_LINES


def test_no_two_classes_share_a_name():
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_imports_form_no_cycle():
    order: dict[str, int] = {}

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in order:
            for other in sorted(IMPORTS[name]):
                visit(other, (*path, name))
            order[name] = len(order)

    for name in MODULES:
        visit(name, ())


def test_nothing_inside_imports_the_peft_interface():
    users = [
        name
        for name, others in IMPORTS.items()
        if not name.startswith("softprompt.peft") and any(other.startswith("softprompt.peft") for other in others)
    ]
    assert users == []


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """Run ``softprompt tune`` and return the files it passed, and the chains that drew first values."""
    folder = tmp_path_factory.mktemp("house")
    lines = complaints("train").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("train", lines[:16]), ("validation", lines[16:24])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    files, chains = set(), []

    def watch(frame, event, argument):
        code = frame.f_code
        is_function = code.co_flags & 1  # module and class bodies run at import
        if event == "call" and is_function and code.co_filename.startswith(str(PACKAGE)):
            files.add(code.co_filename)
            if code.co_name == "normal" and code.co_filename.endswith("initialisers.py"):
                chains.append(chain_of(frame))

    words = [
        "--train-data",
        folder / "train.jsonl",
        "--validation-data",
        folder / "validation.jsonl",
    ]
    words += ["--num-epochs", "1", "--output", folder / "prompt", "--quiet"]
    sys.setprofile(watch)
    try:
        assert run(["tune", *map(str, words)]) == 0
    finally:
        sys.setprofile(None)
    return files, chains


def chain_of(frame):
    found = []
    while frame is not None:
        name = os.path.relpath(frame.f_code.co_filename, PACKAGE)
        if not name.startswith("..") and found[-1:] != [name]:
            found.append(name)
        frame = frame.f_back
    return found[::-1]


def test_tune_passes_few_files(passed):
    files, _ = passed
    assert len(files) <= MOST_FILES, sorted(files)


def test_the_way_to_the_first_values_is_short(passed):
    _, chains = passed
    assert chains
    assert all(len(chain) <= LONGEST_CHAIN for chain in chains), chains
