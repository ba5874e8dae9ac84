"""``bench/gpu.py`` runs on a CPU with a tiny model, so that it works the first time it meets a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the bench compares with PEFT")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_case_runs_and_agrees_with_peft(tmp_path):
    words = [sys.executable, ROOT / "bench/gpu.py", "--tiny", "--device", "cpu", "--output", tmp_path / "gpu.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["failed"], found["left out"]) == ({}, [])
    ways = {(each["case"], each["way"]): each for each in found["results"]}
    training = {way for case, way in ways if case == "training"}
    assert training == {"PEFT", "compiled", "eager", "packed"}
    assert all(each["loss apart"] < 1e-4 for (case, _), each in ways.items() if case == "training")
    assert {case for case, _ in ways} == {"training", "labels", "decoding"}
    assert all(each["seconds"] > 0 for each in found["results"])
    assert done.stdout.count("| training |") == 4
