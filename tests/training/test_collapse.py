"""Signs of collapse: each is seen where it is, once, and not in healthy runs."""

import math
import os
import signal

import pytest
import torch

from softprompt.bundled import complaints
from softprompt.errors import TrainingInterrupted
from softprompt.prompts import Prompt, PromptModule
from softprompt.training import Events, tune
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
    watch = CollapseWatch(module, RMS, 0.1, RMS, TOTAL)
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


QUICK = {"max_steps": 16, "batch_size": 8, "silence_progress_bars": True}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_healthy_runs_of_the_demo_model_print_no_warning(caplog, method):
    tuned = tune("demo", complaints("train"), limit=60, validation_split=0.2, method=method, **QUICK)
    assert "collapse" not in tuned.metrics
    assert not [each for each in caplog.records if each.name.endswith("collapse")]


def test_a_rate_of_nearly_nothing_is_in_the_metrics(llama, rows, caplog):
    tuned = tune(llama, rows, lr=1e-6, **QUICK)
    drift = tuned.metrics["collapse"][0]
    assert "after 8 of 16 updates the prompt has barely moved" in drift
    assert tuned.manifest.metrics["collapse"][0] == drift
    assert caplog.text.count("barely moved") == 1


def test_a_far_too_high_rate_is_in_the_metrics(llama, rows, held_out):
    signs = tune(llama, rows, held_out, lr=30.0, **QUICK).metrics["collapse"]
    assert any("x the base's own" in sign for sign in signs)


def test_what_was_found_before_an_interruption_is_not_said_again(llama, rows, tmp_path, caplog, monkeypatch):
    update = Events.update

    def interrupt(self, state, loss):
        update(self, state, loss)
        if state.update == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", interrupt)
        with pytest.raises(TrainingInterrupted):
            tune(llama, rows, output=tmp_path / "out", lr=1e-6, **QUICK)
    tuned = tune(llama, rows, output=tmp_path / "out", resume=True)
    straight = tune(llama, rows, lr=1e-6, **QUICK)
    assert tuned.metrics["collapse"] == straight.metrics["collapse"]
    assert caplog.text.count("barely moved") == 2  # once in each of the two runs
