"""A script for PEFT and TRL's SFTTrainer runs with the import changed: wrapped, and by ``peft_config``."""

from __future__ import annotations

import copy

import datasets
import peft
import pytest
import torch
import transformers as tf

import softprompt
from oracles.tokenizers import byte_bpe
from oracles.trainer import SHORT

trl = pytest.importorskip("trl", reason="trl is not installed; it is in the dev extra")

P = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:trl"),
]


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_bpe()
    found.pad_token = found.pad_token or found.eos_token
    return found


def base(tokenizer):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tf.LlamaForCausalLM(config)


def data():
    rows = [{"prompt": f"say {i}", "completion": f" it is {i * i}"} for i in range(8)]
    return datasets.Dataset.from_list(rows)


def fine_tune(library, how, method, tokenizer, folder, *, callbacks=(), resume=None, **options):
    """Run the script with a library; return the trainer and what it measured."""
    config = getattr(library, method)(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model, extra = base(tokenizer), {"peft_config": config}
    torch.manual_seed(1)
    if how == "wrapped":
        model, extra = library.get_peft_model(model, config), {}
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder), **{**SHORT, "bf16": False, "save_strategy": "epoch", **options}),
        train_dataset=data(),
        eval_dataset=data(),
        processing_class=copy.deepcopy(tokenizer),
        callbacks=list(callbacks),
        **extra,
    )
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    return trainer, {"train_loss": loss, **trainer.evaluate()}


@pytest.mark.parametrize(
    ("method", "how"),
    [
        pytest.param("PromptTuningConfig", "wrapped", marks=pytest.mark.slow),
        ("PrefixTuningConfig", "peft_config"),
        pytest.param("PromptEncoderConfig", "wrapped", marks=pytest.mark.slow),
        pytest.param("PromptTuningConfig", "peft_config", marks=pytest.mark.slow),
        pytest.param("PrefixTuningConfig", "wrapped", marks=pytest.mark.slow),
        pytest.param("PromptEncoderConfig", "peft_config", marks=pytest.mark.slow),
    ],
)
def test_as_with_peft(tmp_path, tokenizer, how, method):
    plain = {"gradient_checkpointing": False}  # PEFT has none for prefixes
    trainer, found = fine_tune(softprompt, how, method, tokenizer, tmp_path / "ours", **plain)
    _, expected = fine_tune(peft, how, method, tokenizer, tmp_path / "theirs", **plain)
    assert type(trainer.model) is softprompt.PeftModelForCausalLM
    for name in ("train_loss", "eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert found[name] == pytest.approx(expected[name], abs=2e-4), name
    names = {path.name for path in (tmp_path / "ours" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


@pytest.mark.parametrize(
    ("method", "use_reentrant"),
    [
        ("PromptTuningConfig", True),
        pytest.param("PrefixTuningConfig", False, marks=pytest.mark.slow),
        pytest.param("PromptTuningConfig", False, marks=pytest.mark.slow),
        pytest.param("PrefixTuningConfig", True, marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing(tmp_path, tokenizer, method, use_reentrant):
    """PEFT refuses or breaks on it for prefixes."""
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    recomputed, found = fine_tune(
        softprompt, "wrapped", method, tokenizer, tmp_path, gradient_checkpointing=True, **options
    )
    plain, expected = fine_tune(softprompt, "wrapped", method, tokenizer, tmp_path, gradient_checkpointing=False)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    weights = [t.model.prompt_encoder["default"].embedding.weight for t in (recomputed, plain)]
    torch.testing.assert_close(*weights, atol=1e-3, rtol=0)


class Stop(tf.TrainerCallback):
    """Stops behind an epoch."""

    def on_epoch_end(self, args, state, control, **_):
        control.should_training_stop = True


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_resuming_equals_never_having_stopped(tmp_path, tokenizer, method):
    how = (softprompt, "peft_config", method, tokenizer)
    whole, _ = fine_tune(*how, tmp_path / "whole")
    fine_tune(*how, tmp_path / "cut", callbacks=[Stop()])
    resumed, _ = fine_tune(*how, tmp_path / "cut", resume=True)
    wanted = whole.model.prompt_encoder["default"].state_dict()
    for name, value in resumed.model.prompt_encoder["default"].state_dict().items():
        assert torch.equal(value, wanted[name])
