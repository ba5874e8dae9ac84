"""The tables of `quality.py`, made of the cells that are there; a cell that was not run is a dash."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev, variance
from typing import Any

from quality_heads import DEFAULT
from quality_pairs import MINILM, Pair
from softprompt.training.settings import RATE_PER_RMS

Row = Mapping[str, Any]
Recipe = tuple[str, str, float | None, str]
"""Method, start, rate and other settings of a cell: all but the seed."""

PEFT, CARTRIDGE = ("peft", "N(0,1)", 1e-3, ""), ("cartridge", "TEXT", None, "")
VARIANTS: dict[str, tuple[Recipe | None, str]] = {
    "Without the choice among the labels": (None, "choice_weight=0"),
    "With the base's dropout": (None, "keep_dropout=true"),
    "Cartridges whose first token learns too": (CARTRIDGE, "num_frozen_tokens=0"),
}
"""Recipe (our default for None) and what it was chosen against; no candidate for the best of a method."""

STORES = ("prefix", "cartridge")


def report(pairs: Sequence[Pair], results: Iterable[Row]) -> str:
    """Return all tables as Markdown."""
    found: dict[str, dict[Recipe, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results:
        found[f"{row['data']} on {row['base']}"][recipe(row)].append(row)
    shown = [pair for pair in pairs if pair.name in found]
    rated = [pair for pair in shown if any(one[0] == "prefix" and one[2] for one in found[pair.name])]
    missing = [pair.name for pair in pairs if pair.name not in found]
    sections = {
        "Scores": [_scores(shown, found), f"Pairs not begun: {', '.join(missing) or 'none'}. A dash was not run."],
        "Differences": [_goals(shown, found)],
        **{title: [_beside(*both, shown, found)] for title, both in VARIANTS.items()},
        "Demonstrations as keys and values, and mixtures of embeddings": [_variants(shown, found)],
        "Our starts and rates, in units of the embeddings' rms": [_recipes("ours", shown, found)],
        "PEFT's grid": [_recipes("peft", shown, found)],
        "Prefixes at other rates, which are absolute": [_recipes("prefix", rated, found)],
        "The installed peft": [_checks(shown, found)],
    }
    return "\n\n".join(part for title, parts in sections.items() for part in (f"### {title}", *parts))


def recipe_of_default(pair: Pair) -> Recipe:
    """Return our default."""
    return "ours", *(DEFAULT if pair.base == MINILM else (pair.start, RATE_PER_RMS)), ""


def recipe(row: Row) -> Recipe:
    """Return what a cell ran."""
    return row["method"], row["init"], row["lr"], row["more"]


def chosen(cells: Mapping[Recipe, list[Row]], *methods: str) -> Recipe | None:
    """Return the recipe of some methods that is best at the first seed, as `quality.py` chooses it.

    Of keys and values that is one at the default rate, with as many virtual tokens as the pair has.
    """
    apart = ("demonstrations", "keep_dropout", "num_frozen_tokens")
    own = [each for each in cells if each[0] in methods and not each[3].startswith(apart)]
    if set(methods) & set(STORES):
        own = [each for each in own if each[2] is None]
    return max(own, key=lambda each: (cells[each][0]["score"], -cells[each][0]["loss"]), default=None)


def columns_of(cells: Mapping[Recipe, list[Row]], default: Recipe) -> dict[str, Recipe | None]:
    """Return the recipe of each column of the first table."""
    return {
        "zero-shot": chosen(cells, "zero-shot", "head"),
        "few-shot": ("few-shot", "", None, "") if ("few-shot", "", None, "") in cells else None,
        "PEFT's default": PEFT if PEFT in cells else None,
        "PEFT's best": chosen(cells, "peft"),
        "our default": default if default in cells else None,
        "our best": chosen(cells, "ours"),
        **{method: chosen(cells, method) for method in STORES},
        "LoRA": chosen(cells, "lora"),
        "full": chosen(cells, "full"),
    }


def _scores(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return the scores of every method: means over the seeds, with their standard deviation."""
    lines = [["pair", "steps x batch, test rows", *columns_of({}, PEFT)]]
    for pair in pairs:
        cells, default = found[pair.name], recipe_of_default(pair)
        made = [_score(cells, each, default) for each in columns_of(cells, default).values()]
        tested = next(iter(cells.values()))[0]["rows"][1]
        lines.append([pair.name, f"{pair.updates} x {pair.batch}, {tested}", *made])
    return _table(lines)


def _score(cells: Mapping[Recipe, list[Row]], one: Recipe | None, default: Recipe) -> str:
    if one is None:
        return "-"
    scores = [row["score"] for row in cells[one]]
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    note = cells[one][0]["note"] if one[3].startswith("demonstrations") else ""
    kept = [float(row["note"].split("format ")[1]) for row in cells[one] if "format " in row["note"]]
    shape = f", format {mean(kept):.2f}" if kept else ""
    return f"{mean(scores):.3f}{spread}{shape}{'' if one == default else _named(one, note)}"


def _named(one: Recipe, note: str) -> str:
    method, init, rate, more = one
    if one == PEFT or method in ("zero-shot", "few-shot", "head"):
        return ""
    words = [method] if method == "cartridge" and more else []
    words += [each for each in (init, "" if rate is None else f"{rate:g}", note or more) if each]
    return f" ({', '.join(words)})" if words else ""


def _goals(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return the differences that matter, with standard errors over the test rows, paired."""
    compared = [("our default", "PEFT's best"), ("our default", "PEFT's default"), ("our best", "PEFT's best")]
    lines = [["pair", *(" - ".join(names) for names in compared), "way to full"]]
    for pair in pairs:
        cells = found[pair.name]
        columns = columns_of(cells, recipe_of_default(pair))
        pick = {name: cells[one] if one else [] for name, one in columns.items()}
        apart = [difference(pick[ours], pick[theirs]) for ours, theirs in compared]
        lines.append([pair.name, *apart, _way(pick["zero-shot"], pick["our best"], pick["full"])])
    return _table(lines)


def _beside(
    known: Recipe | None, more: str, pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]
) -> str:
    """Return a default and what it was chosen against, where both were run."""
    lines = [["pair", known[0] if known else "our default", f"the same, {more}", "difference"]]
    for pair in pairs:
        cells, usual = found[pair.name], known or recipe_of_default(pair)
        other = (*usual[:3], more)
        if usual in cells and other in cells:
            made = [_score(cells, one, usual).split(" (")[0] for one in (usual, other)]
            lines.append([pair.name, *made, difference(cells[usual], cells[other])])
    return _table(lines)


def _variants(pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return what starts as whole demonstrations, and what learns a mixture, beside what each is a variant of."""
    lines = [["pair", "few-shot", *STORES, "demonstrations", "our default", "superpos"]]
    for pair in pairs:
        cells, default = found[pair.name], recipe_of_default(pair)
        usual = columns_of(cells, default)
        shown = next((one for one in cells if one[3].startswith("demonstrations")), None)
        mixed = next((one for one in cells if one[0] == "superpos"), None)
        made = [usual["few-shot"], *(usual[method] for method in STORES), shown, usual["our default"], mixed]
        if shown or mixed:
            lines.append([pair.name, *(_score(cells, each, default) for each in made)])
    return _table(lines)


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """Return the difference of two mean scores, and its standard error over test rows (paired) and seeds.

    Of a score that is no mean of the rows' (chrF) over the seeds alone.
    """
    if not ours or not theirs:
        return "-"
    apart = mean(row["score"] for row in ours) - mean(row["score"] for row in theirs)
    several = [[row["score"] for row in rows] for rows in (ours, theirs) if len(rows) > 1]
    spread = sum(variance(scores) / len(scores) for scores in several)
    if ours[0]["hits"]:
        rights = [
            [mean(int(row["hits"][i]) for row in rows) for i in range(len(ours[0]["hits"]))]
            for rows in (ours, theirs)
        ]
        each = [a - b for a, b in zip(*rights, strict=True)]
        spread += variance(each) / len(each)
    return f"{apart:+.3f}" + (f" ± {math.sqrt(spread):.3f}" if spread else "")


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


def _recipes(method: str, pairs: Sequence[Pair], found: Mapping[str, Mapping[Recipe, list[Row]]]) -> str:
    """Return score and loss of every start and rate of a method at the first seed."""
    every = {one[1:] for pair in pairs for one in found[pair.name] if one[0] == method}
    lines = [["start, rate", *(pair.name for pair in pairs)]]
    for init, rate, more in sorted(every, key=lambda one: (one[2], one[1] or 0.0, one[0])):
        rows = [found[pair.name].get((method, init, rate, more), [])[:1] for pair in pairs]
        name = ", ".join(each for each in (init, "default rate" if rate is None else f"{rate:g}", more) if each)
        lines.append([name, *(f"{own[0]['score']:.3f} / {own[0]['loss']:.3f}" if own else "-" for own in rows)])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
