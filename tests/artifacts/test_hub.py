"""Prompts to the Hub and back, with a folder in the place of the Hub."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat

import pytest
import torch

from oracles.hub import LocalHub
from oracles.served import served
from softprompt.artifacts import (
    files,
    load_adapter,
    local_prompts,
    outside,
    pull,
    push,
    save_adapter,
    staged_folder,
)
from softprompt.errors import ArtifactError, ConfigError, OutputExistsError

SLUG = "me/prompts-64f9a55bb3115b4f513ec026"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return LocalHub(tmp_path / "hub").install(monkeypatch)


@pytest.fixture
def folder(tmp_path, config, tensors, manifest):
    save_adapter(tmp_path / "prompt", config, tensors, manifest, overwrite=False)
    (tmp_path / "prompt" / "run.toml").write_text("seed = 1\n")
    (tmp_path / "prompt" / "training_curve.png").write_bytes(b"\x89PNG")
    return tmp_path / "prompt"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_prompt_goes_to_the_hub_and_back(hub, folder, tmp_path):
    address = push(folder, "me/prompt", private=True, license="mit", datasets=["org/set"])
    assert address == "https://hub/me/prompt/commit/1"
    assert hub.calls["create"]["private"] is True
    card = (hub.root / "me" / "prompt" / "README.md").read_text()
    assert "license: mit" in card
    assert 'softprompt.load("me/prompt")' in card
    (hub.root / "me" / "prompt" / "setup.py").write_text("raise SystemExit")
    target = pull("me/prompt", tmp_path / "new")
    assert names(target) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "softprompt.json",
        "training_curve.png",
    ]
    there, here = load_adapter(folder), load_adapter(target)
    assert torch.equal(there.values, here.values)
    assert there.manifest == here.manifest


def test_a_prompt_in_memory_publishes_itself(hub):
    tuned = served("llama", kinds=("plain",)).prompts["plain"]
    assert tuned.push_to_hub("me/prompt", base_model="org/tiny", create_pr=True).endswith("/commit/1")
    assert hub.calls["upload"]["create_pr"] is True
    found = load_adapter(hub.root / "me" / "prompt")
    assert found.base_model == "org/tiny"
    assert torch.equal(found.values, tuned.prompt().tensors[0])


def test_a_folder_of_this_machine_is_not_published_as_a_base(hub, folder, config, tensors, manifest):
    home = "/home/someone/models/tiny"
    own = dataclasses.replace(manifest, base_model=home, settings={"source_prompt_base": home, "x": "/ {{input}}"})
    local = {**config, "base_model_name_or_path": home, "tokenizer_name_or_path": home}
    save_adapter(folder, local, tensors, own, overwrite=True)
    with pytest.raises(ConfigError, match=r"base_model='org/name' \(--base-model\)"):
        push(folder, "me/prompt")
    assert not hub.calls
    push(folder, "me/prompt", base_model="org/tiny")
    for path in (hub.root / "me" / "prompt").iterdir():
        assert b"/home" not in path.read_bytes(), path.name
    shared = json.loads((hub.root / "me" / "prompt" / "softprompt.json").read_text())
    assert (shared["base_model"], shared["settings"]["x"]) == ("org/tiny", "/ {{input}}")


def test_nothing_is_overwritten_unasked_and_nothing_damaged_is_kept(hub, folder, tmp_path):
    push(folder, "me/prompt")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        pull("me/prompt", mine)
    assert hub.fetched == []
    pull("me/prompt", mine, overwrite=True)
    assert (mine / "notes.txt").read_text() == "mine"
    (hub.root / "me" / "prompt" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"sha256|damaged"):
        pull("me/prompt", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ArtifactError, match="check the path, or the name and the connection"):
        pull("me/nothing", tmp_path / "other")


def test_pickled_weights_arrive_as_safetensors(hub, config, tensors, manifest, tmp_path):
    save_adapter(hub.root / "me" / "old", config, tensors, manifest, overwrite=False, pickled=True)
    target = pull("me/old", tmp_path / "new")
    assert "adapter_model.safetensors" in names(target)
    assert "adapter_model.bin" not in names(target)
    assert torch.equal(load_adapter(target).values, tensors["prompt_embeddings"])


def test_a_collection_or_a_repository_of_prompts_is_a_folder_for_the_server(hub, folder, caplog):
    for name in ("me/a", "me/b", "you/a"):
        shutil.copytree(folder, hub.root / name)
    (hub.root / "me" / "base").mkdir()
    hub.collections[SLUG] = [(name, "model") for name in ("me/a", "me/b", "you/a", "me/base")] + [
        ("me/set", "dataset")
    ]
    with local_prompts(f"https://huggingface.co/collections/{SLUG}") as found:
        assert names(found) == ["a", "b", "you--a"]
        assert not any(path.is_symlink() for path in found.rglob("*"))
    assert not found.exists()
    assert "base of https" in caplog.text
    for own in ("first", "second"):
        shutil.copytree(folder, hub.root / "me" / "many" / own)
    with local_prompts("me/many") as found:
        assert names(found) == ["first", "second"]
    with local_prompts("me/a") as found:
        assert names(found) == ["a"]
    with pytest.raises(ArtifactError, match="expected prompts in me/base, it has none"), local_prompts("me/base"):
        pass
    hub.collections[SLUG] = [("me/gone", "model"), ("me/a", "model")]
    with local_prompts(SLUG) as found:
        assert names(found) == ["a"]
    assert "me/gone of the collection is left out: " in caplog.text


def test_a_folder_is_served_where_it_is_and_a_mistyped_one_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for source in ("runs", "runs/wt", tmp_path / "nothing"):
        with local_prompts(source) as found:
            assert str(found) == str(source)
    assert hub.fetched == []


def test_without_the_hub_a_collection_is_one_clear_line():
    for source in (SLUG, "me/nowhere"):
        with pytest.raises(ArtifactError) as caught, local_prompts(source):
            pass
        assert "\n" not in str(caught.value)
        assert "the connection" in str(caught.value)


def test_paths_move_with_a_project_and_stay_where_they_could_not(tmp_path, monkeypatch, config, tensors, manifest):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for place in (project / "models" / "tiny", elsewhere):
        place.mkdir(parents=True)
    monkeypatch.chdir(project)
    base = str(project / "models" / "tiny")
    local = {**config, "base_model_name_or_path": base}
    own = dataclasses.replace(manifest, base_model=base, settings={"source_prompt_base": str(project)})
    save_adapter(project / "runs" / "a", local, tensors, own, overwrite=False)
    save_adapter(elsewhere / "a", local, tensors, own, overwrite=False)
    for path in (project / "runs" / "a").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    written = json.loads((project / "runs" / "a" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "./models/tiny"  # as PEFT would read it from here
    assert load_adapter("runs/a").base_model == "./models/tiny"
    monkeypatch.chdir(elsewhere)
    moved = project.rename(tmp_path / "moved")
    # A prompt that was downloaded looks just so: from elsewhere a base beside it is not loaded unasked.
    with pytest.raises(ArtifactError, match="names a base model beside it, not in the working directory"):
        outside(load_adapter(moved / "runs" / "a").base_model, moved / "runs" / "a")
    assert load_adapter("a").base_model == base


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_file_modes_follow_the_umask(mask, expected, tmp_path, config, tensors, manifest):
    before = os.umask(mask)
    try:
        save_adapter(tmp_path / "p", config, tensors, manifest, overwrite=False)
        save_adapter(tmp_path / "p", config, tensors, manifest, overwrite=True)
        files.write_atomically(tmp_path / "p" / "more", "text")
        with staged_folder(tmp_path / "staged") as staged:
            os.close(os.open(staged / "private", os.O_CREAT, 0o600))  # as libraries write through mkstemp
    finally:
        os.umask(before)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) >= 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {expected}
