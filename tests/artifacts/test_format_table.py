"""Which format a path is, and what a path gets that is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softprompt.artifacts import detect, format_named, save_adapter
from softprompt.artifacts.formats import FORMATS
from softprompt.cli.convert import command
from softprompt.errors import ArtifactError, ConfigError

ROOT = Path(__file__).parents[2]


def test_names_are_told_apart():
    names = [each.name for each in FORMATS]
    assert len(set(names)) == len(names)
    assert [format_named(name).name for name in names] == names


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"no format 'cakit' .did you mean 'caikit'.*extended"):
        format_named("cakit")


def test_the_option_and_the_page_list_the_table():
    names = [each.name for each in FORMATS]
    (option,) = [each for each in command.params if each.name == "to"]
    assert re.split(r", | or ", option.help.rstrip(".")) == names
    page = (ROOT / "docs/formats.md").read_text().split("## Other formats")[1]
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.M)[: len(names)] == names


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["adapter_config.json", "adapter_model.bin"], "peft"),
        (["config.yml", "decoder.pt"], "caikit"),
        (["encoder.pt"], "tgis"),
        (["decoder.pt", "encoder.pt"], "tgis"),
        (["config.json", "softprompt_prompts.json"], "extended-vocab"),
    ],
)
def test_folders_are_recognised_by_their_files(tmp_path, files, name):
    for file in files:
        (tmp_path / file).write_text("{}")
    assert detect(tmp_path).name == name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("x.npy", "npy"),
        ("x.safetensors", "tensor"),
        ("x.pt", "tensor"),
        ("x.bin", "tensor"),
        ("x.json", "vllm"),
    ],
)
def test_files_are_recognised_by_their_names(tmp_path, file, name):
    (tmp_path / file).write_text("")
    assert detect(tmp_path / file).name == name


def test_our_folder_is_told_from_pefts(tmp_path, config, tensors, manifest):
    save_adapter(tmp_path / "ours", config, tensors, manifest, overwrite=False)
    save_adapter(tmp_path / "theirs", config, tensors, overwrite=False)
    extended = {**config, "peft_type": "EXTENDED_PROMPT_TUNING", "placement": "suffix"}
    save_adapter(tmp_path / "extended", extended, tensors, overwrite=False)
    found = [detect(tmp_path / name).name for name in ("ours", "theirs", "extended")]
    assert found == ["softprompt", "peft", "softprompt"]


def test_an_unknown_layout_lists_all_that_were_tried(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError) as caught:
        detect(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for each in FORMATS:
        assert f"{each.name}: " in message
    for missing in ("no adapter_config.json", "no config.yml", "no encoder.pt or decoder.pt"):
        assert missing in message
