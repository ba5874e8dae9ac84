"""Draw the pictures of docs/concepts/: ``python docs/draw_concepts.py`` writes them into docs/images/."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / "images"
PROMPT, OTHER, TEXT, ANSWER, PADDING = "#7b5ea7", "#c77d3a", "#8fb8de", "#7fbf7f", "#eeeeee"


def cells(axes: Axes, x: float, y: float, tokens: str, size: float = 1.0) -> float:
    """Draw a row of tokens, one letter each (P, Q prompts, t text, a answer, . padding); returns where it ends."""
    colours = {"P": PROMPT, "Q": OTHER, "t": TEXT, "a": ANSWER, ".": PADDING, "b": "#bbbbbb", "s": "#f2d16b"}
    for token in tokens:
        if token != " ":
            face = plt.Rectangle((x, y), 0.9 * size, 0.9 * size, color=colours[token], linewidth=0)
            axes.add_patch(face)
        x += size
    return x


def canvas(width: float, height: float, columns: int, rows: float) -> tuple[Figure, Axes]:
    """Return an empty figure whose units are tokens, the first row on top."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def note(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Write a text whose left end is at a place."""
    axes.text(x, y, text, **({"fontsize": 9, "va": "center"} | options))


def forest() -> Figure:
    """Four rows of two prompts: padded, and as a forest."""
    rows = [("P", 6, 2), ("P", 3, 2), ("Q", 9, 2), ("P", 5, 2)]
    width = 6 + max(text + answer for _, text, answer in rows)
    figure, axes = canvas(10, 5.2, 44, 23)
    note(axes, 0, 0.6, "a padded batch", fontsize=11, weight="bold")
    for i, (prompt, text, answer) in enumerate(rows):
        line = prompt * 6 + "t" * text + "a" * answer
        cells(axes, 0, 2 + 1.3 * i, line.ljust(width, "."))
    note(axes, 0, 8.2, f"{len(rows)} rows x {width} columns = {len(rows) * width} positions")
    note(axes, 21, 0.6, "the same batch as a forest", fontsize=11, weight="bold")
    below = 2.0
    total = 0
    for prompt in "PQ":
        mine = [(text, answer) for name, text, answer in rows if name == prompt]
        cells(axes, 21, below, prompt * 6)
        total += 6
        for text, answer in mine:
            axes.plot([27, 28.6], [below + 0.45, below + 0.45], color="#999999", linewidth=0.8)
            cells(axes, 29, below, "t" * text + "a" * answer)
            total += text + answer
            below += 1.3
        axes.plot([27.2, 27.2], [below - 1.3 * len(mine) + 0.45, below - 0.85], color="#999999", linewidth=0.8)
    note(axes, 21, 8.2, f"each prompt once, each real token once = {total} positions")
    note(axes, 0, 11.3, "one input, three labels to score", fontsize=11, weight="bold")
    for i, label in enumerate(("aa", "aaa", "aaaa")):
        cells(axes, 0, 12.6 + 1.3 * i, ("P" * 6 + "t" * 6 + label).ljust(16, "."))
    note(axes, 0, 17.5, "3 rows x 16 columns = 48 positions")
    note(axes, 21, 11.3, "the labels as a trie below their input", fontsize=11, weight="bold")
    cells(axes, 21, 12.6, "P" * 6)
    axes.plot([27, 28.6], [13.05, 13.05], color="#999999", linewidth=0.8)
    x = cells(axes, 29, 12.6, "t" * 6)
    x = cells(axes, x, 12.6, "a")
    for i, rest in enumerate(("a", "aa", "aaa")):
        cells(axes, x + 1.0, 12.6 + 1.3 * i, rest)
        axes.plot([x, x + 0.9], [13.05, 13.05 + 1.3 * i], color="#999999", linewidth=0.8)
    note(axes, 21, 17.5, "6 + 6 + 1 + 1 + 2 + 3 = 19 positions")
    legend(axes, 20.4, ("P", "one prompt"), ("Q", "another"), ("t", "text"), ("a", "answer"), (".", "padding"))
    return figure


def legend(axes: Axes, y: float, *entries: tuple[str, str]) -> None:
    """Say what the colours are, in one line."""
    x = 0.0
    for token, words in entries:
        cells(axes, x, y, token)
        note(axes, x + 1.3, y + 0.45, words)
        x += 3.2 + 0.62 * len(words)


def places() -> Figure:
    """Where a prompt stands: in the input of a causal model, of a seq2seq model, in the layers."""
    figure, axes = canvas(10, 5.6, 44, 24.5)
    lines = [
        ("prefix", "PPPPbttttttttaa"),
        ("after_bos", "bPPPPttttttttaa"),
        ("chat_system", "bsPPPPsttttttaa"),
        ("suffix", "bttttttttPPPPaa"),
    ]
    note(axes, 0, 0.6, "in the input of a decoder: placement", fontsize=11, weight="bold")
    for i, (name, line) in enumerate(lines):
        note(axes, 0, 2.45 + 1.4 * i, name, family="monospace")
        cells(axes, 6.5, 2 + 1.4 * i, line)
    note(axes, 25, 0.6, "in a seq2seq model: output_model_types", fontsize=11, weight="bold")
    for i, (name, encoder, decoder) in enumerate(
        (("ENCODER", "PPPPtttttt", "baaa"), ("DECODER", "tttttt", "PPPPbaaa"), ("both", "PPPPtttttt", "PPPPbaaa"))
    ):
        note(axes, 25, 2.45 + 1.4 * i, name, family="monospace")
        cells(axes, 29.5, 2 + 1.4 * i, encoder, 0.75)
        cells(axes, 38, 2 + 1.4 * i, decoder, 0.75)
    note(axes, 29.5, 6.7, "encoder", color="#666666")
    note(axes, 38, 6.7, "decoder", color="#666666")
    note(axes, 0, 9.9, "virtual tokens: P vectors of the input's width", fontsize=11, weight="bold")
    note(axes, 25, 9.9, "keys and values: P of them in every layer", fontsize=11, weight="bold")
    for layer in range(4):
        y = 11.3 + 1.9 * (3 - layer)
        name = "input" if not layer else f"layer {layer}"
        note(axes, 0, y + 0.45, name, color="#666666")
        for i in range(12):
            alpha = 1 if layer == 0 or i >= 4 else 0.35
            face = plt.Rectangle((4.5 + i, y), 0.9, 0.9, color=PROMPT if i < 4 else TEXT, alpha=alpha, linewidth=0)
            axes.add_patch(face)
        note(axes, 25, y + 0.45, name, color="#666666")
        cells(axes, 29.5, y, ("    " if not layer else "PPPP") + "tttttttt")
    note(axes, 0, 19.3, "trained at the input; what stands above\nfollows from them and the frozen layers")
    note(axes, 25, 19.3, "trained in every layer; nothing stands\nin the input")
    legend(axes, 22, ("P", "prompt"), ("b", "start token"), ("s", "template"), ("t", "text"), ("a", "answer"))
    return figure


def distillation() -> Figure:
    """Teacher and student of a distillation."""
    figure, axes = canvas(10, 3.6, 44, 15.5)
    note(axes, 0, 1.45, "teacher", weight="bold")
    cells(axes, 5, 1, "s" * 22 + "t" * 6 + "a" * 5)
    note(axes, 5, 0.3, "the text, read anew with every request", color="#666666")
    note(axes, 0, 8.45, "student", weight="bold")
    cells(axes, 23, 8, "P" * 4 + "t" * 6 + "a" * 5)
    note(axes, 5, 8.45, "the prompt in the text's place", color="#666666")
    axes.annotate("", (35.5, 7.7), (35.5, 2.3), arrowprops={"arrowstyle": "<->", "color": "#444444"})
    note(axes, 22.0, 4.5, "how the next token is distributed,\nat each token of the answer", color="#444444")
    note(axes, 36, 4.9, "KL(teacher || student)\nis the loss", color="#444444")
    note(axes, 0, 10.8, "Both are the same frozen base; gradients reach the prompt alone.")
    legend(axes, 13, ("s", "text"), ("P", "prompt"), ("t", "question"), ("a", "answer"))
    return figure


if __name__ == "__main__":
    for name, draw in (("forest", forest), ("places", places), ("distillation", distillation)):
        figure = draw()
        figure.savefig(IMAGES / f"concept_{name}.png", dpi=110, bbox_inches="tight", facecolor="white")
        plt.close(figure)
