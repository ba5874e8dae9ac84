from __future__ import annotations

import hashlib
import json
import os

import pytest
import safetensors
import torch

from softprompt.artifacts import load_adapter, save_adapter
from softprompt.errors import ArtifactError, OutputExistsError


@pytest.fixture
def written(tmp_path, config, tensors, manifest):
    directory = tmp_path / "prompt"
    save_adapter(directory, config, tensors, manifest, overwrite=False)
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_round_trip(written, config, tensors, manifest):
    stored = load_adapter(written)
    assert stored.config == config
    assert torch.equal(stored.values, tensors["prompt_embeddings"])
    digest = hashlib.sha256((written / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert stored.manifest.weights_sha256 == digest
    assert {**stored.manifest.to_dict(), "weights_sha256": None} == manifest.to_dict()
    assert stored.location == str(written)


def test_the_folder_holds_four_files(written):
    assert sorted(contents(written)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "softprompt.json",
    ]


def test_config_file_is_sorted_and_weights_carry_the_format(written, config):
    text = (written / "adapter_config.json").read_text()
    assert text == json.dumps(config, indent=2, sort_keys=True)
    with safetensors.safe_open(written / "adapter_model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_heads_are_kept_as_they_are(tmp_path, config, dtype):
    shared = torch.arange(6, dtype=dtype).reshape(2, 3)
    tensors = {
        "prompt_embeddings": torch.ones(8, 3, dtype=dtype).T,
        "base_model.classifier.weight": shared,
        "base_model.score.weight": shared,
        "base_model.classifier.steps": torch.tensor(3),
    }
    save_adapter(tmp_path / "p", config, tensors, overwrite=False)
    stored = load_adapter(tmp_path / "p")
    assert stored.manifest is None
    assert stored.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored.tensors[name].dtype == tensor.dtype
        assert torch.equal(stored.tensors[name], tensor)


def test_a_parameter_is_saved_without_its_graph(tmp_path, config, tensors):
    parameter = torch.nn.Parameter(tensors["prompt_embeddings"])
    save_adapter(tmp_path / "p", config, {"prompt_embeddings": parameter}, overwrite=False)
    assert not load_adapter(tmp_path / "p").values.requires_grad


def test_a_full_directory_is_refused_and_left_alone(written, config, tensors):
    before = contents(written)
    with pytest.raises(OutputExistsError, match=r"--overwrite.*overwrite=True"):
        save_adapter(written, config, tensors, overwrite=False)
    assert contents(written) == before


def test_an_empty_directory_is_used(tmp_path, config, tensors):
    save_adapter(tmp_path, config, tensors, overwrite=False)
    assert torch.equal(load_adapter(tmp_path).values, tensors["prompt_embeddings"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path, config, tensors, overwrite):
    (tmp_path / "p").write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        save_adapter(tmp_path / "p", config, tensors, overwrite=overwrite)
    assert (tmp_path / "p").read_text() == "mine"


def test_overwriting_leaves_nothing_of_the_old_prompt(written, config, tensors):
    torch.save(tensors, written / "adapter_model.bin")
    (written / "training_logs.jsonl").write_text("kept")
    new = {"prompt_embeddings": tensors["prompt_embeddings"] + 1}
    save_adapter(written, config, new, overwrite=True)
    stored = load_adapter(written)
    assert torch.equal(stored.values, new["prompt_embeddings"])
    # The old record would describe the new rows.
    assert stored.manifest is None
    assert not (written / "adapter_model.bin").exists()
    assert (written / "training_logs.jsonl").read_text() == "kept"


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_failed_overwrite_leaves_the_old_prompt(written, config, tensors, monkeypatch, call):
    manifest = load_adapter(written).manifest
    before, original, calls = contents(written), os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr("softprompt.artifacts.files._exchanged_files", lambda *written: False)
    new = {"prompt_embeddings": tensors["prompt_embeddings"] + 1}
    with pytest.raises(ArtifactError, match=r"could not write.*No space.*nothing there was chang"):
        save_adapter(written, config, new, manifest, overwrite=True)
    assert contents(written) == before


def test_an_unwritable_place_is_one_line(tmp_path, config, tensors):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="could not write") as caught:
        save_adapter(tmp_path / "file" / "p", config, tensors, overwrite=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_virtual_token": 3}, "PEFT's keys only.*did you mean 'num_virtual_tokens'"),
        ({"template": "x"}, "PEFT's keys only.*softprompt.json"),
        ({"tokenizer_kwargs": {"x": object()}}, "expected plain JSON"),
        ({"num_virtual_tokens": 4}, r"expected prompt_embeddings \[4, 8\].*got \[3, 8\]"),
    ],
)
def test_a_config_that_could_not_be_read_back_is_not_written(tmp_path, config, tensors, change, expected):
    with pytest.raises(ArtifactError, match=expected):
        save_adapter(tmp_path / "p", {**config, **change}, tensors, overwrite=False)
    assert not (tmp_path / "p").exists()


def test_a_prompt_that_is_not_finite_is_not_written(tmp_path, config, tensors):
    tensors["prompt_embeddings"][0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="1 of 24 are NaN"):
        save_adapter(tmp_path / "p", config, tensors, overwrite=False)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("text", ["# My project\n", "---\nlibrary_name: peft\n---\n- softprompt\n", ""])
def test_a_readme_of_somebody_else_is_left_alone(tmp_path, config, tensors, text):
    (tmp_path / "README.md").write_text(text)
    save_adapter(tmp_path, config, tensors, overwrite=True)
    assert (tmp_path / "README.md").read_text() == text
    assert torch.equal(load_adapter(tmp_path).values, tensors["prompt_embeddings"])


def test_our_own_card_is_renewed(written, config, tensors, manifest):
    save_adapter(written, {**config, "base_model_name_or_path": "org/b"}, tensors, overwrite=True)
    assert "base_model: org/b" in (written / "README.md").read_text()
