"""docs/formats.md is run, and names every field there is."""

from __future__ import annotations

import dataclasses
import doctest
import re
from pathlib import Path

import pytest

from softprompt.artifacts import Manifest
from softprompt.artifacts.layout import LAYOUTS
from softprompt.prompts import PeftType

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_examples_of_the_page_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 5
    assert result.failed == 0


def test_every_field_of_the_manifest_has_its_row_in_order():
    section = PAGE.read_text().split("## `softprompt.json`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert rows == [item.name for item in dataclasses.fields(Manifest)]


@pytest.mark.parametrize("key", sorted(LAYOUTS[PeftType.PROMPT_TUNING].keys))
def test_every_key_of_peft_is_named(key):
    assert f"`{key}`" in PAGE.read_text()
