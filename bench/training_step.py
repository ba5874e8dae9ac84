"""One training step of a soft prompt: softprompt's engine against PEFT's forward, as ratios.

Random weights, one thread, dynamic padding for PEFT, both in one process and alternating.
FLOPs come from torch's counter and have no noise; seconds are CPU seconds of the process,
the median over rounds; peak memory is measured in a process of its own for each side.

    python bench/training_step.py [--only NAME] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import softprompt
from alone import alone
from lower_bound import lower_bound
from quiet import quiet
from softprompt.backbone import Base, frozen_linears, swapped_forwards, torch_products
from softprompt.engine import EngineRow, build_engine, pad_rows
from softprompt.prompts import Prompt

TARGET = 4
"""Answer tokens of a causal row, among its T."""

SEQ2SEQ_TARGET = 8
"""Answer tokens of a seq2seq row."""

SCALE = 0.02
"""Prompt values relative to N(0, 1): the scale of these models' embeddings."""


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        title: What is run.
        build: Makes the random model.
        virtual: Virtual tokens (P).
        lengths: Real tokens of each row, answer included for causal models.
        flops, seconds, memory: Targets, PEFT / ours (memory: ours / PEFT).
    """

    title: str
    build: Callable[[], Any]
    virtual: int
    lengths: tuple[int, ...]
    flops: float
    seconds: float
    memory: float | None = None
    task: str = "CAUSAL_LM"
    sees_input: bool = True


def spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """Return lengths spread evenly from low to high."""
    return tuple(round(low + (high - low) * i / (count - 1)) for i in range(count))


def gpt2_small() -> Any:
    """GPT-2 small: 12 layers of 768, 124 M parameters."""
    return tf.GPT2LMHeadModel(tf.GPT2Config())


def llama_135m() -> Any:
    """SmolLM-135M's shape: 30 layers of 576, 9 query and 3 key heads."""
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def t5_small() -> Any:
    """T5-small: 6 + 6 layers of 512."""
    config: Any = tf.T5Config()
    config.decoder_start_token_id = 0
    return tf.T5ForConditionalGeneration(config)


def bert_small() -> Any:
    """BERT-small: 4 layers of 512, with a classification head of two labels."""
    return tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    )


WORKS: dict[str, Work] = {
    "gpt2-p100": Work("GPT-2 small, P=100, B=16, T 11-53", gpt2_small, 100, spread(11, 53, 16), 7.2, 6.0, 0.35),
    "llama-p100": Work(
        "Llama 30 x 576, GQA 9/3, P=100, B=32, T 11-53",
        llama_135m,
        100,
        spread(11, 53, 32),
        6.0,
        5.0,
        0.35,
    ),
    "gpt2-p20": Work("GPT-2 small, P=20, B=8, T 27-101", gpt2_small, 20, spread(27, 101, 8), 2.5, 2.2),
    "t5-p100": Work(
        "T5-small, P=100, B=16, source 21-107, target 8",
        t5_small,
        100,
        spread(21, 107, 16),
        1.2,
        1.2,
        task="SEQ_2_SEQ_LM",
    ),
    "t5-p100-isolated": Work(
        "the same, prompt_sees_input=False",
        t5_small,
        100,
        spread(21, 107, 16),
        2.2,
        2.0,
        task="SEQ_2_SEQ_LM",
        sees_input=False,
    ),
    "bert-p20": Work(
        "BERT-small SEQ_CLS, P=20, B=32, T 16-80",
        bert_small,
        20,
        spread(16, 80, 32),
        1.4,
        1.3,
        task="SEQ_CLS",
    ),
}


def frozen(work: Work) -> Any:
    """Build the model, frozen, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = work.build().eval()
    return model.requires_grad_(False)


def rows_of(work: Work, vocabulary: int) -> list[EngineRow]:
    """Make random rows: sources of unlike beginnings, and answers."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, vocabulary, (length,), generator=generator).tolist())

    if work.task == "CAUSAL_LM":
        return [EngineRow(ids(length - TARGET), ids(TARGET)) for length in work.lengths]
    return [EngineRow(ids(length), ids(SEQ2SEQ_TARGET)) for length in work.lengths]


def batch_of(work: Work, rows: list[EngineRow]) -> dict[str, Tensor]:
    """Return the batch a PEFT user makes: padded on the right to its longest row."""
    causal = work.task == "CAUSAL_LM"
    whole = [row.source + row.target if causal else row.source for row in rows]
    ids, mask = pad_rows(whole, left=False, pad_id=0)
    if work.task == "SEQ_CLS":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows)) % 2}
    if not causal:
        labels = torch.tensor([row.target for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        end = len(row.source) + len(row.target)
        labels[i, len(row.source) : end] = torch.tensor(row.target)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ours(work: Work) -> tuple[Callable[[], float], Any]:
    """Return a step of ours and the prompt's parameter."""
    model = frozen(work)
    rows = rows_of(work, model.config.vocab_size)
    if work.task == "SEQ_CLS":
        return prompted_step(softprompt, model, work, batch_of(work, rows))
    width = model.get_input_embeddings().weight.shape[1]
    prompt = torch.nn.Parameter(torch.randn(work.virtual, width) * SCALE)
    engine = build_engine(Base(model))
    value = Prompt(prompt, sees_input=work.sees_input)
    tokens = sum(len(row.target) for row in rows)
    rows = [replace(row, prompt=value) for row in rows]

    def step() -> float:
        prompt.grad = None
        loss = -engine.target_log_probs(rows).values.sum() / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return step, prompt


def peft(work: Work) -> tuple[Callable[[], float], Any]:
    """Return a step of PEFT's forward and the prompt's parameter."""
    import peft as library

    model = frozen(work)
    batch = batch_of(work, rows_of(work, model.config.vocab_size))
    return prompted_step(library, model, work, batch)


def prompted_step(
    library: Any, model: Any, work: Work, batch: dict[str, Tensor]
) -> tuple[Callable[[], float], Any]:
    """Return a step of a library's own forward and the prompt's parameter."""
    config = library.PromptTuningConfig(
        task_type=work.task, num_virtual_tokens=work.virtual, num_transformer_submodules=1
    )
    torch.manual_seed(2)
    prompted = library.get_peft_model(model, config).eval()
    prompt = prompted.prompt_encoder["default"].embedding.weight
    prompt.data.mul_(SCALE)

    def step() -> float:
        prompt.grad = None
        loss = prompted(**batch).loss
        loss.backward()
        return float(loss.detach())

    return step, prompt


def torch_step(step: Callable[[], float]) -> Callable[[], float]:
    """Return a step of ours whose products are torch's own, as PEFT's are."""

    def run() -> float:
        with torch_products():
            return step()

    return run


def attention_flop(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the FLOPs of fused attention on the CPU, which torch's counter does not know."""
    batch, heads, tokens, width = query
    return int(2 * batch * heads * tokens * key[2] * (width + value[3]))


def attention_backward_flop(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of its backward: five products for the forward's two."""
    return int(2.5 * attention_flop(query, key, value))


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


def count(step: Callable[[], float]) -> int:
    """Return the FLOPs of a step, attention included; while they are counted, products are torch's own."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    return int(counter.get_total_flops())


def matmul_rate() -> float:
    """Return the machine's matrix-product rate on one thread, FLOP/s, by its fastest library."""
    torch.set_num_threads(1)
    x, layer = torch.randn(612, 768), torch.nn.Linear(768, 3072).requires_grad_(False)
    best = float("inf")
    for bodies in ([], frozen_linears(layer)):
        with swapped_forwards(bodies):
            for _ in range(20):
                start = time.process_time()
                for _ in range(10):
                    layer(x)
                best = min(best, time.process_time() - start)
    return 10 * 2 * x.shape[0] * layer.in_features * layer.out_features / best


def _peak(side: str, name: str, queue: Any) -> None:
    warnings.simplefilter("ignore")
    step, _ = {"ours": ours, "peft": peft}[side](WORKS[name])
    before = _high_water()
    step()
    queue.put(_high_water() - before)


def _high_water() -> int:
    """Return the most memory this process ever held, bytes (Linux; ru_maxrss counts the parent's too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def peak_memory(side: str, name: str) -> int:
    """Return how far one step raises a fresh process's peak resident memory, bytes."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(side, name, queue))
    process.start()
    peak = int(queue.get())
    process.join()
    return peak


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure one row of the table."""
    work = WORKS[name]
    our_step, our_prompt = ours(work)
    peft_step, peft_prompt = peft(work)
    our_prompt.data.copy_(peft_prompt.data)
    losses = our_step(), peft_step()
    difference = (our_prompt.grad - peft_prompt.grad).abs().max() / peft_prompt.grad.abs().max()
    flops = count(our_step), count(peft_step)
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        for step, spent in zip((our_step, peft_step, torch_step(our_step)), times, strict=True):
            start = time.process_time()
            step()
            spent.append(time.process_time() - start)
    seconds = [statistics.median(spent) for spent in times]
    memory = peak_memory("ours", name), peak_memory("peft", name)
    answer = TARGET if work.task == "CAUSAL_LM" else SEQ2SEQ_TARGET
    bound = lower_bound(work.build, work.task, work.virtual, work.lengths, answer, sees_input=work.sees_input)
    return {
        "work": work.title,
        "loss_difference": abs(losses[0] - losses[1]),
        "gradient_difference": float(difference),
        "gflop": [flops[0] / 1e9, flops[1] / 1e9],
        "flops_ratio": flops[1] / flops[0],
        "flops_target": work.flops,
        "seconds": seconds,
        "seconds_ratio": seconds[1] / seconds[0],
        "seconds_ratio_torch_products": seconds[1] / seconds[2],
        "seconds_target": work.seconds,
        "memory_mib": [m / 2**20 for m in memory],
        "memory_ratio": memory[0] / memory[1],
        "memory_target": work.memory,
        "flops_over_bound": flops[0] / bound,
        "seconds_over_bound": seconds[0] / (bound / matmul_rate()),
        "reachable_ratio": flops[1] / bound,
    }


def asked(
    document: str | None, names: Iterable[str], measure: Callable[[str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure the works that the command line asks for; with --json print them and leave."""
    names = list(names)
    parser = argparse.ArgumentParser(description=document.splitlines()[0] if document else None)
    parser.add_argument("--only", choices=names, help="one row of the table")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    quiet()
    results = [measure(name, options.rounds) for name in ([options.only] if options.only else names)]
    if options.json:
        print(json.dumps(results, indent=2))
        raise SystemExit(0)
    return results


def main() -> None:
    """Run the works and print the table."""
    results = asked(__doc__, WORKS, measure)
    print(
        "| work | GFLOP PEFT / ours | ratio (target) | seconds ratio (target) | with torch's products "
        "| memory ours / PEFT | over bound: FLOPs, time | ratio at the bound |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['work']} | {r['gflop'][1]:.0f} / {r['gflop'][0]:.0f} "
            f"| {r['flops_ratio']:.2f} ({r['flops_target']}) "
            f"| {r['seconds_ratio']:.2f} ({r['seconds_target']}) "
            f"| {r['seconds_ratio_torch_products']:.2f} "
            f"| {r['memory_mib'][0]:.0f} / {r['memory_mib'][1]:.0f} MiB = {r['memory_ratio']:.2f} "
            f"| {r['flops_over_bound']:.2f}, {r['seconds_over_bound']:.2f} "
            f"| {r['reachable_ratio']:.1f} |"
        )


if __name__ == "__main__":
    alone()
    main()
