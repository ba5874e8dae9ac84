"""Figures, drawn from recorded numbers; matplotlib is the extra ``plot``.

No global state of matplotlib is touched: styles are set on the objects, pyplot stays out.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt.artifacts import write_atomically
from softprompt.errors import ConfigError

_TRAINING, _VALIDATION, _ACCURACY, _INK = "#1f5fa8", "#7fb0e0", "#c8501e", "#3c3c3c"
_FRAME, _GRID = "#b0b0b0", "#e8e8e8"


def training_curve(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "Training curve",
    base_accuracy: float | None = None,
) -> None:
    """Draw loss and validation accuracy by epoch as a PNG, the best epoch marked.

    Args:
        history: the manifest's points: ``epoch``, ``loss`` and, where validated,
            ``validation_loss`` and ``validation_accuracy`` (or both inside ``validation``).
        path: file to write, ``.png``.
        title: above the figure.
        base_accuracy: accuracy without the prompt, between 0 and 1, as a dashed line.

    Raises:
        ConfigError: no history, another suffix, or matplotlib is not installed.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"expected a .png file for the training curve, got {target.name}")
    if not history:
        raise ConfigError("expected at least one epoch to draw, the history is empty: train first")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ConfigError('figures need matplotlib, it is not installed: pip install "softprompt[plot]"') from error
    points = [_flat(point) for point in history]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(8.0, 4.6), dpi=150, layout=layout, facecolor="white")
    _draw(figure, points, title, base_accuracy)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, image.getvalue())


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    validation = point.get("validation") or {}
    return {**point, **{f"validation_{name}": value for name, value in validation.items()}}


def _series(points: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(p["epoch"], p[key]) for p in points if p.get(key) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _draw(figure: Any, points: Sequence[Mapping[str, Any]], title: str, base_accuracy: float | None) -> None:
    losses = figure.add_subplot()
    dots = {"marker": "o", "markersize": 4.5, "linewidth": 2.0}
    losses.plot(*_series(points, "loss"), color=_TRAINING, label="training loss", **dots)
    validated = _series(points, "validation_loss")
    if validated[0]:
        losses.plot(*validated, color=_VALIDATION, label="validation loss", **dots)
    losses.set_xlabel("epoch", color=_INK, fontsize=11)
    losses.set_ylabel("loss (nats per target token)", color=_TRAINING, fontsize=11)
    losses.set_xlim(points[0]["epoch"] - 0.5, points[-1]["epoch"] + 0.5)
    losses.set_ylim(0, 1.08 * losses.get_ylim()[1])
    losses.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    losses.grid(visible=True, color=_GRID, linewidth=0.8)
    _frame(losses, _TRAINING)
    scored = _series(points, "validation_accuracy")
    if scored[0] or base_accuracy is not None:
        _draw_accuracy(losses.twinx(), points, base_accuracy)
    else:
        losses.spines["right"].set_visible(False)
    if validated[0] and not scored[0]:
        best = min(zip(validated[1], validated[0], strict=True))
        _mark_best(losses, best[1], best[0], f"{best[0]:.3f}", _VALIDATION)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK)
    # Outside the axes, so that it never covers a curve.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, labelcolor=_INK)


def _draw_accuracy(axis: Any, points: Sequence[Mapping[str, Any]], base_accuracy: float | None) -> None:
    scored = _series(points, "validation_accuracy")
    axis.set_ylabel("validation accuracy", color=_ACCURACY, fontsize=11)
    _frame(axis, _ACCURACY)
    axis.set_ylim(0, 1.05)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    if scored[0]:
        line = {"marker": "s", "markersize": 4.5, "linewidth": 2.0, "color": _ACCURACY}
        axis.plot(*scored, label="validation accuracy", **line)
        best = min(
            (p for p in points if p.get("validation_accuracy") is not None),
            key=lambda p: (-p["validation_accuracy"], p.get("validation_loss") or 0.0),
        )
        accuracy = best["validation_accuracy"]
        _mark_best(axis, best["epoch"], accuracy, f"{accuracy:.1%}", _ACCURACY)
    if base_accuracy is not None:
        label = f"accuracy without the prompt ({base_accuracy:.1%})"
        axis.axhline(base_accuracy, color=_ACCURACY, linestyle="--", linewidth=1.3, label=label)


def _frame(axis: Any, color: str) -> None:
    axis.set_axisbelow(True)
    axis.spines[:].set_color(_FRAME)
    axis.spines["top"].set_visible(False)
    axis.tick_params(axis="x", colors=_INK)
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
