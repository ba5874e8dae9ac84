"""docs/methods.md: its Python runs, its files exist, its names are public."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import softprompt

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_its_python_runs():
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
    test = doctest.DocTestParser().get_doctest(blocks, {}, "methods", "methods", 0)
    report = []
    runner = doctest.DocTestRunner()
    runner.run(test, out=report.append)
    assert test.examples
    assert not runner.failures, "".join(report)


def test_its_files_and_names_exist():
    files = set(re.findall(r"`(prompts/methods/\w+\.py)`", PAGE))
    assert len(files) > 4
    assert all((ROOT / "src" / "softprompt" / file).is_file() for file in files)
    names = set(re.findall(r"`(\w+Config)`", PAGE))
    assert names <= set(softprompt.__all__)
