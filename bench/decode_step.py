"""What the decode forest costs: a step against an aligned batch, and serving against transformers' own.

GPT-2-small shape, random weights, one process, runs in turn:

- one step of R rows, each at a context of its own, against one forward of ``[R, 1]`` with a
  ``DynamicCache`` whose rows are aligned;
- the same greedy requests through our batcher, with one prompt and with eight, and through
  transformers' continuous batching, where the prompt is the same 50 ordinary tokens, which it shares.

    python bench/decode_step.py [--rows 16] [--context 110] [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from alone import alone
from softprompt.backbone import Base, with_cache
from softprompt.engine import DecodeForest, NewTokens
from softprompt.generation import Batcher, GenerationOptions, Request
from softprompt.prompts import Prompt

P, INPUT, NEW, PROMPTS = 50, 32, 32, 8


def drawn(*size: int) -> torch.Tensor:
    """Return token ids."""
    return torch.randint(0, 50_000, size)


def step_ratios(model: Any, rows: int, context: int, repeats: int) -> list[float]:
    """Return our step's time over that of an aligned forward, pair by pair."""
    forest = DecodeForest(Base(model), 65_536)
    lanes = [lane for _ in range(rows) for lane in forest.store.take(context + 18) or []]
    ids = drawn(rows, context)
    for i, lane in enumerate(lanes):
        # Rows of unlike lengths, the mean of which is the context.
        length = context - 8 + (i % 8) * 2
        forest.step([NewTokens(lane, tuple((ids[i].tolist() * 2)[:length]))])
    cache = DynamicCache()
    with torch.no_grad():
        model(**with_cache(model, {"input_ids": ids}, cache), use_cache=True, logits_to_keep=1)

    def aligned() -> None:
        with torch.no_grad():
            model(**with_cache(model, {"input_ids": drawn(rows, 1)}, cache), use_cache=True)

    def ours() -> None:
        forest.step([NewTokens(lane, (7,)) for lane in lanes])

    for warm in (aligned, ours):
        warm()
    pairs = [(seconds(ours), seconds(aligned)) for _ in range(3 * repeats)]
    return [own / other for own, other in pairs]


def seconds(run: Callable[[], Any]) -> float:
    """Return the CPU seconds that a call takes, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def tokenizer() -> Any:
    """Return a tokenizer that only decodes, and has no end token: every answer runs to its limit."""
    words = {f"{i} ": i for i in range(50_257)}
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0 ")))


def served(batcher: Batcher, table: torch.Tensor, heads: torch.Tensor, ids: torch.Tensor) -> Any:
    """Answer every row behind the prompt whose turn it is; return the tokens."""
    options = GenerationOptions(max_new_tokens=NEW)
    values = [Prompt(table[head]) for head in heads]
    tickets = [
        batcher.submit(Request(tuple(row.tolist()), values[i % len(values)], options=options, decode=lambda _: ""))
        for i, row in enumerate(ids)
    ]
    return [list(ticket.result()[0].tokens) for ticket in tickets]


def transformers_own(model: Any, heads: torch.Tensor, ids: torch.Tensor) -> Any:
    """Answer the same requests by transformers' continuous batching; return the tokens."""
    inputs = [[*heads[i % len(heads)].tolist(), *row.tolist()] for i, row in enumerate(ids)]
    config = cast(Any, GenerationConfig)(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    bounds = ContinuousBatchingConfig(
        page_size=32, num_blocks=8 * len(inputs), max_batch_tokens=512, use_cuda_graph=False
    )
    found = model.generate_batch(inputs, config, bounds, warmup=False)
    ordered = sorted(found.values(), key=lambda each: int(str(each.request_id).rsplit("_", 1)[-1]))
    return [each.generated_tokens for each in ordered]


def throughput(model: Any, rows: int, repeats: int) -> dict[str, float]:
    """Return new tokens a CPU second: ours with one prompt and with eight, transformers' with eight."""
    table = model.get_input_embeddings().weight.detach()
    heads, ids = drawn(PROMPTS, P), drawn(rows, INPUT)
    batcher = Batcher(Base(model, tokenizer()))
    found: dict[str, list[float]] = {
        "ours, 8 prompts": [],
        "ours, 1 prompt": [],
        "transformers": [],
    }
    answers: dict[str, Any] = {}
    for turn in range(repeats + 1):
        runs: dict[str, Callable[[], Any]] = {
            "ours, 8 prompts": lambda: served(batcher, table, heads, ids),
            "ours, 1 prompt": lambda: served(batcher, table, heads[:1], ids),
            "transformers": lambda: transformers_own(model, heads, ids),
        }
        for name, run in runs.items():
            start = time.process_time()
            answers[name] = run()
            if turn:
                found[name].append(rows * NEW / (time.process_time() - start))
    batcher.stop()
    same = sum(a == b for a, b in zip(answers["ours, 8 prompts"], answers["transformers"], strict=True))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return medians | {"equal answers": same / rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=110)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    model.eval()
    ratios = step_ratios(model, args.rows, args.context, args.repeats)
    rates = throughput(model, args.rows, args.repeats)
    result = {"step, ours / aligned": statistics.median(ratios), **rates}
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value:8.2f}")


if __name__ == "__main__":
    alone()
    main()
