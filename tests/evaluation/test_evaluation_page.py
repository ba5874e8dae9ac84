"""docs/evaluation.md: its Python runs and prints what it shows, its commands run as written."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from softprompt.cli.main import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "src/softprompt/bundled/complaints")
    test = doctest.DocTestParser().get_doctest(
        "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), {}, "evaluation.md", "docs/evaluation.md", 0
    )
    assert len(test.examples) > 10
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    commands = [line for line in PAGE.splitlines() if line.startswith("softprompt ")]
    assert len(commands) == 4
    for command in commands:
        limit = [] if " runs" in command[:16] else ["--limit", "20"]
        assert run([*shlex.split(command)[1:], *limit, "--quiet"]) == 0, capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 300
    assert len((tmp_path / "compared.jsonl").read_text().splitlines()) == 60
