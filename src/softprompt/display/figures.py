"""Figures, drawn from recorded numbers; matplotlib is the extra ``plot``.

No global state of matplotlib is touched: styles are set on the objects, pyplot stays out.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from softprompt.artifacts import write_atomically
from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, PALE, ORANGE, INK = "#1f5fa8", "#7fb0e0", "#c8501e", "#3c3c3c"
_COUNTED, _HALF = 20, 12
"""Most labels of a matrix that shows its counts; most characters of either half of a label."""
_TICKS = 6
"""Learning rates that are marked one by one at most."""
_FRAME, GRID = "#b0b0b0", "#e8e8e8"
_COLORS, _MARKERS = (BLUE, ORANGE, "#2f8f5b", "#8a5bb5", PALE, "#b08d2c"), "osD^vP"


def training_curve(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    base_accuracy: float | None = None,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Write ``training_figure`` as a PNG to ``path``, atomically.

    Raises:
        ConfigError: no history, another suffix, or matplotlib is not installed.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"expected a .png file for the training curve, got {target.name}")
    image = png_of(training_figure(history, base_accuracy=base_accuracy, start=start))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, image)


def training_figure(
    history: Sequence[Mapping[str, Any]],
    *,
    base_accuracy: float | None = None,
    start: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw loss and validation accuracy by epoch, the best epoch marked.

    Args:
        history: the manifest's points: ``epoch``, ``loss`` and, where validated,
            ``validation_loss`` (of a distillation ``validation_divergence``) and ``validation_accuracy``, or all of
            them inside ``validation``.
        base_accuracy: accuracy without the prompt, between 0 and 1, as a dashed line.
        start: the validation before the first update, as epoch 0.

    Raises:
        ConfigError: no history, or matplotlib is not installed.
    """
    if not history:
        raise ConfigError("expected at least one epoch to draw, the history is empty: train first")
    figure = empty_figure(8.0, 4.6)
    before = [] if start is None else [{"epoch": 0, "validation": start}]
    _draw(figure, [_flat(point) for point in (*before, *history)], base_accuracy)
    return figure


def report_figure(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    confusion: Mapping[str, Mapping[str, int]] | None = None,
    labels: Sequence[str] = (),
) -> Figure:
    """Draw a confusion matrix where there is one, bars of metrics otherwise.

    Args:
        title: above the figure.
        groups: metrics between 0 and 1 by their names, of each of several reports or of one.
        confusion: records by gold label, then by predicted label.
        labels: order of the labels.

    Raises:
        ConfigError: there is nothing to draw, or matplotlib is not installed.
    """
    if confusion and labels:
        size = min(3.2 + 0.45 * len(labels), 5.5 + 0.12 * len(labels))
        figure = empty_figure(size + 1.6, size)
        _draw_matrix(figure, [[confusion.get(gold, {}).get(got, 0) for got in labels] for gold in labels], labels)
    elif any(groups.values()):
        bars = sum(len(each) for each in groups.values())
        figure = empty_figure(8.0, 1.6 + 0.34 * bars)
        _draw_bars(figure, groups)
    else:
        raise ConfigError("expected a metric between 0 and 1 to draw, the report has none")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    return figure


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
        for each in own if len(found["rungs"]) == 1 else [each for each in own if len(each["points"]) > 1]:
            steps = [point["steps"] for point in each["points"]]
            values = [point["validation"][by] for point in each["points"]]
            rungs.plot(steps, values, linewidth=2.4 if each["name"] == found["best"] else 1.2, **style)
    best = next(each for each in measured if each["name"] == found["best"])
    last = best["points"][-1]
    ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}
    rungs.plot([last["steps"]], [last["validation"][by]], label=f"kept: {last['validation'][by]:.3f}", **ring)
    rates.plot([best["learning_rate"]], [best["points"][0]["validation"][by]], **ring)
    for axis in (rates, rungs):
        axis.set_xscale("log")
        axis.minorticks_off()
    low, high = rates.get_xlim()
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = sorted({float(each["learning_rate"]) for each in measured})
    if len(ticks) > _TICKS:
        ticks = [digit * 10.0**ten for ten in tens for digit in (1, 2, 5) if low <= digit * 10.0**ten <= high]
    rates.set_xticks(ticks, [f"{rate:.3g}" for rate in ticks])
    rungs.set_xticks(found["rungs"], [f"{steps:,}" for steps in found["rungs"]], minor=False)
    rates.set_xlabel("peak learning rate", color=INK, fontsize=11)
    rates.set_ylabel("validation accuracy" if by == "accuracy" else "validation loss (nats per token)", fontsize=11)
    rates.set_title(f"all candidates, at step {found['rungs'][0]:,}", color=INK, fontsize=11)
    rungs.set_xlabel("optimizer steps", color=INK, fontsize=11)
    rungs.set_title("those that went on", color=INK, fontsize=11)
    for axis in (rates, rungs):
        axis.grid(visible=True, color=GRID, linewidth=0.8)
        framed(axis, INK)
        axis.spines["right"].set_visible(False)
    figure.suptitle("Sweep", fontsize=13, fontweight="bold", color=INK)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, labelcolor=INK)
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def empty_figure(width: float, height: float) -> Figure:
    """Return an empty figure, sizes in inches; notebooks show it as it is returned."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ConfigError('figures need matplotlib, it is not installed: pip install "softprompt[plot]"') from error
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure: Any = Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")
    # pyplot would register this with IPython, and change matplotlib for the whole process.
    figure._repr_png_ = partial(png_of, figure)
    return cast(Figure, figure)


def _draw_matrix(figure: Any, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    many = len(labels) > _COUNTED
    size = max(4.0, min(10.0, 330 / len(labels))) if many else 10.0
    names = [label if len(label) <= 2 * _HALF else f"{label[:_HALF]}…{label[-_HALF:]}" for label in labels]
    turned = {"rotation": 90} if many else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(labels)), names, fontsize=size, **turned)
    axis.set_yticks(range(len(labels)), names, fontsize=size)
    axis.set_xlabel("predicted label", color=INK, fontsize=11)
    axis.set_ylabel("gold label", color=INK, fontsize=11)
    for row, (own, share) in enumerate(zip(counts, shares, strict=True)):
        for column, count in enumerate(own if not many else ()):
            color = "white" if share[column] > 0.5 else INK
            axis.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=10)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, format=lambda value, _: f"{value:.0%}")
    bar.set_label("share of the gold label's records", color=INK, fontsize=10)


def _draw_bars(figure: Any, groups: Mapping[str, Mapping[str, float]]) -> None:
    axis = figure.add_subplot()
    names = list(dict.fromkeys(name for each in groups.values() for name in each))
    height = 0.8 / len(groups)
    colors = [BLUE, ORANGE, PALE, INK]
    for number, (group, metrics) in enumerate(groups.items()):
        places = [names.index(name) + (number - (len(groups) - 1) / 2) * height for name in metrics]
        values = list(metrics.values())
        bars = axis.barh(places, values, height * 0.9, color=colors[number % len(colors)], label=group)
        axis.bar_label(bars, [f"{value:.3f}" for value in values], padding=4, color=INK, fontsize=10)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.set_xlabel("value (0 to 1)", color=INK, fontsize=11)
    axis.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
    framed(axis, INK)
    axis.spines["right"].set_visible(False)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=10, labelcolor=INK)


def _kind(tried: Mapping[str, Any]) -> str:
    """Return what a candidate is, but for its learning rate."""
    choice = tried["choice"]
    length = None if choice["length"] is None else f"{choice['length']} tokens"
    return ", ".join(part for part in (choice["method"], choice["init"], length) if part)


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    validation = point.get("validation") or {}
    return {**point, **{f"validation_{name}": value for name, value in validation.items()}}


def _series(points: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(p["epoch"], p[key]) for p in points if p.get(key) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _draw(figure: Any, points: Sequence[Mapping[str, Any]], base_accuracy: float | None) -> None:
    losses = figure.add_subplot()
    dots = {"marker": "o", "markersize": 4.5, "linewidth": 2.0}
    losses.plot(*_series(points, "loss"), color=BLUE, label="training loss", **dots)
    validated, name = _series(points, "validation_loss"), "validation loss"
    if not validated[0]:
        validated, name = _series(points, "validation_divergence"), "divergence from the text, kept apart"
    if validated[0]:
        losses.plot(*validated, color=PALE, label=name, **dots)
    losses.set_xlabel("epoch", color=INK, fontsize=11)
    losses.set_ylabel("loss (nats per target token)", color=BLUE, fontsize=11)
    losses.set_xlim(points[0]["epoch"] - 0.5, points[-1]["epoch"] + 0.5)
    losses.set_ylim(0, 1.08 * losses.get_ylim()[1])
    losses.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    losses.grid(visible=True, color=GRID, linewidth=0.8)
    framed(losses, BLUE)
    scored = _series(points, "validation_accuracy")
    if scored[0] or base_accuracy is not None:
        _draw_accuracy(losses.twinx(), points, base_accuracy)
    else:
        losses.spines["right"].set_visible(False)
    if validated[0] and not scored[0]:
        best = min(zip(validated[1], validated[0], strict=True))
        _mark_best(losses, best[1], best[0], f"{best[0]:.3f}", PALE)
    figure.suptitle("Training curve", fontsize=13, fontweight="bold", color=INK)
    # Outside the axes, so that it never covers a curve.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, labelcolor=INK)


def _draw_accuracy(axis: Any, points: Sequence[Mapping[str, Any]], base_accuracy: float | None) -> None:
    scored = _series(points, "validation_accuracy")
    axis.set_ylabel("validation accuracy", color=ORANGE, fontsize=11)
    framed(axis, ORANGE)
    axis.set_ylim(0, 1.05)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    if scored[0]:
        line = {"marker": "s", "markersize": 4.5, "linewidth": 2.0, "color": ORANGE}
        axis.plot(*scored, label="validation accuracy", **line)
        best = min(
            (p for p in points if p.get("validation_accuracy") is not None),
            key=lambda p: (-p["validation_accuracy"], p.get("validation_loss") or 0.0),
        )
        accuracy = best["validation_accuracy"]
        _mark_best(axis, best["epoch"], accuracy, f"{accuracy:.1%}", ORANGE)
    if base_accuracy is not None:
        label = f"accuracy without the prompt ({base_accuracy:.1%})"
        axis.axhline(base_accuracy, color=ORANGE, linestyle="--", linewidth=1.3, label=label)


def framed(axis: Any, color: str) -> None:
    """Give an axis the frame of all figures, its y axis in a color."""
    axis.set_axisbelow(True)
    axis.spines[:].set_color(_FRAME)
    axis.spines["top"].set_visible(False)
    axis.tick_params(axis="x", colors=INK)
    axis.tick_params(axis="y", colors=color)


def _mark_best(axis: Any, epoch: float, best: float, shown: str, color: str) -> None:
    # By training's own order: accuracy, then loss, then the earlier epoch.
    axis.plot(
        [epoch],
        [best],
        linestyle="none",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor=color,
        markeredgewidth=1.8,
        label=f"best checkpoint (epoch {epoch}: {shown})",
    )
