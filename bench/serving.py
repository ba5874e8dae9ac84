"""Serving many prompts from one model: our batcher against a PEFT user's loops.

16 clients ask one thing after the other of 8 prompts (50 virtual tokens, popularity by Zipf's
law, inputs of 24 to 40 tokens, 32 new tokens each, greedy). Ours runs all in one batch; PEFT runs
one `generate` for each prompt's waiting requests, padded to the longest of them, or one request
at a time. One process, one thread of compute. Ours must give the tokens that PEFT gives to the
request alone. Also: time to the first token with a prompt that is known and one that is not, and
memory and latency with 1,000 prompts in the folder against 1.

Times to and between tokens are seconds of CPU of what computes, so that other work on the machine
moves them little; where it is idle they are those of the wall.

With `--vllm`, in place of PEFT's batches and of all the rest vLLM with the same prompts as extra
vocabulary, in a process of its own, over HTTP (`serving_vllm.py`); its answers too are held to those of
PEFT alone.

    python bench/serving.py [--model gpt2|demo|FOLDER|FILE.gguf] [--dtype bfloat16] [--requests 64]
        [--rounds 1] [--json] [--vllm URL|PROGRAM]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from alone import alone
from quiet import quiet
from serving_peft import PeftServer
from serving_registry import registered
from serving_vllm import running
from serving_work import (
    OUTPUT,
    PROMPTS,
    Ask,
    Took,
    asks,
    by_clients,
    model_named,
    prompt_tables,
    request_of,
    timed,
    values_of,
)
from softprompt.backbone import Base
from softprompt.generation import Batcher, FinishEvent, TokenEvent
from softprompt.prompts import Prompt

OURS, ALONE = "ours", "PEFT, one request at a time"
LARGEST = "PEFT, a batch for each prompt, largest first"
OLDEST = "PEFT, a batch for each prompt, oldest first"
PEER = "vLLM, prompts as extra vocabulary"


def answered(batcher: Batcher, ask: Ask, values: Sequence[Prompt]) -> Took:
    """Ask the batcher and note when each token comes."""
    began, took = time.process_time(), Took()
    for event in batcher.submit(request_of(ask, values)):
        if isinstance(event, TokenEvent):
            took.times.append(time.process_time() - began)
        elif isinstance(event, FinishEvent):
            took.ids = event.tokens
    return took


def throughput(
    model: Any, tokenizer: Any, requests: int, clients: int, rounds: int, vllm: str | None = None
) -> dict[str, Any]:
    """Measure the ways, alternating; the medians of the rounds count."""
    tables = prompt_tables(model, PROMPTS)
    values, todo = values_of(tables), asks(model, requests)
    some = todo[: max(4, requests // 4)]
    peft = PeftServer(model, tables)
    batcher = Batcher(Base(model, tokenizer))
    rows: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, list[Took]] = {}
    by_clients(clients, todo[:PROMPTS], lambda ask: answered(batcher, ask, values))
    ways: dict[str, Callable[[], list[Took]]] = {
        OURS: lambda: by_clients(clients, todo, lambda ask: answered(batcher, ask, values)),
        LARGEST: lambda: peft.by_prompt(todo, clients, largest=True),
        OLDEST: lambda: peft.by_prompt(todo, clients, largest=False),
    }
    with running(vllm, model, tokenizer, tables) if vllm else nullcontext() as peer:
        if peer is not None:
            by_clients(clients, todo[:PROMPTS], peer.answered)
            ways = {OURS: ways[OURS], PEER: lambda: by_clients(clients, todo, peer.answered)}
        ways[ALONE] = lambda: peft.one_by_one(some)
        for turn in range(rounds):
            for way, work in ways.items():
                if way == ALONE and turn and peer:  # there it is only what the others are held to
                    continue
                row, answers[way] = timed(work, way, peer.clock if peer and way == PEER else time.process_time)
                rows.setdefault(way, []).append(row)
    batcher.stop()
    return {
        "rows": [middle(found) for found in rows.values()],
        "rounds": rows,
        "equal_to_solo": {way: share(found, answers[ALONE]) for way, found in answers.items() if way != ALONE},
        "engine": batcher.engine,
    }


def middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the round of median speed, with the speeds of the slowest and the fastest."""
    ordered = sorted(rows, key=lambda row: row["tokens_per_cpu_second"])
    ends = [ordered[i]["tokens_per_cpu_second"] for i in (0, -1)]
    return {**ordered[len(rows) // 2], "range_per_cpu_second": ends}


def share(found: Sequence[Took], solo: Sequence[Took]) -> float:
    """Return the share of answers whose tokens are those of the request alone."""
    pairs = list(zip(found, solo, strict=False))
    return sum(a.ids == b.ids for a, b in pairs) / len(pairs)


def first_tokens(model: Any, tokenizer: Any, times: int) -> dict[str, float]:
    """Return the median time to the first token, idle server, of new and of known prompts, ms."""
    values = values_of(prompt_tables(model, times))
    todo = [Ask(i, ask.ids) for i, ask in enumerate(asks(model, times))]
    batcher = Batcher(Base(model, tokenizer))
    answered(batcher, todo[0], values_of(prompt_tables(model, times + 1)[-1:]))
    cold = [answered(batcher, ask, values).first for ask in todo]
    warm = [answered(batcher, ask, values).first for ask in todo]
    batcher.stop()
    return {
        "cold_ms": 1000 * statistics.median(cold),
        "warm_ms": 1000 * statistics.median(warm),
    }


def table(result: dict[str, Any]) -> None:
    """Print everything."""
    print("| way | tokens/s | tokens per CPU s (range) | first token p50, p95 ms | between tokens p50, p95 ms |")
    print("|---|---|---|---|---|")
    for row in result["rows"]:
        first, between = row["first_ms"], row["between_ms"]
        least, most = row["range_per_cpu_second"]
        print(
            f"| {row['way']} | {row['tokens_per_second']:.0f} "
            f"| {row['tokens_per_cpu_second']:.0f} ({least:.0f}-{most:.0f}) "
            f"| {first[0]:.0f}, {first[1]:.0f} | {between[0]:.0f}, {between[1]:.0f} |"
        )
    equal = ", ".join(f"{way} {part:.0%}" for way, part in result["equal_to_solo"].items())
    print(f"\nanswers equal to the request alone: {equal}")
    if first := result.get("first_token"):
        print(f"first token, idle: known prompt {first['warm_ms']:.0f} ms, new {first['cold_ms']:.0f}")
    for row in result.get("registered", []):
        print(
            f"{row['prompts']} prompts in the folder: {row['memory_mib']:.1f} MiB more than none, "
            f"listed in {row['listing_ms']:.0f} ms, first token {row['first_ms']:.1f} ms"
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="gpt2 (its shape), demo, or a model's folder or file")
    parser.add_argument("--dtype", help="of the weights, where the model is no random one; by default as stored")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--clients", type=int, default=16, help="clients at once")
    parser.add_argument("--rounds", type=int, default=1, help="timed runs of each way")
    parser.add_argument("--registered", type=int, default=1000, help="prompts in the folder")
    parser.add_argument("--vllm", help="address of a vLLM server of the export, or the program that starts one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    model, tokenizer = model_named(options.model, options.dtype)
    result = {
        "model": options.model,
        "new_tokens": OUTPUT,
        **throughput(model, tokenizer, options.requests, options.clients, options.rounds, options.vllm),
    }
    if not options.vllm:
        result["first_token"] = first_tokens(*model_named(options.model, options.dtype), 5)
        result["registered"] = [registered(count) for count in (1, options.registered)]
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        table(result)


if __name__ == "__main__":
    alone()
    main()
