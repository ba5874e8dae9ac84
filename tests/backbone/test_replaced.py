"""Trained copies of the base's modules, for the passes inside a context."""

import copy

import pytest
import torch

from oracles.families import causal
from softprompt.backbone import Base, replaced_modules
from softprompt.errors import ConfigError

IDS = torch.tensor([[1, 5, 9, 4]])


def trained(model):
    head = copy.deepcopy(model.lm_head).float()
    with torch.no_grad():
        head.weight.add_(torch.randn_like(head.weight))
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_copy_runs_in_its_own_dtype_and_leaves_nothing_behind(dtype):
    model = causal("llama").to(dtype)
    base, head = Base.of(model), trained(model)
    before, modules = model(IDS).logits, list(model.named_modules())
    with replaced_modules(base, {"lm_head": head}):
        inside = model(IDS).logits
        assert torch.equal(model.get_output_embeddings().weight, head.weight)
        states = model.model(IDS).last_hidden_state
    assert inside.dtype == dtype
    assert torch.equal(inside, head(states.float()).to(dtype))
    assert not torch.equal(inside, before)
    assert torch.equal(model(IDS).logits, before)
    assert list(model.named_modules()) == modules


def test_an_error_inside_gives_the_module_back():
    model = causal("llama")
    own = model.lm_head
    with pytest.raises(KeyError), replaced_modules(Base.of(model), {"lm_head": trained(model)}):
        raise KeyError
    assert model.lm_head is own


def test_a_path_the_base_lacks():
    model = causal("llama")
    own = model.lm_head
    modules = {"lm_head": trained(model), "score": torch.nn.Linear(2, 2)}
    with (
        pytest.raises(ConfigError, match="has no module 'score'"),
        replaced_modules(Base.of(model), modules),
    ):
        pass
    assert model.lm_head is own
