"""A tuned prompt under PEFT's interface: one base, one set of parameters."""

import copy
import dataclasses

import pytest
import torch

from oracles.families import tiny
from softprompt import PeftModel, PromptTuningConfig, get_peft_model
from softprompt.backbone import Base
from softprompt.inference import TunedPrompt

IDS = torch.tensor([[3, 7, 9, 11]])


def tuned_of(attached, heads=None):
    """Return the TunedPrompt with the parameters of an attached prompt, which is detached."""
    name = attached.active_adapter
    from softprompt.peft.saving import manifest_of

    manifest = manifest_of(attached, name)
    module, config = attached.encoder_of(name), attached.peft_config[name]
    return TunedPrompt(Base.of(attached.detach()), module, config, manifest, heads=heads)


def test_shares_base_and_parameters():
    first = get_peft_model(tiny("llama"), PromptTuningConfig(num_virtual_tokens=4)).eval()
    expected = first(IDS).logits
    tuned = tuned_of(first)
    model = PeftModel.of(tuned, "again")
    assert type(model) is type(first)
    assert model.base_model is tuned.base.model
    assert model.prompt_encoder["again"] is tuned.module
    assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad():
        tuned.module.embedding.weight.add_(1)
    assert not torch.equal(model(IDS).logits, expected)


def test_saves_what_was_tuned(tmp_path):
    tuned = tuned_of(get_peft_model(tiny("llama"), PromptTuningConfig(num_virtual_tokens=4)))
    tuned.whole = dataclasses.replace(tuned.whole, template="{{text}}!")
    model = PeftModel.of(tuned)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model).detach(), tmp_path)
    assert again.manifests["default"].template == "{{text}}!"
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_heads_come_along(dtype):
    base = tiny("llama").to(dtype)
    head = copy.deepcopy(base.lm_head).float()
    with torch.no_grad():
        head.weight.mul_(-1)
    config = PromptTuningConfig(num_virtual_tokens=4, modules_to_save=["lm_head"])
    first = get_peft_model(base, config).eval()
    with torch.no_grad():
        first.base_model.lm_head.modules_to_save["default"].weight.mul_(-1)
    expected = first(IDS).logits
    model = PeftModel.of(tuned_of(first, {"lm_head": head}))
    assert model.base_model.lm_head.modules_to_save["default"] is head
    assert torch.equal(model(IDS).logits, expected)
