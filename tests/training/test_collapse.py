"""Signs of collapse: each is seen where it is, once, and not in healthy runs."""

import math

import pytest
import torch

from softprompt.bundled import complaints
from softprompt.prompts import Prompt, PromptModule
from softprompt.training import tune
from softprompt.training.collapse import CollapseWatch
from softprompt.training.state import RunState, Sums

RMS, TOTAL = 0.5, 80


class Fixed(PromptModule):
    """A prompt of four numbers that a test sets."""

    def __init__(self):
        super().__init__(None)
        self.values = torch.full((2, 2), RMS)

    def materialize(self, task=0):
        return self.values

    def prompt(self, task=0):
        return Prompt(self.values)

    def stored(self):
        return {}

    def load_stored(self, tensors):
        pass


def watched(change, losses, caplog):
    """Run a watch over a whole run: ``change(update)`` gives the values, ``losses(update)`` the loss."""
    module, state = Fixed(), RunState()
    watch = CollapseWatch(module, RMS, 0.1, TOTAL)
    seen = {}
    for number in range(1, TOTAL + 1):
        module.values = change(number)
        state.add_update(Sums(1, 1, losses(number)), seconds=0.0, rate=0.1)
        watch.update(state, losses(number))
        for sign in state.collapse.keys() - seen.keys():
            seen[sign] = number
    assert len(caplog.records) == len(state.collapse) == len(seen)
    return seen


def moving(number):
    return torch.full((2, 2), RMS * (1 + number / TOTAL))


def falling(number):
    return 2.0 - number / TOTAL


def test_a_healthy_run_is_not_warned_of(caplog):
    assert watched(moving, falling, caplog) == {}


def test_a_prompt_that_stays_is_seen_at_the_half(caplog):
    assert watched(lambda number: torch.full((2, 2), RMS * 1.09), falling, caplog) == {"drift": TOTAL // 2}
    assert "raise learning_rate 0.1" in caplog.text


def test_a_norm_that_explodes_is_seen_at_the_next_quarter(caplog):
    grown = [RMS * (31 if number > TOTAL // 4 + 1 else 2) for number in range(TOTAL + 1)]
    assert watched(lambda number: torch.full((2, 2), grown[number]), falling, caplog) == {"norm": TOTAL // 2}
    assert "lower learning_rate 0.1" in caplog.text


def test_a_loss_that_stays_is_seen_at_the_half(caplog):
    assert watched(moving, lambda number: 0.7 + 0.01 * math.sin(number), caplog) == {"loss": TOTAL // 2}


@pytest.fixture(scope="module")
def data():
    from softprompt.data import read_records

    records = [record.fields | {"output": str(record.target)} for record in read_records(complaints("train"))]
    return [{"input": each["input"], "output": each["output"]} for each in records[:96]]


QUICK = {"max_steps": 16, "batch_size": 8, "validation_split": 0.3, "silence_progress_bars": True}


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix", "cpt"])
def test_healthy_runs_of_the_demo_model_print_no_warning(data, caplog, method):
    tuned = tune("demo", data, method=method, **QUICK | ({"context_records": 1} if method == "cpt" else {}))
    assert "collapse" not in tuned.metrics
    assert not [each for each in caplog.records if each.name.endswith("collapse")]


def test_a_rate_of_nearly_nothing_is_in_the_metrics(data, caplog):
    tuned = tune("demo", data, lr=1e-6, **QUICK)
    drift, loss = tuned.metrics["collapse"]
    assert "the prompt has barely moved" in drift
    assert "the loss is where it began" in loss
    assert tuned.manifest.metrics["collapse"] == [drift, loss]
    assert caplog.text.count("barely moved") == 1


def test_a_far_too_high_rate_is_in_the_metrics(data):
    signs = tune("demo", data, lr=30.0, **QUICK).metrics["collapse"]
    assert any("x the base's own" in sign for sign in signs)
