"""Encoders without padding: outputs at real columns and gradients are those of the padded run."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, ENCODERS, ROTARY_ENCODERS, SEQ2SEQ, build
from oracles.naive import padded
from oracles.slow import only
from softprompt import PromptTuningConfig, get_peft_model
from softprompt.backbone import Base
from softprompt.engine import packs
from softprompt.engine.forest import encoder
from softprompt.engine.forest.encoder import why_not_packed
from softprompt.engine.forest.layers import Packing
from softprompt.peft import inputs as peft_inputs

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ALL = {**ENCODERS, **ROTARY_ENCODERS}
ROWS = [list(range(5, 25)), [11, 2], list(range(21, 33))]
P = 5
LOADERS = {
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": tf.AutoModel,
}


def prompted(name, task, **config):
    extra = {} if task == "FEATURE_EXTRACTION" else {"num_labels": 3}
    base = build(LOADERS[task], ALL[name](), **extra)
    torch.manual_seed(1)
    return get_peft_model(base, PromptTuningConfig(task_type=task, num_virtual_tokens=P, **config)).eval()


def batch(task, side="right"):
    ids, mask = padded(ROWS, side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 2, 1])
    if task == "TOKEN_CLS":
        inputs["labels"] = (ids % 3).masked_fill(mask == 0, -100)
    return inputs


def run(model, inputs, packed, monkeypatch):
    """Return real outputs, loss and prompt gradient; count the passes that were packed."""
    passes = []

    def counted(*args):
        passes.append(1)
        return encoder.without_padding(*args)

    with monkeypatch.context() as patch:
        patch.setattr(peft_inputs, "without_padding", counted)
        if not packed:
            patch.setattr(peft_inputs, "packs", lambda *_, **__: False)
        output = model(**inputs)
    assert len(passes) == packed
    values = output[1 if "labels" in inputs else 0]
    if values.dim() == 3:
        mask = inputs["attention_mask"].bool()
        if inputs["input_ids"][1, 0] == 0:  # left padding stands before the prompt
            real = torch.cat([mask[:, :1].new_zeros(len(mask), P) | mask[:, :1], mask], dim=1)
            real[:, :P] = False  # the text alone
        else:
            real = torch.cat([mask.new_ones(len(mask), P), mask], dim=1)
        values = values[real]
    loss = output.loss if "labels" in inputs else values.square().mean()
    weight = model.prompt_encoder["default"].embedding.weight
    return values, loss, torch.autograd.grad(loss, weight)[0]


def same(model, inputs, monkeypatch):
    ours = run(model, inputs, True, monkeypatch)
    for got, expected in zip(ours, run(model, inputs, False, monkeypatch), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("task", LOADERS)
@pytest.mark.parametrize("name", only(["bert", "roberta", "modernbert", "jina_v3"], ALL))
def test_equal_to_the_padded_run(name, task, monkeypatch):
    same(prompted(name, task), batch(task), monkeypatch)


@pytest.mark.parametrize("name", ["bert", "modernbert", "eurobert"])
def test_left_padding(name, monkeypatch):
    same(prompted(name, "TOKEN_CLS"), batch("TOKEN_CLS", "left"), monkeypatch)


def test_windows_are_honoured(monkeypatch):
    """A window of 4 tokens to each side hides most of a row of 25."""
    model = prompted("modernbert", "FEATURE_EXTRACTION")
    inputs = batch("FEATURE_EXTRACTION")
    same(model, inputs, monkeypatch)
    values = run(model, inputs, True, monkeypatch)[0]
    model.base_model.config.sliding_window = 100
    assert (run(model, inputs, True, monkeypatch)[0] - values).abs().max() > 1e-4


def test_a_mask_with_gaps(monkeypatch):
    """Relative positions and windows count columns, real or not."""
    inputs = batch("FEATURE_EXTRACTION")
    inputs["attention_mask"][0, 3:9] = 0
    for model in (
        prompted("modernbert", "FEATURE_EXTRACTION"),
        prompted("eurobert", "FEATURE_EXTRACTION"),
    ):
        real = torch.cat([torch.ones(3, P).bool(), inputs["attention_mask"].bool()], dim=1)
        got = model(**inputs).last_hidden_state[real]
        with monkeypatch.context() as patch:
            patch.setattr(peft_inputs, "packs", lambda *_, **__: False)
            torch.testing.assert_close(got, model(**inputs).last_hidden_state[real], **CLOSE)


def test_t5_encoder(monkeypatch):
    base = build(tf.AutoModelForTokenClassification, SEQ2SEQ["t5"](), num_labels=3)
    model = get_peft_model(base, PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=P)).eval()
    same(model, batch("TOKEN_CLS"), monkeypatch)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_checkpointed(name, reentrant, monkeypatch):
    model = prompted(name, "SEQ_CLS")
    expected = run(model, batch("SEQ_CLS"), True, monkeypatch)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(model.base_model.config, key):
            setattr(model.base_model.config, key, 0.0)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    weight = model.prompt_encoder["default"].embedding.weight
    weight.grad = None
    loss = model.train()(**batch("SEQ_CLS")).loss
    loss.backward()
    torch.testing.assert_close(weight.grad, expected[2], **CLOSE)


def test_padding_has_the_heads_answer_to_zeros():
    model = prompted("bert", "TOKEN_CLS")
    inputs = batch("TOKEN_CLS")
    pads = model(**inputs).logits[:, P:][inputs["attention_mask"] == 0]
    head = model.base_model.classifier.modules_to_save["default"]
    torch.testing.assert_close(pads, head.bias.expand_as(pads), **CLOSE)


def test_padded_where_padding_is_read():
    model = prompted("bert", "TOKEN_CLS").base_model
    inputs = batch("TOKEN_CLS")
    assert packs(Base(model), inputs)
    assert not packs(Base(model), inputs | {"labels": inputs["input_ids"] % 3})
    assert not packs(Base(model), inputs | {"output_hidden_states": True})
    assert not packs(Base(model), inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})


@pytest.mark.parametrize(
    ("loader", "config", "reason"),
    [
        (tf.AutoModelForSequenceClassification, CAUSAL["llama"], "fills a cache"),
        (tf.AutoModelForCausalLM, CAUSAL["gpt2"], "no encoder"),
        (tf.AutoModel, SEQ2SEQ["bart"], "no encoder"),
    ],
)
def test_decoders_are_left_alone(loader, config, reason):
    assert reason in why_not_packed(Base(build(loader, config())))


def test_a_shared_packing_keeps_each_prompt_row_once():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    slot = torch.tensor([[0, 1, -1, -1], [2, -1, -1, -1], [-1, 0, 1, -1]])
    packing = Packing.sharing(mask, slot)
    values = torch.arange(12.0).view(3, 4, 1)
    stream = packing.packed(values)[0, :, 0].tolist()
    assert stream == [0, 1, 2, 4, 5, 6, 7, 11]  # row 2 has the prompt of row 0
    back = packing.unpacked(packing.packed(values))[..., 0].tolist()
    assert back == [[0, 1, 2, 0], [4, 5, 6, 7], [0, 0, 1, 11]]
