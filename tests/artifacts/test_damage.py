"""What a damaged, foreign or hostile folder gets: one ArtifactError in one line."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from softprompt.artifacts import load_adapter, parse_object, save_adapter
from softprompt.errors import ArtifactError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def written(tmp_path, config, tensors):
    directory = tmp_path / "prompt"
    save_adapter(directory, config, tensors, overwrite=False)
    return directory


def refused(expected, *arguments, **keywords):
    with pytest.raises(ArtifactError, match=expected) as caught:
        load_adapter(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_weights(directory, **tensors):
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def test_a_missing_directory_says_what_was_looked_for(tmp_path):
    message = refused("no folder", tmp_path / "absent")
    assert "adapter_config.json" in message
    assert WEIGHTS in message


def test_a_file_instead_of_a_directory(written):
    refused("is a file: pass the folder", written / WEIGHTS)


def test_no_config(written):
    (written / "adapter_config.json").unlink()
    refused("expected adapter_config.json in .*, it has none", written)


@pytest.mark.parametrize("pickled", [False, True])
def test_weights_beyond_the_limit_say_what_raises_it_and_so_does_writing_them(
    tmp_path, config, tensors, monkeypatch, caplog, pickled
):
    monkeypatch.setenv("SOFTPROMPT_MAX_PROMPT_BYTES", "10")
    save_adapter(tmp_path / "large", config, tensors, overwrite=False, pickled=pickled)
    size = max(path.stat().st_size for path in (tmp_path / "large").glob("adapter_model.*"))
    (said,) = caplog.messages
    assert said.startswith(f"the weights have {size:,} bytes, more than are read unasked")
    assert f"SOFTPROMPT_MAX_PROMPT_BYTES={size} " in said and f"--max-prompt-bytes {size}" in said
    refused(rf"larger than 10 bytes: .*, set SOFTPROMPT_MAX_PROMPT_BYTES={size}$", tmp_path / "large")
    monkeypatch.setenv("SOFTPROMPT_MAX_PROMPT_BYTES", str(size))
    load_adapter(tmp_path / "large")
    save_adapter(tmp_path / "again", config, tensors, overwrite=False, pickled=pickled)
    assert caplog.messages == [said]


@pytest.mark.parametrize("text", ["", "{", '{"a": \x00}', "[" * 100_000])
def test_a_config_that_is_not_json(written, text):
    (written / "adapter_config.json").write_text(text)
    refused("expected JSON in .*adapter_config.json", written)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("x" * ((1 << 20) + 1), "a text has 1,048,577 characters, more than 1,048,576"),
        ("a\0b", "a text has a zero character"),
        ([0] * 100_001, "more than 100,000 values"),
    ],
)
def test_a_config_beyond_bounds(written, value, told):
    set_config(written, revision=value)
    refused(f"expected plain values within bounds in .*, {told}|, it is nested .*{told}", written)


def test_a_text_beyond_bounds_is_not_parsed():
    with pytest.raises(ArtifactError, match=r"it cannot be read .2,097,153 characters, more than 2,097,152"):
        parse_object(" " * ((2 << 20) + 1), "a file")


def test_a_config_that_is_not_text(written):
    (written / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    refused("expected JSON in", written)


def test_a_config_that_is_a_list(written):
    (written / "adapter_config.json").write_text("[]")
    refused("expected a JSON object.*got a list", written)


@pytest.mark.parametrize("kind", ["LORA", None, "prompt_tuning", ["PROMPT_TUNING"]])
def test_another_method_lists_the_supported(written, kind):
    set_config(written, peft_type=kind)
    refused("expected peft_type PROMPT_TUNING .*load other adapters with peft", written)


@pytest.mark.parametrize("count", [None, 0, -1, "3", 3.0, True])
def test_a_number_of_virtual_tokens_that_is_no_count(written, count):
    set_config(written, num_virtual_tokens=count)
    refused("expected num_virtual_tokens .* whole number above 0", written)


def test_no_weights(written):
    (written / WEIGHTS).unlink()
    refused("expected adapter_model.safetensors .or adapter_model.bin. in", written)


@pytest.mark.parametrize("size", [0, 4, 7, 20, -1, -40])
def test_truncated_weights(written, size):
    data = (written / WEIGHTS).read_bytes()
    (written / WEIGHTS).write_bytes(data[:size])
    refused("truncated or damaged", written)


@pytest.mark.parametrize(
    "data",
    [b"\x00" * 64, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"{]", b"\xff" * 64],
)
def test_a_corrupt_header(written, data):
    (written / WEIGHTS).write_bytes(data)
    refused("truncated or damaged", written)


def test_a_corrupt_body_is_found_by_the_recorded_hash(tmp_path, config, tensors, manifest):
    save_adapter(tmp_path / "p", config, tensors, manifest, overwrite=False)
    data = bytearray((tmp_path / "p" / WEIGHTS).read_bytes())
    data[-3] ^= 0x01
    (tmp_path / "p" / WEIGHTS).write_bytes(data)
    refused("expected .* with sha256 .*, got .*: restore the weights", tmp_path / "p")


@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_ends_in_another_error(written, tensors, position, value, cut):
    for name in (WEIGHTS, "adapter_model.bin"):
        if name == WEIGHTS:
            set_weights(written, **tensors)
        else:
            pickled(written, tensors)
        data = bytearray((written / name).read_bytes())
        place = position % len(data)
        data[place] = value
        (written / name).write_bytes(data[:place] if cut else data)
        with contextlib.suppress(ArtifactError), warnings.catch_warnings():
            # torch warns of a protocol byte it does not know, besides refusing the file.
            warnings.simplefilter("ignore")
            load_adapter(written)


def test_no_prompt_in_the_weights(written):
    set_weights(written, other=torch.ones(3, 8))
    refused("expected a tensor 'prompt_embeddings' in .*, it holds other", written)


@pytest.mark.parametrize("shape", [(24,), (1, 3, 8), (8, 3), (4, 8), (3, 7), (3, 0), (6, 8)])
def test_a_wrong_shape_names_both(written, shape):
    set_weights(written, prompt_embeddings=torch.ones(shape))
    message = refused(r"expected prompt_embeddings \[3, 8\]", written)
    assert f"got {list(shape)}" in message


def test_missing_sizes_follow_pefts_convention(written):
    set_config(written, token_dim=None, num_transformer_submodules=None)
    set_weights(written, prompt_embeddings=torch.ones(3, 5))
    assert load_adapter(written).values.shape == (3, 5)
    set_config(written, task_type="SEQ_2_SEQ_LM")
    refused(r"expected prompt_embeddings \[6, H\]", written)
    set_weights(written, prompt_embeddings=torch.ones(6, 5))
    assert load_adapter(written).values.shape == (6, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["prompt_embeddings", "base_model.score.weight"])
def test_values_that_are_not_finite(written, name, value):
    tensors = {"prompt_embeddings": torch.ones(3, 8), "base_model.score.weight": torch.ones(2, 8)}
    tensors[name][1, 2] = value
    set_weights(written, **tensors)
    refused(f"expected finite numbers in {name} .*, 1 of", written)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_no_prompt(written, dtype):
    set_weights(written, prompt_embeddings=torch.ones(3, 8, dtype=dtype))
    refused("float32, float16, bfloat16 or float64, got (int64|uint8|bool)", written)


@pytest.mark.parametrize("subfolder", ["../prompt", "a/../../x", "/etc", "", "..", "C:\\x", "a\\..\\.."])
def test_a_subfolder_that_leads_outside(written, subfolder):
    refused("expected a subfolder inside the prompt directory", written, subfolder=subfolder)


def test_a_subfolder_that_is_a_link_outside(tmp_path, written):
    (tmp_path / "root").mkdir()
    os.symlink(written, tmp_path / "root" / "link")
    refused("leads outside", tmp_path / "root", subfolder="link")


def test_a_missing_subfolder(written):
    refused("other does not exist", written, subfolder="other")


def test_a_subfolder_is_read(tmp_path, config, tensors):
    save_adapter(tmp_path / "all" / "second", config, tensors, overwrite=False)
    stored = load_adapter(tmp_path / "all", subfolder="second")
    assert torch.equal(stored.values, tensors["prompt_embeddings"])


def test_files_may_be_links_as_in_the_hub_cache(tmp_path, written):
    (tmp_path / "snapshot").mkdir()
    for path in written.iterdir():
        os.symlink(path, tmp_path / "snapshot" / path.name)
    assert load_adapter(tmp_path / "snapshot").values.shape == (3, 8)


def test_an_unknown_hub_id_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def snapshot(repository, **options):
        raise OSError("no connection")

    monkeypatch.setattr("softprompt.artifacts.peft_folder.snapshot_download", snapshot)
    refused(r"some-org/some-prompt is neither \(no connection\)", "some-org/some-prompt")


def test_a_hub_id_is_fetched(written, monkeypatch):
    asked = {}

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        return str(written.parent)

    monkeypatch.setattr("softprompt.artifacts.peft_folder.snapshot_download", snapshot)
    stored = load_adapter("some-org/some-prompt", subfolder="prompt", revision="v2")
    assert stored.location == str(written)
    assert (asked["repository"], asked["revision"]) == ("some-org/some-prompt", "v2")
    assert "prompt/adapter_config.json" in asked["allow_patterns"]


def test_a_revision_of_a_local_folder_is_not_ignored(written):
    refused("revision .'main'. selects a version on the hub", written, revision="main")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "softprompt.json: expected JSON"),
        ("[]", "softprompt.json: expected a JSON object"),
        ('{"format_version": 99}', "format_version 99.*upgrade"),
        ('{"format_version": 1}', "softprompt.json lacks template"),
    ],
)
def test_a_damaged_or_newer_manifest(written, text, expected):
    (written / "softprompt.json").write_text(text)
    refused(expected, written)


class Bomb:
    def __reduce__(self):
        return (os.system, ("echo bomb > bomb.txt",))


def pickled(directory, value):
    (directory / WEIGHTS).unlink()
    torch.save(value, directory / "adapter_model.bin")


def test_pickled_weights_are_read(written, tensors):
    pickled(written, {"prompt_embeddings": torch.nn.Parameter(tensors["prompt_embeddings"])})
    stored = load_adapter(written)
    assert torch.equal(stored.values, tensors["prompt_embeddings"])
    assert not stored.values.requires_grad


def test_safetensors_win_over_a_pickle(written, tensors):
    torch.save({"prompt_embeddings": torch.zeros(3, 8)}, written / "adapter_model.bin")
    assert torch.equal(load_adapter(written).values, tensors["prompt_embeddings"])


def test_a_pickle_with_code_is_refused_and_not_run(written, monkeypatch):
    monkeypatch.chdir(written)
    pickled(written, {"prompt_embeddings": Bomb()})
    refused("holds code, which is never run", written)
    (written / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    refused("holds code, which is never run", written)
    assert not (written / "bomb.txt").exists()


@pytest.mark.parametrize("size", [0, 10, 200, -10])
def test_a_truncated_pickle(written, tensors, size):
    pickled(written, tensors)
    data = (written / "adapter_model.bin").read_bytes()
    (written / "adapter_model.bin").write_bytes(data[:size])
    refused("damaged", written)


def test_a_pickle_whose_records_are_packed(written, tensors):
    pickled(written, tensors)
    path = written / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    refused("damaged .*its records are packed", written)


@pytest.mark.parametrize("file", ["adapter_config.json", "softprompt.json"])
def test_a_name_of_a_base_that_no_file_system_has(tmp_path, config, tensors, manifest, file):
    save_adapter(tmp_path / "p", config, tensors, manifest, overwrite=False)
    path = tmp_path / "p" / file
    path.write_text(path.read_text().replace("org/tiny", "org/" + "x" * 300))
    refused(f"expected the name of a base in .*{file}, got 'org/x*'...: restore it", tmp_path / "p")


@pytest.mark.parametrize("value", [[1], {"prompt_embeddings": [1.0]}, torch.ones(3, 8)])
def test_a_pickle_of_something_else(written, value):
    pickled(written, value)
    refused("expected a dict of named tensors", written)


def test_sparse_tensors_are_refused(written):
    pickled(written, {"prompt_embeddings": torch.ones(3, 8).to_sparse()})
    refused("expected plain dense tensors", written)
