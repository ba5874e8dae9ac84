"""Our decode forest against transformers' continuous batching, on the same greedy requests.

Prompts become token ids past the vocabulary (an input embedding that knows them), so that the
paged cache of transformers takes them like any text and shares what requests have in common. Both
run at most 16 requests at once, in one process, on one thread; the paged cache is bounded to what
the requests need.

    python bench/serving_engines.py [--model gpt2|demo] [--requests 64] [--rounds 1] [--json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from serving import answered, middle
from serving_work import (
    INPUT,
    OUTPUT,
    PROMPTS,
    VIRTUAL,
    Ask,
    asks,
    by_clients,
    model_named,
    prompt_tables,
    values_of,
)
from softprompt.inference.continuous.batcher import Batcher

PAGE = 16
LONGEST = VIRTUAL + INPUT[1] + OUTPUT


class WithPrompts(nn.Module):
    """An input embedding whose ids from V on are the rows of prompts."""

    def __init__(self, table: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.table, self.rows = table, rows
        self.weight: Any = table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids."""
        size = self.weight.shape[0]
        known = self.table(ids.clamp(max=size - 1))
        return torch.where((ids >= size)[..., None], self.rows[(ids - size).clamp(min=0)], known)


def paged(model: Any, tables: Sequence[Tensor], todo: Sequence[Ask], clients: int) -> Any:
    """Return the new tokens of each request by continuous batching, and the seconds it took."""
    size = model.get_input_embeddings().weight.shape[0]
    model.set_input_embeddings(WithPrompts(model.get_input_embeddings(), torch.cat(list(tables))))
    inputs = [
        [*range(size + ask.prompt * VIRTUAL, size + (ask.prompt + 1) * VIRTUAL), *ask.ids]
        for ask in todo
    ]
    bounds = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=2 * clients * -(-LONGEST // PAGE),
        max_batch_tokens=512,
        max_requests_per_batch=clients,
    )
    settings: Any = tf.GenerationConfig(max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
    wall, cpu = time.perf_counter(), time.process_time()
    found = model.generate_batch(inputs, settings, bounds, warmup=False)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    model.set_input_embeddings(model.get_input_embeddings().table)
    ordered = sorted(found.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
    return [tuple(each.generated_tokens) for _, each in ordered], spent


def measure(name: str, requests: int, clients: int, rounds: int) -> dict[str, Any]:
    """Run both, alternating."""
    model, tokenizer = model_named(name)
    tables, todo = prompt_tables(model, PROMPTS), asks(model, requests)
    values = values_of(tables)
    rows: dict[str, list[dict[str, Any]]] = {"forest": [], "paged": []}
    same = 0.0
    for _ in range(rounds):
        batcher = Batcher(model, tokenizer)
        wall, cpu = time.perf_counter(), time.process_time()
        took = by_clients(clients, todo, lambda ask: answered(batcher, ask, values))  # noqa: B023
        rows["forest"].append(row(took, time.perf_counter() - wall, time.process_time() - cpu))
        batcher.stop()
        answers, (wall, cpu) = paged(model, tables, todo, clients)
        rows["paged"].append(row(answers, wall, cpu))
        same = sum(a.ids == b for a, b in zip(took, answers, strict=True)) / len(todo)
    return {"model": name, "equal": same, **{way: middle(found) for way, found in rows.items()}}


def row(answers: Sequence[Any], wall: float, cpu: float) -> dict[str, Any]:
    """Return what the answers took."""
    tokens = len(answers) * OUTPUT
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["gpt2", "demo"], default="gpt2", help="what is served")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--clients", type=int, default=16, help="requests at once")
    parser.add_argument("--rounds", type=int, default=1, help="timed runs of each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity(40)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    result = measure(options.model, options.requests, options.clients, options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print("| engine | tokens/s | tokens per CPU s |\n|---|---|---|")
    for way in ("forest", "paged"):
        found = result[way]
        speed, cpu = found["tokens_per_second"], found["tokens_per_cpu_second"]
        print(f"| {way} | {speed:.0f} | {cpu:.0f} |")
    print(f"\nequal answers: {result['equal']:.0%}")


if __name__ == "__main__":
    main()
