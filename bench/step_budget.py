"""What does bounding a pass beside running answers do to tokens a second and the time between tokens?

The requests of `serving.py` (16 clients, one thing after the other, 8 prompts of 50 virtual tokens, inputs of
24 to 40 tokens, 32 new tokens; `--spread 16`: 16 to 48, so that answers end at unlike moments), in one thread,
once for each `max_mixed_step_tokens`, in turn. The clock counts CPU seconds of that thread, so that other work
on the machine moves the figures little; the clients cost nothing.

    python bench/step_budget.py [--model demo] [--budgets 32,64,128,512] [--spread 16] [--requests 96] [--rounds 3]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from alone import alone
from quiet import quiet
from serving_work import OUTPUT, PROMPTS, Took, asks, model_named, prompt_tables, quantiles, request_of, values_of
from softprompt.backbone import Base
from softprompt.generation import Bounds, GenerationOptions, Request
from softprompt.generation.answer import AnswerRules, Job
from softprompt.generation.batcher import Runner, runner_of
from softprompt.generation.ticket import Ticket

CLIENTS = 16


def requests_of(model: Any, count: int, spread: int) -> list[Request]:
    """Return the requests, with answers of ``OUTPUT`` tokens, up to ``spread`` more or fewer."""
    values, rng = values_of(prompt_tables(model, PROMPTS)), random.Random(1)
    lengths = [rng.randint(OUTPUT - spread, OUTPUT + spread) for _ in range(count)]
    return [
        replace(request_of(ask, values), options=GenerationOptions(max_new_tokens=length), decode=lambda _: "")
        for ask, length in zip(asks(model, count), lengths, strict=True)
    ]


def answered(runner: Runner, rules: AnswerRules, requests: Sequence[Request]) -> tuple[list[Took], float]:
    """Return when each answer's tokens came since its request did, CPU seconds, and how long all took."""
    left = deque(requests)
    waiting: list[tuple[Job, Took, float]] = []
    running: list[tuple[Job, Took, float]] = []
    took: list[Took] = []
    start = time.thread_time()
    while left or waiting or running:
        while left and len(waiting) + len(running) < CLIENTS:
            took.append(Took())
            waiting.append((Job.of(Ticket(left.popleft(), lambda: None), rules), took[-1], time.thread_time()))
        started = [each for each in waiting if runner.admit(each[0]) == "started"]
        waiting = [each for each in waiting if each not in started]
        running += started
        runner.step()
        now = time.thread_time()
        for job, own, since in running:
            if len(job.answers[0].tokens) > len(own.times):
                own.times.append(now - since)
        running = [each for each in running if each[0].answers[0].ended_by is None]
    return took, time.thread_time() - start


def row(budget: int, took: Sequence[Took], seconds: float) -> dict[str, Any]:
    """Return the figures of one run."""
    gaps, first = [1000 * gap for each in took for gap in each.between], [1000 * each.first for each in took]
    return {
        "max_mixed_step_tokens": budget,
        "tokens_per_cpu_second": sum(len(each.times) for each in took) / seconds,
        "between_ms": [statistics.fmean(gaps), *quantiles(gaps), max(gaps)],
        "first_ms": [statistics.fmean(first), *quantiles(first)],
    }


def main() -> None:
    """Measure, in turn, and print a row for each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="gpt2 (its shape), demo, or a model's folder or file")
    parser.add_argument("--budgets", default="32,64,128,512", help="values of max_mixed_step_tokens")
    parser.add_argument("--spread", type=int, default=16, help="tokens that an answer may have more or fewer")
    parser.add_argument("--requests", type=int, default=96, help="requests in all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each value, in turn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    model, tokenizer = model_named(options.model)
    base, requests = Base(model, tokenizer), requests_of(model, options.requests, options.spread)
    if not options.json:
        print("| budget | tokens per CPU s | between tokens mean, p50, p95, most ms | first mean, p50, p95 ms |")
        print("|---|---|---|---|")
    rules = AnswerRules.of(base, lambda _: "")
    runners = {
        budget: runner_of(base, Bounds(max_mixed_step_tokens=budget), rules)
        for budget in map(int, options.budgets.split(","))
    }
    for runner in runners.values():
        answered(runner, rules, requests[:PROMPTS])
    for _ in range(options.rounds):
        for budget, runner in runners.items():
            found = row(budget, *answered(runner, rules, requests))
            if options.json:
                print(json.dumps(found), flush=True)
                continue
            lists = (", ".join(f"{value:.0f}" for value in found[name]) for name in ("between_ms", "first_ms"))
            print(f"| {budget} | {found['tokens_per_cpu_second']:.0f} | {' | '.join(lists)} |", flush=True)


if __name__ == "__main__":
    alone()
    main()
