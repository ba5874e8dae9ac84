"""Benches under a launcher: one process is asked for in a line, and the update over ranks is that of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oracles.ranks import run_ranks

BENCH = Path(__file__).parents[2] / "bench"
ELSEWHERE = ("ranks.py", "serving_vllm.py")
"""What is for several processes, and what runs where this package is not installed."""

TINY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import transformers as tf
import training_step
from training_step import Work, spread

def tiny():
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))

training_step.WORKS.clear()
training_step.WORKS["tiny"] = Work("tiny", tiny, 4, spread(8, 20, 5), 1, 1)
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
def test_ranks_share_the_rows_of_an_update_whose_gradient_is_that_of_one():
    pytest.importorskip("peft", reason="the module of the works compares with PEFT")
    first, second = run_ranks(TINY, BENCH, "--rounds", 2, "--json", seconds=900)
    assert (first[0], second[0], second[1]) == (0, 0, ""), first[2] + second[2]
    (found,) = json.loads(first[1])
    assert (found["ranks"], found["rows"], found["bytes_added_up"]) == (2, 5, 4 * 4 * 32)
    assert found["gradient_difference"] < 1e-5
    assert all(each > 0 for each in found["seconds"])
