"""One small valid prompt, as config, tensors and manifest."""

from __future__ import annotations

import pytest
import torch

from softprompt.artifacts import Manifest


@pytest.fixture
def config():
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/tiny",
        "num_virtual_tokens": 3,
        "token_dim": 8,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }


@pytest.fixture
def tensors():
    return {"prompt_embeddings": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def manifest():
    return Manifest(
        template="Text : {{input}} Label : ",
        task="classification",
        labels=("complaint", "no complaint"),
        base_model="org/tiny",
        base_fingerprint={"short": "abcdefabcdef"},
        max_source_length=256,
        max_target_length=16,
        dtype="float32",
        seq2seq=False,
        metrics={"validation_accuracy": 0.875},
        history=[{"epoch": 1, "update": 5, "loss": 1.5, "validation_accuracy": 0.875}],
        settings={"learning_rate": 0.05, "seed": 73},
        data={"train": {"path": "train.jsonl", "rows": 400}},
        versions={"softprompt": "0.1.0"},
        created="2026-11-20T09:00:00+00:00",
    )
