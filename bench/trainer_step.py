"""One training step on the same rows: through transformers' Trainer, ours and PEFT's, against ``tune``'s own loop.

Random weights without dropout, one thread, all in one process and alternating. A step is the forward and backward
pass and the optimiser's update. FLOPs come from torch's counter and have no noise; seconds are CPU seconds of the
process, the median over rounds.

    python bench/trainer_step.py [--only NAME] [--rounds 5] [--json]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers as tf

import softprompt
from alone import alone
from softprompt.backbone import Base
from softprompt.engine import EngineRow, build_engine
from softprompt.prompts import Prompt
from training_step import SCALE, WORKS, Work, asked, batch_of, count, frozen, rows_of

LIMIT = 1.15
"""How many times ``tune``'s step ours may take through Trainer."""

NAMES = ("gpt2-p100", "llama-p100", "gpt2-p20", "t5-p100")


def without_dropout(work: Work) -> Any:
    """Return the frozen base; a dropout would draw other masks on each path."""
    model = frozen(work)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def in_tune(work: Work) -> Callable[[], float]:
    """Return a step of ``tune``'s loop: log-probabilities of the targets, their gradient, AdamW, clipping."""
    model = without_dropout(work)
    rows: list[EngineRow] = rows_of(work, model.config.vocab_size)
    engine = build_engine(Base(model))
    torch.manual_seed(2)
    width = model.get_input_embeddings().weight.shape[1]
    prompt = torch.nn.Parameter(torch.randn(work.virtual, width) * SCALE)
    optimizer = torch.optim.AdamW([prompt], lr=1e-3, weight_decay=0.0)
    targets = sum(len(row.target) for row in rows)

    def step() -> float:
        leaf = Prompt(prompt).leaves()
        own = [EngineRow(row.source, row.target, leaf) for row in rows]
        loss = -engine.target_log_probs(own).values.sum() / targets
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.input is not None
        prompt.grad = leaf.input.grad
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def in_trainer(library: Any, work: Work) -> Callable[[], float]:
    """Return a step of Trainer with a library's model: what its loop does for one batch."""
    model = without_dropout(work)
    batch = batch_of(work, rows_of(work, model.config.vocab_size))
    config = library.PromptTuningConfig(
        task_type=work.task, num_virtual_tokens=work.virtual, num_transformer_submodules=1
    )
    torch.manual_seed(2)
    prompted = library.get_peft_model(model, config)
    prompted.prompt_encoder["default"].embedding.weight.data.mul_(SCALE)
    rows = [{name: values[i].tolist() for name, values in batch.items()} for i in range(len(work.lengths))]
    options = tf.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        learning_rate=1e-3,
        weight_decay=0.0,
        max_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = tf.Trainer(prompted, options, train_dataset=rows)
    trainer.train()  # sets up the optimiser, and probes
    prompted.train()
    optimizer = cast(torch.optim.Optimizer, trainer.optimizer)
    inputs = {name: value.clone() for name, value in batch.items()}

    def step() -> float:
        items = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        loss = trainer.training_step(prompted, dict(inputs), items)
        trainer.accelerator.clip_grad_norm_(prompted.parameters(), 1.0)
        optimizer.step()
        prompted.zero_grad()
        return float(loss)

    return step


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure one row of the table."""
    import peft

    work = WORKS[name]
    steps = [in_tune(work), in_trainer(softprompt, work), in_trainer(peft, work)]
    for step in steps:
        step()
    flops = [count(step) / 1e9 for step in steps]
    spent: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for step, times in zip(steps, spent, strict=True):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
    seconds = [statistics.median(times) for times in spent]
    return {
        "work": work.title,
        "gflop": flops,
        "seconds": seconds,
        "over_tune": seconds[1] / seconds[0],
        "flops_over_tune": flops[1] / flops[0],
        "limit": LIMIT,
        "peft_over_ours": seconds[2] / seconds[1],
        "peft_flops_over_ours": flops[2] / flops[1],
    }


def main() -> None:
    """Run the works and print the table."""
    results = asked(__doc__, NAMES, measure)
    print(
        "| work | GFLOP tune / Trainer / PEFT in Trainer | Trainer over tune (limit): seconds, FLOPs "
        "| PEFT over ours |"
    )
    print("|---|---|---|---|")
    for r in results:
        print(
            f"| {r['work']} | {r['gflop'][0]:.0f} / {r['gflop'][1]:.0f} / {r['gflop'][2]:.0f} "
            f"| {r['over_tune']:.2f} ({r['limit']}), {r['flops_over_tune']:.2f} "
            f"| {r['peft_over_ours']:.1f}, FLOPs {r['peft_flops_over_ours']:.1f} |"
        )


if __name__ == "__main__":
    alone()
    main()
