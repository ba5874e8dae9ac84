import json
import os
import signal
import sys

import pytest
import torch

from softprompt.artifacts import write_atomically
from softprompt.errors import (
    ConfigError,
    OutputExistsError,
    TrainingError,
    TrainingInterrupted,
    UsageError,
)
from softprompt.training import Events, tune
from softprompt.training.state import StopSignal, state_path

SETTINGS = {
    "num_epochs": 3,
    "batch_size": 4,
    "accumulate_steps": 2,
    "tuning_config": {"num_virtual_tokens": 3},
}


def prompt_of(tuned):
    return tuned.module.embedding.weight.detach()


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal at a given update, as a user or a scheduler would."""

    def plan(update, number=signal.SIGINT):
        told = Events.update

        def tell(self, state, loss):
            told(self, state, loss)
            if state.update == update:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Events, "update", tell)

    return plan


def interrupted(llama, rows, held_out, output, **options):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterrupted) as error:
        tune(llama, rows, held_out, output=output, **(SETTINGS | options))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    return str(error.value)


@pytest.mark.parametrize(
    ("update", "number", "optimizer"),
    [(1, signal.SIGINT, "adamw"), (4, signal.SIGTERM, "adamw"), (6, signal.SIGINT, "adafactor")],
)
def test_a_resumed_run_ends_bit_equal(
    llama, rows, held_out, tmp_path, signal_at, monkeypatch, update, number, optimizer
):
    straight = tune(llama, rows, held_out, output=tmp_path / "a", optimizer=optimizer, **SETTINGS)
    with monkeypatch.context():
        signal_at(update, number)
        message = interrupted(llama, rows, held_out, tmp_path / "b", optimizer=optimizer)
    monkeypatch.undo()
    assert f"after update {update} " in message
    assert message.endswith(f"softprompt tune --resume --output {tmp_path / 'b'}")

    resumed = tune(llama, rows, held_out, output=tmp_path / "b", resume=True)
    assert torch.equal(prompt_of(resumed), prompt_of(straight))
    assert resumed.history == straight.history
    assert not state_path(tmp_path / "b").parent.exists()
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert names[0] == names[1]
    texts = [(tmp_path / name / "run.toml").read_text() for name in "ab"]
    assert texts[0] == texts[1]


def test_a_killed_run_goes_on_from_its_last_epoch(llama, rows, tmp_path, monkeypatch):
    straight = tune(llama, rows, output=tmp_path / "a", **SETTINGS)
    told = Events.update

    def die(self, state, loss):
        told(self, state, loss)
        if state.update == 5:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", die)
        with pytest.raises(MemoryError):
            tune(llama, rows, output=tmp_path / "b", **SETTINGS)
    resumed = tune(llama, rows, output=tmp_path / "b", resume=True)
    assert torch.equal(prompt_of(resumed), prompt_of(straight))
    steps = [
        json.loads(line)["data"]["step"]
        for line in (tmp_path / "b" / "training_logs.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 10))


def test_data_in_a_file_need_not_be_given_again(llama, rows, tmp_path, signal_at, monkeypatch):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    signal_at(2)
    with pytest.raises(TrainingInterrupted):
        tune(llama, "rows.jsonl", output="out", **SETTINGS)
    monkeypatch.undo()
    monkeypatch.chdir(llama)
    assert tune(output=tmp_path / "out", resume=True).metrics["updates"] == 9


@pytest.fixture
def stopped(llama, rows, held_out, tmp_path, signal_at, monkeypatch):
    signal_at(2)
    interrupted(llama, rows, held_out, tmp_path / "out")
    monkeypatch.undo()
    return tmp_path / "out"


def test_an_interrupted_output_is_not_overwritten_by_accident(llama, rows, stopped):
    with pytest.raises(OutputExistsError, match="holds an interrupted run; continue it with"):
        tune(llama, rows, output=stopped, **SETTINGS)
    tune(llama, rows, output=stopped, overwrite=True, **SETTINGS)


def test_other_data_or_settings_cannot_be_mixed_in(llama, rows, held_out, stopped):
    with pytest.raises(TrainingError, match="its train data sha256 was"):
        tune(llama, rows[:-1], held_out, output=stopped, resume=True)
    with pytest.raises(ConfigError, match="has num_epochs 3, not 4; leave it out"):
        tune(llama, rows, held_out, output=stopped, resume=True, num_epochs=4)
    with pytest.raises(ConfigError, match=r"unknown setting 'num_epoch'"):
        tune(llama, rows, held_out, output=stopped, resume=True, num_epoch=4)
    tune(llama, rows, held_out, output=stopped, resume=True, num_epochs=3)


def test_rows_in_memory_have_to_be_given_again(llama, stopped):
    with pytest.raises(UsageError, match="train_data is missing"):
        tune(llama, output=stopped, resume=True)


def test_a_damaged_state_is_refused(llama, rows, held_out, stopped):
    content = state_path(stopped).read_bytes()
    write_atomically(state_path(stopped), content[: len(content) // 2])
    with pytest.raises(TrainingError, match=r"is damaged .*start again with overwrite"):
        tune(llama, rows, held_out, output=stopped, resume=True)


def test_there_must_be_something_to_resume(llama, rows, tmp_path):
    with pytest.raises(UsageError, match="holds no interrupted run"):
        tune(llama, rows, output=tmp_path / "none", resume=True)
    tune(llama, rows, output=tmp_path / "done", **SETTINGS)
    with pytest.raises(UsageError, match="holds no interrupted run"):
        tune(llama, rows, output=tmp_path / "done", resume=True)


def test_without_output_an_interrupted_run_says_that_nothing_is_saved(llama, rows, signal_at):
    signal_at(2)
    with pytest.raises(TrainingInterrupted, match="nothing is saved, since the run has no output"):
        tune(llama, rows, **SETTINGS)


def test_a_second_ctrl_c_acts_at_once(llama, rows, tmp_path, monkeypatch):
    class Impatient(StopSignal):
        def check(self):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys.modules[tune.__module__], "StopSignal", Impatient)
    # A job in the background starts with Ctrl-C ignored, and then so would the second one be.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(TrainingInterrupted, match=r"stopped at once; .* --resume --output"):
            tune(llama, rows, output=tmp_path / "out", **SETTINGS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert state_path(tmp_path / "out").exists()


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_before_the_first_state_leaves_a_resumable_run_or_nothing(
    llama, rows, tmp_path, monkeypatch, signals
):
    """Once it is noted and the first state is written; the second one acts before that."""
    output = tmp_path / "out"

    def impatient(*arguments):
        written(*arguments)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)

    from softprompt.training.run import write_run as written

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[tune.__module__], "write_run", impatient)
            expected = (TrainingInterrupted, KeyboardInterrupt)[signals - 1]
            with pytest.raises(expected):
                tune(llama, rows, output=output, **SETTINGS)
    finally:
        signal.signal(signal.SIGINT, before)
    if signals == 1:
        assert tune(llama, rows, output=output, resume=True).metrics["updates"] == 9
    else:
        assert not output.exists()


def test_ctrl_c_while_the_model_loads_leaves_nothing(llama, rows, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("softprompt.training.preparation.load_base", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(llama, rows, output=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    tune(llama, rows, output=tmp_path / "out", **SETTINGS)


def test_what_a_killed_start_left_is_no_interrupted_run(llama, rows, tmp_path):
    left = tmp_path / "out" / ".state"
    left.mkdir(parents=True)
    (left / "run.toml").write_text("num_epochs = 3\n")
    tune(llama, rows, output=tmp_path / "out", **SETTINGS)
    assert not left.exists()
