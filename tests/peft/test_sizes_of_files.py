"""A configuration that came in a file cannot ask for a module larger than its base."""

import json

import pytest

from oracles.families import causal
from softprompt import PeftConfig, PromptEncoderConfig, get_peft_model
from softprompt.errors import ConfigError

P = 4
BIG = {
    "an MLP": {"peft_type": "P_TUNING", "encoder_hidden_size": 12_000},
    "an LSTM": {"peft_type": "P_TUNING", "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 3_000},
    "layers of an LSTM": {
        "peft_type": "P_TUNING",
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 20_000,
    },
    "a projection": {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 1 << 20},
    "virtual tokens": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1 << 30},
    "a cartridge": {"peft_type": "CARTRIDGE", "num_virtual_tokens": 1 << 30},
    "a prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 1 << 20},
    "tasks": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 1 << 24, "num_ranks": 1},
    "mixed embeddings": {
        "peft_type": "EXTENDED_PROMPT_TUNING",
        "parameterization": "superpos",
        "parameterization_rank": 1 << 24,
    },
}


def read(folder, **values):
    values = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P, **values}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize("revision", [None, "main"])
@pytest.mark.parametrize("values", BIG.values(), ids=BIG)
def test_more_numbers_than_the_base_has_are_refused_before_they_are_made(tmp_path, monkeypatch, values, revision):
    config = read(tmp_path, **values)
    monkeypatch.setattr(type(config), "build", lambda *_: pytest.fail("it is built"))
    with pytest.raises(ConfigError, match="numbers, more than its base: lower"):
        get_peft_model(causal("llama"), config, revision=revision)


def test_what_is_smaller_or_a_users_own_is_built(tmp_path, monkeypatch):
    for hidden in (None, 256):
        get_peft_model(causal("llama"), read(tmp_path, peft_type="P_TUNING", encoder_hidden_size=hidden))
    own = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=5_000)
    assert get_peft_model(causal("llama"), own).get_nb_trainable_parameters()[0] > 25_000_000
    monkeypatch.setenv("SOFTPROMPT_MAX_PROMPT_BYTES", str(1 << 30))
    get_peft_model(causal("llama"), read(tmp_path, peft_type="P_TUNING", encoder_hidden_size=5_000))
