"""Imports point one way, and what must not be in the library is not there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "softprompt"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = [
    {"__main__"},
    {"as_peft", "cli", "integrations", "lm_eval", "peft"},
    {"batches", "server"},
    {"distillation"},
    {"inspection", "training"},
    {"evaluation"},
    {"inference"},
    {"generation", "display"},
    {"engine", "artifacts"},
    {"backbone", "data"},
    {"prompts", "cluster"},
    {"world"},
    {"fields", "progress", "untrusted"},
    {"errors", "bundled"},
]
"""High to low; a folder imports lower levels only, so siblings never import each other."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FORBIDDEN = {"utils", "helpers", "common", "core", "misc", "tools", "manager", "handler"}


def layer_of(path):
    """Return the folder (or top-level module) a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def running_nodes(tree):
    """Yield every node but those under ``if TYPE_CHECKING``."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if is_type_checking(node):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def imported_layers(path):
    """Yield (line, layer) of every import of softprompt at run time."""
    for node in running_nodes(tree_of(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module]
            if node.module == "softprompt":
                names = [f"softprompt.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "softprompt":
                yield node.lineno, parts[1] if len(parts) > 1 else "softprompt"


def breaches(path):
    """Return the imports of a file that point sideways or up."""
    layer = layer_of(path)
    if layer == "__init__":
        return []
    allowed = LEVEL["prompts"] if layer == "tuners" else LEVEL[layer] + 1
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {layer} imports {target}"
        for line, target in imported_layers(path)
        if target != layer and LEVEL.get(target, -1) < allowed
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert breaches(path) == []


def test_every_folder_has_a_level():
    layers = {layer_of(path) for path in FILES} - {"__init__", "tuners"}
    assert layers <= set(LEVEL)


def test_a_breach_is_seen(tmp_path):
    """The checker itself: sideways, upwards, hidden in a function; not under TYPE_CHECKING."""
    path = PACKAGE / "engine" / "imaginary.py"
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from softprompt.cli import main\n"
        "from softprompt.errors import nearest\n"
        "from softprompt import artifacts\n"
        "def f():\n    import softprompt.peft.model\n"
    )
    found = {line for line, _ in imported_lines(source)}
    assert found == {4, 5, 7}
    assert LEVEL["artifacts"] == LEVEL[layer_of(path)]
    assert LEVEL["peft"] < LEVEL["engine"] < LEVEL["errors"]


def imported_lines(source):
    class Text:
        def read_text(self, encoding):
            return source

    return list(imported_layers(Text()))


def test_the_second_import_path_is_one_table():
    (path,) = [path for path in FILES if layer_of(path) == "tuners"]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    defined = (ast.FunctionDef, ast.ClassDef)
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, defined)]


def test_no_empty_names():
    names = {part.removesuffix(".py").strip("_") for path in FILES for part in path.relative_to(PACKAGE).parts}
    assert not names & FORBIDDEN
    # A file may be about the base model; a folder of that name would be about nothing.
    assert "base" not in {part for path in FILES for part in path.relative_to(PACKAGE).parts[:-1]}
    assert not {name for name in names if name.endswith(("_utils", "_helpers", "_manager", "_handler"))}


def calls(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_a_library_does_not_do(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert not [word for word in ("TODO", "FIXME", "XXX") if word in text]
    for node, name in calls(path):
        where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("trust_remote_code", "False") in ("False", "trust_remote_code"), where  # the user's own
        assert name not in ("eval", "exec", "os.system"), where
        assert not name.startswith(("pickle.", "dill.", "joblib.", "shelve.")), where
        if name in ("torch.load", "load") and "map_location" in keywords:
            assert keywords.get("weights_only") == "True", where
        assert name != "torch.load" or keywords.get("weights_only") == "True", where
        if name == "print":
            assert "noqa: T201" in lines[node.lineno - 1], where


def test_no_workplace_is_named():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "/" + "work/" not in text, path
