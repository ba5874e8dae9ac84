"""The tables of `quality.py`, made of the cells that are there; a cell that was not run is a dash."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from quality_pairs import Pair
from softprompt.training.settings import RATE_PER_RMS

Row = Mapping[str, Any]
Recipe = tuple[str, str, float | None, str]
"""Method, start, rate and other settings of a cell: all but the seed."""

OURS, PEFT = ("ours", "RANDOM", RATE_PER_RMS, ""), ("peft", "N(0,1)", 1e-3, "")
COLUMNS = ("zero-shot", "few-shot", "PEFT's default", "PEFT's best", "our default", "our best", "keys and values")


def report(pairs: Sequence[Pair], results: Iterable[Row]) -> str:
    """Return all tables as Markdown."""
    found: dict[str, dict[Recipe, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results:
        found[f"{row['data']} on {row['base']}"][recipe(row)].append(row)
    shown = [pair for pair in pairs if pair.name in found]
    tables = [_scores(shown, found), _goals(shown, found), _checks(shown, found), _means(shown, found)]
    tables += [_grid(pair, found[pair.name]) for pair in shown]
    missing = [pair.name for pair in pairs if pair.name not in found]
    return "\n\n".join([*tables, f"Not run: {', '.join(missing) or 'nothing'}."])


def recipe(row: Row) -> Recipe:
    """Return what a cell ran."""
    return row["method"], row["init"], row["lr"], row["more"]


def chosen(cells: Mapping[Recipe, list[Row]], *methods: str) -> Recipe | None:
    """Return the recipe of some methods that is best at the first seed, as `quality.py` chooses it."""
    own = [each for each in cells if each[0] in methods and (each[0] != "few-shot")]
    return max(own, key=lambda each: (cells[each][0]["score"], -cells[each][0]["loss"]), default=None)


def columns_of(cells: Mapping[Recipe, list[Row]]) -> dict[str, Recipe | None]:
    """Return the recipe of each column of the first table."""
    return {
        "zero-shot": chosen(cells, "zero-shot", "head"),
        "few-shot": ("few-shot", "", None, "") if ("few-shot", "", None, "") in cells else None,
        "PEFT's default": PEFT if PEFT in cells else None,
        "PEFT's best": chosen(cells, "peft"),
        "our default": OURS if OURS in cells else None,
        "our best": chosen(cells, "ours"),
        "keys and values": chosen(cells, "prefix", "cartridge"),
        "LoRA": chosen(cells, "lora"),
        "full": chosen(cells, "full"),
    }


def _scores(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return the scores of every method: means over the seeds, with their standard deviation."""
    lines = [["pair", "steps x batch", *COLUMNS, "LoRA", "full"]]
    for pair in pairs:
        cells = found[pair.name]
        made = [_score(cells, each) for each in columns_of(cells).values()]
        lines.append([pair.name, f"{pair.updates} x {pair.batch}", *made])
    return _table(lines)


def _score(cells: Mapping[Recipe, list[Row]], one: Recipe | None) -> str:
    if one is None:
        return "-"
    scores = [row["score"] for row in cells[one]]
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{spread}{_named(one)}"


def _named(one: Recipe) -> str:
    method, init, rate, more = one
    if one in (OURS, PEFT) or method in ("zero-shot", "few-shot", "head"):
        return ""
    words = [method] if method in ("prefix", "cartridge") else []
    words += [each for each in (init, "" if rate is None else f"{rate:g}", more) if each]
    return f" ({', '.join(words)})"


def _goals(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return the differences that matter, with standard errors over the test rows, paired."""
    lines = [
        [
            "pair",
            "our default - PEFT's best",
            "our default - PEFT's default",
            "our best - PEFT's best",
            "way to full",
        ]
    ]
    for pair in pairs:
        cells, columns = found[pair.name], columns_of(found[pair.name])
        pick = {name: cells[one] if one else [] for name, one in columns.items()}
        lines.append(
            [
                pair.name,
                difference(pick["our default"], pick["PEFT's best"]),
                difference(pick["our default"], pick["PEFT's default"]),
                difference(pick["our best"], pick["PEFT's best"]),
                _way(pick["zero-shot"], pick["our best"], pick["full"]),
            ]
        )
    return _table(lines)


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """Return the difference of two mean scores, and its standard error over the test rows."""
    if not ours or not theirs:
        return "-"
    apart = mean(row["score"] for row in ours) - mean(row["score"] for row in theirs)
    if not ours[0]["hits"] or abs(apart) > 1:
        return f"{apart:+.3f}"
    rights = [
        [mean(int(row["hits"][i]) for row in rows) for i in range(len(ours[0]["hits"]))] for rows in (ours, theirs)
    ]
    each = [a - b for a, b in zip(*rights, strict=True)]
    return f"{apart:+.3f} ± {stdev(each) / math.sqrt(len(each)):.3f}"


def _way(zero: Sequence[Row], ours: Sequence[Row], full: Sequence[Row]) -> str:
    if not (zero and ours and full):
        return "-"
    start, middle, end = (mean(row["score"] for row in rows) for rows in (zero, ours, full))
    return f"{(middle - start) / (end - start):.0%}" if end > start else "-"


def _checks(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return how far the installed peft is from the same recipe in our engine."""
    lines = [["the installed peft against the same recipe in our engine", "largest relative difference"]]
    for pair in pairs:
        rows = [row for one, own in found[pair.name].items() if one[0] == "peft-real" for row in own]
        lines += [[f"{pair.name}, {row['init']}, {row['lr']:g}", row["note"]] for row in rows]
    return _table(lines)


def _means(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return the mean score and loss of each of our recipes over the pairs that have all of them."""
    every = sorted(
        {one for pair in pairs for one in found[pair.name] if one[0] == "ours" and one[1] != "LABELS"}, key=str
    )
    lines = [["ours", *(pair.name for pair in pairs)]]
    labels = {one for pair in pairs for one in found[pair.name] if one[:2] == ("ours", "LABELS")}
    for one in [*every, *sorted(labels, key=str)]:
        rows = [found[pair.name].get(one, [])[:1] for pair in pairs]
        name = _named(one).strip(" ()") or "default"
        lines.append([name, *(f"{own[0]['score']:.3f} / {own[0]['loss']:.3f}" if own else "-" for own in rows)])
    return _table(lines)


def _grid(pair: Pair, cells: Mapping[Recipe, list[Row]]) -> str:
    """Return PEFT's grid on a pair: score and loss at the first seed."""
    own = {(init, rate): rows[0] for (method, init, rate, _), rows in cells.items() if method == "peft"}
    rates = sorted({rate for _, rate in own if rate is not None})
    lines = [[f"PEFT, {pair.name}", *(f"{rate:g}" for rate in rates)]]
    for init in dict.fromkeys(init for init, _ in own):
        made = (own.get((init, rate)) for rate in rates)
        lines.append([init, *(f"{row['score']:.3f} / {row['loss']:.3f}" if row else "-" for row in made)])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
