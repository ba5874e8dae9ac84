"""Prompt folders made of given rows, for tests that need no model."""

from __future__ import annotations

import torch

from softprompt.artifacts import Manifest, save_adapter
from softprompt.backbone import Fingerprint

BASES = {
    "one": Fingerprint("llama", (64, 8, 2, 2), (0.5, -0.25, 0.125)),
    "two": Fingerprint("llama", (64, 8, 2, 2), (-0.5, 0.75, 0.3)),
}


def drawn(seed: int, length: int = 3, width: int = 8) -> torch.Tensor:
    """Return rows that are always the same for a seed."""
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def folder(path, rows, *, base="one", manifest=True, options=None, **changes):
    """Write rows [P, H] as a prompt's folder; ``changes`` are fields of its manifest."""
    config = {
        "peft_type": "EXTENDED_PROMPT_TUNING" if options else "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "inference_mode": True,
        **(options or {}),
    }
    values = {
        "template": "{{input}} =>",
        "task": "classification",
        "labels": ("good", "poor"),
        "base_model": base,
        "base_fingerprint": BASES[base].to_dict(),
        "max_source_length": 40,
        "max_target_length": 8,
        "dtype": "float32",
        "seq2seq": False,
        "metrics": {"accuracy": 0.9},
        "history": [{"epoch": 1}],
        "settings": {"learning_rate": 0.1, "input_field": "question"},
        **changes,
    }
    record = Manifest(**values) if manifest else None
    save_adapter(path, config, {"prompt_embeddings": rows}, record, overwrite=False)
    return path
