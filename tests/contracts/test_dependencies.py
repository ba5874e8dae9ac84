"""What is said of dependencies is true: licences as the packages name them, versions that the Makefile tests."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())


def test_the_page_has_the_licences_that_the_packages_name(monkeypatch):
    if metadata.version("transformers") != PINNED["transformers"]:
        pytest.skip("other versions than those of constraints.txt bring other packages along")
    monkeypatch.syspath_prepend(ROOT / "docs")
    listing = import_module("list_licences")
    text = listing.PAGE.read_text(encoding="utf-8")
    assert listing.page(text) == text, "run python docs/list_licences.py"
    for asked in PROJECT["dependencies"]:
        assert f"| {re.split('[>=<[]', asked)[0]} |" in text
    assert "not named" not in text


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tested():
    (line,) = re.findall(r"^test-oldest: OTHERS \?= (.*)", MAKEFILE, re.M)
    tested = dict(re.findall(r"(\w+)==(\S+)", line))
    assert tested.keys() == {"torch", "transformers"}
    for name, version in tested.items():
        (allowed,) = re.findall(rf"^{name}>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.M)
        assert f"{version}.".startswith(f"{allowed}."), f"{name}: {allowed} is allowed, {version} is tested"
