"""Copying, pickling, compiling, detaching."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from oracles.families import causal
from oracles.peft_pair import TASKS, base, batch
from oracles.weights import weights_hash
from softprompt import PeftModel, PromptTuningConfig, get_peft_model
from softprompt.errors import AdapterError

IDS = torch.tensor([[5, 6, 7, 8]])


def prompted(task, model=None):
    model = model if model is not None else base(task)
    torch.manual_seed(2)
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    return get_peft_model(model, config).eval()


def outputs(model, task):
    return model(**batch(task))[-1 if task == "FEATURE_EXTRACTION" else 0]


@pytest.mark.parametrize("task", TASKS)
def test_a_deep_copy_is_independent(task):
    model = prompted(task)
    expected = outputs(model, task)
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    assert torch.equal(outputs(other, task), expected)
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight[:, ::2].mul_(-1)
    assert torch.equal(outputs(model, task), expected)
    assert not torch.equal(outputs(other, task), expected)
    other.detach()
    assert torch.equal(outputs(model, task), expected)
    assert not any(module._forward_hooks for module in other.base_model.modules())


@pytest.mark.parametrize("task", TASKS)
def test_through_a_pickle(task):
    model = prompted(task)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(outputs(other, task), outputs(model, task))
    assert other.peft_config["default"] == model.peft_config["default"]
    other.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))


def test_state_dict_round_trip():
    model = prompted("CAUSAL_LM")
    state = model.state_dict()
    assert "prompt_encoder.default.embedding.weight" in state
    other = prompted("CAUSAL_LM")
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled(backend):
    model = prompted("CAUSAL_LM")
    expected = model(IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    got = compiled(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(0.5)
    changed = model(IDS).logits
    torch.testing.assert_close(compiled(input_ids=IDS).logits, changed, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, expected)


@pytest.mark.slow
def test_compiled_with_padding():
    """Encoders run padded inside a graph; the lock is left out of it."""
    model, inputs = prompted("SEQ_CLS"), batch("SEQ_CLS")
    expected = outputs(model, "SEQ_CLS")
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager")(**inputs)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_unload_gives_the_base_back(task):
    model = base(task)
    keys, before, expected = list(model.state_dict()), weights_hash(model), outputs(model, task)
    attached = prompted(task, model)
    attached.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))
    attached(**batch(task))
    back = attached.detach()
    assert back is model
    assert list(back.state_dict()) == keys
    assert weights_hash(back) == before
    assert torch.equal(outputs(back, task), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in back.modules())
    assert "prepare_inputs_for_generation" not in vars(back)
    again = prompted(task, back)
    assert again(**batch(task)) is not None


def test_two_prompted_models_on_one_base():
    model = causal("llama")
    expected = model(IDS).logits
    first, second = prompted("CAUSAL_LM", model), prompted("CAUSAL_LM", model)
    with torch.no_grad():
        second.prompt_encoder["default"].embedding.weight.mul_(2)
    alone = prompted("CAUSAL_LM")
    one, two = first(IDS).logits, second(IDS).logits
    assert torch.equal(one, alone(IDS).logits)
    assert not torch.equal(one, two)
    assert torch.equal(first(IDS).logits, one)
    assert torch.equal(model(IDS).logits, expected)
    first.detach()
    assert torch.equal(second(IDS).logits, two)
    assert torch.equal(model(IDS).logits, expected)


def test_two_heads_of_one_name_on_one_base_are_refused():
    """The second would take the first one's head out of its hands."""
    model = base("SEQ_CLS")
    first = prompted("SEQ_CLS", model)
    expected = outputs(first, "SEQ_CLS")
    with pytest.raises(AdapterError, match="'default'"):
        prompted("SEQ_CLS", model)
    assert torch.equal(outputs(first, "SEQ_CLS"), expected)
    first.detach()
    assert isinstance(prompted("SEQ_CLS", model), PeftModel)
