"""Scoring many labels: one forest against a PEFT user's loop and against prompt reuse alone.

Every input is scored against 77 labels (the intent names of Banking77, read from ``--shared``;
without it labels of the same shape are drawn) on a GPT-2-small shape with random weights. A
PEFT user runs one batched forward per label; with the prompt's keys and values computed once
(engine ``expand``) the rows are still run once per label; the forest runs prompt, input and a
trie of the labels' tokens once. Raw scores (sums) and length-normalised ones (means) are held to
the loop's, relative to their size. One thread, one process, alternating.

    python bench/label_scoring.py [--virtual 100] [--inputs 4] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from alone import alone
from quiet import quiet
from softprompt.backbone import Base
from softprompt.bundled import model_directory
from softprompt.engine import EngineRow, build_engine, pad_rows
from softprompt.prompts import Prompt
from training_step import SCALE, count, gpt2_small

LABELS = 77


def label_ids(shared: Path, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Return the names' token ids by the bundled tokenizer, or drawn ones with shared first words."""
    names = shared / "data" / "banking77" / "categories.json"
    if names.is_file():
        tokenizer: Any = tf.AutoTokenizer.from_pretrained(model_directory())
        texts = [" " + name.replace("_", " ") for name in json.loads(names.read_text())]
        return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    heads = [tuple(torch.randint(10, 50000, (2,), generator=generator).tolist()) for _ in range(15)]
    labels = []
    for i in range(LABELS):
        tail = torch.randint(10, 50000, (1 + i % 5,), generator=generator).tolist()
        labels.append((*heads[i % len(heads)], *tail))
    return labels


def sources(count_: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Make inputs of 10 to 30 tokens."""
    lengths = [10 + (i * 7) % 21 for i in range(count_)]
    return [tuple(torch.randint(10, 50000, (n,), generator=generator).tolist()) for n in lengths]


def engine_step(
    model: Any,
    kind: str,
    inputs: list[tuple[int, ...]],
    labels: list[tuple[int, ...]],
    prompt: Tensor,
) -> Callable[[], Tensor]:
    """Return a function that scores every input against every label, ``[N, K]``."""
    engine = build_engine(Base(model), kind)
    value = Prompt(prompt)
    rows = [EngineRow(source, label, value) for source in inputs for label in labels]

    @torch.no_grad()
    def step() -> Tensor:
        parts = []
        per_call = len(rows) if kind == "forest" else 4 * len(labels)
        for at in range(0, len(rows), per_call):
            batch = rows[at : at + per_call]
            parts.append(engine.target_log_probs(batch).row_sums(len(batch)))
        return torch.cat(parts).view(len(inputs), len(labels))

    return step


def peft_step(
    model: Any, inputs: list[tuple[int, ...]], labels: list[tuple[int, ...]], prompt: Tensor
) -> Callable[[], Tensor]:
    """Return what a PEFT user writes: for each label one forward over all inputs."""
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt.shape[0])
    prompted: Any = get_peft_model(model, config).eval()
    prompted.prompt_encoder["default"].embedding.weight.data.copy_(prompt)

    @torch.no_grad()
    def step() -> Tensor:
        columns = []
        for label in labels:
            ids, mask = pad_rows([source + label for source in inputs], left=False, pad_id=0)
            logits = prompted(input_ids=ids, attention_mask=mask).logits[:, prompt.shape[0] :]
            scores = []
            for i, source in enumerate(inputs):
                at = slice(len(source) - 1, len(source) + len(label) - 1)
                log_probs = torch.log_softmax(logits[i, at], dim=-1)
                scores.append(log_probs.gather(1, torch.tensor(label).unsqueeze(1)).sum())
            columns.append(torch.stack(scores))
        return torch.stack(columns, dim=1)

    return step


def largest(scores: Tensor, loop: Tensor) -> float:
    """Return the largest difference of a score from the loop's, relative to its size."""
    return float(((scores - loop).abs() / loop.abs().clamp(min=1)).max())


def equal(result: dict[str, Any]) -> bool:
    """Tell whether raw and length-normalised scores are the loop's."""
    return bool(max(result["raw_difference"], result["normalised_difference"]) <= 1e-5)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of real data")
    parser.add_argument("--virtual", type=int, default=100, help="virtual tokens (P)")
    parser.add_argument("--inputs", type=int, default=4, help="inputs scored in one call")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = gpt2_small().eval().requires_grad_(False)
    labels, inputs = label_ids(options.shared, generator), sources(options.inputs, generator)
    prompt = torch.randn(options.virtual, 768, generator=generator) * SCALE
    steps = {
        "forest": engine_step(model, "forest", inputs, labels, prompt),
        "prompt KV reused": engine_step(model, "expand", inputs, labels, prompt),
        "PEFT loop over labels": peft_step(model, inputs, labels, prompt),
    }
    scores = {name: step() for name, step in steps.items()}
    flops = {name: count(step) for name, step in steps.items()}  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    seconds = {name: statistics.median(spent) for name, spent in times.items()}
    loop, lengths = scores["PEFT loop over labels"], torch.tensor([len(label) for label in labels])
    results = [
        {
            "way": name,
            "gflop": flops[name] / 1e9,
            "flops_ratio": flops[name] / flops["forest"],
            "seconds": seconds[name],
            "seconds_ratio": seconds[name] / seconds["forest"],
            "raw_difference": largest(scores[name], loop),
            "normalised_difference": largest(scores[name] / lengths, loop / lengths),
        }
        for name in steps
    ]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{len(labels)} labels x {options.inputs} inputs, GPT-2 small, P={options.virtual}")
    print(
        "| way | GFLOP | x forest | CPU time, x forest "
        "| off the loop: raw score | length-normalised | equal to 1e-5 |"
    )
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['way']} | {r['gflop']:.0f} | {r['flops_ratio']:.1f} | {r['seconds_ratio']:.1f} "
            f"| {r['raw_difference']:.1g} | {r['normalised_difference']:.1g} "
            f"| {'yes' if equal(r) else 'no'} |"
        )


if __name__ == "__main__":
    alone()
    main()
