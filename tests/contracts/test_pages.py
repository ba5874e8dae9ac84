"""README and docs cannot rot: their Python runs with the output they show, their commands run as written."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("softprompt ")
]


def run_doctest(text, name):
    parser = doctest.DocTestParser()
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    test = parser.get_doctest(blocks, {}, name, name, 0)
    assert test.examples, f"{name} shows no code"
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_the_readmes_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_doctest(README, "README.md")


@pytest.mark.parametrize("page", ["engine", "composition", "serving", "training"])
def test_the_python_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_doctest((ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), f"docs/{page}.md")


def test_every_measurement_is_on_its_page():
    page = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in (ROOT / "bench").glob("*.py"))
    assert [name for name in scripts if f"`{name}`" not in page] == []


def test_the_readmes_commands_in_order(tmp_path):
    """Every softprompt command, in one folder, as a user would type them one after the other."""
    assert len(COMMANDS) >= 4
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (tmp_path / "data").symlink_to(ROOT / "src/softprompt/bundled/complaints")
    for command in COMMANDS:
        words = shlex.split(command)
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_readme_is_short_and_starts_with_what_it_is():
    lines = README.splitlines()
    assert len(lines) < 150
    first_code = next(i for i, line in enumerate(lines) if line.startswith("```python"))
    install = next(i for i, line in enumerate(lines) if "pip install" in line or "make demo" in line)
    assert first_code < 15 and install < 50


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    starts = (ROOT, ROOT / "src" / "softprompt", ROOT / "src" / "softprompt" / page.stem)
    for name in re.findall(r"`([\w/.]+/\w+\.py)`", page.read_text(encoding="utf-8")):
        assert any((start / name).exists() for start in starts), f"{page.name}: {name}"
