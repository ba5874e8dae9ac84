"""A mistyped folder is not taken for a Hub id without a word, wherever a folder of a prompt or a base is named."""

import io
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from softprompt import AutoPeftModelForCausalLM, PeftConfig, load
from softprompt.artifacts import peft_folder
from softprompt.backbone import load_base
from softprompt.cli.main import run
from softprompt.errors import ArtifactError, SoftPromptError, no_folder
from softprompt.prompts import load_tokenizer

SAID = "no folder runs/tw; did you mean runs/tw0?"
EVERYWHERE = {
    "load": lambda: load("runs/tw"),
    "several": lambda: load({"a": "runs/tw"}),
    "configuration": lambda: PeftConfig.from_pretrained("runs/tw"),
    "auto class": lambda: AutoPeftModelForCausalLM.from_pretrained("runs/tw"),
    "base": lambda: load_base("runs/tw"),
    "recorded base": lambda: AutoPeftModelForCausalLM.from_pretrained("of_typo"),
    "tokenizer": lambda: load_tokenizer("runs/tw"),
}
COMMANDS = [
    ["generate", "runs/tw", "--text", "x"],
    ["classify", "runs/tw", "--text", "x"],
    ["chat", "runs/tw"],
    ["chat", "--base-model", "runs/tw"],
    ["evaluate", "runs/tw", "--data", "x"],
    ["info", "runs/tw"],
    ["similar", "runs/tw", "runs"],
    ["compose", "average", "runs/tw", "runs/tw0", "--output", "o"],
    ["convert", "runs/tw", "o", "--to", "peft"],
    ["sources", "list", "--source-prompt-base", "runs/tw"],
    ["serve", "--base-model", "runs/tw", "--prompts", "runs"],
    ["serve", "--base-model", "demo", "--prompts", "runs/tw"],
]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    Path("runs/tw0").mkdir(parents=True)
    Path("of_typo").mkdir()
    text = '{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "runs/tw"}'
    Path("of_typo/adapter_config.json").write_text(text)


@pytest.mark.parametrize("place", EVERYWHERE)
def test_the_line_in_python(place):
    with pytest.raises(SoftPromptError) as raised:
        EVERYWHERE[place]()
    assert SAID in str(raised.value)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_the_line_of_every_command(capsys, words):
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert SAID in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rnus/tw0", "no folder rnus/tw0; did you mean runs/tw0?"),
        ("runs/xyz", "no folder runs/xyz; runs holds tw0"),
        ("run", "no folder run; did you mean runs?"),
        ("./../xyz/abc", "no folder ./../xyz/abc; check the path"),
        ("runs/m.ggf", "no folder runs/m.ggf; did you mean runs/m.gguf?"),
        ("org/name", ""),
        ("gpt2", ""),
        ("runs/tw0", ""),
    ],
)
def test_what_is_said_of_a_name(name, said):
    Path("runs/m.gguf").write_bytes(b"") if "ggf" in name else None
    assert no_folder(name) == said


def test_a_real_hub_id_still_goes_to_the_hub(monkeypatch):
    asked = []

    def snapshot(repository, **options):
        asked.append(repository)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(peft_folder, "snapshot_download", snapshot)
    for name in ("org/name", "runs/quite-another"):
        with pytest.raises(ArtifactError, match="the Hub cannot be reached, and it is not in the local cache"):
            load(name)
    with pytest.raises(ArtifactError, match="did you mean"):
        load("runs/tw")
    assert asked == ["org/name", "runs/quite-another"]


def test_what_the_hub_cache_holds_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--runs--tw").mkdir(parents=True)
    monkeypatch.setattr(peft_folder, "snapshot_download", lambda *a, **b: str(tmp_path / "fetched"))
    shutil.copytree("of_typo", tmp_path / "fetched")
    with pytest.raises(ArtifactError, match="expected num_virtual_tokens"):
        load("runs/tw")


def test_a_misspelt_demo_is_named():
    with pytest.raises(SoftPromptError, match=r"'dmeo' \(did you mean 'demo'\?\)"):
        load_base("dmeo")
