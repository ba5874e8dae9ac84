"""One tiny base twice: prompted by us, and by the installed peft, with the same rows."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

import softprompt
from oracles.families import CAUSAL, ENCODERS, SEQ2SEQ, build

P = 5

TASKS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "CAUSAL_LM": (tf.AutoModelForCausalLM, CAUSAL["llama"], {}),
    "SEQ_2_SEQ_LM": (tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"], {}),
    "SEQ_CLS": (tf.AutoModelForSequenceClassification, ENCODERS["bert"], {"num_labels": 3}),
    "TOKEN_CLS": (tf.AutoModelForTokenClassification, ENCODERS["bert"], {"num_labels": 3}),
    "QUESTION_ANS": (tf.AutoModelForQuestionAnswering, ENCODERS["bert"], {}),
    "FEATURE_EXTRACTION": (tf.AutoModel, ENCODERS["bert"], {}),
}


def base(task: str) -> PreTrainedModel:
    """Return a fresh tiny base for a task type."""
    loader, config, changes = TASKS[task]
    return build(loader, config(), **changes)


def pair(task: str, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
    """Return (ours, peft's) on copies of one base, with equal prompts and heads."""
    import peft

    model = model if model is not None else base(task)
    torch.manual_seed(1)
    ours = softprompt.get_peft_model(
        copy.deepcopy(model), softprompt.PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(model),
            peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P, num_transformer_submodules=1),
        )
    rows = ours.prompt_encoder["default"].embedding.weight.data
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    return ours.eval(), theirs.eval()


def batch(task: str, *, side: str = "right", padded: bool = True) -> dict[str, torch.Tensor]:
    """Return inputs and labels for a task; one padded row of three unless ``padded`` is false."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        where = slice(0, 3) if side == "left" else slice(5, 8)
        ids[1, where], mask[1, where] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "CAUSAL_LM":
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "SEQ_2_SEQ_LM":
        inputs["labels"] = torch.randint(3, 64, (3, 4), generator=generator)
    elif task == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 1, 2])
    return inputs
