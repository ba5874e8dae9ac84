import pytest
import torch

from oracles.families import seq2seq
from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.errors import ConfigError
from softprompt.prompts import build_prompt

BOTH = ["ENCODER", "DECODER"]


def prompt(types, task="SEQ_2_SEQ_LM", submodules=1):
    """The prompt that rows 0, 1, 2, ... are for a configuration, and their first column by parts."""
    config = PromptTuningConfig(
        task_type=task,
        num_virtual_tokens=2,
        token_dim=3,
        num_transformer_submodules=submodules,
        output_model_types=types,
    )
    module = build_prompt(config, torch.nn.Embedding(7, 3))
    with torch.no_grad():
        module.embedding.weight.copy_(torch.arange(2.0 * submodules)[:, None])
    made = module.prompt()
    return [None if part is None else part[:, 0].tolist() for part in (made.input, made.decoder)]


@pytest.mark.parametrize(
    ("types", "task", "submodules", "expected"),
    [
        (None, "CAUSAL_LM", 1, [[0, 1], None]),
        (["DECODER"], "CAUSAL_LM", 1, [[0, 1], None]),
        (None, "SEQ_2_SEQ_LM", 1, [[0, 1], None]),
        (["ENCODER"], "SEQ_2_SEQ_LM", 1, [[0, 1], None]),
        (["DECODER"], "SEQ_2_SEQ_LM", 1, [None, [0, 1]]),
        (BOTH, "SEQ_2_SEQ_LM", 2, [[0, 1], [2, 3]]),
        (BOTH[::-1], "SEQ_2_SEQ_LM", 2, [[0, 1], [2, 3]]),
    ],
)
def test_the_first_half_is_the_encoders(types, task, submodules, expected):
    assert prompt(types, task, submodules) == expected


def test_keys_and_values_stay_whole():
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    made = get_peft_model(seq2seq("t5"), config).encoder_of("default").prompt()
    assert made.input is made.decoder is None
    assert made.prefix.dim() == 5 and made.tokens == made.prefix_tokens == 4


def test_the_parts_of_a_model_need_the_task_that_reads_both():
    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2, output_model_types=BOTH)
    with pytest.raises(ConfigError, match="needs task_type SEQ_2_SEQ_LM"):
        get_peft_model(seq2seq("t5"), config)
