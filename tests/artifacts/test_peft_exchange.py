"""PEFT itself as the oracle: it reads what we write, we read what it writes."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from peft.utils import load_peft_weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from softprompt.artifacts import load_adapter, save_adapter
from softprompt.artifacts.layout import LAYOUTS
from softprompt.prompts import PeftType

# PEFT 0.21 reads a property that transformers 5.23 has renamed; nothing of ours is involved.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def tiny_llama():
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def test_our_table_of_keys_is_pefts():
    assert {item.name for item in dataclasses.fields(peft.PromptTuningConfig)} == LAYOUTS[
        PeftType.PROMPT_TUNING
    ].keys


@torch.no_grad()
def test_peft_computes_with_our_folder_what_the_rows_mean(tmp_path, config, tensors, manifest):
    save_adapter(tmp_path / "p", config, tensors, manifest, overwrite=False)
    base, ids = tiny_llama(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    rows = tensors["prompt_embeddings"].expand(2, -1, -1)  # [B, P, H]
    joined = torch.cat([rows, base.get_input_embeddings()(ids)], dim=1)
    expected = base(inputs_embeds=joined).logits
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "p")).eval()
    came = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB", "RANDOM_SCALED", "LABELS"])
def test_peft_reads_every_initialisation_without_its_tokenizer(tmp_path, config, tensors, init):
    start = {"prompt_tuning_init": init, "tokenizer_name_or_path": str(tmp_path / "gone")}
    heads = {"num_attention_heads": 2, "num_layers": 2, "prompt_tuning_init_text": "yes"}
    save_adapter(tmp_path / "p", {**config, **start, **heads}, tensors, overwrite=False)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "p"))
    rows = loaded.prompt_encoder["default"].embedding.weight
    assert torch.equal(rows, tensors["prompt_embeddings"])


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_peft_wrote_is_read(tmp_path, safe):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_llama(), config)
    model.save_pretrained(str(tmp_path), safe_serialization=safe)
    assert (tmp_path / "adapter_model.bin").exists() != safe
    stored = load_adapter(tmp_path)
    assert torch.equal(stored.values, model.prompt_encoder["default"].embedding.weight)
    assert stored.manifest is None
    assert stored.config["num_virtual_tokens"] == 3


def tiny_t5():
    torch.manual_seed(2)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=16)).eval()


seq2seq = pytest.mark.skipif(
    peft.__version__ == "0.21.0",
    reason="PEFT 0.21.0 cannot build a seq2seq prompt with transformers 5.23, 0.21.2 can",
)


@seq2seq
def test_both_halves_of_a_seq2seq_prompt_are_read(tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny_t5(), config).save_pretrained(str(tmp_path))
    assert load_adapter(tmp_path).values.shape == (6, 8)


@seq2seq
@torch.no_grad()
def test_peft_computes_with_an_encoder_only_prompt(tmp_path, config, tensors):
    config = {**config, "task_type": "SEQ_2_SEQ_LM", "num_attention_heads": 2, "num_layers": 1}
    save_adapter(tmp_path / "p", config, tensors, overwrite=False)
    base, ids = tiny_t5(), torch.tensor([[1, 2, 3, 4]])
    rows = tensors["prompt_embeddings"][None]  # [1, P, H]
    joined = torch.cat([rows, base.get_input_embeddings()(ids)], dim=1)
    expected = base(inputs_embeds=joined, decoder_input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "p")).eval()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-6)


def test_heads_survive_both_ways(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, **heads))
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "bert"))
    stored = load_adapter(tmp_path / "bert")
    assert sorted(stored.tensors) == [
        "base_model.classifier.bias",
        "base_model.classifier.weight",
        "prompt_embeddings",
    ]
    save_adapter(tmp_path / "again", stored.config, stored.tensors, overwrite=False)
    theirs = load_peft_weights(str(tmp_path / "again"), device="cpu")
    assert theirs.keys() == stored.tensors.keys()
    assert all(torch.equal(theirs[name], stored.tensors[name]) for name in theirs)
