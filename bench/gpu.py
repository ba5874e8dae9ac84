"""One GPU in at most eight minutes: training step against PEFT, label scoring, decoding, memory; JSON and a table.

Random weights in bfloat16 (float32 on a CPU). Every way runs in this process; a way's seconds are the median over
rounds, waited for to the end (``synchronize``); memory is the allocator's peak above what was held before. A way
that runs out of memory has no numbers. Cases that no longer fit into ``--minutes`` are left out, and listed.

    python bench/gpu.py [--output gpu.json] [--device cuda:0] [--minutes 8] [--rounds 5] [--tiny]

The ways of a training step: PEFT's forward on the padded batch; ours with FlexAttention compiled (what ``auto``
takes on a GPU), with FlexAttention in eager mode, and with the packed attention of CPUs. ``attention`` compares the
kernels alone, forward and backward: FlexAttention over the forest against variable-length attention
(``torch.nn.attention.varlen``) over rows that each repeat the prompt.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as tf

import training_step as steps
from alone import alone
from decode_step import served, tokenizer
from quiet import quiet
from softprompt.backbone import Base
from softprompt.bundled import model_directory
from softprompt.engine import EngineRow, build_engine
from softprompt.generation import Batcher
from softprompt.prompts import Prompt

ATTENTION = "softprompt.engine.forest.forest_attention"
NEW = 32
"""New tokens of an answer, as ``decode_step`` asks for."""


def llama_1b() -> Any:
    """TinyLlama's shape: 22 layers of 2,048, 32 query and 4 key heads, 1.1 B parameters."""
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=32_000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
    )


def tiny() -> Any:
    """The bundled model, to see that everything runs; a random one of its size has no fast path."""
    return tf.AutoModelForCausalLM.from_pretrained(model_directory())


@dataclass
class Bench:
    """Where cases run, how often, and until when."""

    device: torch.device
    rounds: int
    deadline: float

    def model(self, build: Callable[[], Any]) -> Any:
        """Build a frozen model on the device, in bfloat16 on a GPU."""
        torch.manual_seed(0)
        with self.device:
            found = build()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return found.to(dtype).eval().requires_grad_(False)

    def wait(self) -> None:
        """Wait for what was started on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measured(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Return seconds and peak memory in MiB of a call; None where memory is not counted or ran out."""
        cuda = self.device.type == "cuda"
        gc.collect()
        try:
            started = time.perf_counter()
            run()  # compiles, and prepares what is prepared once
            self.wait()
            first, held = time.perf_counter() - started, torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            spent = []
            for _ in range(self.rounds):
                started = time.perf_counter()
                run()
                self.wait()
                spent.append(time.perf_counter() - started)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return {"seconds": None, "first": None, "mib": None}
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else None
        return {"seconds": statistics.median(spent), "first": first, "mib": peak}


@contextmanager
def attention(way: str) -> Iterator[None]:
    """Run the forest's attention in a way: ``compiled``, ``eager`` or ``packed``."""
    from torch.nn.attention.flex_attention import flex_attention

    patches: dict[str, Any] = {
        "compiled": nullcontext(),
        "eager": mock.patch(f"{ATTENTION}._compiled", lambda: flex_attention),
        "packed": mock.patch("softprompt.engine.forest.plan.Visibility.flex", lambda self: None),
    }
    with patches[way]:
        yield


def training(bench: Bench, model: Any, work: steps.Work) -> Iterator[dict[str, Any]]:
    """Yield the ways of one training step."""
    import peft

    rows = steps.rows_of(work, model.config.vocab_size)
    width = model.get_input_embeddings().weight.shape[1]
    batch = {name: each.to(bench.device) for name, each in steps.batch_of(work, rows).items()}
    prompted, prompt_of_peft = steps.prompted_step(peft, model, work, batch)
    losses, found = {}, {}
    losses["PEFT"] = prompted()
    found["PEFT"] = bench.measured(prompted)
    tokens = sum(len(row.target) for row in rows)
    for way in ("compiled", "eager", "packed"):
        prompt = torch.nn.Parameter(prompt_of_peft.detach().float().clone())
        assert prompt.shape == (work.virtual, width)

        with attention(way):
            engine = build_engine(Base(model))

        def step(prompt: torch.nn.Parameter = prompt, engine: Any = engine) -> float:
            prompt.grad = None
            value = Prompt(prompt)
            loss = -engine.target_log_probs([replace(row, prompt=value) for row in rows]).values.sum() / tokens
            loss.backward()
            return float(loss.detach())

        with attention(way):
            losses[way] = step()
            found[way] = bench.measured(step) | {"engine": engine.name}
    for way, numbers in found.items():
        ratio = _ratio(found["PEFT"]["seconds"], numbers["seconds"])
        apart = abs(losses[way] - losses["PEFT"])
        yield {
            "case": "training",
            "work": work.title,
            "way": way,
            **numbers,
            "times PEFT": ratio,
            "loss apart": apart,
        }


def labels(bench: Bench, model: Any, inputs: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield the ways of scoring every label for every input."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, model.config.vocab_size, (length,), generator=generator).tolist())

    answers = [ids(1 + i % 5) for i in range(count)]
    width = model.get_input_embeddings().weight.shape[1]
    value = Prompt(torch.randn(100, width, device=bench.device) * steps.SCALE)
    sources = [ids(10 + i % 21) for i in range(inputs)]
    rows = [EngineRow(source, label, value) for source, label in product(sources, answers)]
    for kind in ("auto", "expand"):
        engine = build_engine(Base(model), kind)

        @torch.no_grad()
        def score(engine: Any = engine) -> None:
            for start in range(0, len(rows), 4 * count):
                engine.target_log_probs(rows[start : start + 4 * count])

        yield {
            "case": "labels",
            "work": f"{count} labels x {inputs} inputs",
            "way": engine.name,
            **bench.measured(score),
        }


def decoding(bench: Bench, model: Any, rows: int) -> Iterator[dict[str, Any]]:
    """Yield tokens a second of greedy answers behind eight prompts, and of PEFT's ``generate`` behind one."""
    import peft

    table = model.get_input_embeddings().weight.detach()
    heads = torch.randint(0, table.shape[0], (8, 50), device=bench.device)
    ids = torch.randint(0, table.shape[0], (rows, 32), device=bench.device)
    batcher = Batcher(Base(model, tokenizer()))
    ours = bench.measured(lambda: served(batcher, table, heads, ids))
    batcher.stop()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=50)
    prompted: Any = peft.get_peft_model(model, config).eval()
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    theirs = bench.measured(lambda: prompted.generate(input_ids=ids, attention_mask=mask, **how))
    for way, numbers in (("ours, 8 prompts", ours), ("PEFT, 1 prompt", theirs)):
        rate = _ratio(rows * NEW, numbers["seconds"])
        yield {"case": "decoding", "work": f"{rows} rows", "way": way, **numbers, "tokens/s": rate}


def kernels(bench: Bench, batch: int, virtual: int, length: int) -> Iterator[dict[str, Any]]:
    """Yield attention alone, forward and backward: FlexAttention over a forest, varlen over repeated prompts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, width, total = 32, 64, virtual + batch * length
    tree = torch.cat([torch.zeros(virtual), 1 + torch.arange(batch).repeat_interleave(length)]).to(bench.device)

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((tree[k] == 0) | (tree[k] == tree[q]))

    mask = create_block_mask(visible, None, None, total, total, device=bench.device)
    compiled: Any = torch.compile(flex_attention, dynamic=True)

    def drawn(*size: int) -> list[torch.Tensor]:
        how: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16, "requires_grad": True}
        return [torch.randn(*size, **how) for _ in range(3)]

    one, rest = drawn(1, heads, total, width), drawn(batch * (virtual + length), heads, width)

    def forest() -> None:
        compiled(*one, block_mask=mask).sum().backward()

    work = f"B={batch}, P={virtual}, T={length}"
    yield {"case": "attention", "work": work, "way": "FlexAttention, forest", **bench.measured(forest)}
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    ends = torch.arange(batch + 1, device=bench.device, dtype=torch.int32) * (virtual + length)

    def repeated() -> None:
        found = varlen.varlen_attn(*rest, ends, ends, virtual + length, virtual + length, window_size=(-1, 0))
        found.sum().backward()

    yield {"case": "attention", "work": work, "way": "varlen, prompt repeated", **bench.measured(repeated)}


def cases(bench: Bench, *, small: bool) -> Iterator[tuple[str, Callable[[], Iterator[dict[str, Any]]]]]:
    """Yield the cases by name, the most wanted first; a model is built once for all of its own."""
    shapes: dict[str, Callable[[], Any]] = {"tiny": tiny} if small else {"GPT-2 small": steps.gpt2_small}
    shapes |= {} if small else {"Llama 1.1 B": llama_1b}
    sizes = [(4, 4)] if small else [(20, 8), (20, 64), (100, 8), (100, 32), (100, 64)]
    for name, build in shapes.items():
        model = bench.model(build)
        for virtual, rows in sizes:
            work = steps.Work(f"{name}, P={virtual}, B={rows}", build, virtual, steps.spread(11, 53, rows), 0, 0)
            yield work.title, partial(training, bench, model, work)
        yield f"{name}, labels", partial(labels, bench, model, 2 if small else 16, 5 if small else 77)
        for rows in (2,) if small else (16, 64):
            yield f"{name}, decoding {rows}", partial(decoding, bench, model, rows)
    if bench.device.type == "cuda":
        yield "attention alone", partial(kernels, bench, 32, 100, 32)


def run(bench: Bench, *, small: bool) -> dict[str, Any]:
    """Run the cases that fit, and return their numbers."""
    found: list[dict[str, Any]] = []
    left, failed = [], {}
    for name, case in cases(bench, small=small):
        if time.perf_counter() > bench.deadline:
            left.append(name)
            continue
        try:
            for numbers in case():
                found.append(numbers)
                print(json.dumps(numbers), flush=True)
        except Exception as error:  # one case that a card cannot run must not cost the others
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": tf.__version__}
    return {"device": device, **versions, "results": found, "left out": left, "failed": failed}


def table(found: dict[str, Any]) -> str:
    """Return the numbers as a table of Markdown."""
    head = ("case", "work", "way", "seconds", "times PEFT", "tokens/s", "mib")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for each in found["results"]:
        values = [each.get(name) for name in head]
        lines.append(
            "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v or "-") for v in values) + " |"
        )
    return "\n".join(lines)


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def main() -> None:
    """Measure, write JSON and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the JSON")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins after so much of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to see that everything runs")
    given = parser.parse_args()
    quiet()
    # A case takes up to a minute with its compilation.
    deadline = time.perf_counter() + 60 * given.minutes - (0 if given.tiny else 60)
    bench = Bench(torch.device(given.device), 1 if given.tiny else given.rounds, deadline)
    found = run(bench, small=given.tiny)
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    for name, why in found["failed"].items():
        print(f"failed: {name}: {why}")


if __name__ == "__main__":
    alone()
    main()
