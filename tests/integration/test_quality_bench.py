"""bench/quality.py: finished cells are kept and skipped, the same rows for every method, PEFT's losses are ours."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

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
