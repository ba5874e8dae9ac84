"""One tiny base twice: behind a prefix of ours, and of the installed peft, with the same values."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

import softprompt
from oracles.families import L

P = 5


def prefix_pair(task: str, model: PreTrainedModel, **options: Any) -> tuple[Any, Any]:
    """Return (ours, peft's) on copies of one base, made from the same seed."""
    import peft

    seq2seq = task == "SEQ_2_SEQ_LM"
    torch.manual_seed(1)
    ours = softprompt.get_peft_model(
        copy.deepcopy(model),
        softprompt.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **options),
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(model),
            peft.PrefixTuningConfig(
                task_type=task,
                num_virtual_tokens=P,
                num_layers=2 * L if seq2seq else None,
                **options,
            ),
        )
    if seq2seq:
        stored = ours.prompt_encoder["default"].stored()["prompt_embeddings"]
        theirs.prompt_encoder["default"].embedding.weight.data.copy_(stored)
    heads = [n for n in dict(ours.base_model.named_parameters()) if "modules_to_save" in n]
    for name in heads:
        theirs.base_model.get_parameter(name).data.copy_(ours.base_model.get_parameter(name))
    return ours.eval(), theirs.eval()
