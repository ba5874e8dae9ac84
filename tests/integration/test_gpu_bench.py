"""``bench/gpu.py`` runs on a CPU with a tiny model, so that it works the first time it meets a GPU."""

import json

import pytest


@pytest.mark.slow
def test_every_case_runs_and_agrees_with_peft(bench, tmp_path):
    printed = bench("gpu", "--tiny", "--device", "cpu", "--output", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["failed"], found["left out"]) == ({}, [])
    ways = {(each["case"], each["way"]): each for each in found["results"]}
    training = {way for case, way in ways if case == "training"}
    assert training == {"PEFT", "compiled", "eager", "packed"}
    assert all(each["loss apart"] < 1e-4 for (case, _), each in ways.items() if case == "training")
    assert {case for case, _ in ways} == {"training", "labels", "decoding"}
    assert all(each["seconds"] > 0 for each in found["results"])
    assert printed.count("| training |") == 4
