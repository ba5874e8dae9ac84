"""README and docs cannot rot: their Python runs with the output they show, their commands run as written."""

from __future__ import annotations

import doctest
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from oracles.hub import LocalHub
from softprompt.cli.main import run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("softprompt ")
]


def run_doctest(text, name, names=None):
    """Run the Python of a text; ``names`` is a namespace that goes on from block to block."""
    parser = doctest.DocTestParser()
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    test = parser.get_doctest(blocks, {}, name, name, 0)
    test.globs = {} if names is None else names
    assert test.examples, f"{name} shows no code"
    report = []
    runner = doctest.DocTestRunner(optionflags=LOOSE)
    runner.run(test, out=report.append, clear_globs=names is None)
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


def test_the_readmes_commands_in_order(tmp_path, monkeypatch):
    """Every softprompt command, in one folder, as a user would type them one after the other; on less data."""
    assert len(COMMANDS) >= 4
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for path in (ROOT / "src/softprompt/bundled/complaints").glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        Path("data", path.name).write_text("".join(lines[::12]), encoding="utf-8")
    for command in COMMANDS:
        softprompt(command, "", monkeypatch)


def test_the_readmes_data(tmp_path):
    """The line before the commands, as typed, finds the data that they read."""
    link = next(line for line in README.splitlines() if line.startswith("ln -sfn"))
    shell(f"cd {tmp_path} && {link}")
    assert (tmp_path / "data" / "train.jsonl").is_file()


def shell(command, given=""):
    """Return what a command of bash writes to stdout."""
    words = ["bash", "-c", command]
    done = subprocess.run(words, env=ENVIRONMENT, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def softprompt(command, given, monkeypatch):
    """Return what a softprompt command writes to stdout and to stderr; in this process, which is quicker."""
    words = shell(f"printf '%s\\0' {command}").split("\0")[1:-1]
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    with redirect_stdout(out), redirect_stderr(err):
        code = run(words)
    assert code == 0, f"{command}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def typed(line, monkeypatch):
    """Return what a terminal shows after a line of commands, piped into each other and perhaps into a file."""
    found, said = "", ""
    line, _, path = line.partition(" > ")
    for command in line.split(" | "):
        if command.startswith("softprompt "):
            found, noted = softprompt(command, found, monkeypatch)
            said += noted
        else:
            found = shell(f"{command} > {path}" if path else command, found)
    if path and "softprompt " in line:
        Path(path).write_text(found, encoding="utf-8")
        found = ""
    return said + found


@pytest.fixture
def started():
    """Start commands in the background; returns what each wrote to stderr up to a line with some words."""
    running = []

    def start(command, words):
        process = subprocess.Popen(shlex.split(command), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        running.append(process)
        said = ""
        while words not in said:
            line = process.stderr.readline()
            assert line, f"{command}\n{said}"
            said += line
        return said

    yield start
    for process in running:
        process.terminate()
        process.communicate(timeout=60)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def tutorial_folder(tmp_path_factory):
    """A folder that all tutorials work in, and what was typed there already: they share training runs."""
    return tmp_path_factory.mktemp("tutorials"), {}


def worked_through():
    """Return the pages of the site whose commands and Python are run in order."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if page.parent.name in ("tutorials", "how-to", "migrate") or page.stem == "index":
            if re.search(r"```(console|python)\n", page.read_text(encoding="utf-8")):
                yield pytest.param(page, id=page.relative_to(ROOT / "docs").as_posix())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT's
@pytest.mark.parametrize("page", list(worked_through()))
def test_a_page_shows_what_happens(page, tutorial_folder, started, monkeypatch):
    folder, before = tutorial_folder
    monkeypatch.chdir(folder)
    if page.stem == "quantised":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: run make test-extra")
    if page.stem == "hub":
        LocalHub(folder / "hub").install(monkeypatch)
    text = page.read_text(encoding="utf-8").replace(":8000", f":{(port := free_port())}")
    text = text.replace("--port 8000", f"--port {port}")
    names = {}
    for number, (kind, block) in enumerate(re.findall(r"```(console|python)\n(.*?)```", text, re.S), start=1):
        if kind == "python":
            run_doctest(f"```python\n{block}```", f"{page.name}, block {number}", names)
            continue
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.M)[1:]:
            line, _, want = part.partition("\n")
            if line.endswith(" &"):
                before[line] = started(line.removesuffix(" &"), "listening")
            if line not in before or line.startswith("softprompt runs"):  # pages add to them
                before[line] = typed(line, monkeypatch)
            got = before[line]
            assert doctest.OutputChecker().check_output(want, got, LOOSE), f"{line}\n{want}\nbut got\n{got}"


def test_the_readme_is_short_and_starts_with_what_it_is():
    lines = README.splitlines()
    assert len(lines) < 150
    first_code = next(i for i, line in enumerate(lines) if line.startswith("```python"))
    install = next(i for i, line in enumerate(lines) if "pip install" in line or "make demo" in line)
    assert first_code < 15 and install < 50


def test_every_page_is_reached_from_the_first_by_links_in_the_text():
    docs = ROOT / "docs"
    left, reached = [docs / "index.md"], set()
    while left:
        page = left.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
            left += [(page.parent / each).resolve() for each in targets]
    notebooks = set((docs / "notebooks").glob("*.md"))  # made of the notebooks, which are linked themselves
    assert {each.relative_to(docs).as_posix() for each in set(docs.rglob("*.md")) - reached - notebooks} == set()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    starts = (ROOT, ROOT / "src" / "softprompt", ROOT / "src" / "softprompt" / page.stem)
    for name in re.findall(r"`([\w/.]+/\w+\.py)`", page.read_text(encoding="utf-8")):
        assert any((start / name).exists() for start in starts), f"{page.name}: {name}"
