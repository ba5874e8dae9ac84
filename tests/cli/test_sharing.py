"""push and pull, the groups of the help, and completion in a shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oracles.hub import LocalHub
from softprompt.artifacts import save_adapter
from softprompt.cli.main import COMMANDS, GROUPS, run
from softprompt.server import app


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return LocalHub(tmp_path / "hub").install(monkeypatch)


@pytest.fixture
def prompt(tmp_path):
    import torch

    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/tiny"}
    config |= {"num_virtual_tokens": 2, "token_dim": 4, "num_transformer_submodules": 1}
    save_adapter(tmp_path / "prompt", config, {"prompt_embeddings": torch.ones(2, 4)}, overwrite=False)
    return str(tmp_path / "prompt")


def test_push_and_pull(hub, prompt, tmp_path, capsys, monkeypatch):
    options = ["--private", "--license", "mit", "--dataset", "a/b", "--dataset", "c/d", "--commit-message", "first"]
    assert run(["push", prompt, "me/prompt", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"repository": "me/prompt", "commit": "https://hub/me/prompt/commit/1"}
    assert hub.calls["create"]["private"] is True
    assert hub.calls["upload"]["commit_message"] == "first"
    assert "- c/d" in (hub.root / "me" / "prompt" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "hub")
    assert run(["pull", "me/prompt"]) == 0
    assert capsys.readouterr().out == "me/prompt is in prompt\n"
    assert Path("prompt/adapter_config.json").is_file()
    assert run(["pull", "me/prompt"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_collection_is_served_like_a_folder(hub, prompt, monkeypatch):
    slug, seen = "me/prompts-64f9a55bb3115b4f513ec026", []
    shutil.copytree(prompt, hub.root / "me" / "writer")
    hub.collections[slug] = [("me/writer", "model")]
    monkeypatch.setattr(app, "_serve", lambda settings, root: seen.append(root.names()))
    assert run(["serve", "--base-model", "demo", "--prompts", slug, "--quiet"]) == 0
    assert seen == [["writer"]]


def test_a_hub_out_of_reach_is_one_line(prompt, capsys, tmp_path):
    assert run(["push", prompt, "me/prompt"]) == 2
    assert "could not upload to me/prompt" in capsys.readouterr().err
    assert run(["pull", "me/prompt", str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_the_help_lists_commands_in_groups(capsys):
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.rstrip(":") for line in lines if line.endswith(":") and line.rstrip(":") in GROUPS]
    assert titles == list(GROUPS)
    assert [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in COMMANDS] == [
        *COMMANDS
    ]
    for title in ("Train", "Evaluate", "Use", "Share", "Inspect"):
        assert GROUPS[title]


def completions(words, word, shell="bash"):
    """Return what a shell is offered for a word of a command line, given by its number, in fish by itself."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(word), "_SOFTPROMPT_COMPLETE": f"{shell}_complete"}
    program = [sys.executable, "-c", "from softprompt.cli.main import main; main()"]
    done = subprocess.run(program, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "number", "offered"),
    [
        ("softprompt pu", 1, ["plain,push", "plain,pull"]),
        ("softprompt tune --optimizer ada", 3, ["plain,adamw", "plain,adafactor"]),
        ("softprompt tune --train-data ro", 3, ["file,ro"]),
        ("softprompt serve --prompts ru", 3, ["dir,ru"]),
        ("softprompt info ru", 2, ["dir,ru"]),
        ("softprompt compose av", 2, ["plain,average"]),
    ],
)
def test_what_a_shell_is_offered(words, number, offered):
    assert completions(words, number) == offered


def test_a_command_that_does_not_exist_breaks_no_completion():
    assert "plain,tune" in completions("softprompt nothing ", 2)


@pytest.mark.parametrize(("shell", "word"), [("bash", 1), ("zsh", 1), ("fish", "pus")])
def test_the_script_of_a_shell(shell, word, tmp_path, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_SOFTPROMPT_COMPLETE={shell}_complete" in script, "how it asks"
    assert completions("softprompt pus", word, shell)[0].startswith("plain"), "what it is answered"
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(script, encoding="utf-8")
        done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_bash_completes_with_the_script(tmp_path, capsys):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    assert run(["completion", "bash"]) == 0
    program = tmp_path / "softprompt"
    program.write_text(f"#!{sys.executable}\nfrom softprompt.cli.main import main\nmain()\n")
    program.chmod(0o755)
    script = f"""{capsys.readouterr().out}
COMP_WORDS=(softprompt compl); COMP_CWORD=1
_softprompt_completion softprompt compl softprompt
echo "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["completion"]
