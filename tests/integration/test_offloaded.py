"""A base whose layers lie on the CPU and on disk (``device_map``) is tuned, saved and run as one in memory."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oracles.serving import app_over, greedy_alone, greedy_over_http, running, write_prompt
from softprompt import (
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    load,
    tune,
)
from softprompt.backbone import Base, load_base
from softprompt.backbone.base import fingerprint_of
from softprompt.backbone.state import locked
from softprompt.bundled import model_directory
from softprompt.errors import ConfigError

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
RECORDS = [{"input": f"It is {word}.", "output": word} for word in ("good", "bad", "late", "early") * 2]


def base(offload=None):
    """The bundled model, all of it or every second layer on disk."""
    if offload is None:
        return AutoModelForCausalLM.from_pretrained(model_directory())
    layers = AutoModelForCausalLM.from_pretrained(model_directory()).config.num_hidden_layers
    places = {"model.embed_tokens": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(layers)}
    return AutoModelForCausalLM.from_pretrained(model_directory(), device_map=places, offload_folder=offload)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_directory())


@pytest.fixture
def offloaded(tmp_path):
    model = base(tmp_path / "offload")
    assert any(weight.is_meta for weight in model.parameters())
    return model


@pytest.mark.parametrize("config", [PromptTuningConfig, pytest.param(PrefixTuningConfig, marks=pytest.mark.slow)])
def test_the_same_pass_gradient_and_tokens(config, offloaded, tokenizer, tmp_path):
    ids = tokenizer("Hello there, I am", return_tensors="pt").input_ids
    found = []
    for model in (base(), offloaded):
        torch.manual_seed(0)
        prompted = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        outputs = prompted(input_ids=ids, labels=ids)
        outputs.loss.backward()
        gradient = next(p.grad for p in prompted.parameters() if p.grad is not None)
        written = prompted.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        found.append((outputs.logits, gradient, written))
    (logits, gradient, written), (other_logits, other_gradient, other_written) = found
    assert torch.allclose(logits, other_logits, atol=1e-4)
    assert torch.allclose(gradient, other_gradient, atol=1e-4 * float(gradient.abs().max()))
    assert torch.equal(written, other_written)
    prompted.save_pretrained(tmp_path / "prompt")
    again = PeftModel.from_pretrained(base(), tmp_path / "prompt").generate(
        input_ids=ids, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(again, written)


@pytest.mark.slow
def test_tuned_and_used(offloaded, tokenizer, tmp_path):
    settings = {"num_epochs": 2, "batch_size": 4, "seed": 1, "max_target_length": 8}
    values = []
    for name, model in (("whole", base()), ("offloaded", offloaded)):
        tuned = tune(Base(model, tokenizer, "demo"), RECORDS, output=tmp_path / name, **settings)
        values.append(tuned.prompt().input)
    assert torch.allclose(*values, atol=1e-3 * float(values[0].abs().max()))
    request = {"input": "It is good."}
    loaded = load(tmp_path / "whole", offloaded, tokenizer=tokenizer)
    assert loaded(request) == load(tmp_path / "offloaded")(request)
    assert any(weight.is_meta for weight in offloaded.parameters())


@pytest.mark.slow
def test_served(offloaded, tokenizer, tmp_path):
    """A mixed batch over HTTP, each answer that of the request alone on the whole model."""
    whole = load_base("demo")
    options = {"task": "generation", "labels": None, "template": "{{input}}"}
    folders = [write_prompt(tmp_path / "prompts" / f"writer{i}", whole, seed=i, **options) for i in (1, 2)]
    texts = ["The kettle broke", "What time do you open on Sunday, and"]
    with running(app_over(Base(offloaded, tokenizer, "demo"), tmp_path / "prompts")) as server:
        found = greedy_over_http(server.url, texts, [folder.name for folder in folders])
    assert found == greedy_alone(whole, folders, texts)


def test_what_is_read_of_it_waits_for_a_pass(offloaded):
    """Its weights come and go with a pass, so that what reads them beside one would find none."""
    found = []
    reader = threading.Thread(target=lambda: found.append(fingerprint_of(offloaded)))
    with locked(offloaded):
        reader.start()
        reader.join(0.2)
        assert not found
    reader.join(20)
    assert found == [fingerprint_of(offloaded)]


def test_it_is_not_moved(offloaded, tokenizer):
    for change in ({"device": "cpu"}, {"torch_dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} cannot be changed.*leave it out"):
            load_base(offloaded, tokenizer=tokenizer, **change)
