"""One tiny random model with a byte-level tokenizer, and a prompt on it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softprompt.artifacts.manifest import Manifest
from softprompt.attach.classes import get_peft_model
from softprompt.inference.tuned import TunedPrompt
from softprompt.prompts.configs import PromptTuningConfig


def _tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def make_tuned():
    """Return a function from manifest fields to a prompt on a fresh model, always the same one."""

    def make(**changes):
        tokenizer = _tokenizer()
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        model = get_peft_model(
            LlamaForCausalLM(config).eval(),
            PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        )
        values = {
            "template": "{{input}} =>",
            "task": "classification",
            "labels": ("good", "poor", "so so"),
            "base_model": "tiny",
            "base_fingerprint": {},
            "max_source_length": 40,
            "max_target_length": 8,
            "dtype": "float32",
            "seq2seq": False,
            **changes,
        }
        return TunedPrompt(model, tokenizer, Manifest(**values))

    return make
