"""A base in a GGUF file is tuned, loaded and served by its path, with its tokenizer and chat template."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from oracles import gguf_file
from oracles.serving import command_serving, greedy_alone, greedy_over_http, write_prompt
from softprompt import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model, load, tune
from softprompt.artifacts import load_adapter
from softprompt.backbone import load_base
from softprompt.cli.main import run
from softprompt.errors import BackboneError, FingerprintError

RECORDS = [{"input": f"It is {word}.", "output": word} for word in ("good", "bad", "late", "early") * 2]
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {
        "float": gguf_file.write(folder / "float.gguf"),
        "quantised": gguf_file.write(folder / "quantised.gguf", quantised=True),
        "other": gguf_file.write(folder / "other.gguf", seed=1),
    }


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "prompt"
    tune(files["quantised"], RECORDS, output=folder, num_epochs=2, max_target_length=8)
    return folder


@needs_gguf
def test_model_tokenizer_and_chat_template(files):
    base, here = load_base("demo"), load_base(files["float"])
    ids = here.tokenizer("The parcel was late.", return_tensors="pt").input_ids
    assert torch.equal(ids, base.tokenizer("The parcel was late.", return_tensors="pt").input_ids)
    assert torch.allclose(here.model(ids).logits, base.model(ids).logits, atol=1e-5)
    assert here.tokenizer.eos_token == base.tokenizer.eos_token
    chat = [{"role": "user", "content": "Hi"}]
    assert here.tokenizer.apply_chat_template(chat, tokenize=False) == "<user>Hi"
    assert (here.name, here.model.name_or_path) == (files["float"], files["float"])
    assert load_base(files["float"], torch_dtype="bfloat16").dtype == torch.bfloat16


@needs_gguf
@pytest.mark.slow
def test_tuned_and_loaded_by_the_path_on_record(tuned, files):
    assert load_adapter(tuned).base_model == files["quantised"]
    text = load(tuned)({"input": "It is good."})
    assert load(tuned, files["quantised"])({"input": "It is good."}) == text
    assert load(tuned, "demo").base.name == "demo"  # the same model, not quantised
    assert load(tuned, files["float"]).base.name == files["float"]
    with pytest.raises(FingerprintError, match=r"other\.gguf, another model"):
        load(tuned, files["other"])


@pytest.mark.slow
@needs_gguf
def test_pefts_interface(files, tmp_path):
    prompted = get_peft_model(
        load_base(files["float"]).model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    prompted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == files["float"]
    again, ids = AutoPeftModelForCausalLM.from_pretrained(tmp_path), torch.arange(9)[None]
    assert torch.equal(again.eval()(input_ids=ids).logits, prompted.eval()(input_ids=ids).logits)


@needs_gguf
@pytest.mark.slow
def test_commands(tuned, files, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    quick = ["--num-epochs", "1", "--quiet"]
    text = ["--prompt-tuning-init-method", "TEXT", "--prompt-tuning-init-text", "Word:"]
    for command in (
        [
            "tune",
            "--base-model",
            files["float"],
            "--train-data",
            str(data),
            "--output",
            str(tmp_path / "out"),
            *quick,
            *text,
        ],
        ["generate", str(tuned), "--base-model", files["float"], "--text", "It is", "--quiet"],
        ["evaluate", str(tuned), "--data", str(data), "--quiet"],
        ["info", str(tuned), "--quiet"],
        ["convert", str(tuned), str(tmp_path / "wide"), "--to", "extended-vocab", "--quiet"],
    ):
        assert run(command) == 0, capsys.readouterr().err
    assert run(["generate", str(tuned), "--base-model", files["other"], "--text", "x", "--quiet"]) == 2
    assert "pass --ignore-fingerprint" in capsys.readouterr().err


@needs_gguf
@pytest.mark.slow
def test_served(files, tmp_path):
    """``softprompt serve --base-model model.gguf``: a mixed batch, each answer that of the request alone."""
    base = load_base(files["quantised"])
    options = {"task": "generation", "labels": None, "template": "{{input}}"}
    folders = [write_prompt(tmp_path / f"writer{seed}", base, seed=seed, **options) for seed in (1, 2)]
    texts = ["The kettle broke", "What time do you open on Sunday, and"]
    with command_serving(files["quantised"], tmp_path) as server:
        found = greedy_over_http(server.url, texts, [folder.name for folder in folders])
    assert found == greedy_alone(base, folders, texts)


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r'it is not installed: pip install "softprompt\[gguf\]"$'):
        load_base(tmp_path / "model.gguf")


@needs_gguf
def test_a_file_that_is_not_there():
    with pytest.raises(BackboneError, match=r"'none.gguf' is neither a folder nor a GGUF file nor in"):
        load_base("none.gguf")
