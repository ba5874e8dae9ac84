"""A fingerprint tells bases apart by their weights, whatever they are called."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, ENCODERS, SEQ2SEQ, build, causal, seq2seq
from oracles.slow import only
from softprompt.backbone import Fingerprint
from softprompt.errors import ArtifactError


@pytest.fixture(scope="module")
def llama():
    return Fingerprint.of(causal("llama"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", only(["llama", "gpt2", "t5"], ["llama", "gpt2", "t5", "gemma"]))
def test_another_dtype_is_the_same_base(name, dtype):
    make = causal if name in CAUSAL else seq2seq
    assert Fingerprint.of(make(name)).matches(Fingerprint.of(make(name).to(dtype)))
    assert Fingerprint.of(make(name).to(dtype)).matches(Fingerprint.of(make(name)))


@pytest.mark.parametrize("name", only(["gpt2", "llama", "mixtral", "gemma3", "t5", "bart"], [*CAUSAL, *SEQ2SEQ]))
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
    assert not llama.matches(Fingerprint.of(causal("llama", hidden_size=16)))


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


def test_more_tokens_are_the_same_base():
    model = causal("llama")
    before = Fingerprint.of(model)
    model.resize_token_embeddings(72)
    grown = Fingerprint.of(model)
    assert before.matches(grown)
    assert grown.matches(before)
    assert before.stored_otherwise(grown) == "72 tokens instead of 64"
    other = causal("llama", seed=1)
    other.resize_token_embeddings(72)
    assert not before.matches(Fingerprint.of(other))


def test_other_embeddings_in_a_table_of_another_size_are_another_base():
    model = causal("llama")
    before = Fingerprint.of(model)
    model.resize_token_embeddings(72)
    with torch.no_grad():
        model.get_input_embeddings().weight[:64].mul_(1.5)
    assert not before.matches(Fingerprint.of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_base_is_another_base(dtype):
    """Steps of fine-tuning move weights further than bfloat16 rounds them."""
    model = causal("llama")
    before = Fingerprint.of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(32).reshape(2, 16)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert not before.matches(Fingerprint.of(model.to(dtype)))


def _four_bits(weight):
    """Round to 16 levels in blocks of 32, as 4-bit files do."""
    blocks = weight.reshape(-1, 16)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_read_from_a_quantised_file_are_the_same_base(name):
    """As GGUF is loaded: floating point, all of it rounded, which the config says."""
    before, model = Fingerprint.of(causal(name)), causal(name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(_four_bits(weight))
    assert not before.matches(Fingerprint.of(model))
    model.config.quantization_config = {"quant_method": "gguf"}
    assert before.matches(Fingerprint.of(model))
    other = causal(name, seed=1)
    other.config.quantization_config = {"quant_method": "gguf"}
    assert not before.matches(Fingerprint.of(other))


def _saved(tmp_path, seed=0):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    model = causal("llama", seed=seed, **sizes)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(1, 0.1)
    model.save_pretrained(tmp_path)
    return model


def _quantisation(kind):
    if kind == "torchao":
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig

        return tf.TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return tf.BitsAndBytesConfig(load_in_4bit=kind == "4-bit", load_in_8bit=kind == "8-bit")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["4-bit", "8-bit", "torchao"])
def test_a_quantised_base_is_the_same_base(kind, tmp_path):
    settings = _quantisation(kind)
    model = _saved(tmp_path)
    before = Fingerprint.of(model)
    quantised = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=settings)
    bits = {name: str(weight) for name, weight in quantised.named_parameters()}
    now = Fingerprint.of(quantised)
    assert {name: str(weight) for name, weight in quantised.named_parameters()} == bits
    assert not any(math.isnan(value) for value in now.values[: -len(now.values) // 8])
    assert before.matches(now)
    assert now.matches(before)
    assert before.stored_otherwise(now) == "other layers quantised"
    with torch.no_grad():
        quantised(input_ids=torch.arange(8)[None])  # packs 4-bit weights on some processors
    assert before.matches(Fingerprint.of(quantised))
    assert Fingerprint.from_dict(json.loads(json.dumps(now.to_dict()))) == now
    tuned = _saved(tmp_path / "tuned")
    with torch.no_grad():
        tuned.model.layers[1].input_layernorm.weight.mul_(1.02)
    assert not Fingerprint.of(tuned).matches(now)
    assert not Fingerprint.of(_saved(tmp_path / "other", seed=1)).matches(now)


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_base_is_the_same_base(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    before = Fingerprint.of(_saved(tmp_path / "model"))
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(weight.is_meta for weight in offloaded.parameters())
    assert Fingerprint.of(offloaded) == before
    assert any(weight.is_meta for weight in offloaded.parameters())


def test_a_model_without_weights_is_not_another_base(llama):
    with torch.device("meta"):
        model = causal("llama")
    unknown = Fingerprint.of(model)
    assert llama.matches(unknown)
    assert llama.stored_otherwise(unknown) == "weights that cannot be compared"
    assert not llama.matches(Fingerprint("llama", (64, 8, 1, 2), unknown.values, unknown.names))


def test_a_fingerprint_of_an_earlier_version(llama):
    """It has the matrices alone, evenly spaced places of tables too, and no names."""
    model = causal("llama")
    state = dict(model.base_model.named_parameters())
    names = sorted(name for name, weight in state.items() if weight.dim() > 1)
    count = min(len(names), max(16, 2 * model.config.num_hidden_layers))
    values = []
    for name in [names[i * len(names) // count] for i in range(count)]:
        flat = state[name].detach().reshape(-1)
        values += flat[torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long()].tolist()
    recorded = {"model_type": "llama", "sizes": list(llama.sizes), "values": values, "short": "0123456789ab"}
    old = Fingerprint.from_dict(recorded)
    assert old.matches(llama)
    assert llama.matches(old)
    assert old.matches(old)
    model.resize_token_embeddings(72)
    assert old.matches(Fingerprint.of(model))
    assert not old.matches(Fingerprint.of(causal("llama", seed=1)))
    assert not old.matches(Fingerprint.from_dict({**recorded, "values": values[::-1]}))


def test_bases_of_no_known_kind_have_a_fingerprint():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tf.PretrainedConfig()
            self.lin = torch.nn.Linear(4, 4)

    torch.manual_seed(0)
    first, second = Odd(), Odd()
    assert Fingerprint.of(first).matches(Fingerprint.of(first))
    assert not Fingerprint.of(first).matches(Fingerprint.of(second))
