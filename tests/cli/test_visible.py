"""What a terminal would obey is spelt out in all that is said, whatever string it came in."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

import softprompt
from oracles.stored import drawn, folder
from softprompt.cli.main import run
from softprompt.cli.options import start_logging
from softprompt.errors import ConfigError, SoftPromptError, line, visible
from softprompt.progress import phase

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202egnp\u2069\x9b31m\x7f"
OBEYED = set(ESCAPES) - set("]0;owned[2Jgnp31m")


def safe(text):
    return not OBEYED & {*text}


def test_an_error_is_one_short_visible_line():
    message = str(ConfigError(f"expected a name, got {ESCAPES}\nError: forged \ud800", "x" * 3_000_000, "do this"))
    assert safe(message)
    assert "\n" not in message
    assert len(message) <= 1000
    assert message.startswith("expected a name")
    assert message.endswith("do this")
    message.encode()


def test_what_is_harmless_is_said_as_it_is():
    text = "é\t日本語 😀 عربي 'a  b'"
    assert line(text) == visible(text) == str(SoftPromptError(text)) == text


@pytest.mark.parametrize("words", [["info"], ["info", "--json"]])
def test_a_prompt_cannot_write_escapes(tmp_path, monkeypatch, words):
    path = folder(tmp_path / ESCAPES.replace("/", ""), drawn(0), template=f"{ESCAPES}{{{{input}}}}")
    record = json.loads((path / "softprompt.json").read_text())
    (path / "softprompt.json").write_text(json.dumps(record | {"settings": {ESCAPES: ESCAPES}, "dtype": ESCAPES}))
    out, err = terminal(), terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert run([*words, str(path), "--without-base"]) == 0
    assert "u001b" in out.getvalue()
    assert run(["info", str(path) + "missing"]) == 2
    assert "u001b" in err.getvalue()
    assert safe(out.getvalue() + err.getvalue())


def test_log_lines_of_a_run_from_python(tmp_path, caplog):
    """Whoever sets up logging himself has no handler of ours."""
    rows = [f'message {i};"{"good" if i % 2 else ESCAPES}";"x"' for i in range(8)]
    data = tmp_path / f"{ESCAPES}.csv"
    data.write_text("\n".join([f'input;output;"{ESCAPES}"', *rows]))
    with caplog.at_level(logging.INFO, logger="softprompt"):
        softprompt.tune("demo", data, dry_run=True, tuning_config={"num_virtual_tokens": 2})
    said = [record.getMessage() for record in caplog.records]
    assert sum("u001b" in each for each in said) >= 3  # the file, the column left out, a label
    assert all(map(safe, said))


def test_names_in_options_and_usage_errors(capsys):
    assert run([ESCAPES]) == 2
    assert run(["info", f"--{ESCAPES}"]) == 2
    assert run(["info", ESCAPES]) == 2
    said = capsys.readouterr().err
    assert said.count("Error:") == 3
    assert safe(said)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_log_lines_and_status_lines(monkeypatch, is_terminal):
    err = terminal(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", err)
    start_logging(quiet=False)
    logging.getLogger("softprompt.any").warning("the prompt %s\nforged: %s", ESCAPES, "y" * 10_000)
    with phase("loading", f"loading {ESCAPES}"):
        pass
    first = err.getvalue().splitlines()[0]
    assert first.startswith("warning: the prompt \\u001b")
    assert "forged" in first
    assert len(first) < 1100
    shown = err.getvalue().replace("\x1b[A", "")  # tqdm's own
    assert safe(shown)


def terminal(*, is_terminal=True):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    return stream
