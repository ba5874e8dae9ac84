"""bench/quality.py: finished cells are kept and skipped, the same rows for every method, PEFT's losses are ours."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from softprompt.backbone import load_base
from softprompt.engine import EngineRow, build_engine
from softprompt.training.objectives import LabelChoice

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def quality(monkeypatch):
    """Import the script and its parts, and forget them."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield import_module("quality")
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what peft calls
def test_a_killed_run_goes_on_and_the_installed_peft_learns_the_same(quality, monkeypatch, tmp_path):
    pair = replace(
        next(each for each in quality.PAIRS if each.name == "complaints on demo"), rows=(16, 6), updates=2
    )
    cells = [quality.Cell(pair, "peft-real", "SAMPLE_VOCAB", 0.1), quality.Cell(pair, "ours", "RANDOM")]
    output, results = tmp_path / "cells.jsonl", {}
    options = Namespace(output=output, data=tmp_path, smollm2=None)
    monkeypatch.setattr(quality, "wanted", lambda *_: cells[:1])
    quality.complete(pair, 0, results, options)
    with output.open("a") as lines:
        lines.write('{"base": "demo", "half a')
    monkeypatch.setattr(quality, "wanted", lambda *_: cells)
    quality.complete(pair, 0, results := quality.read(output), options)
    rows = list(results.values())
    assert [row["method"] for row in rows] == ["peft-real", "ours"]
    assert len(output.read_text().splitlines()) == 3
    assert float(rows[0]["note"].split()[1].rstrip(",")) < 1e-4
    assert "| complaints on demo | 2 x 8 |" in quality.report([pair], rows)
    assert json.loads(output.read_text().splitlines()[-1])["score"] == rows[1]["score"]


def test_the_best_of_a_grid_waits_for_all_of_it_and_gets_the_other_seeds(quality):
    pair = quality.PAIRS[0]
    grid = [quality.Cell(pair, "peft", "TEXT", rate) for rate in (0.1, 0.3)]
    results = {grid[0].key: {"score": 0.5, "loss": 1.0}}
    assert quality.best(grid, results) is None
    results[grid[1].key] = {"score": 0.5, "loss": 0.9}
    assert [cell.seed for cell in quality.again(quality.best(grid, results))] == [74, 75]
    assert quality.best(grid, results).rate == 0.3


def test_every_finished_cell_is_one_that_the_script_runs(quality):
    """So that the tables can be made again; which of a grid is run with other seeds may change."""
    results = quality.read(BENCH / "quality.jsonl")
    seeds = (*quality.SEEDS, *quality.MORE_SEEDS)
    wanted = {
        cell.key[:5] + cell.key[6:]
        for pair in quality.PAIRS
        for phase in range(quality.PHASES)
        for cell in quality.wanted(pair, results, phase)
    }
    assert {quality.default_of(pair).seed for pair in quality.PAIRS} == {quality.SEEDS[0]}
    assert [key for key in results if key[:5] + key[6:] not in wanted or key[5] not in seeds] == []


def row(score, hits="", **more):
    return {"score": score, "hits": hits, "note": "", "loss": 1.0, "rows": [8, 4], **more}


@pytest.fixture
def tables(quality):
    return sys.modules["quality_report"]


def test_a_difference_has_the_error_of_rows_and_of_seeds(tables):
    ours, theirs = [row(0.75, "1110"), row(0.5, "1100")], [row(0.25, "1000")]
    # Over rows the means are apart by 0, 1, 0.5, 0: variance 0.22917 of 4; over seeds 0.03125 of 2.
    assert tables.difference(ours, theirs) == f"+0.375 ± {(0.2291667 / 4 + 0.03125 / 2) ** 0.5:.3f}"
    assert tables.difference([row(40.0), row(44.0)], [row(30.0)]) == "+12.000 ± 2.000"  # chrF: seeds alone
    assert tables.difference([row(40.0)], [row(30.0)]) == "+10.000"
    assert tables.difference(ours, []) == "-"


def test_the_way_to_full_fine_tuning(tables):
    assert tables._way([row(0.5)], [row(0.8), row(0.6)], [row(0.9)]) == "50%"
    assert tables._way([row(0.5)], [row(0.8)], [row(0.4)]) == tables._way([row(0.5)], [], [row(0.9)]) == "-"


def test_the_best_of_a_column_is_that_of_the_first_seed_and_says_its_recipe(tables):
    cells = {
        ("full", "", 1e-4, ""): [row(0.8), row(0.9)],
        ("full", "", 1e-4, "choice_weight=1"): [row(0.85), row(0.55)],
        ("prefix", "TEXT", None, ""): [row(0.7)],
        ("prefix", "TEXT", 0.05, ""): [row(0.9)],
        ("cartridge", "", None, "demonstrations=8"): [row(0.95)],
        ("cartridge", "", None, ""): [row(0.6, note="format 0.50"), row(0.8, note="format 0.70")],
    }
    columns = tables.columns_of(cells, tables.PEFT)
    assert columns["full"] == ("full", "", 1e-4, "choice_weight=1")
    assert columns["prefix"] == ("prefix", "TEXT", None, "")
    shown = {name: tables._score(cells, columns[name], tables.PEFT) for name in ("full", "cartridge", "LoRA")}
    assert shown["full"].startswith("0.700 ± 0.212 (0.0001, choice_weight=1")
    assert (shown["cartridge"], shown["LoRA"]) == ("0.700 ± 0.141, format 0.60", "-")


@pytest.mark.parametrize(
    ("text", "number"),
    [("so it is 3 + 4 = 7.\n#### 1,007.", "1007"), ("#### -2.5", "-2.5"), ("it is 7", None), ("#### seven", None)],
)
def test_the_number_of_an_answer_of_gsm8k(quality, text, number):
    assert sys.modules["quality_methods"]._number(text) == number


def test_all_weights_learn_the_choice_that_our_default_learns(quality):
    """Of every row of a batch among the labels: the loss of padded rows is that of the forest."""
    methods, base = sys.modules["quality_methods"], load_base("demo")
    texts = [("spam", "win now"), ("no spam", "see you at home then"), ("maybe", "hello")]
    rows = [
        EngineRow(*(tuple(base.tokenizer(each).input_ids) for each in (text, f" {label}"))) for label, text in texts
    ]
    choice = LabelChoice(build_engine(base), tuple(each.target for each in rows), 1.0)
    expected = choice(rows, [0] * 3)
    loss = (expected.penalty.sum() - expected.values.sum()) / len(expected.values)
    batch = methods._padded(choice.offered(rows), 0, seq2seq=False)
    torch.testing.assert_close(methods._chosen(base.model, batch, choice.count), loss)
