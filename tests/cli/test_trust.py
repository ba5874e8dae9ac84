"""``--trust-remote-code``: code beside a base runs where a user says so, and nowhere else."""

from __future__ import annotations

import json

import pytest

from oracles.families import causal
from oracles.foreign_code import base_with_code
from oracles.stored import drawn
from oracles.stored import folder as write_prompt
from oracles.tokenizers import byte_bpe
from softprompt.backbone import load_base
from softprompt.cli.main import COMMANDS, Commands, run
from softprompt.errors import ArtifactError
from softprompt.inspection import inspect_prompt

LOADING = {
    "tune",
    "sweep",
    "distill",
    "evaluate",
    "compare",
    "generate",
    "classify",
    "chat",
    "serve",
    "convert",
    "info",
}


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    return base_with_code(tmp_path, monkeypatch)


def evaluated(folder, tmp_path, *more):
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "a", "output": "b"}\n')
    return run(["evaluate", "--base-model", str(folder), "--data", str(data), "--template", "{{input}}", *more])


def test_code_of_a_base_runs_by_the_option_alone_and_for_one_command(with_code, tmp_path, capsys):
    folder, mark = with_code
    assert evaluated(folder, tmp_path) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not mark.exists()
    evaluated(folder, tmp_path, "--trust-remote-code")
    assert "would run code" not in capsys.readouterr().err
    assert mark.exists()
    assert evaluated(folder, tmp_path) == 2
    with pytest.raises(Exception, match="would run code"):
        load_base(folder)


def test_every_command_that_loads_a_base_has_the_option():
    commands = {name: Commands().get_command(None, name) for name in COMMANDS}
    flagged = {name for name, command in commands.items() if "--trust-remote-code" in flags(command)}
    based = {name for name, command in commands.items() if "--base-model" in flags(command)}
    assert flagged == LOADING | {"info", "inspect"} == based - {"push"}


def flags(command):
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("manifest", [True, False])
def test_looking_at_a_prompt_does_not_load_the_base_that_it_brings_along(tmp_path, manifest):
    write_prompt(tmp_path / "sent", drawn(0), manifest=manifest)
    causal("llama").save_pretrained(tmp_path / "sent" / "base")
    byte_bpe().save_pretrained(tmp_path / "sent" / "base")
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("softprompt.json", "base_model")):
        file = tmp_path / "sent" / name
        if file.exists():
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: str(tmp_path / "sent" / "base")}))
    with pytest.raises(ArtifactError, match="inside its own folder"):
        inspect_prompt(tmp_path / "sent")


def test_a_base_that_is_a_link_to_itself_is_one_line(tmp_path, monkeypatch, capsys):
    write_prompt(tmp_path / "sent", drawn(0), manifest=False)
    (tmp_path / "sent" / "base").symlink_to("base")
    file = tmp_path / "sent" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "./base"}))
    monkeypatch.chdir(tmp_path / "sent")
    assert run(["classify", ".", "--text", "x"]) == 2
    assert "Error: base model: no folder ./base; check the path" in capsys.readouterr().err
