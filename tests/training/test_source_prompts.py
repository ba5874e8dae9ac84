"""Source prompts: found, described, checked."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from softprompt.backbone import Fingerprint, load_base
from softprompt.errors import ConfigError
from softprompt.training import TuneSettings, list_sources, source_folder, tune
from softprompt.training.examples import read_data
from softprompt.training.preparation import prepare, teacher_prompt
from softprompt.training.source_prompts import find_source


def tensors(tasks=2, length=3, rank=1, width=16):
    return {
        "prompt_embeddings": torch.randn(length, width),
        "prefix_task_cols": torch.randn(tasks, length, rank),
        "prefix_task_rows": torch.randn(tasks, rank, width),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bases):
    """A named source of ours, PEFT's, caikit's bare files, a plain prompt, and a damaged one."""
    root = tmp_path_factory.mktemp("sources")
    rows = [{"input": "it was good", "output": w} for w in ("yes", "no") * 3]
    tune(
        bases / "llama",
        {"film": rows, "news": rows},
        {"film": rows, "news": rows},
        output=root / "team" / "ours",
        tuning_type="MULTITASK_PROMPT_TUNING",
        distillation_weight=0,
        num_epochs=1,
        tuning_config={"num_virtual_tokens": 3},
    )
    peft = root / "peft"
    peft.mkdir()
    save_file(tensors(tasks=4, rank=2), peft / "adapter_model.safetensors")
    config = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_transformer_submodules": 1,
        "token_dim": 16,
        "num_tasks": 4,
        "num_ranks": 2,
        "base_model_name_or_path": "somewhere",
    }
    (peft / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors(), root / "caikit.pt")
    save_file(tensors(width=8), root / "narrow.safetensors")
    torch.save(torch.randn(3, 16), root / "plain.pt")
    (root / "damaged.safetensors").write_bytes(b"nothing")
    (root / "notes.txt").write_text("no source")
    return root


def test_every_kind_of_source_is_found_and_described(folder, bases):
    found = {source.name: source for source in list_sources(folder)}
    assert sorted(found) == sorted(
        ["caikit.pt", "damaged.safetensors", "narrow.safetensors", "peft", "plain.pt", "team/ours"]
    )
    ours = found["team/ours"]
    assert (ours.tasks, ours.virtual_tokens, ours.ranks, ours.width) == (("film", "news"), 3, 1, 16)
    assert ours.base_model == str(bases / "llama")
    assert "film accuracy" in ours.metrics["validation"]
    assert (found["peft"].tasks, found["peft"].ranks) == (("0", "1", "2", "3"), 2)
    assert found["peft"].base_model == "somewhere"
    assert (found["caikit.pt"].tasks, found["caikit.pt"].base_model) == (("0", "1"), None)
    assert (found["plain.pt"].tasks, found["plain.pt"].ranks) == ((), 0)
    assert "damaged" in found["damaged.safetensors"].problem


def test_a_source_starts_a_multitask_prompt_alone(folder, llama, rows):
    given = {"prompt_tuning_init_method": "AVERAGE_SOURCE", "prompt_tuning_init_source_model": "peft"}
    with pytest.raises(
        ConfigError, match=r"source_model would be ignored with .*; set tuning_type MULTITASK_PROMPT_"
    ):
        tune(llama, rows, source_prompt_base=str(folder), tuning_config=given, max_steps=1)


def test_the_teachers_of_a_prompt_from_a_source_start_without_it(folder, llama, rows):
    """They are plain prompts, each of one task, of which a source has none."""
    source = {"prompt_tuning_init_method": "AVERAGE_SOURCE", "prompt_tuning_init_source_model": "peft"}
    teachers = []
    for own in (source, {}):
        options = {"method": "multitask", "tuning_config": {"num_virtual_tokens": 3, "num_ranks": 2, **own}}
        settings = TuneSettings.from_dict(options | ({"source_prompt_base": str(folder)} if own else {}))
        prepared = prepare(llama, read_data({"a": rows, "b": rows}, None, settings), settings)
        teachers.append(teacher_prompt(prepared, 1).materialize())
    assert torch.equal(*teachers)


def test_hidden_files_are_no_sources(folder, tmp_path):
    save_file(tensors(), tmp_path / ".half-written.safetensors")
    save_file(tensors(), tmp_path / "whole.safetensors")
    assert [source.name for source in list_sources(tmp_path)] == ["whole.safetensors"]


def test_what_fits_a_base_by_width_and_by_fingerprint(folder, bases):
    found = {source.name: source for source in list_sources(folder)}
    llama, bart = (Fingerprint.of(load_base(bases / name).model) for name in ("llama", "bart"))
    assert found["team/ours"].misfit(16, llama) == ""
    assert "it was made for" in found["team/ours"].misfit(16, bart)
    assert found["caikit.pt"].misfit(16, bart) == ""
    assert "8 wide, the base's embeddings are 16" in found["narrow.safetensors"].misfit(16, llama)
    assert "damaged" in found["damaged.safetensors"].misfit(16, llama)


def test_the_setting_goes_before_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_PROMPT_BASE", raising=False)
    assert source_folder(None) is None
    monkeypatch.setenv("SOURCE_PROMPT_BASE", str(folder))
    assert source_folder(None) == folder
    assert source_folder(str(tmp_path)) == tmp_path
    assert find_source("peft", None).weights == folder / "peft" / "adapter_model.safetensors"
    with pytest.raises(ConfigError, match="source_prompt_base must be a folder"):
        source_folder(str(tmp_path / "none"))


def test_paths_stay_inside_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_PROMPT_BASE", raising=False)
    assert find_source("team/../caikit.pt", str(folder)).tasks == ("0", "1")
    assert find_source(str(folder / "caikit.pt"), str(folder)).tasks == ("0", "1")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "link").symlink_to(folder)
    (tmp_path / "sources" / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="'loop' is not there"):
        find_source("loop", str(tmp_path / "sources"))
    for name in ("../caikit.pt", str(folder / "caikit.pt"), "link/caikit.pt"):
        with pytest.raises(ConfigError, match="leads out of the folder of source prompts"):
            find_source(name, str(tmp_path / "sources"))
    assert find_source(str(folder / "caikit.pt"), None).tasks == ("0", "1")
    with pytest.raises(ConfigError, match=r"is relative to the folder .* SOURCE_PROMPT_BASE"):
        find_source("caikit.pt", None)


def test_what_is_not_there_names_what_is(folder):
    with pytest.raises(ConfigError, match=r"holds caikit\.pt, .*did you mean 'caikit\.pt'"):
        find_source("caikt.pt", str(folder))
    with pytest.raises(ConfigError, match=r"damaged\.safetensors cannot be used"):
        find_source("damaged.safetensors", str(folder))


def test_a_file_that_holds_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"prompt_embeddings": Code()}, tmp_path / "bad.pt")
    assert "damaged or holds more than tensors" in list_sources(tmp_path)[0].problem


@pytest.mark.parametrize("name", ["caikit.pt", "plain.pt"])
def test_bare_files_start_a_target_prompt(folder, llama, rows, name):
    tuning = {
        "num_virtual_tokens": 3,
        "prompt_tuning_init_source_model": name,
        "prompt_tuning_init_method": "AVERAGE_SOURCE",
    }
    options = {
        "tuning_type": "MULTITASK_PROMPT_TUNING",
        "source_prompt_base": str(folder),
        "num_epochs": 1,
        "learning_rate": 1e-30,
        "task_learning_rate": 1e-30,
    }
    if name == "plain.pt":
        with pytest.raises(ConfigError, match=r"is a plain prompt without tasks, .* use ONLY_SOURCE_SHARED"):
            tune(llama, rows, tuning_config=tuning, **options)
        tuning["prompt_tuning_init_method"] = "ONLY_SOURCE_SHARED"
    tuned = tune(llama, rows, tuning_config=tuning, **options)
    stored = torch.load(folder / name, weights_only=True)
    if name == "caikit.pt":
        matrix = stored["prefix_task_cols"].mean(0) @ stored["prefix_task_rows"].mean(0)
        stored = stored["prompt_embeddings"] * matrix
    torch.testing.assert_close(tuned.prompt().input, stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING", "num_layers": 1, "token_dim": 8}, "a PREFIX_TUNING prompt"),
        ({"peft_type": "EXTENDED_PROMPT_TUNING", "placement": "suffix"}, "has placement suffix"),
        (
            {
                "peft_type": "EXTENDED_PROMPT_TUNING",
                "task_type": "SEQ_2_SEQ_LM",
                "output_model_types": ["DECODER"],
            },
            "before the decoder's input alone",
        ),
        ({"peft_type": "PROMPT_TUNING"}, ""),
    ],
)
def test_prompts_of_other_places_are_no_sources(tmp_path, bases, changes, message):
    sizes = {"num_virtual_tokens": 3, "num_transformer_submodules": 1, "token_dim": 16}
    config = {"task_type": "CAUSAL_LM", **sizes, **changes}
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"prompt_embeddings": torch.randn(3, 16)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (found,) = list_sources(tmp_path)
    base = Fingerprint.of(load_base(bases / "llama").model)
    assert message in found.misfit(16, base)
    assert bool(message) == bool(found.problem)
    if message:
        with pytest.raises(ConfigError, match="other cannot be used"):
            find_source("other", str(tmp_path))


def test_folders_that_are_nested_without_end_are_looked_through_to_a_depth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for level in range(1, 1_501):
        os.mkdir("d")
        os.chdir("d")  # a path of so many names takes the longer the deeper it is
        if level in (8, 9):
            Path("plain.pt").write_bytes(b"")
    found = [source.name for source in list_sources(tmp_path)]
    for _ in range(1_491):  # what cleans up behind a test may recurse
        os.chdir("..")
        os.rmdir("d")
    assert found == ["d/" * 8 + "plain.pt"]
