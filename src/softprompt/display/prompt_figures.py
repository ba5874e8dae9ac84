"""Figures of what a prompt learned, from plain numbers; they raise ``ConfigError`` without matplotlib.

Virtual tokens are counted from 1. Texts of tokens and names come from files, so none is read as a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from softprompt.display.figures import BLUE, GRID, INK, ORANGE, PALE, empty_figure, framed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED, _MOST_NAMED = 9, 40
"""Most characters of a token's text on an axis; most virtual tokens with their texts there."""


def tokens_figure(
    words: Sequence[str] = (),
    change: Sequence[float] = (),
    error: Sequence[float] = (),
    attention: Sequence[Sequence[float]] = (),
    every: int = 1,
) -> Figure:
    """Draw the loss without each virtual token above the attention on it by layer, or one of the two.

    Args:
        words: the vocabulary token nearest to each virtual token ``[P]``; may be empty.
        change: change of the loss without each ``every``-th virtual token, nats per target token.
        error: its standard error.
        attention: share of the text's attention on each virtual token ``[L, P]``, 0 to 1.
        every: of every which virtual token the change is.
    """
    count = len(attention[0]) if attention else (len(change) - 1) * every + 1
    heights = [2.0] * bool(change) + [2.6] * bool(attention)
    figure = empty_figure(min(10.0, max(6.4, 2.0 + 0.3 * count)), sum(heights) + 1.3)
    axes: list[Any] = list(
        figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    )
    if change:
        colors = [ORANGE if value > 0 else PALE for value in change]
        axes[0].bar(range(1, count + 1, every), change, 0.75 * every, yerr=error, color=colors, ecolor=INK)
        axes[0].axhline(0, color=INK, linewidth=0.8)
        bars = " ± standard error" * any(error)
        _plain(axes[0], y=f"added loss without it{bars}\n(nats per token)")
    if attention:
        ends = (0.5, count + 0.5, len(attention) + 0.5, 0.5)
        image = axes[-1].imshow(attention, cmap="Blues", vmin=0, aspect="auto", extent=ends)
        axes[-1].set_ylabel("layer", color=INK, fontsize=10)
        axes[-1].yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        bar = figure.colorbar(image, ax=axes[-1], orientation="horizontal", fraction=0.06, pad=0.03)
        bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bar.set_label("share of the text's attention", color=INK, fontsize=10)
    axes[-1].set_xlim(0.5, count + 0.5)
    if words and count <= _MOST_NAMED:
        labels = [
            f"{number}  {_printable(word.strip() or word)[:_NAMED]}" for number, word in enumerate(words, start=1)
        ]
        axes[-1].set_xticks(range(1, count + 1), labels, rotation=90, fontsize=9, parse_math=False)
        axes[-1].set_xlabel("virtual token, and the vocabulary's nearest (cosine)", color=INK, fontsize=11)
    else:
        _counted(axes[-1], "virtual token")
    return _titled(figure, "What each virtual token is for")


def cosines_figure(cosines: Sequence[Sequence[float]], every: int = 1) -> Figure:
    """Draw the cosines of virtual tokens with each other ``[P, P]``, of every ``every``-th one."""
    figure, axis = _axis(6.0, 5.0)
    end = len(cosines) * every + 0.5
    image = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, extent=(0.5, end, end, 0.5))
    _counted(axis, "virtual token")
    axis.set_ylabel("virtual token", color=INK, fontsize=11)
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, fraction=0.05).set_label("cosine", color=INK, fontsize=10)
    return _titled(figure, "Similarity of the virtual tokens")


def norms_figure(norms: Sequence[float], quantiles: Sequence[float]) -> Figure:
    """Draw the norm of each virtual token ``[P]`` over the vocabulary's at 0, 5, 25, 50, 75, 95 and 100 %."""
    figure, axis = _axis(7.2, 3.6)
    for i, (share, alpha) in enumerate((("all", 0.15), ("90 %", 0.3), ("50 %", 0.5))):
        band = {"color": PALE, "alpha": alpha, "linewidth": 0, "label": f"vocabulary, {share}"}
        axis.axhspan(quantiles[i], quantiles[6 - i], **band)
    axis.axhline(quantiles[3], color=BLUE, linewidth=1.2, label="vocabulary, median")
    axis.plot(range(1, len(norms) + 1), norms, "o", color=ORANGE, markersize=5, label="virtual tokens")
    axis.set_ylim(bottom=0)
    _counted(axis, "virtual token")
    _plain(axis, y="norm of the embedding")
    return _titled(figure, "Norms against the vocabulary's", columns=3)


def drift_figure(
    epochs: Sequence[int], drift: Sequence[Sequence[float]], every: int = 1, kept: int | None = None
) -> Figure:
    """Draw how far each virtual token is from its start after each epoch ``[E, P]``, rms over its values.

    The epoch whose prompt is ``kept`` is marked; 0 is the start.
    """
    figure, axis = _axis(7.2, 3.8)
    many = [0, *epochs]
    for number, own in enumerate(zip(*drift, strict=True)):
        axis.plot(many, [0.0, *own], color=PALE, linewidth=1.0, label="" if number else "each virtual token")
    means = [sum(row) / len(row) for row in drift]
    axis.plot(many, [0.0, *means], color=BLUE, linewidth=2.4, marker="o", markersize=4, label="mean")
    most = max(range(len(drift[-1])), key=drift[-1].__getitem__)
    label = f"virtual token {most * every + 1}, which moved most"
    axis.plot(many, [0.0, *(row[most] for row in drift)], color=ORANGE, linewidth=1.8, label=label)
    if kept is not None:
        axis.axvline(kept, color=INK, linewidth=1.0, linestyle="--", label=f"kept: epoch {kept}")
    axis.set_ylim(bottom=0)
    _counted(axis, "epoch")
    _plain(axis, y="distance from the start\n(rms over the values)")
    return _titled(figure, "Drift from the start", columns=3)


def layers_figure(
    share: Sequence[float],
    heads: Sequence[tuple[float, float]],
    answering: Sequence[float | None],
    uniform: float,
    place: str,
) -> Figure:
    """Draw the share of the text's attention that goes to the prompt, by layer ``[L]``, 0 to 1.

    Args:
        share: mean over heads and text tokens.
        heads: of the heads with the least and the most.
        answering: of the text tokens that predict the answer.
        uniform: what attention alike to all tokens would give.
        place: whose attention it is.
    """
    figure, axis = _axis(7.2, 3.8)
    layers = range(1, len(share) + 1)
    axis.fill_between(
        layers, *zip(*heads, strict=True), color=PALE, alpha=0.35, linewidth=0, label="range of the heads"
    )
    axis.plot(layers, share, color=BLUE, linewidth=2.2, marker="o", markersize=4, label="mean")
    if None not in answering:
        answers = {"color": ORANGE, "marker": "s", "markersize": 4, "label": "where the answer is predicted"}
        axis.plot(layers, answering, linewidth=1.8, **answers)
    axis.axhline(uniform, color=INK, linestyle="--", linewidth=1.1, label=f"uniform attention ({uniform:.0%})")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _counted(axis, "layer")
    _plain(axis, y="share of attention on the prompt")
    return _titled(figure, f"Attention to the prompt ({place})", columns=2)


def contest_figure(versus: Mapping[str, tuple[int, int]], rows: int) -> Figure:
    """Draw the records that the prompt won and lost against others ``{name: (won, lost)}``, of ``rows``."""
    figure, axis = _axis(7.2, 1.9 + 0.45 * len(versus))
    places = range(len(versus))
    for i, sign, color, label in ((0, 1, BLUE, "won by the prompt"), (1, -1, ORANGE, "lost")):
        bars = axis.barh(places, [sign * pair[i] for pair in versus.values()], 0.62, color=color, label=label)
        axis.bar_label(bars, [f"{pair[i] or ''}" for pair in versus.values()], padding=4, color=INK, fontsize=10)
    names = [name if len(name) <= 24 else f"...{name[-21:]}" for name in versus]
    axis.set_yticks(places, [_printable(name) for name in names], parse_math=False)
    axis.invert_yaxis()
    axis.axvline(0, color=INK, linewidth=0.8)
    lost, won = (max(1, *(pair[i] for pair in versus.values())) for i in (1, 0))
    axis.set_xlim(-1.1 * lost - 0.1 * won, 1.1 * won + 0.1 * lost)
    _counted(axis, f"records, of {rows}")
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    _plain(axis, "x")
    return _titled(figure, "Records won and lost against", columns=2)


def _axis(width: float, height: float) -> tuple[Figure, Any]:
    figure = empty_figure(width, height)
    return figure, figure.add_subplot()


def _printable(text: str) -> str:
    """Return a text in letters that every font has, the others as escapes."""
    return "".join(each if each.isprintable() and ord(each) < 0x250 else ascii(each)[1:-1] for each in text)


def _counted(axis: Any, what: str) -> None:
    """Name the x axis, which counts something."""
    axis.set_xlabel(what, color=INK, fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _plain(axis: Any, grid: str = "y", y: str = "") -> None:
    axis.set_ylabel(y, color=INK, fontsize=10)
    axis.grid(visible=True, axis=grid, color=GRID, linewidth=0.8)
    framed(axis, INK)
    axis.spines["right"].set_visible(False)


def _titled(figure: Figure, title: str, columns: int = 0) -> Figure:
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    if columns:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)
    return figure
