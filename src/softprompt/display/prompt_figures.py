"""Figures of what a prompt learned, from plain numbers; see ``figures``.

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
    title: str,
    words: Sequence[str] = (),
    change: Sequence[float] = (),
    error: Sequence[float] = (),
    attention: Sequence[Sequence[float]] = (),
    every: int = 1,
) -> Figure:
    """Draw what each virtual token is for: the loss without it above the attention on it by layer, or one of them.

    Args:
        title: above the figure.
        words: the vocabulary token nearest to each virtual token ``[P]``, for the axis; may be empty.
        change: change of the loss without each ``every``-th virtual token, nats per target token.
        error: its standard error.
        attention: share of the text's attention on each virtual token ``[L, P]``, 0 to 1.
        every: of every which virtual token the change is.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    count = len(attention[0]) if attention else (len(change) - 1) * every + 1
    figure = empty_figure(min(10.0, max(6.4, 2.0 + 0.3 * count)), 2.0 * bool(change) + 2.9 * bool(attention) + 1.0)
    heights = [2.0] * bool(change) + [2.6] * bool(attention)
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    if change:
        axis = axes[0]
        colors = [ORANGE if value > 0 else PALE for value in change]
        lines = {"ecolor": INK, "error_kw": {"linewidth": 1.0}}
        axis.bar(range(1, count + 1, every), change, 0.75 * every, yerr=error, color=colors, **lines)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_ylabel("added loss without it\n(nats per token)", color=INK, fontsize=10)
        _plain(axis)
    if attention:
        image = axes[-1].imshow(
            attention, cmap="Blues", vmin=0, aspect="auto", extent=(0.5, count + 0.5, len(attention) + 0.5, 0.5)
        )
        axes[-1].set_ylabel("layer", color=INK, fontsize=10)
        axes[-1].yaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(image, ax=axes[-1], orientation="horizontal", fraction=0.06, pad=0.03)
        bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bar.set_label("share of the text's attention", color=INK, fontsize=10)
    _virtual_tokens(axes[-1], count, words)
    return _titled(figure, title)


def cosines_figure(cosines: Sequence[Sequence[float]], every: int = 1) -> Figure:
    """Draw the cosines of virtual tokens with each other ``[P, P]``, of every ``every``-th one."""
    figure = empty_figure(6.0, 5.0)
    axis, end = figure.add_subplot(), len(cosines) * every + 0.5
    image = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, extent=(0.5, end, end, 0.5))
    for set_label in (axis.set_xlabel, axis.set_ylabel):
        set_label("virtual token", color=INK, fontsize=11)
    for own in (axis.xaxis, axis.yaxis):
        own.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, fraction=0.05).set_label("cosine", color=INK, fontsize=10)
    return _titled(figure, "Similarity of the virtual tokens")


def norms_figure(norms: Sequence[float], quantiles: Sequence[float]) -> Figure:
    """Draw the norm of each virtual token over the shell of the vocabulary's.

    Args:
        norms: of each virtual token ``[P]``.
        quantiles: of the vocabulary's norms at 0, 5, 25, 50, 75, 95 and 100 %.
    """
    figure = empty_figure(7.2, 3.6)
    axis, (low, five, quarter, half, three, most, high) = figure.add_subplot(), quantiles
    for lower, upper, alpha, share in (
        (low, high, 0.15, "all"),
        (five, most, 0.3, "90 %"),
        (quarter, three, 0.5, "50 %"),
    ):
        axis.axhspan(lower, upper, color=PALE, alpha=alpha, linewidth=0, label=f"vocabulary, {share}")
    axis.axhline(half, color=BLUE, linewidth=1.2, label="vocabulary, median")
    axis.plot(range(1, len(norms) + 1), norms, "o", color=ORANGE, markersize=5, label="virtual tokens")
    axis.set_ylabel("norm of the embedding", color=INK, fontsize=11)
    axis.set_ylim(bottom=0)
    _plain(axis)
    _virtual_tokens(axis, len(norms))
    return _titled(figure, "Norms against the vocabulary's", columns=3)


def drift_figure(epochs: Sequence[int], drift: Sequence[Sequence[float]], every: int = 1) -> Figure:
    """Draw how far each virtual token is from its start after each epoch ``[E, P]``, rms over its values."""
    figure = empty_figure(7.2, 3.8)
    axis, many = figure.add_subplot(), [0, *epochs]
    for own in zip(*drift, strict=True):
        axis.plot(many, [0.0, *own], color=PALE, linewidth=1.0)
    means = [sum(row) / len(row) for row in drift]
    axis.plot(many, [0.0, *means], color=BLUE, linewidth=2.4, marker="o", markersize=4, label="mean")
    most = max(range(len(drift[-1])), key=drift[-1].__getitem__)
    label = f"virtual token {most * every + 1}, which moved most"
    axis.plot(many, [0.0, *(row[most] for row in drift)], color=ORANGE, linewidth=1.8, label=label)
    axis.plot([], [], color=PALE, linewidth=1.0, label="each virtual token")
    axis.set_xlabel("epoch", color=INK, fontsize=11)
    axis.set_ylabel("distance from the start\n(rms over the values)", color=INK, fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    _plain(axis)
    return _titled(figure, "Drift from the start", columns=3)


def layers_figure(
    share: Sequence[float],
    heads: Sequence[tuple[float, float]],
    answering: Sequence[float | None],
    uniform: float,
    place: str,
) -> Figure:
    """Draw the share of the text's attention that goes to the prompt, by layer.

    Args:
        share: mean over heads and text tokens ``[L]``, 0 to 1.
        heads: of the heads with the least and the most ``[L]``.
        answering: of the text tokens that predict the answer ``[L]``.
        uniform: what attention alike to all tokens would give.
        place: whose attention it is.
    """
    figure = empty_figure(7.2, 3.8)
    axis, layers = figure.add_subplot(), range(1, len(share) + 1)
    axis.fill_between(
        layers, *zip(*heads, strict=True), color=PALE, alpha=0.35, linewidth=0, label="range of the heads"
    )
    axis.plot(layers, share, color=BLUE, linewidth=2.2, marker="o", markersize=4, label="mean")
    if None not in answering:
        axis.plot(
            layers,
            answering,
            color=ORANGE,
            linewidth=1.8,
            marker="s",
            markersize=4,
            label="where the answer is predicted",
        )
    axis.axhline(uniform, color=INK, linestyle="--", linewidth=1.1, label=f"uniform attention ({uniform:.0%})")
    axis.set_xlabel("layer", color=INK, fontsize=11)
    axis.set_ylabel("share of attention on the prompt", color=INK, fontsize=11)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _plain(axis)
    return _titled(figure, f"Attention to the prompt ({place})", columns=2)


def contest_figure(versus: Mapping[str, tuple[int, int]], rows: int) -> Figure:
    """Draw the records that the prompt won and lost against others ``{name: (won, lost)}``, of ``rows``."""
    figure = empty_figure(7.2, 1.9 + 0.45 * len(versus))
    axis, places = figure.add_subplot(), range(len(versus))
    won, lost = ([pair[i] for pair in versus.values()] for i in (0, 1))
    for values, color, label in ((won, BLUE, "won by the prompt"), ([-n for n in lost], ORANGE, "lost")):
        bars = axis.barh(places, values, 0.62, color=color, label=label)
        axis.bar_label(bars, [f"{abs(n)}" for n in values], padding=4, color=INK, fontsize=10)
    names = [name if len(name) <= 24 else f"…{name[-23:]}" for name in versus]
    axis.set_yticks(places, [_printable(name) for name in names], parse_math=False)
    axis.invert_yaxis()
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.margins(x=0.15)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    axis.set_xlabel(f"records, of {rows}", color=INK, fontsize=11)
    _plain(axis, "x")
    return _titled(figure, "Records won and lost against", columns=2)


def _virtual_tokens(axis: Any, count: int, words: Sequence[str] = ()) -> None:
    """Label an axis of virtual tokens, with their nearest words where there is room."""
    axis.set_xlim(0.5, count + 0.5)
    if not words or count > _MOST_NAMED:
        axis.set_xlabel("virtual token", color=INK, fontsize=11)
        axis.xaxis.get_major_locator().set_params(integer=True)
        return
    labels = [f"{number}  {_printable(word)[:_NAMED]}" for number, word in enumerate(words, start=1)]
    axis.set_xticks(range(1, count + 1), labels, rotation=90, fontsize=9, parse_math=False)
    axis.set_xlabel("virtual token, and the vocabulary's nearest (cosine)", color=INK, fontsize=11)


def _printable(text: str) -> str:
    """Return a text in letters that every font has, the others as escapes."""
    return "".join(each if each.isprintable() and ord(each) < 0x250 else ascii(each)[1:-1] for each in text)


def _plain(axis: Any, grid: str = "y") -> None:
    axis.grid(visible=True, axis=grid, color=GRID, linewidth=0.8)
    framed(axis, INK)
    axis.spines["right"].set_visible(False)


def _titled(figure: Figure, title: str, columns: int = 0) -> Figure:
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, parse_math=False)
    if columns:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)
    return figure
