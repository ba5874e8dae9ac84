"""``softprompt chat``: piped, and in a terminal of its own."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from oracles.serving import write_prompt
from softprompt.backbone import load_base
from softprompt.cli import options
from softprompt.cli.main import run

FEW = ["--max-new-tokens", "3", "--min-new-tokens", "3"]


@pytest.fixture(scope="module")
def base():
    return load_base("demo")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, base):
    monkeypatch.setattr("softprompt.inference.loading.load_base", lambda *_, **__: base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("prompts")
    write_prompt(root / "a", base, seed=1, task="generation", labels=None)
    write_prompt(root / "b", base, seed=2)
    return root


@pytest.fixture
def chat(capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)

    def call(turns, *words, code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
        assert run(["chat", *words, *FEW]) == code
        return capsys.readouterr()

    return call


def test_each_line_is_a_turn_and_the_history_counts(chat):
    both = chat("Hello\nAnd you?\n", "a").out
    first, second = (chat(f"{turn}\n", "a").out for turn in ("Hello", "And you?"))
    assert both.startswith(first)
    assert both != first + second
    assert chat("Hello\n/reset\nAnd you?\n", "a").out == first + second
    assert chat("Hello\n\n  \n/quit\nAnd you?\n", "a").out == first


def test_the_base_answers_alone_and_beside_the_prompts(chat):
    base, a, b = (chat("Hello\n", *words).out for words in (["--base-model", "demo"], ["a"], ["b"]))
    assert chat("Hello\n", "a", "b", "--compare").out == f"base> {base}a> {a}b> {b}"
    assert chat("/prompt base b\nHello\n", "a", "b").out == f"base> {base}b> {b}"
    switched = chat("Hello\n/reset\n/prompt b\nHello\n/prompt\n", "a", "b")
    assert switched.out == a + b
    assert "b of base, a, b" in switched.err


def test_the_system_message_and_sampling(chat):
    plain = chat("Hello\n", "a").out
    given = chat("Hello\n", "a", "--system", "Be rude.").out
    assert given != plain
    assert chat("/system Be rude.\nHello\n", "a").out == given
    assert chat("/system\nHello\n", "a", "--system", "Be rude.").out == plain
    warm = [chat("Hello\n", "a", "--temperature", "5", "--seed", "3").out for _ in range(2)]
    assert warm[0] == warm[1] != plain


def test_what_is_done_is_said_once(chat):
    err = chat("Hello\nHello\n", "b").err
    assert err.count("has no chat template; turns are written as plain lines") == 1
    assert err.count("b is a classifier; softprompt classify gives its labels") == 1
    assert "note: cut at 3 tokens; --max-new-tokens" in err
    assert chat("Hello\n", "b", "--quiet").err == ""


@pytest.mark.slow
def test_a_chat_that_exceeds_the_context_goes_on_and_says_so(chat):
    found = chat("".join(f"{n} {'word ' * 60}\n" for n in range(12)), "a")
    assert found.out.count("\n") >= 12
    assert "note: the chat exceeds the model's context; a answers without the oldest 1 turns" in found.err
    found = chat(f"Hello\n{'word ' * 900}\nHello\n", "a", code=2)
    assert found.err.count("Error: ") == 1
    assert found.out == chat("Hello\nHello\n", "a").out


@pytest.mark.parametrize(
    ("words", "turns", "said"),
    [
        ([], "x\n", "nobody to chat with: name the folder of a prompt, or a base model with --base-model"),
        (["--base-model", "demo", "--compare"], "x\n", "--compare needs a prompt to compare the base with"),
        (["a", "--temperature", "0", "--top-p", "0.5"], "x\n", "--top-p would be ignored at --temperature 0"),
        (["a", "a"], "x\n", "a prompt is named twice"),
        (["a"], "/sistem x\n", "no command /sistem (did you mean '/system'?)"),
        (["a"], "/prompt c\n", "no prompt 'c'"),
    ],
)
def test_mistakes(chat, words, turns, said):
    assert said in chat(turns, *words, code=2).err


def test_a_turn_may_begin_with_a_slash(chat):
    assert chat("//help\n", "a").out == chat("/help\n//help\n", "a").out != ""


def test_control_characters_are_spelt_out_on_a_terminal_alone(capsys, monkeypatch):
    text = "a\tb\n\x1b[2J\x9b\x7f\r\u202ec é 汉"
    options.show({}, text, as_json=False)
    assert "\x9b" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    options.show({}, text, as_json=False)
    assert capsys.readouterr().out == "a\tb\n\\u001b[2J\\u009b\\u007f\\u000d\\u202ec é 汉\n"


class Session:
    """``softprompt chat`` in a terminal of its own."""

    def __init__(self, folder, *words):
        self.end, theirs = pty.openpty()
        command = [sys.executable, "-m", "softprompt", "chat", *words]
        environment = {**os.environ, "TERM": "dumb"}
        ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **ends, start_new_session=True)
        os.close(theirs)
        self.seen = ""

    def until(self, text, seconds=300):
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.end], [], [], 0.2)[0]:
                self.seen += os.read(self.end, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.end, text.encode())

    def interrupt(self):
        """Send what Ctrl-C sends, once input() waits: Python loses a signal that comes just before."""
        time.sleep(0.5)
        self.process.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(folder):
    session = Session(folder, "a", "--max-new-tokens", "450", "--min-new-tokens", "450")
    try:
        opening = session.until("you> ")
        assert "a of base, a on demo; /help lists commands, Ctrl-D ends" in opening
        session.type("Hello\n")
        session.until("a> ")
        session.interrupt()
        session.until("(stopped)")
        session.until("you> ")
        session.interrupt()
        session.until("(Ctrl-D or /quit ends)")
        session.until("you> ")
        session.type("/help\n")
        assert "/system TEXT" in session.until("you> ")
        session.type("\x04")
        assert session.process.wait(30) == 0
    finally:
        session.process.kill()
        session.process.wait()
        os.close(session.end)


def test_a_prompt_that_was_not_trained_on_chats_is_noted(chat, base, tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    own = {"task": "generation", "labels": None, "template": "{{input}}", "chat": True}
    write_prompt(tmp_path / "talk", base, **own)
    assert "note: a records no training on chats, its template is 'Text : {{input}}" in chat("Hello\n", "a").err
    assert "no training on chats" not in chat("Hello\n", str(tmp_path / "talk")).err
