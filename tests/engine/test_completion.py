"""What a base adds to a configuration, and what it refuses of it, without any prompt attached."""

import pytest
import transformers as tf

from oracles.families import build, causal, seq2seq
from softprompt.backbone import Base
from softprompt.engine import completed, infer_task
from softprompt.errors import BackboneError, ConfigError
from softprompt.prompts import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)


def test_sizes_and_task_come_from_the_base():
    base = Base.of(causal("llama"))
    given = PromptTuningConfig(num_virtual_tokens=4)
    config = completed(given, base)
    assert config.task_type is TaskType.CAUSAL_LM
    assert config.num_transformer_submodules == 1
    assert config.token_dim == base.facts.token_dim
    assert (config.num_layers, config.num_attention_heads) == (
        base.facts.num_layers,
        base.facts.num_attention_heads,
    )
    assert (given.task_type, given.token_dim) == (None, None)
    assert completed(config, base) == config


def test_keys_and_values_have_the_sizes_of_the_layers():
    base = Base.of(causal("llama"))
    config = completed(PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True), base)
    shape = base.key_value_shape
    assert config.num_attention_heads == shape.heads
    assert config.token_dim == config.encoder_hidden_size == shape.heads * shape.width


def test_a_multitask_prompt_feeds_encoder_and_decoder():
    config = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2)
    assert completed(config, Base.of(seq2seq("t5"))).num_transformer_submodules == 2


@pytest.mark.parametrize("method", [PromptTuningConfig, PromptEncoderConfig])
def test_pefts_two_submodules_of_a_seq2seq_model_are_the_one_that_is_read(method):
    config = method(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=2)
    done = completed(config, Base.of(seq2seq("t5")))
    assert (done.num_transformer_submodules, done.model_types()) == (1, ("ENCODER",))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptTuningConfig(num_virtual_tokens=4, token_dim=7), "token_dim is 7"),
        (PrefixTuningConfig(num_virtual_tokens=4, num_layers=9), "num_layers is 9"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_sees_input=False),
            "would be ignored",
        ),
        (PromptTuningConfig(num_virtual_tokens=4, num_transformer_submodules=2), "nothing reads"),
    ],
)
def test_what_does_not_fit_a_base(config, words):
    with pytest.raises(ConfigError, match=words):
        completed(config, Base.of(causal("llama")))


def test_what_does_not_fit_the_other_prompts_or_the_class():
    base = Base.of(causal("llama"))
    first = completed(PromptTuningConfig(num_virtual_tokens=4), base)
    with pytest.raises(ConfigError, match="are prefixes or none is"):
        completed(PrefixTuningConfig(num_virtual_tokens=4), base, shared=first)
    with pytest.raises(ConfigError, match="share its task_type CAUSAL_LM"):
        other = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
        completed(other, base, shared=first)
    with pytest.raises(ConfigError, match="the model's class takes task_type SEQ_CLS"):
        completed(PromptTuningConfig(num_virtual_tokens=4), base, own=TaskType.SEQ_CLS)


def test_a_base_without_equal_keys_and_values():
    sizes = tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    base = Base.of(build(tf.AutoModelForCausalLM, sizes))
    with pytest.raises(BackboneError):
        completed(PrefixTuningConfig(num_virtual_tokens=4), base)


def test_the_task_of_a_class_name():
    assert infer_task(causal("gpt2")) is TaskType.CAUSAL_LM
    assert infer_task(seq2seq("t5")) is TaskType.SEQ_2_SEQ_LM
    with pytest.raises(ConfigError, match="does not tell it"):
        infer_task(object())
