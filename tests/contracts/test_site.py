"""The site says what there is: every page and public name is on it, its notebooks run, and it loads nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import softprompt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def script(name):
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(part):
    """Return the pages that a part of the navigation names."""
    if isinstance(part, str):
        return [part]
    return [page for each in (part.values() if isinstance(part, dict) else part) for page in leaves(each)]


def test_every_page_is_in_the_navigation_once():
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    there += [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]
    elsewhere = script("site_pages").ELSEWHERE
    named = [page for page in leaves(yaml.safe_load(SITE)["nav"]) if page not in elsewhere.values()]
    assert sorted(named) == sorted(there)


def test_every_public_name_has_its_entry():
    named = re.findall(r"^::: softprompt\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(softprompt.__all__)


def test_a_link_out_of_docs_leads_to_its_page_or_is_text():
    relinked = script("site_pages").relinked
    told = "[a](../bench/README.md#b) [c](../pyproject.toml) [d](training.md#e) ![h](images/growth.png)"
    assert relinked(told, "docs/x.md", "x.md") == "[a](bench.md#b) c [d](training.md#e) ![h](images/growth.png)"
    assert (
        relinked("[a](../docs/results.md) [b](real_tasks.py)", "bench/README.md", "bench.md") == "[a](results.md) b"
    )
    assert relinked("[a](../notebooks/first_prompt.ipynb)", "docs/concepts/x.md", "concepts/x.md") == (
        "[a](../notebooks/first_prompt.md)"
    )


def shown(outputs):
    """Return the texts of a cell's outputs, with what differs from machine to machine left out."""
    texts = ["".join(each.get("text", each.get("data", {}).get("text/plain", ""))) for each in outputs]
    return [re.sub(r"\d+(\.\d+)?|0x\w+| +", "#", text) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_its_cells_print(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    kept = [shown(cell["outputs"]) for cell in code]
    assert sum(map(len, kept)) >= 4
    script("run_notebooks").run(notebook)
    assert [shown(cell["outputs"]) for cell in code] == kept


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="make docs installs what builds the site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=.?(https?:[^\s\">]+)", text)
        assert not loaded, f"{page.name} loads {loaded}"
    shutil.rmtree(tmp_path / "site")
