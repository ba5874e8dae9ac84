"""How the update of one batch scales over the processes of a launcher, against the whole batch in one of them.

The rows of a causal work of `training_step.py` are dealt out to the ranks; each runs its own forward and backward,
then the prompt's gradient is added up over all, which is what `tune` does. Seconds pass on the clock, those of the
slowest rank, the median over rounds; rank 0 has the whole batch alone while the others wait. On ranks that share
cores this says what they lose to each other, and nothing of devices of their own.

    torchrun --nproc-per-node 2 bench/ranks.py [--only NAME] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from quiet import quiet
from softprompt.world import World, joined, launched
from training_step import WORKS, ours

NAMES = [name for name, work in WORKS.items() if work.task == "CAUSAL_LM"]


def measure(ranks: World, name: str, rounds: int) -> dict[str, Any]:
    """Measure an update of one work in one process, and over all; every rank returns the same."""
    work = WORKS[name]
    step, prompt = ours(work)
    step()
    whole = prompt.grad.clone()
    one = timed(ranks, step if ranks.is_main else lambda: None, rounds)

    step, prompt = ours(work, slice(ranks.rank, None, ranks.size))

    def update() -> None:
        step()
        ranks.add_up(prompt.grad)

    update()
    difference = float((prompt.grad - whole).abs().max() / whole.abs().max())
    several = timed(ranks, update, rounds)
    return {
        "work": work.title,
        "ranks": ranks.size,
        "rows": len(work.lengths),
        "seconds": [one, several],
        "times_as_fast": one / several,
        "gradient_difference": max(ranks.gather(difference)),
        "bytes_added_up": prompt.grad.numel() * prompt.grad.element_size(),
    }


def timed(ranks: World, step: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a step on the slowest rank; all begin together."""
    spent = []
    for _ in range(rounds):
        ranks.gather(None)
        start = time.perf_counter()
        step()
        spent.append(max(ranks.gather(time.perf_counter() - start)))
    return statistics.median(spent)


def main() -> None:
    """Run the works; rank 0 prints them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=NAMES, help="one row of the table")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each side")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if launched().size == 1:
        parser.error("expected several processes: torchrun --nproc-per-node 2 bench/ranks.py")
    quiet()
    with joined() as ranks:
        results = [measure(ranks, name, options.rounds) for name in ([options.only] if options.only else NAMES)]
    if not ranks.is_main:
        return
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(
        "| work | ranks | rows | seconds of one rank, of all | times as fast | gradient off by | bytes added up |"
    )
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['work']} | {r['ranks']} | {r['rows']} | {r['seconds'][0]:.2f}, {r['seconds'][1]:.2f} "
            f"| {r['times_as_fast']:.2f} | {r['gradient_difference']:.0e} | {r['bytes_added_up']:,} |"
        )


if __name__ == "__main__":
    main()
