"""N prompts trained side by side against N runs one after another: FLOPs and time of an update of all of them.

The same candidates (seeds) on the same records, alternating in one process, one thread. FLOPs come from torch's
counter and have no noise; seconds are CPU seconds of the process, the least over rounds, since other work on the
machine only adds to them. Losses of both ways are compared.

    python bench/side_by_side.py [--base-model demo] [--counts 1,2,4,8] [--batch-size 8] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from alone import alone
from softprompt.bundled import complaints
from softprompt.training import Candidate, TuneSettings, candidate_of, prepare, read_data, train_together, varied


def candidates(first: Any, count: int) -> list[Candidate]:
    """Return the runs of ``count`` seeds."""
    settings = first.settings.to_dict()
    return [candidate_of(varied(first, TuneSettings.from_dict(settings | {"seed": seed}))) for seed in range(count)]


def measured(first: Any, count: int, rounds: int) -> dict[str, Any]:
    """Return FLOPs and the least CPU seconds of an update of all prompts, both ways."""
    ways = {"side by side": candidates(first, count), "one after another": candidates(first, count)}

    def update(way: str, until: int) -> None:
        groups = [ways[way]] if way == "side by side" else [[each] for each in ways[way]]
        for group in groups:
            train_together(group, until=until)

    found: dict[str, Any] = {"prompts": count}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(1, rounds + 2):
        for way in ways:
            started = time.process_time()
            if number == 1:  # also prepares what is prepared once
                with FlopCounterMode(display=False) as counter:
                    update(way, number)
                found[f"{way}, GFLOPs"] = counter.get_total_flops() / 1e9
            else:
                update(way, number)
                seconds[way].append(time.process_time() - started)
    losses = [[each.state.mean_loss for each in own] for own in ways.values()]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)
    found |= {f"{way}, s": min(each) for way, each in seconds.items()}
    return found | {"times faster": found["one after another, s"] / found["side by side, s"]}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-model", default="demo")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = TuneSettings.from_dict({"batch_size": given.batch_size, "num_epochs": 100, "limit": 128})
    first = prepare(given.base_model, read_data(complaints("train"), None, settings), settings)
    found = [measured(first, int(count), given.rounds) for count in given.counts.split(",")]
    if given.json:
        print(json.dumps(found))
        return
    print(" | ".join(found[0]))
    for row in found:
        print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    alone()
    main()
