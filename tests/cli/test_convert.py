"""``softprompt convert``: thin, one object with --json, one line for an error."""

from __future__ import annotations

import json

import pytest
import torch

from oracles.tiny_bases import P, write_base, write_prompt
from softprompt.artifacts import load_adapter
from softprompt.cli.main import run


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    base = write_base(root / "base", "llama")
    return write_prompt(root / "complaints", base)


def test_there_and_back(tmp_path, capsys, prompt):
    out, back = str(tmp_path / "p.npy"), str(tmp_path / "back")
    assert run(["convert", prompt, out, "--to", "npy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "source": prompt,
        "source_format": "softprompt",
        "output": out,
        "output_format": "npy",
        "base_model": None,
        "lost": [
            *("template", "base_model", "max_source_length", "max_target_length"),
            *("base_fingerprint", "dtype"),
        ],
    }
    base = load_adapter(prompt).manifest.base_model
    assert run(["convert", out, back, "--to", "peft", "--base-model", base, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "output format" in shown.out.replace("_", " ")
    assert shown.err == ""
    assert torch.equal(load_adapter(back).values, load_adapter(prompt).values)


def test_several_prompts_as_vocabulary(tmp_path, capsys, prompt):
    arguments = ["--to", "extended-vocab", "--add", f"other={prompt}"]
    assert run(["convert", prompt, str(tmp_path / "out"), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["prompts"]) == ["complaints", "other"]
    assert len(found["prompts"]["other"]["token_ids"]) == P
    assert run(["convert", prompt, str(tmp_path / "text"), *arguments, "--name", "mine"]) == 0
    assert "ids of mine" in capsys.readouterr().out


def test_a_request_for_vllm(tmp_path, prompt):
    out = tmp_path / "r.json"
    assert run(["convert", prompt, str(out), "--to", "vllm", "--field", "input=it is late"]) == 0
    first = json.loads(out.read_text())
    command = ["convert", prompt, str(out), "--to", "vllm", "--text", "it is late", "--overwrite"]
    assert run(command) == 0
    assert json.loads(out.read_text()) == first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--to", "cakit"], "did you mean 'caikit'"),
        ([], "--to"),
        (["--to", "npy"], ".npy"),
        (["--to", "vllm"], "--text"),
        (["--to", "peft", "--add", "x"], "--add takes NAME=PROMPT"),
        (["--to", "peft", "--add", "x=y", "--add", "x=z"], "twice"),
        (["--to", "tgis", "--task-name", "1"], "multitask"),
        (["--to", "extended-vocab", "--add-task", "x=1"], "'x', which is none of"),
        (["--to", "peft", "--template", "no field"], "placeholder"),
        (["--to", "npy", "--template", "{{input}}"], "no field for a template"),
        (["--to", "peft", "--template", "{{input}}"], "has a template of its own"),
        (["--to", "vllm", "--text", "a", "--field", "input=b"], "'input' is given twice"),
        (["--to", "vllm", "--field", "input=a", "--field", "input=b"], "'input' is given twice"),
        (["--to", "caikit", "--base-model", "demo"], "made for"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, prompt, arguments, expected):
    assert run(["convert", prompt, str(tmp_path / "out"), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert expected in shown.err
    assert not (tmp_path / "out").exists()


def test_the_way_around_the_check(tmp_path, prompt):
    other = write_base(tmp_path / "other", "llama", seed=9)
    command = ["convert", prompt, str(tmp_path / "out"), "--to", "caikit", "--base-model", other]
    assert run(command) == 2
    assert run([*command, "--ignore-fingerprint"]) == 0
