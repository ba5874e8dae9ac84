"""Prompts for a language model in 4 and 8 bits: trained, its weights left alone, saved and loaded."""

from __future__ import annotations

import importlib.util
import warnings

import peft
import pytest
import torch
import transformers as tf

import softprompt
from oracles.real_model import smollm2
from oracles.serving import command_serving, greedy_alone, greedy_over_http, write_prompt
from oracles.trainer import SHORT
from softprompt import PromptTuningConfig, get_peft_model
from softprompt.backbone import Base, load_base
from softprompt.bundled import model_directory
from softprompt.errors import TrainingError

RECORDS = [
    {"input": "my parcel is lost again", "output": "complaint"},
    {"input": "what a lovely day", "output": "no complaint"},
]
WRITER = {"task": "generation", "labels": None, "template": "{{input}}"}
TEXTS = ["The kettle broke", "What time do you open on Sunday, and", "It is"]
KINDS = ("4-bit", "8-bit", "int8")
PACKAGE = {"4-bit": "bitsandbytes", "8-bit": "bitsandbytes", "int8": "torchao"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


def config_of(kind, **options):
    package = PACKAGE[kind]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: run make test-extra")
    if kind == "4-bit":
        return tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    if kind == "8-bit":
        return tf.BitsAndBytesConfig(load_in_8bit=True, **options)
    from torchao.quantization import Int8WeightOnlyConfig

    return tf.TorchAoConfig(Int8WeightOnlyConfig())


def loaded(kind, folder=None, **options):
    """Return SmolLM2, or the model of another folder, quantised."""
    options = {"device_map": "cpu", "quantization_config": config_of(kind), **options}
    folder = folder or smollm2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return Base(model, tf.AutoTokenizer.from_pretrained(folder), str(folder))


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    return loaded(request.param)


def bits(model):
    """Return every tensor behind the model's weights, whatever they are wrapped in."""
    found = {}
    for name, weight in model.named_parameters():
        inner = getattr(weight, "__tensor_flatten__", None)
        parts = {"": weight.data} if inner is None else {part: getattr(weight, part) for part in inner()[0]}
        found |= {
            f"{name} {part}": value.clone() for part, value in parts.items() if isinstance(value, torch.Tensor)
        }
        scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
        if scales is not None:
            found[f"{name} absmax"] = scales.clone()
    return found


def gradient_of(model, values):
    """Return the prompt's gradient in a peft model, ours or PEFT's."""
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(values)
    ids = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30]])
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    return weight.grad.clone()


def test_a_prompt_is_trained_saved_and_loaded_and_no_bit_of_the_base_changes(base, tmp_path):
    before = bits(base.model)
    tuned = softprompt.tune(
        base,
        RECORDS,
        RECORDS,
        num_epochs=2,
        batch_size=2,
        learning_rate=0.01,
        tuning_config={"num_virtual_tokens": 4},
        output=tmp_path / "prompt",
        silence_progress_bars=True,
    )
    assert tuned.history[1]["loss"] < tuned.history[0]["loss"]
    again = softprompt.load(tmp_path / "prompt", base.model, tokenizer=base.tokenizer, ignore_fingerprint=True)
    text = RECORDS[0]["input"]
    labels = [record["output"] for record in RECORDS]
    assert again.classify([text], labels)[0].scores == tuned.classify([text], labels)[0].scores
    after = bits(base.model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_gradient_is_pefts(base):
    values = torch.randn(4, base.facts.token_dim, generator=torch.Generator().manual_seed(0)) * 0.1
    theirs = peft.get_peft_model(
        base.model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).train()
    expected = gradient_of(theirs, values)
    ours = get_peft_model(base.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    got = gradient_of(ours, values)
    assert expected.norm() > 0.1
    assert float((got - expected).norm() / expected.norm()) < 1e-3


def test_a_base_that_was_packed_before_is_refused():
    base = loaded("4-bit")
    with torch.no_grad():
        base.model(input_ids=torch.tensor([[1, 2, 3]]))
    states = [getattr(m.weight, "quant_state", None) for m in base.model.modules() if hasattr(m, "quant_state")]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes packs nothing on this CPU (no AVX512-BF16)")
    with pytest.raises(TrainingError, match="does not pass on the gradient of a prompt"):
        softprompt.tune(base, RECORDS, num_epochs=1, silence_progress_bars=True)


def places(layers):
    """Return a device map with every second layer of a Llama on disk."""
    found = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    return found | {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(layers)}


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_quantised_where_it_is_not_offloaded(kind, tmp_path):
    """bitsandbytes keeps in 32 bits what a device map leaves to the CPU and the disk: without a GPU, all."""
    layers = tf.AutoConfig.from_pretrained(model_directory()).num_hidden_layers
    config = config_of(kind, llm_int8_enable_fp32_cpu_offload=True)
    options = {"device_map": places(layers), "offload_folder": tmp_path / "layers", "quantization_config": config}
    base = loaded(kind, model_directory(), **options)
    assert any(weight.is_meta for weight in base.model.parameters())
    tuned = tuned_on(base, tmp_path / "prompt")
    again = softprompt.load(tmp_path / "prompt", "demo")  # the same model, neither quantised nor offloaded
    assert again("my parcel is lost again") == tuned("my parcel is lost again")


def test_int8_offloaded(tmp_path):
    """Its quantised layers come from the CPU's memory for each pass, and leave again."""
    from accelerate import cpu_offload

    whole, offloaded = loaded("int8", model_directory()), loaded("int8", model_directory())
    cpu_offload(offloaded.model, torch.device("cpu"))
    assert any(weight.is_meta for weight in offloaded.model.parameters())
    values = [tuned_on(base, tmp_path / str(i)).prompt().input for i, base in enumerate((whole, offloaded))]
    torch.testing.assert_close(*values, atol=1e-4, rtol=0)
    loaded_again = softprompt.load(tmp_path / "1", offloaded.model, tokenizer=offloaded.tokenizer)
    on_the_whole = softprompt.load(tmp_path / "1", whole.model, tokenizer=whole.tokenizer)
    assert loaded_again("my parcel is lost again") == on_the_whole("my parcel is lost again")


def test_what_loses_its_scales_before_backward_is_refused(tmp_path):
    """An offloaded 8-bit layer of bitsandbytes takes no backward, from nobody."""
    from accelerate import cpu_offload

    base = loaded("8-bit", model_directory())
    cpu_offload(base.model, torch.device("cpu"))
    with pytest.raises(TrainingError, match="does not pass on the gradient of a prompt: backward raises Attr"):
        tuned_on(base, tmp_path / "prompt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_folder_is_served(kind, tmp_path):
    """Each request of a mixed batch gets what the base, quantised as its files say, generates for it alone.

    But in 8 bits: bitsandbytes rounds what enters a layer by what else is in the batch, so near ties may turn.
    """
    quantised = loaded(kind, model_directory())
    quantised.model.save_pretrained(tmp_path / "base")
    quantised.tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base")
    assert getattr(base.model, "hf_quantizer", None) is not None
    folders = [write_prompt(tmp_path / "prompts" / f"writer{seed}", base, seed=seed, **WRITER) for seed in (1, 2)]
    before = bits(base.model)
    with command_serving(tmp_path / "base", tmp_path / "prompts") as server:
        found = greedy_over_http(server.url, TEXTS, [folder.name for folder in folders])
        served = server.app.state.service.registry.base.model
        assert [name for name, value in bits(served).items() if not torch.equal(value, before[name])] == []
    expected = greedy_alone(base, folders, TEXTS)
    equal = sum(ours == alone for ours, alone in zip(found, expected, strict=True))
    assert equal >= (len(expected) // 2 if kind == "8-bit" else len(expected))


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_trainer_as_with_peft(kind, tmp_path):
    rows = []
    for text in (*TEXTS, "my parcel is lost again"):
        ids = tf.AutoTokenizer.from_pretrained(model_directory())(text).input_ids[:4]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    rows = [row for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])] * 2
    losses = []
    for library in (peft, softprompt):
        torch.manual_seed(0)
        model = library.get_peft_model(
            loaded(kind, model_directory()).model,
            library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        )
        model.prompt_encoder["default"].embedding.weight.data.mul_(0.1)
        options = tf.TrainingArguments(str(tmp_path), **SHORT, save_strategy="no", logging_steps=1)
        trainer = tf.Trainer(model, options, train_dataset=rows)
        trainer.train()
        losses.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
    assert len(losses[0]) > 1
    assert losses[1] == pytest.approx(losses[0], abs=2e-3 if kind == "4-bit" else 0.05)


def tuned_on(base, output):
    return softprompt.tune(
        Base(base.model, base.tokenizer, "demo"),
        RECORDS,
        num_epochs=1,
        batch_size=2,
        learning_rate=0.01,
        tuning_config={"num_virtual_tokens": 4},
        output=output,
        silence_progress_bars=True,
    )
