import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from oracles.slow import only
from oracles.stored import drawn, folder
from softprompt.artifacts import write_atomically
from softprompt.bundled import complaints
from softprompt.cli.main import run
from softprompt.errors import (
    ConfigError,
    OutputExistsError,
    TrainingError,
    TrainingInterrupted,
    UsageError,
)
from softprompt.inference import TunedPrompt
from softprompt.training import Events, claimed, list_runs, output, tune
from softprompt.training.output import state_path
from softprompt.training.state import Saving, StopSignal, load_states

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
    only(
        [(4, signal.SIGTERM, "adamw"), (6, signal.SIGINT, "adafactor")],
        [(1, signal.SIGINT, "adamw"), (4, signal.SIGTERM, "adamw"), (6, signal.SIGINT, "adafactor")],
    ),
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


@pytest.mark.parametrize("every", only([2], [1, 2]))
def test_a_killed_run_loses_at_most_the_updates_between_two_saves(
    llama, rows, held_out, tmp_path, monkeypatch, every
):
    """Prompts of several seeds side by side, in the middle of an epoch."""
    options = SETTINGS | {"seeds": 2, "early_stopping_patience": 2, "accumulate_steps": 1}
    straight = tune(llama, rows, held_out, output=tmp_path / "a", **options)
    with monkeypatch.context() as patch:
        updates = fail_at(patch, 10)  # of each of the two, in the second epoch
        with pytest.raises(MemoryError):
            tune(llama, rows, held_out, output=tmp_path / "b", save_every=every, **options)
    made = len(updates)
    updates = fail_at(monkeypatch, None)
    resumed = tune(llama, rows, held_out, output=tmp_path / "b", resume=True, save_every=50)
    assert torch.equal(prompt_of(resumed), prompt_of(straight))
    assert resumed.history == straight.history
    assert made + len(updates) - 2 * straight.metrics["updates"] <= 2 * every
    logs = [(tmp_path / name / "training_logs.jsonl").read_text().count("\n") for name in "ab"]
    assert logs[0] == logs[1]


def fail_at(monkeypatch, update):
    """Let a run die behind an update; return the list of all updates from now on."""
    told, seen = Events.update, []

    def tell(self, state, loss):
        told(self, state, loss)
        seen.append(state.update)
        if state.update == update and seen.count(update) == 2:
            raise MemoryError

    monkeypatch.setattr(Events, "update", tell)
    return seen


def test_the_state_is_saved_by_time_where_nothing_else_is_said(monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr("softprompt.training.state.time.monotonic", lambda: now[0])

    def save():
        saved.append(now[0])
        now[0] += 2.5  # a slow disk, which may cost a twentieth of the time

    saving = Saving(save)
    for second in range(200):
        now[0] = max(now[0], float(second))
        saving.updated()
    assert saved == [30.0, 83.0, 136.0, 189.0]
    saved.clear()
    saving = Saving(save, every=3)
    for _ in range(7):
        saving.updated()
    assert len(saved) == 2


def test_a_clock_that_is_set_back_changes_no_seconds(llama, rows, held_out, tmp_path, monkeypatch, capsys):
    real, behind, told, saves = time.time, [0.0], Events.update, []
    for name in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(name, lambda: real() - behind[0])

    def tell(self, state, loss):
        told(self, state, loss)
        behind[0] = 18 * 3600.0 if state.update >= 3 else 0.0

    monkeypatch.setattr(Events, "update", tell)
    monkeypatch.setattr("softprompt.training.state.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("softprompt.training.state._SHARE_OF_SAVING", 0)
    monkeypatch.setattr("softprompt.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(Saving, "now", lambda self, now=Saving.now: saves.append(behind[0]) or now(self))
    tuned = tune(llama, rows, held_out, output=tmp_path / "out", **SETTINGS)
    assert behind[0] and saves.count(behind[0]) >= 6  # the updates after it, one by one
    parts = tuned.metrics["seconds_by_part"]
    assert 0 <= tuned.metrics["seconds"] < 3600 and parts and all(0 <= each < 3600 for each in parts.values())
    shown = capsys.readouterr().err
    assert "9/9" in shown and "-" not in "".join(re.findall(r"\[.*?\]", shown))


def test_a_hangup_saves_as_ctrl_c_does_but_not_under_nohup(llama, rows, held_out, tmp_path, signal_at):
    signal_at(4, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        assert "after update 4 " in interrupted(llama, rows, held_out, tmp_path / "out")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        tune(llama, rows, held_out, output=tmp_path / "other", **SETTINGS)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_runs_do_not_share_an_output(llama, rows, held_out, stopped, tmp_path, monkeypatch):
    with claimed(tmp_path / "new"):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputExistsError, match=rf"another run is at work in .*process {os.getpid()} on "):
                tune(
                    llama, rows, output=tmp_path / "new", **(options if "resume" in options else SETTINGS | options)
                )
    assert not (tmp_path / "new").exists()
    with claimed(stopped, resume=True), pytest.raises(OutputExistsError, match="another run is at work"):
        tune(llama, rows, held_out, output=stopped, resume=True)
    (run,) = list_runs(stopped)
    assert run.state == "interrupted"
    # The lock file of a run that was killed means nothing.
    lock = state_path(stopped).with_name("lock")
    lock.write_text("process 1 on another machine")
    tune(llama, rows, held_out, output=stopped, resume=True)
    assert not lock.exists()


@pytest.mark.parametrize("place", [".state", ".state/lock", ".state/trackers.partial", "seeds", "seeds/1"])
@pytest.mark.parametrize("resume", [False, True])
def test_nothing_is_written_or_deleted_behind_a_link_that_came_with_the_folder(tmp_path, place, resume):
    victim, link = tmp_path / "victim", tmp_path / "out" / place
    (victim / "1").mkdir(parents=True)
    (victim / "1" / "README.md").write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    words = ["--resume"] if resume else ["--overwrite", "--train-data", str(complaints("train"))]
    assert run(["tune", *words, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    with pytest.raises(OutputExistsError, match=rf"{place} is a link.*remove it"), claimed(tmp_path / "out"):
        pass
    assert [path.relative_to(victim).as_posix() for path in victim.rglob("*")] == ["1", "1/README.md"]
    assert (victim / "1" / "README.md").read_text() == "mine"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()] == [link]


def test_only_our_own_files_go_with_an_earlier_state(tmp_path):
    state = tmp_path / ".state"
    state.mkdir()
    for name in ("plan.json", "1.training_logs.jsonl", "targets-3.safetensors", "thesis", "lock"):
        (state / name).write_text("{}")
    output.clear_state(tmp_path)
    assert {path.name for path in state.iterdir()} == {"thesis", "lock"}


def test_a_run_that_begins_while_another_looks_keeps_its_lock(tmp_path, monkeypatch):
    look = output._require_writable
    with ExitStack() as other:

        def begin(path):
            monkeypatch.setattr(output, "_require_writable", look)
            other.enter_context(claimed(path))

        monkeypatch.setattr(output, "_require_writable", begin)
        with pytest.raises(OutputExistsError, match="another run is at work"), claimed(tmp_path / "new"):
            pass
        assert state_path(tmp_path / "new").with_name("lock").exists()


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_the_very_end_leaves_a_run_to_resume_or_a_finished_one(
    llama, rows, held_out, tmp_path, monkeypatch, stride
):
    """Before each call that changes the disk after the last state."""
    short = SETTINGS | {"num_epochs": 1}
    straight = tune(llama, rows, held_out, output=tmp_path / "a", **short)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    ends = 0
    for number in range(0, 100, stride):
        output = tmp_path / f"b{number}"
        try:
            with monkeypatch.context() as patch:
                dies_at_end(patch, number)
                tune(llama, rows, held_out, output=output, **short)
        except KeyboardInterrupt:
            ends += 1
        else:
            break
        if state_path(output).exists():
            resumed = tune(llama, rows, held_out, output=output, resume=True)
            assert torch.equal(prompt_of(resumed), prompt_of(straight))
        else:
            with pytest.raises(UsageError, match="nothing to resume"):
                tune(llama, rows, held_out, output=output, resume=True)
        found = {path.name for path in output.iterdir()}
        assert found == names, number
        logs = [(folder / "training_logs.jsonl").read_text().count("\n") for folder in (tmp_path / "a", output)]
        assert logs[0] == logs[1]
    assert ends > 10 / stride


def dies_at_end(monkeypatch, number):
    """Kill a run at a rename of its end; what would clean up does not run either, as behind ``kill -9``."""
    left, ended, dead = [number], [], []
    replace, unlink, rmtree = os.replace, Path.unlink, shutil.rmtree
    save = TunedPrompt.save

    def ending(self, *arguments, **options):
        ended.append(True)
        return save(self, *arguments, **options)

    def step(do):
        def done(*arguments, **options):
            if dead:
                return None
            if ended and left[0] == 0:
                dead.append(True)
                raise KeyboardInterrupt
            left[0] -= bool(ended)
            return do(*arguments, **options)

        return done

    monkeypatch.setattr(TunedPrompt, "save", ending)
    monkeypatch.setattr(os, "replace", step(replace))
    monkeypatch.setattr(Path, "unlink", step(unlink))
    monkeypatch.setattr(shutil, "rmtree", step(rmtree))


def test_flipped_bits_and_edited_headers_are_one_clear_line(llama, rows, held_out, stopped):
    content = state_path(stopped).read_bytes()
    size = len(content)
    for place in (0, 3, 12, size // 4, size // 2, size - 1, content.index(b'"sha256":"') + 12):
        flipped = bytearray(content)
        flipped[place] ^= 1
        state_path(stopped).write_bytes(flipped)
        with pytest.raises(TrainingError, match=r"is damaged .*start again with overwrite"):
            tune(llama, rows, held_out, output=stopped, resume=True)
    state_path(stopped).write_bytes(content.replace(b"learning_rate", b"learning_rata", 1))
    with pytest.raises(TrainingError, match=r"is damaged .*start again with overwrite"):
        tune(llama, rows, held_out, output=stopped, resume=True)


def test_a_state_of_another_version_is_refused_by_its_format(llama, rows, held_out, stopped):
    content = state_path(stopped).read_bytes()
    output.write_sealed(state_path(stopped), json.dumps(output.SEAL).encode())
    with pytest.raises(TrainingError, match=r"is damaged .*start again with overwrite"):
        tune(llama, rows, held_out, output=stopped, resume=True)
    (spelt,) = re.findall(rb'format\\": (\d+)', content)
    changed = content.replace(b'format\\": ' + spelt, b'format\\": ' + str(int(spelt) + 1).encode())
    (digest,) = re.findall(rb'"sha256": ?"([0-9a-f]{64})"', changed)
    output.write_sealed(state_path(stopped), changed.replace(digest, output.SEAL["sha256"].encode()))
    with pytest.raises(TrainingError, match=rf"it has format {int(spelt) + 1}, this version reads {int(spelt)}"):
        tune(llama, rows, held_out, output=stopped, resume=True)


def test_a_state_that_is_more_than_a_list_reads_is_named_without_its_place(stopped, monkeypatch):
    monkeypatch.setattr("softprompt.training.runs.MOST_TEXT_BYTES", 16)
    (found,) = list_runs(stopped)
    assert (found.state, found.reason) == ("interrupted", "training was stopped in its training")


def test_a_prompt_without_a_record_is_a_finished_run(tmp_path):
    folder(tmp_path / "plain", drawn(0), manifest=False)
    (found,) = list_runs(tmp_path)
    assert (found.state, found.folder, found.bytes) == ("finished", "plain", 3 * 8 * 4)
    assert found.settings == {"method": "PROMPT_TUNING", "num_virtual_tokens": 3, "base_model": "one"}


def test_a_torn_tail_of_the_log_is_cut(llama, rows, held_out, stopped):
    log = state_path(stopped).with_name("training_logs.jsonl")
    log.write_bytes(log.read_bytes() + b'{"name": "loss", "data": {"st\xc3\x00')
    tune(llama, rows, held_out, output=stopped, resume=True)
    lines = (stopped / "training_logs.jsonl").read_text().splitlines()
    assert [json.loads(line)["data"]["step"] for line in lines] == list(range(1, 10))


def test_another_base_is_refused(llama, rows, held_out, stopped, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    with pytest.raises(ConfigError, match=r"has base_model .*; leave base_model out"):
        tune(other, rows, held_out, output=stopped, resume=True)


KILLED = """
import os, signal, sys
from softprompt.training import Events, tune
told = Events.update
def tell(self, state, loss):
    told(self, state, loss)
    if state.update == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Events.update = tell
tune(sys.argv[1], sys.argv[2], output=sys.argv[3], save_every=1, num_epochs=3, batch_size=4, accumulate_steps=2,
     tuning_config={"num_virtual_tokens": 3})
"""


@pytest.mark.slow
def test_kill_9_loses_an_update_and_no_bit(llama, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    straight = tune(llama, data, output=tmp_path / "a", **SETTINGS)
    output = tmp_path / "b"
    killed = subprocess.run([sys.executable, "-c", KILLED, llama, data, output], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert load_states(output, {"base model fingerprint": ANY, "train data sha256": ANY})[0][""].run.update == 5
    resumed = tune(output=output, resume=True)
    assert torch.equal(prompt_of(resumed), prompt_of(straight))
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
