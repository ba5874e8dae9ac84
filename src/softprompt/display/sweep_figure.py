"""What a sweep found: quality against learning rate, and rung by rung."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softprompt.display.figures import BLUE, GRID, INK, ORANGE, PALE, empty_figure, framed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS, _MARKERS = (BLUE, ORANGE, "#2f8f5b", "#8a5bb5", PALE, "#b08d2c"), "osD^vP"


def sweep_figure(found: Mapping[str, Any]) -> Figure:
    """Draw the validation metric of each candidate against its learning rate, and along the rungs.

    Args:
        found: ``sweep.json``'s values: ``by``, ``best``, ``rungs`` and ``candidates``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, by = empty_figure(10.0, 4.6), found["by"]
    rates, rungs = figure.subplots(1, 2, sharey=True)
    measured = [each for each in found["candidates"] if each["points"]]
    for number, kind in enumerate(dict.fromkeys(map(_kind, measured))):
        style: dict[str, Any] = {
            "color": _COLORS[number % len(_COLORS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 6,
        }
        own = sorted(
            (each for each in measured if _kind(each) == kind), key=lambda each: float(each["learning_rate"])
        )
        first = [each["points"][0]["validation"][by] for each in own]
        rates.plot([each["learning_rate"] for each in own], first, label=kind, linewidth=1.6, **style)
        for each in own:
            steps = [point["steps"] for point in each["points"]]
            values = [point["validation"][by] for point in each["points"]]
            rungs.plot(steps, values, linewidth=2.4 if each["name"] == found["best"] else 1.2, **style)
    best = next(each for each in measured if each["name"] == found["best"])
    last = best["points"][-1]
    ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}
    rungs.plot([last["steps"]], [last["validation"][by]], label=f"kept: {last['validation'][by]:.3f}", **ring)
    rates.plot([best["learning_rate"]], [best["points"][0]["validation"][by]], **ring)
    rates.set_xscale("log")
    rungs.set_xscale("log")
    rungs.set_xticks(found["rungs"], [f"{steps:,}" for steps in found["rungs"]], minor=False)
    rungs.minorticks_off()
    rates.set_xlabel("peak learning rate", color=INK, fontsize=11)
    rates.set_ylabel("validation accuracy" if by == "accuracy" else "validation loss (nats per token)", fontsize=11)
    rates.set_title(f"all candidates, after {found['rungs'][0]:,} steps", color=INK, fontsize=11)
    rungs.set_xlabel("optimizer steps", color=INK, fontsize=11)
    rungs.set_title("those that went on", color=INK, fontsize=11)
    for axis in (rates, rungs):
        axis.grid(visible=True, color=GRID, linewidth=0.8)
        framed(axis, INK)
        axis.spines["right"].set_visible(False)
    figure.suptitle("Sweep", fontsize=13, fontweight="bold", color=INK)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, labelcolor=INK)
    return figure


def _kind(tried: Mapping[str, Any]) -> str:
    """Return what a candidate is, but for its learning rate."""
    choice = tried["choice"]
    length = None if choice["length"] is None else f"{choice['length']} tokens"
    return ", ".join(part for part in (choice["method"], choice["init"], length) if part)
