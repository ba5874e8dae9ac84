"""One tiny random model with a byte-level tokenizer, and a prompt on it."""

from __future__ import annotations

import pytest
import torch

from oracles.families import tiny
from oracles.probed import sharing
from oracles.tokenizers import byte_bpe
from oracles.tuned import untrained
from softprompt.artifacts import Manifest
from softprompt.backbone import Base
from softprompt.prompts import PromptTuningConfig


@pytest.fixture
def make_tuned():
    """Return a function from manifest fields to a prompt on a fresh model, always the same one."""

    def make(**changes):
        tokenizer = byte_bpe()
        base = sharing(tiny("llama", seed=3, vocab_size=len(tokenizer), max_position_embeddings=128))
        torch.manual_seed(3)
        config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
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
        return untrained(Base(base, tokenizer), config, Manifest(**values))

    return make
