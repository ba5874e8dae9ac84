"""Loading a base: from a folder, from memory, and every way it can fail."""

from __future__ import annotations

import io
import json
from contextlib import suppress

import pytest
import torch
import transformers as tf

from oracles.families import ENCODERS, build, causal, seq2seq
from oracles.foreign_code import base_with_code
from oracles.tokenizers import byte_bpe
from oracles.weights import weights_hash
from softprompt.backbone import load_base
from softprompt.errors import BackboneError, ConfigError
from softprompt.prompts.initialisers import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a causal and a seq2seq model saved with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for name, model in (("llama", causal("llama")), ("t5", seq2seq("t5"))):
        model.save_pretrained(root / name)
        byte_bpe().save_pretrained(root / name)
    return root


def test_a_causal_folder(folders):
    loaded = load_base(folders / "llama")
    assert isinstance(loaded.model, tf.LlamaForCausalLM)
    assert loaded.name == str(folders / "llama")
    assert loaded.tokenizer("late")["input_ids"]
    assert weights_hash(loaded.model) == weights_hash(causal("llama"))
    assert not loaded.model.training


def test_the_kind_is_read_from_the_config(folders):
    assert isinstance(load_base(str(folders / "t5")).model, tf.T5ForConditionalGeneration)
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_base(folders / "llama", seq2seq=True)


def test_dtypes_by_name(folders):
    for name in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert load_base(folders / "llama", torch_dtype=name).model.dtype is torch.bfloat16
    assert load_base(folders / "llama").model.dtype is torch.float32


@pytest.mark.parametrize("name", ["int8", "bf16", "", "torch.int64"])
def test_unknown_dtypes_are_refused(folders, name):
    with pytest.raises(ConfigError, match="torch_dtype must be one of float32"):
        load_base(folders / "llama", torch_dtype=name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "nonsense:1"])
def test_devices_that_are_not_there_are_refused(folders, device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        load_base(folders / "llama", device=device)
    assert load_base(folders / "llama", device="cpu").model.device.type == "cpu"


def test_a_model_in_memory_keeps_itself(folders):
    model, words = causal("llama"), byte_bpe()
    loaded = load_base(model, tokenizer=words)
    assert loaded.model is model
    assert loaded.tokenizer is words
    assert load_base(model, tokenizer=words, torch_dtype="bfloat16").model.dtype is torch.bfloat16


def test_a_model_in_memory_finds_the_tokenizer_of_its_folder(folders):
    model = tf.AutoModelForCausalLM.from_pretrained(folders / "llama")
    loaded = load_base(model)
    assert loaded.name == str(folders / "llama")
    assert loaded.tokenizer("late")["input_ids"] == byte_bpe()("late")["input_ids"]


def test_a_model_in_memory_without_a_tokenizer_is_refused():
    with pytest.raises(BackboneError, match="pass tokenizer="):
        load_base(causal("llama"))


def test_a_model_in_memory_that_generates_nothing_is_refused():
    model = build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=2)
    with pytest.raises(BackboneError, match="neither a causal nor a seq2seq"):
        load_base(model, tokenizer=byte_bpe())


@pytest.mark.parametrize("name", ["no-such-model-here", "some-org/no-such-model"])
def test_unknown_names_say_how_to_download(name):
    with pytest.raises(BackboneError, match="ALLOW_DOWNLOADS=true") as caught:
        load_base(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_downloads_need_permission(monkeypatch):
    asked = []
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda name, **options: asked.append(options) or 1 / 0)
    for value in ("", "false", "true", "TRUE"):
        monkeypatch.setenv("ALLOW_DOWNLOADS", value)
        with pytest.raises(BackboneError):
            load_base("some-org/no-such-model")
    assert [options["local_files_only"] for options in asked] == [True, True, False, False]


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BackboneError, match="cannot be loaded") as caught:
        load_base(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_damaged_model(tmp_path):
    causal("llama").save_pretrained(tmp_path)
    byte_bpe().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_base(tmp_path)


def test_a_folder_that_needs_its_own_code_is_refused(tmp_path):
    values = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "code.py").write_text("raise SystemExit('executed')\n")
    with pytest.raises(BackboneError, match=r"would run code that .* --trust-remote-code .trust_remote_code=True"):
        load_base(tmp_path)


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_beside_a_model_or_a_tokenizer_runs_only_where_the_user_says_so(tmp_path, monkeypatch, answer):
    folder, mark = base_with_code(tmp_path, monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))  # transformers would ask
    with pytest.raises(BackboneError, match="would run code"):
        load_base(folder)
    assert not mark.exists()
    assert type(load_base(folder, trust_remote_code=True).model).__name__ == "Model"
    assert mark.exists()


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_of_a_tokenizer_for_the_start_does_not_run(tmp_path, monkeypatch, answer):
    mark = tmp_path / "ran"
    byte_bpe().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    auto = {"AutoTokenizer": ["code.Words", None]}
    config.write_text(json.dumps({"tokenizer_class": "Words", "auto_map": auto}))
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with suppress(ConfigError):
        load_tokenizer(str(tmp_path))
    assert not mark.exists()


def test_the_bundled_model_goes_by_name():
    loaded = load_base("demo")
    assert loaded.name == "demo"
    assert loaded.tokenizer("late")["input_ids"]


def test_a_device_is_not_ignored_where_each_process_takes_its_own():
    with pytest.raises(ConfigError, match="device would be ignored with shard"):
        load_base("demo", shard="fsdp", device="cpu")
