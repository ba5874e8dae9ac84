"""Benches under a launcher: one process is asked for in a line, and the update over ranks is that of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import families
from oracles.ranks import run_ranks
from oracles.tiny_bases import write_base

BENCH = Path(__file__).parents[2] / "bench"
ELSEWHERE = ("ranks.py", "serving_vllm.py")
"""What is for several processes, and what runs where this package is not installed."""

SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import ranks
ranks.main()
"""


@pytest.mark.parametrize(
    "path", [each for each in sorted(BENCH.glob("*.py")) if each.name not in ELSEWHERE], ids=str
)
def test_every_other_script_begins_by_asking_for_one_process(path):
    _, is_script, body = path.read_text(encoding="utf-8").partition('if __name__ == "__main__":\n')
    assert not is_script or body.startswith("    alone()\n")


def test_of_several_processes_the_first_says_that_it_is_for_one():
    for rank, said in (
        ("0", "cost_model.py runs in one process; start it without torchrun, or bench/ranks.py with it\n"),
        ("1", ""),
    ):
        environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, BENCH / "cost_model.py"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.slow
def test_what_ranks_count_is_what_the_formulas_say_and_their_gradient_is_that_of_one(tmp_path):
    base = write_base(tmp_path, "llama")
    sizes = {"rounds": 1, "rows": 3, "tokens": 12, "answer": 4, "virtual": 5}
    words = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    first, second = run_ranks(SCRIPT, BENCH, "--base", base, *words, "--json", seconds=900)
    assert (first[0], second[0], second[1]) == (0, 0, ""), first[2] + second[2]
    found = json.loads(first[1])
    assert [each["way"] for each in found] == ["data", "fsdp", "tp"]
    for each in found:
        assert each["products"][0] == each["products"][1]
        assert each["wire"][0] == each["wire"][1] > 0, each["way"]
        assert each["gradient_difference"] < 1e-5
        assert all(speed > 0 for speed in each["tokens_per_second"])
    assert found[0]["wire"][0] == 4 * 5 * families.H
