"""The table a prompt starts from, for every part of a model it feeds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oracles.tokenizers import byte_bpe
from softprompt import MultitaskPromptTuningConfig, PromptTuningConfig
from softprompt.errors import ConfigError
from softprompt.prompts import PeftConfig, PromptLearningConfig, build_prompt

H = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a configuration's options for TEXT, and the token ids of that text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_bpe()
    tokenizer.save_pretrained(folder)
    words = "is it good or bad"
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": words,
        "tokenizer_name_or_path": str(folder),
        "num_virtual_tokens": 3,
    }
    return options, tokenizer(words)["input_ids"]


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(320, H)


@pytest.mark.parametrize("kind", [PromptTuningConfig, MultitaskPromptTuningConfig])
def test_encoder_and_decoder_start_at_the_same_text(kind, text, table):
    options, ids = text
    rows = build_prompt(kind(**options, num_transformer_submodules=2), table).materialize()
    start = table.weight[[ids[i % len(ids)] for i in range(3)]]
    assert torch.equal(rows, torch.cat([start, start]))


def test_a_parameterised_prompt_starts_at_the_text(text, table):
    options, ids = text
    config = PromptTuningConfig(**options, parameterization="residual")
    expected = table.weight[[ids[i % len(ids)] for i in range(3)]]
    assert torch.equal(build_prompt(config, table).materialize(), expected)


def test_what_no_module_belongs_to_is_refused(table):
    with pytest.raises(ConfigError, match="expected the configuration of a prompt, got a PromptLearn"):
        build_prompt(PromptLearningConfig(num_virtual_tokens=3), table)
    with pytest.raises(ConfigError, match="got a PeftConfig"):
        build_prompt(PeftConfig(), table)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig", "CPTConfig"])
def test_sizes_that_do_not_fit_the_base_are_refused(name, table):
    import softprompt

    length = {"task_type": "CAUSAL_LM"} if name == "CPTConfig" else {"num_virtual_tokens": 3}
    config = getattr(softprompt, name)(**length, token_dim=9)
    with pytest.raises(ConfigError, match="token_dim is 9, but the base's embeddings are 8 wide"):
        build_prompt(config, table)
