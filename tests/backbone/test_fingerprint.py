"""A fingerprint tells bases apart by their weights, whatever they are called."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, ENCODERS, SEQ2SEQ, build, causal, seq2seq
from softprompt.backbone import Fingerprint
from softprompt.errors import ArtifactError


@pytest.fixture(scope="module")
def llama():
    return Fingerprint.of(causal("llama"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gemma"])
def test_another_dtype_is_the_same_base(name, dtype):
    make = causal if name in CAUSAL else seq2seq
    assert Fingerprint.of(make(name)).matches(Fingerprint.of(make(name).to(dtype)))
    assert Fingerprint.of(make(name).to(dtype)).matches(Fingerprint.of(make(name)))


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_another_seed_is_another_base(name):
    make = causal if name in CAUSAL else seq2seq
    first, same, other = (Fingerprint.of(make(name, seed=seed)) for seed in (0, 0, 1))
    assert first.matches(same)
    assert first.short == same.short
    assert not first.matches(other)
    assert first.short != other.short


def test_another_architecture_or_size_is_another_base(llama):
    assert not llama.matches(Fingerprint.of(causal("mistral")))
    assert not llama.matches(Fingerprint.of(causal("llama", num_hidden_layers=1)))
    grown = causal("llama")
    grown.resize_token_embeddings(72)
    assert not llama.matches(Fingerprint.of(grown))


@pytest.mark.parametrize("layer", [0, 7, 13, 19])
def test_one_changed_layer_is_another_base(layer):
    first = causal("llama", num_hidden_layers=20)
    before = Fingerprint.of(first)
    with torch.no_grad():
        for parameter in first.model.layers[layer].parameters():
            parameter.normal_(std=0.02)
    assert not before.matches(Fingerprint.of(first))


def test_the_head_does_not_matter():
    model = build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=3)
    before = Fingerprint.of(model)
    torch.nn.init.normal_(model.classifier.weight)
    assert before.matches(Fingerprint.of(model))


def test_one_backbone_under_two_tasks():
    language = causal("gpt2")
    classifier = build(tf.AutoModelForSequenceClassification, CAUSAL["gpt2"](), seed=3, num_labels=2)
    assert not Fingerprint.of(language).matches(Fingerprint.of(classifier))
    classifier.transformer.load_state_dict(language.transformer.state_dict())
    assert Fingerprint.of(language).matches(Fingerprint.of(classifier))


def test_rows_that_prompts_are_not_made_of_do_not_count(llama):
    """A prompted base has the fingerprint of the base alone."""
    from softprompt import PromptTuningConfig, get_peft_model

    model = causal("llama")
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert Fingerprint.of(model) == llama


def test_through_json(llama):
    back = Fingerprint.from_dict(json.loads(json.dumps(llama.to_dict())))
    assert back == llama
    assert back.short == llama.short
    assert len(llama.short) == 12
    assert set(llama.short) <= set("0123456789abcdef")


@pytest.mark.parametrize("change", [{"values": None}, {"values": ["x"]}, {"sizes": 3}, {"sizes": ["a"]}])
def test_damage_is_one_clear_error(llama, change):
    with pytest.raises(ArtifactError, match=r"fingerprint in softprompt\.json is damaged"):
        Fingerprint.from_dict({**llama.to_dict(), **change})


@pytest.mark.parametrize("key", ["model_type", "sizes", "values"])
def test_missing_parts_are_one_clear_error(llama, key):
    values = llama.to_dict()
    del values[key]
    with pytest.raises(ArtifactError, match=key):
        Fingerprint.from_dict(values)
