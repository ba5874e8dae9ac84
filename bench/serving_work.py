"""What `serving.py` serves: a model, prompts, requests by their popularity, and what they took."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.backbone import load_base
from softprompt.generation import GenerationOptions, Request
from softprompt.prompts import Prompt
from training_step import SCALE, gpt2_small

VIRTUAL = 50
PROMPTS = 8
OUTPUT = 32
INPUT = (24, 40)
"""Fewest and most tokens of an input, 32 on average."""


class Numbers:
    """A tokenizer for models of random weights: a token's text is its number."""

    eos_token_id = None
    pad_token_id = 0
    chat_template = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Return the ids as text."""
        return " ".join(map(str, ids))


def model_named(name: str, dtype: str | None = None) -> tuple[Any, Any]:
    """Return a frozen model that ends no answer by itself, and a tokenizer."""
    torch.manual_seed(0)
    model: Any
    tokenizer: Any
    if name == "gpt2":
        model, tokenizer = gpt2_small(), Numbers()
        # Random weights repeat the input's last token for ever; wider ones make every choice count.
        with torch.no_grad():
            for each in model.transformer.h.parameters():
                if each.dim() == 2:
                    each.mul_(3)
    else:
        base = load_base(name, torch_dtype=dtype)
        model, tokenizer = base.model, base.tokenizer
        tokenizer.eos_token = tokenizer.chat_template = None  # whose end of a turn ends answers, too
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False), tokenizer


def prompt_tables(model: Any, count: int) -> list[Tensor]:
    """Return prompts ``[P, H]``, as far from zero as the model's embeddings."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(3)
    scale = float(table.float().std()) or SCALE
    return [torch.randn(VIRTUAL, table.shape[1], generator=generator) * scale for _ in range(count)]


@dataclass(frozen=True)
class Ask:
    """One request: which prompt, and the input's token ids."""

    prompt: int
    ids: tuple[int, ...]


def asks(model: Any, count: int, seed: int = 5) -> list[Ask]:
    """Return requests; prompt k is asked for in proportion to 1 / (k + 1) (Zipf's law)."""
    rng = random.Random(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    chosen = rng.choices(range(PROMPTS), [1 / (k + 1) for k in range(PROMPTS)], k=count)
    return [
        Ask(prompt, tuple(rng.randrange(10, vocabulary) for _ in range(rng.randint(*INPUT)))) for prompt in chosen
    ]


def request_of(ask: Ask, values: Sequence[Prompt]) -> Request:
    """Return a request as a server makes it."""
    return Request(ask.ids, values[ask.prompt], options=GenerationOptions(max_new_tokens=OUTPUT))


def values_of(tables: Sequence[Tensor]) -> list[Prompt]:
    """Return prompts as requests carry them."""
    return [Prompt(table) for table in tables]


@dataclass
class Took:
    """When the tokens of one answer came, CPU seconds of what computes since it was asked for."""

    ids: tuple[int, ...] = ()
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0]

    @property
    def between(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def figures(way: str, took: Sequence[Took], wall: float, cpu: float) -> dict[str, Any]:
    """Return a row of the table."""
    tokens = sum(len(each.ids) for each in took)
    first, between = [each.first for each in took], [gap for each in took for gap in each.between]
    return {
        "way": way,
        "requests": len(took),
        "tokens": tokens,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "first_ms": [1000 * value for value in quantiles(first)],
        "between_ms": [1000 * value for value in quantiles(between)],
    }


def by_clients(count: int, todo: Sequence[Ask], answer: Callable[[Ask], Took]) -> list[Took]:
    """Have clients, each a thread, ask one thing after the other; return what each request took."""
    took: list[Took | None] = [None] * len(todo)
    numbers = iter(range(len(todo)))
    guard = threading.Lock()

    def client() -> None:
        while True:
            with guard:
                i = next(numbers, None)
            if i is None:
                return
            took[i] = answer(todo[i])

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [each for each in took if each is not None]


def timed(
    work: Callable[[], list[Took]], way: str, clock: Callable[[], float] = time.process_time
) -> tuple[dict[str, Any], list[Took]]:
    """Run a way and return its row and its answers; the clock is that of what computes, CPU seconds."""
    wall, cpu = time.perf_counter(), clock()
    took = work()
    return figures(way, took, time.perf_counter() - wall, clock() - cpu), took


def resident_bytes() -> int:
    """Return this process's resident memory, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")
