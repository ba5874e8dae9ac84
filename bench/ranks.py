"""What an update counts and takes over the processes of a launcher, beside what `cost_model.py` says it does.

A base of Llama's shape, random rows, an update's forward and backward through the engine, over gloo on the CPU:
with ``data`` and ``fsdp`` each rank has rows of its own and the prompt's gradient is added up, with ``tp`` all
have the same. Operations are torch's, bytes those that collectives carry, activations what autograd keeps. The
speed that is foretold follows from rank 0 alone with its own rows: as many times it as there are ranks, or cores
where those are fewer, and the wire as fast as gloo is measured to be. One process's gradient of all rows is the
oracle.

    python bench/ranks.py [--base demo] [--rounds 5] [--json]
    torchrun --nproc-per-node 2 bench/ranks.py [--base demo] [--way data fsdp] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cost_model
from cost_model import Shape, Work
from quiet import quiet
from softprompt.backbone import Base, freeze, load_base, own_part
from softprompt.engine import EngineRow, build_engine
from softprompt.prompts import Prompt
from softprompt.world import World, joined, launched

WAYS = ("data", "fsdp", "tp")


@final
class Wire(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that collectives give to a process.

    Attributes:
        gathered: Of weights that were put together.
        summed: Of sums.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gathered = self.summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name = func(*args, **(kwargs or {})), str(func)
        first: Any = args[0][0] if args and isinstance(args[0], list) else args[0] if args else None
        if "allgather" in name:
            self.gathered += first.nbytes
        elif "all_reduce.default" in name or "allreduce_" in name:
            self.summed += first.nbytes
        return output

    def sent(self, ranks: int) -> float:
        """Return the bytes that a process sends: its share to all others, in a sum twice."""
        return (self.gathered + 2 * self.summed) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Measured:
    """What an update of one rank came to, and what the formulas say, each a pair (counted, formula)."""

    base: str
    way: str
    ranks: int
    products: tuple[int, int]
    attention: tuple[int, int]
    activations: tuple[int, float]
    wire: tuple[float, float]
    tokens_per_second: tuple[float, float]
    gradient_difference: float


def measure(ranks: World, name: str, way: str, work: Work, rounds: int) -> Measured:
    """Measure an update of a base; every rank returns the same."""
    whole = load_base(name)
    freeze(whole.model)
    shape = shape_of(whole)
    base = whole if way == "data" or ranks.size == 1 else load_base(name, shard=way)
    apart = way != "tp"
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(
        3, shape.vocabulary, (work.rows * (ranks.size if apart else 1), work.tokens), generator=drawn
    )
    start = whole.facts.embedding_rms * torch.randn(work.virtual, shape.width, generator=drawn)
    step, prompt = update(base, ids[ranks.rank :: ranks.size] if apart else ids, work, start)
    alone, _ = update(whole, ids[: work.rows], work, start)
    every, oracle = update(whole, ids, work, start)

    def together() -> None:
        step()
        if apart:
            ranks.add_up(gradient(prompt))

    every()
    together()  # the first pass also prepares
    off = float((gradient(prompt) - gradient(oracle)).abs().max() / gradient(oracle).abs().max())
    with Wire() as wire:
        together()
    counts = operations(alone)
    weighed = sum(counts.pop(each, 0) for each in ("mm", "addmm"))
    single = timed(ranks, alone if ranks.is_main else lambda: None, rounds)
    several = timed(ranks, together, rounds)
    found = cost_model.cost(shape, work, ranks.size, way, size=4)
    carried = timed(ranks, lambda: carry(ranks, found.wire, way), rounds) if found.wire else 0.0
    text = work.rows * work.tokens * (ranks.size if apart else 1)
    cores = min(ranks.size, os.cpu_count() or 1)
    # The work of all ranks on the cores that are there; nothing else computes while gloo carries on the same cores.
    foretold = single * (ranks.size if apart else 1) / cores + carried
    return Measured(
        base=Path(name).name,
        way=way,
        ranks=ranks.size,
        products=(weighed, cost_model.products(shape, work)),
        attention=(sum(counts.values()), cost_model.attention(shape, work)),
        activations=(kept(base, step) if way == "tp" else kept(whole, alone), found.activations),
        wire=(wire.sent(ranks.size), found.wire),
        tokens_per_second=(text / several, text / foretold),
        gradient_difference=max(ranks.gather(off)),
    )


def shape_of(base: Base) -> Shape:
    """Return the sizes of a base of Llama's shape."""
    config = base.model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        base.name,
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        config.num_key_value_heads,
        width,
        config.intermediate_size,
        config.vocab_size,
        tables=1 if config.tie_word_embeddings else 2,
    )


def update(
    base: Base, ids: torch.Tensor, work: Work, start: torch.Tensor
) -> tuple[Callable[[], None], torch.nn.Parameter]:
    """Return a forward and backward over rows, whose last tokens are the answer, and the prompt that learns."""
    prompt = torch.nn.Parameter(start.clone())
    engine, value, source = build_engine(base, "forest"), Prompt(prompt), work.tokens - work.answer
    rows = [EngineRow(tuple(row[:source]), tuple(row[source:]), value) for row in ids.tolist()]

    def step() -> None:
        prompt.grad = None
        (-engine.target_log_probs(rows).values.sum()).backward()  # type: ignore[no-untyped-call]

    return step, prompt


def gradient(prompt: torch.nn.Parameter) -> torch.Tensor:
    """Return what the last update left."""
    assert prompt.grad is not None
    return prompt.grad


def operations(step: Callable[[], None]) -> dict[str, int]:
    """Return the operations of an update by the name of the product."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts no other on a CPU
        step()
    return {str(name).split(".")[1]: count for name, count in counter.get_flop_counts()["Global"].items()}


def kept(base: Base, step: Callable[[], None]) -> int:
    """Return the bytes that autograd keeps of an update, the base's own weights left out."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        own = own_part(tensor).untyped_storage()
        saved[own.data_ptr()] = own.nbytes()
        return tensor

    tensors = [*base.model.parameters(), *base.model.buffers()]
    weights = {own_part(each).untyped_storage().data_ptr() for each in tensors}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(size for place, size in saved.items() if place not in weights)


def carry(ranks: World, sent: float, way: str) -> None:
    """Have a collective send as many bytes as an update does, in one piece of at most 32 MB after the other."""
    left = sent * ranks.size / (ranks.size - 1) / (1 if way == "fsdp" else 2)
    while left > 0:
        piece = torch.zeros(int(min(left, 2**25)) // 4 + 1)
        if way == "fsdp":
            torch.distributed.all_gather_into_tensor(piece.new_empty(len(piece) * ranks.size), piece)
            left -= piece.nbytes * ranks.size
        else:
            ranks.add_up(piece)
            left -= piece.nbytes


def timed(ranks: World, step: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a step on the slowest rank; all begin together."""
    spent = []
    for _ in range(rounds):
        ranks.gather(None)
        start = time.perf_counter()
        step()
        spent.append(max(ranks.gather(time.perf_counter() - start)))
    return statistics.median(spent)


def row(each: Measured) -> str:
    """Return a line of the table: what was counted by what the formula says, and both speeds."""
    shares = [
        counted / said if said else 1.0 for counted, said in (each.products, each.attention, each.activations)
    ]
    wire = f"{each.wire[0] / 1e6:.3f}, {each.wire[1] / 1e6:.3f} MB" if each.wire[1] else "-"
    cells = [each.base, str(each.ranks), each.way, *(f"{share:.3f}" for share in shares), wire]
    speeds = ", ".join(f"{speed:,.0f}" for speed in each.tokens_per_second)
    return "| " + " | ".join([*cells, speeds, f"{each.gradient_difference:.0e}"]) + " |"


HEAD = (
    "| base | ranks | way | products / formula | attention / least | activations / formula "
    "| wire, formula | tokens/s, foretold | gradient off by |"
)


def main() -> None:
    """Run the ways; rank 0 prints them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="demo", help="a folder of Llama's shape, or the bundled model")
    parser.add_argument("--way", choices=WAYS, nargs="+", default=WAYS, help="how the base and the rows are split")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each side")
    for name, value in asdict(replace(Work(), tokens=64, answer=8)).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    ways = options.way if launched().size > 1 else WAYS[:1]
    quiet()
    work = Work(options.rows, options.tokens, options.answer, options.virtual)
    with joined() as ranks:
        results = [measure(ranks, options.base, way, work, options.rounds) for way in ways]
    if ranks.is_main:
        say(results, as_json=options.json)


def say(results: Sequence[Measured], *, as_json: bool) -> None:
    """Print the table, or its numbers."""
    if as_json:
        print(json.dumps([asdict(each) for each in results], indent=2))
        return
    print("\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(row, results)]))


if __name__ == "__main__":
    main()
