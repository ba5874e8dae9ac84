"""A stored prompt as a configuration, as a value, and beside a base."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from oracles.stored import drawn, folder
from softprompt.artifacts import load_adapter, other_parts
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import PrefixTuningConfig, PromptTuningConfig

SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 2}
BOTH = {"output_model_types": ["ENCODER", "DECODER"]}


@pytest.fixture
def stored(tmp_path):
    return load_adapter(folder(tmp_path / "a", drawn(0, 4)))


def changed(stored, **config):
    return dataclasses.replace(stored, config=stored.config | config)


def test_the_configuration_is_that_of_the_method_and_reads_no_text(stored):
    config = changed(
        stored,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="x",
        tokenizer_name_or_path="gone",
    ).configuration()
    assert type(config) is PromptTuningConfig
    assert (config.inference_mode, config.num_virtual_tokens) == (True, 4)
    prefix = changed(stored, peft_type="PREFIX_TUNING").configuration()
    assert type(prefix) is PrefixTuningConfig


def test_the_submodules_are_those_that_are_run(stored):
    """PEFT writes S = 2 for every seq2seq prompt."""
    plain = changed(stored, **SEQ2SEQ, num_transformer_submodules=2)
    assert plain.configuration().num_transformer_submodules == 1
    assert plain.model_types() == ("ENCODER",)
    both = changed(stored, **SEQ2SEQ, **BOTH, num_transformer_submodules=None)
    assert both.configuration().num_transformer_submodules == 2
    assert both.model_types() == ("ENCODER", "DECODER")
    tasks = changed(stored, **SEQ2SEQ, peft_type="MULTITASK_PROMPT_TUNING", num_tasks=2)
    assert (
        dataclasses.replace(tasks, config=tasks.config | {"num_transformer_submodules": None})
        .configuration()
        .num_transformer_submodules
        == 2
    )


def test_the_prompt_keeps_dtype_and_options(stored):
    half = {"prompt_embeddings": drawn(0, 4).bfloat16()}
    prompt = dataclasses.replace(changed(stored, placement="suffix"), tensors=half).prompt()
    assert (prompt.placement, prompt.input.dtype) == ("suffix", torch.bfloat16)
    assert torch.equal(prompt.input, half["prompt_embeddings"])
    answer = changed(stored, **SEQ2SEQ, output_model_types=["DECODER"]).prompt()
    assert answer.input is None
    assert torch.equal(answer.decoder, drawn(0, 4)[:2])


def test_an_option_that_only_training_reads_does_not_hide_the_prompt(stored):
    newer = changed(stored, some_new_option=3)
    assert torch.equal(newer.prompt().input, drawn(0, 4))
    with pytest.warns(UserWarning, match="some_new_option"):
        assert newer.configuration() == stored.configuration()


def test_a_multitask_prompt_is_no_prompt_before_a_task_is_chosen(stored):
    factors = {"prefix_task_cols": torch.ones(2, 4, 1), "prefix_task_rows": torch.ones(2, 1, 8)}
    tasks = dataclasses.replace(
        changed(stored, peft_type="MULTITASK_PROMPT_TUNING", num_tasks=2, num_ranks=1),
        tensors=stored.tensors | factors,
    )
    with pytest.raises(ArtifactError, match=r"factors of its tasks.*--task-name"):
        tasks.prompt()
    torch.testing.assert_close(tasks.of_task("1").prompt().input, drawn(0, 4))
    with pytest.raises(ConfigError, match=r"holds 2 tasks \(0 to 1\); name the one to convert"):
        tasks.of_task(None)
    alone = dataclasses.replace(tasks, tensors=tasks.tensors | {name: each[:1] for name, each in factors.items()})
    torch.testing.assert_close(alone.of_task(None).prompt().input, drawn(0, 4))


def test_other_parts_are_named():
    assert other_parts(("ENCODER",), ["ENCODER"]) is None
    reason = other_parts(("ENCODER", "DECODER"), ["DECODER"])
    assert reason == ("its virtual tokens stand before the input and the answer, not before the answer")
