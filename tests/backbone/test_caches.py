"""A base may name its cache as transformers does now, or as it did before 5.24; a caller may too."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from oracles.caches import CACHE
from oracles.families import causal
from softprompt.backbone import Base, cache_in, cached_tokens, key_values, with_cache, without_cache
from softprompt.engine import build_engine

IDS = [5, 6, 7]


class Older(LlamaForCausalLM):
    """A model of its own code, written for an older transformers."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **{CACHE: past_key_values}, **kwargs)


def filled():
    return causal("llama")(torch.tensor([IDS]), use_cache=True)[CACHE]


def test_a_model_of_its_own_code_gets_its_cache_by_the_name_it_has_there():
    model, cache = causal("llama"), DynamicCache()
    older = Older(model.config)
    older.load_state_dict(model.state_dict())
    torch.testing.assert_close(key_values(older, IDS), key_values(model, IDS), rtol=0, atol=0)
    inputs = {"input_ids": IDS, "cache": None, "past_key_values": None}
    assert with_cache(older, inputs, cache) == {"input_ids": IDS, "past_key_values": cache}
    assert with_cache(model, inputs, cache) == {"input_ids": IDS, CACHE: cache}
    assert build_engine(Base(older), "expand").name == "expand"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_caller_may_use_either_name(name):
    cache = filled()
    assert cache_in({name: cache}) is cache and cached_tokens({name: cache, "use_cache": True}) == len(IDS)
    assert cache_in({name: None}) is None and cached_tokens({"use_cache": True}) == 0


def test_recurrent_states_do_not_say_what_they_have_seen():
    config = MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    output = MambaForCausalLM(config)(torch.tensor([IDS]), use_cache=True)
    cache = output["cache" if CACHE == "cache" else "cache_params"]
    assert cached_tokens({CACHE: cache}) == 0


def test_an_output_without_its_cache_keeps_the_rest():
    output = causal("llama")(torch.tensor([IDS]), use_cache=True)
    bare = without_cache(output)
    assert list(bare) == ["logits"] and bare.logits is output.logits and cache_in(output) is not None
