"""Cells of `quality.py` on an encoder with a new head: `TaskType.SEQ_CLS` through our PeftModel.

"head" trains the head alone on the frozen encoder, which stands for zero-shot here. PEFT's recipes give head and
prompt one rate, as its examples do; ours, LoRA and full fine-tuning give the head its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import nn

import softprompt
from quality_methods import NOTEBOOK, Cell, Found
from real_data import Row, Split
from real_heads import inputs, load_encoder, parts
from softprompt.training import TuneSettings
from softprompt.training.optimisation import rate_factor
from softprompt.training.sampling import plan_batches

DEFAULT = ("N(0,1)", 2.0)
"""Start, and rate / rms of the embeddings; larger than elsewhere, as positions are added and all is normalised."""
HEAD_RATES = {"head": 0.3, "ours": 0.3, "lora": 1e-2, "full": 1e-2}
STARTS = {"N(0,1)": "RANDOM", "RANDOM": "RANDOM_SCALED", "WORDS": "TEXT"}


def run_head(cell: Cell, split: Split) -> Found:
    """Train a head, and what the method trains with it, and test both."""
    labels = sorted({row["output"] for row in split.train})
    tokenizer, encoder = load_encoder(len(labels), cell.seed)
    rms = encoder.get_input_embeddings().weight.detach().pow(2).mean().sqrt().item()
    model, rate = _model(cell, encoder, labels), cell.rate
    if cell.method == "ours":
        rate = (DEFAULT[1] if rate is None else rate) * rms
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_head = "classifier" in name or "head" in name
            own = HEAD_RATES.get(cell.method, rate) if of_head else rate
            groups.setdefault(own or 0.0, []).append(parameter)
    loss = _fit(cell, model, tokenizer, groups, split.train, labels)
    found = _tested(model, tokenizer, split.test, labels)
    return Found(*found, train_loss=loss, rate=rate)


def _model(cell: Cell, encoder: Any, labels: Sequence[str]) -> Any:
    """Return the model of a method, with what it trains requiring a gradient."""
    torch.manual_seed(cell.seed)
    encoder.requires_grad_(cell.method == "full")
    if cell.method == "lora":
        config: Any = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
        return peft.get_peft_model(encoder, config)
    if cell.method in ("head", "full"):
        encoder.classifier.requires_grad_(True)
        return encoder
    text = {"TEXT": cell.pair.text, "LABELS": "\n".join(labels), "WORDS": " ".join(labels)}.get(cell.init)
    config = softprompt.PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=cell.pair.tokens,
        prompt_tuning_init=STARTS.get(cell.init, cell.init),
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=encoder.name_or_path if text else None,
    )
    return softprompt.get_peft_model(encoder, config)


def _fit(
    cell: Cell,
    model: Any,
    tokenizer: Any,
    groups: dict[float, list[Any]],
    rows: Sequence[Row],
    labels: Sequence[str],
) -> float:
    """Train as the recipe does; return the last batch's loss."""
    pair, ours = cell.pair, TuneSettings()
    theirs = cell.method == "peft"
    optimizer = torch.optim.AdamW(
        [{"params": each, "lr": rate, "peak": rate} for rate, each in groups.items()],
        weight_decay=NOTEBOOK["weight_decay"] if theirs else 0.0,
    )
    lengths = [len(tokenizer(row["input"])["input_ids"]) for row in rows]
    model.eval()
    step, epoch, loss = 0, 0, torch.tensor(math.nan)
    while step < pair.updates:
        for batch in plan_batches(lengths, pair.batch, seed=cell.seed, epoch=epoch)[: pair.updates - step]:
            factor = rate_factor("linear", step, pair.updates, 0.0 if theirs else ours.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            gold = torch.tensor([labels.index(rows[i]["output"]) for i in batch])
            logits = model(**inputs(tokenizer, [rows[i] for i in batch])).logits
            loss = nn.functional.cross_entropy(logits, gold)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if not theirs:
                nn.utils.clip_grad_norm_([each for own in groups.values() for each in own], ours.max_grad_norm)
            optimizer.step()
            step += 1
        epoch += 1
    return loss.item()


@torch.no_grad()
def _tested(model: Any, tokenizer: Any, rows: Sequence[Row], labels: Sequence[str]) -> tuple[float, float, str]:
    """Return accuracy, mean loss and which rows were right."""
    hits, losses = "", 0.0
    for part in parts(rows, 64):
        logits = model(**inputs(tokenizer, part)).logits
        gold = torch.tensor([labels.index(row["output"]) for row in part])
        losses += nn.functional.cross_entropy(logits, gold, reduction="sum").item()
        hits += "".join(str(int(right)) for right in logits.argmax(dim=1) == gold)
    return hits.count("1") / len(rows), losses / len(rows), hits
