"""One GPU in about eight minutes: training step against PEFT, label scoring, decoding, memory; JSON and a table.

Random weights in bfloat16 (float32 on a CPU). No case begins in the last of the ``--minutes``, or later; one that
has begun is not cut short, so all of it may take longer. Every way runs in this process; a way's seconds are the
median over rounds, waited for to the end (``synchronize``); memory is the allocator's peak above what was held
before. A way that runs out of memory has no numbers. Cases that could not begin in time are left out, and listed.

    python bench/gpu.py [--output gpu.json] [--device cuda:0] [--minutes 8] [--rounds 5] [--tiny]

The ways of a training step: PEFT's forward on the padded batch; ours with FlexAttention compiled (what ``auto``
takes on a GPU), with FlexAttention in eager mode, with variable-length attention (``gpu_varlen.py``), and with the
packed attention of CPUs; ``flex calls`` says how often a step really ran FlexAttention. ``attention`` compares the
kernels alone, forward and backward, over one forest.

``--tiny`` runs every case's code on a CPU: FlexAttention forward only and in eager mode (it has no backward there),
in the model and alone; variable-length attention by kernels registered with torch's operators; a step in bfloat16.
What it cannot show is that FlexAttention compiles, its backward, and that the GPU's own kernels take these shapes.
"""

from __future__ import annotations

import argparse
import gc
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
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import training_step as steps
from alone import alone
from decode_step import served, tokenizer
from gpu_varlen import CAUSAL, Stretches, merged, on_cpu
from quiet import quiet
from softprompt.backbone import Base
from softprompt.bundled import model_directory
from softprompt.engine import EngineRow, build_engine
from softprompt.engine.forest import forest_attention
from softprompt.generation import Batcher
from softprompt.prompts import Prompt

WAYS = ("compiled", "eager", "varlen", "packed")
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

    def model(self, build: Callable[[], Any], dtype: torch.dtype | None = None) -> Any:
        """Build a frozen model on the device, by default in bfloat16 on a GPU."""
        torch.manual_seed(0)
        with self.device:
            found = build()
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
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
def attention(way: str, stretches: Stretches | None = None) -> Iterator[None]:
    """Run the forest's attention in a way: one of ``WAYS``, or ``flex``, which is FlexAttention on a CPU too."""
    patches: dict[str, Any] = {
        "compiled": nullcontext(),
        "eager": mock.patch.object(forest_attention, "_compiled", lambda: flex_attention),
        "packed": mock.patch("softprompt.engine.forest.plan.Visibility.flex", lambda self: None),
    }
    if stretches is not None:
        patches["varlen"] = registered(lambda q, k, v, mask, scale: merged(q, k, v, stretches, scale))
    patches["flex"] = registered(
        lambda q, k, v, mask, scale: forest_attention.attend_flex(q, k, v, mask.flex(), scale)
    )
    with patches[way]:
        yield


@contextmanager
def registered(kernel: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Have a kernel in the place of the forest's whole attention, whatever the device."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel(query, key, value, mask, scale).transpose(1, 2).contiguous(), None

    tf.AttentionInterface.register(forest_attention.NAME, forward)
    try:
        yield
    finally:
        tf.AttentionInterface.register(forest_attention.NAME, forest_attention.forest_attention_forward)


def flex_calls(step: Callable[[], float]) -> tuple[float, int]:
    """Return what a step gives, and how often it ran FlexAttention."""
    with mock.patch.object(forest_attention, "attend_flex", wraps=forest_attention.attend_flex) as flex:
        return step(), flex.call_count


def training(bench: Bench, model: Any, work: steps.Work) -> Iterator[dict[str, Any]]:
    """Yield the ways of one training step."""
    import peft

    rows = steps.rows_of(work, model.config.vocab_size)
    width = model.get_input_embeddings().weight.shape[1]
    batch = {name: each.to(bench.device) for name, each in steps.batch_of(work, rows).items()}
    prompted, prompt_of_peft = steps.prompted_step(peft, model, work, batch)
    losses, found, grads = {}, {}, {}
    stretches = Stretches.of(work.virtual, [length - 1 for length in work.lengths], bench.device)
    losses["PEFT"], grads["PEFT"] = prompted(), prompt_of_peft.grad.float()
    found["PEFT"] = bench.measured(prompted)
    tokens = sum(len(row.target) for row in rows)
    for way in WAYS:
        prompt = torch.nn.Parameter(prompt_of_peft.detach().float().clone())
        assert prompt.shape == (work.virtual, width)

        with nullcontext() if way == "varlen" else attention(way):  # its stretches are not those of the probe
            engine = build_engine(Base(model))

        def step(prompt: torch.nn.Parameter = prompt, engine: Any = engine) -> float:
            prompt.grad = None
            value = Prompt(prompt)
            loss = -engine.target_log_probs([replace(row, prompt=value) for row in rows]).values.sum() / tokens
            loss.backward()
            return float(loss.detach())

        with attention(way, stretches):
            losses[way], calls = flex_calls(step)
            grads[way] = prompt.grad
            found[way] = bench.measured(step) | {"engine": engine.name, "flex calls": calls}
    for way, numbers in found.items():
        ratio = _ratio(found["PEFT"]["seconds"], numbers["seconds"])
        apart = abs(losses[way] - losses["PEFT"])
        turned = (grads[way] - grads["PEFT"]).norm() / grads["PEFT"].norm()
        yield {
            "case": "training",
            "work": work.title,
            "way": way,
            **numbers,
            "times PEFT": ratio,
            "loss apart": apart,
            "gradient apart": float(turned),
        }


def forced(bench: Bench, model: Any, work: steps.Work) -> Iterator[dict[str, Any]]:
    """Yield the loss of a batch by FlexAttention, forward alone, and how far from the packed attention it is."""
    table = model.get_input_embeddings().weight
    prompt = Prompt(torch.randn(work.virtual, table.shape[1], device=bench.device) * steps.SCALE)
    rows = [replace(row, prompt=prompt) for row in steps.rows_of(work, table.shape[0])]
    engine = build_engine(Base(model))

    @torch.no_grad()
    def loss() -> float:
        return -float(engine.target_log_probs(rows).values.mean())

    with attention("packed"):
        expected = loss()
    with attention("flex"):
        value, calls = flex_calls(loss)
        numbers = bench.measured(loss)
    here = {"case": "forward", "work": work.title, "way": "FlexAttention"}
    yield {**here, **numbers, "flex calls": calls, "loss apart": abs(value - expected)}


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
    """Yield attention alone over one forest; how far an output is off that over repeated prompts is ``apart``.

    Forward and backward on a GPU, forward alone on a CPU.
    """
    heads, width, total = 32, 64, virtual + batch * length
    cuda, device = bench.device.type == "cuda", bench.device
    tree = torch.cat([torch.zeros(virtual), 1 + torch.arange(batch).repeat_interleave(length)]).to(device)

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((tree[k] == 0) | (tree[k] == tree[q]))

    mask = create_block_mask(visible, None, None, total, total, device=device)
    flex: Any = forest_attention._compiled() if cuda else flex_attention
    drawn = [torch.randn(1, heads, total, width, device=device, dtype=torch.bfloat16) for _ in range(3)]
    own = torch.arange(virtual, total, device=device).view(batch, length)
    rows = torch.cat([torch.arange(virtual, device=device).expand(batch, -1), own], 1).flatten()
    q, k, v = (each[0].transpose(0, 1)[rows].contiguous() for each in drawn)  # [B (P + T), A, D]
    for each in (*drawn, q, k, v):
        each.requires_grad_(cuda)
    stretches = Stretches.of(virtual, [length] * batch, device)
    ends = torch.arange(batch + 1, device=device, dtype=torch.int32) * (virtual + length)
    most = virtual + length
    ways: dict[str, Callable[[], Any]] = {
        "varlen, prompt repeated": lambda: varlen.varlen_attn(q, k, v, ends, ends, most, most, window_size=CAUSAL),
        "varlen, merged": lambda: merged(drawn[0], drawn[1], drawn[2], stretches, width**-0.5),
        "FlexAttention, forest": lambda: flex(*drawn, block_mask=mask),
    }
    expected: torch.Tensor | None = None
    for way, run in ways.items():

        def step(run: Callable[[], Any] = run) -> None:
            found = run()
            if cuda:
                found.sum().backward()

        numbers = bench.measured(step)
        with torch.no_grad():
            found = run()
            found = found if found.dim() == 3 else found[0].transpose(0, 1)[rows]
            expected = found if expected is None else expected
        apart = float((found - expected).abs().max())
        work = f"B={batch}, P={virtual}, T={length}"
        yield {"case": "attention", "work": work, "way": way, **numbers, "apart": apart}


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
    if small:
        half = bench.model(tiny, torch.bfloat16)
        for title, each in (("tiny", model), ("tiny, bfloat16", half)):
            yield f"{title}, forward", partial(forced, bench, each, replace(work, title=title))
        yield "tiny, bfloat16", partial(training, bench, half, replace(work, title="tiny, bfloat16"))
    yield "attention alone", partial(kernels, bench, *((3, 5, 4) if small else (32, 100, 32)))


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
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins in the last of them, or later")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to see that everything runs")
    given = parser.parse_args()
    quiet()
    if given.device == "cpu":
        on_cpu()
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
