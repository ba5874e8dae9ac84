"""How a training step grows: with the prompt, with the batch, with unlike row lengths.

The GPT-2-small shape of ``training_step.py``, PEFT's forward against ours, one thread. FLOPs have
no noise; CPU seconds are one run each and only their ratio means anything.

    python bench/growth.py [--plot docs/images/growth.png] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from alone import alone
from quiet import quiet
from training_step import Work, count, gpt2_small, ours, peft, spread

SKEWED = (11, 11, 12, 12, 13, 14, 15, 16, 17, 19, 21, 24, 28, 34, 42, 53)
"""Sixteen lengths between 11 and 53 with the long tail of real messages, 21 on average."""

PROMPTS = (1, 20, 100, 200)
BATCHES = (1, 4, 16, 64)


def works() -> dict[tuple[str, int | str], Work]:
    """Return the works, keyed by what varies and its value."""

    def work(virtual: int, lengths: tuple[int, ...]) -> Work:
        return Work("", gpt2_small, virtual, lengths, 0.0, 0.0)

    even = spread(11, 53, 16)
    grid: dict[tuple[str, int | str], Work] = {("P", p): work(p, even) for p in PROMPTS}
    grid |= {("B", b): work(100, spread(11, 53, b) if b > 1 else (32,)) for b in BATCHES}
    lengths = {"all 32": (32,) * 16, "even 11-53": even, "skewed 11-53": SKEWED}
    return grid | {("T", name): work(100, values) for name, values in lengths.items()}


def measure(work: Work) -> dict[str, float]:
    """Return FLOPs and seconds of both sides, and their ratios."""
    result: dict[str, float] = {}
    for side, make in (("ours", ours), ("peft", peft)):
        step, _ = make(work)
        result[f"{side}_gflop"] = count(step) / 1e9
        start = time.process_time()
        step()
        result[f"{side}_seconds"] = time.process_time() - start
    result["flops_ratio"] = result["peft_gflop"] / result["ours_gflop"]
    result["seconds_ratio"] = result["peft_seconds"] / result["ours_seconds"]
    return result


def plot(results: dict[tuple[str, int | str], dict[str, float]], path: Path) -> None:
    """Draw both ratios over P and over B."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    titles = {"P": "virtual tokens (B = 16, T 11-53)", "B": "rows (P = 100, T 11-53)"}
    for index, (axis, title) in enumerate(titles.items(), start=1):
        points = [(value, r) for (kind, value), r in results.items() if kind == axis]
        panel = figure.add_subplot(1, 2, index)
        for name, label, marker in (("flops", "FLOPs", "o"), ("seconds", "CPU time", "s")):
            ratios = [r[f"{name}_ratio"] for _, r in points]
            panel.plot([value for value, _ in points], ratios, marker=marker, label=label)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.set_xlabel(title)
        panel.set_ylabel("PEFT / softprompt")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure the grid, print it and draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    quiet()
    done: dict[Work, dict[str, float]] = {}
    results = {}
    for key, work in works().items():
        if work not in done:
            done[work] = measure(work)
        results[key] = done[work]
    if options.plot is not None:
        plot(results, options.plot)
    if options.json:
        rows: list[dict[str, Any]] = [{"varied": k, "value": v, **r} for (k, v), r in results.items()]
        print(json.dumps(rows, indent=2))
        return
    print("| varied | value | GFLOP PEFT / ours | FLOPs ratio | time ratio |")
    print("|---|---|---|---|---|")
    for (varied, value), r in results.items():
        print(
            f"| {varied} | {value} | {r['peft_gflop']:.0f} / {r['ours_gflop']:.0f} "
            f"| {r['flops_ratio']:.2f} | {r['seconds_ratio']:.2f} |"
        )


if __name__ == "__main__":
    alone()
    main()
