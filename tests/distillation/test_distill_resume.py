"""A distillation that was stopped in any of its stages ends as one that never was; nothing is mixed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import softprompt
from distillation.conftest import TEXT
from softprompt.cli.main import run
from softprompt.distillation import Teacher, questions, stages
from softprompt.errors import OutputExistsError, TrainingError, TrainingInterrupted, UsageError
from softprompt.training import Events, list_runs
from softprompt.training.output import SEAL, state_path, write_sealed

RUN = {
    "num_virtual_tokens": 3,
    "max_source_length": 48,
    "max_target_length": 6,
    "num_epochs": 2,
    "batch_size": 4,
    "silence_progress_bars": True,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    small(monkeypatch)


def small(patch):
    patch.setattr(stages, "BLOCK", 4)
    patch.setattr(questions, "_NEW", 12)


@pytest.fixture(scope="module")
def drawn_under():
    """What another run in the folder is told while the curve is drawn."""
    return []


@pytest.fixture(scope="module")
def straight(chat_base, tmp_path_factory, drawn_under):
    """Runs that were not stopped: of given questions, and of self-study."""
    given = [{"input": f"is parcel {number} late"} for number in range(9)]
    kinds = {"given": {"questions": given}, "studied": {"self_study": 5}}
    found = {}

    def drawn(history, path, **options):
        with pytest.raises(OutputExistsError) as error:
            softprompt.distill(chat_base, system_prompt=TEXT, output=path.parent, overwrite=True, self_study=2)
        drawn_under.append(str(error.value))

    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        patch.setattr("softprompt.distillation.run.training_curve", drawn)
        for name, each in kinds.items():
            output = tmp_path_factory.mktemp("straight") / name
            found[name] = (
                softprompt.distill(chat_base, system_prompt=TEXT, output=output, **each, **RUN),
                output,
                each,
            )
    return found


def stop_at(patch, owner, name, call):
    """Raise Ctrl-C, as a second one does, in the n-th call of a method."""
    method, calls = getattr(owner, name), []

    def counted(self, *arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return method(self, *arguments, **options)

    patch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("kind", "owner", "method", "call", "where"),
    [
        ("given", Teacher, "answered", 2, "while questions were answered"),
        ("studied", Teacher, "generate", 3, "while questions were answered"),
        pytest.param("given", Teacher, "targets", 2, "while the teacher read", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_in_a_stage_ends_as_one_that_was_not(
    chat_base, straight, tmp_path, monkeypatch, kind, owner, method, call, where
):
    tuned, reference, given = straight[kind]
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, owner, method, call)
        with pytest.raises(TrainingInterrupted, match=where) as error:
            softprompt.distill(chat_base, system_prompt=TEXT, output=output, **given, **RUN)
    assert str(error.value).endswith(f"softprompt distill --resume --output {output}")
    with pytest.raises(OutputExistsError, match="holds an interrupted run"):
        softprompt.distill(chat_base, system_prompt=TEXT, output=output, **given, **RUN)
    again = counted_calls(monkeypatch, method)
    resumed = softprompt.distill(output=output, resume=True)
    assert torch.equal(resumed.prompt().input, tuned.prompt().input)
    assert (output / "questions.jsonl").read_text() == (reference / "questions.jsonl").read_text()
    assert not state_path(output).parent.exists()
    assert 0 < len(again) < total_calls(tuned, method)


def test_the_output_is_held_until_the_last_of_its_files(straight, drawn_under):
    assert len(drawn_under) == 2
    assert all("another run is at work" in each for each in drawn_under)


def counted_calls(monkeypatch, method):
    calls, original = [], getattr(Teacher, method)

    def counted(self, *arguments, **options):
        calls.append(method)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Teacher, method, counted)
    return calls


def total_calls(tuned, method):
    """Blocks of a whole run, for blocks of 4: what a stage that began anew would need at least."""
    rows = sum(tuned.manifest.data[use]["rows"] for use in ("train", "validation"))
    return -(-rows // 4) + (10 if method == "generate" else 0)


def test_a_run_stopped_in_training_ends_bit_equal(chat_base, straight, tmp_path, monkeypatch):
    tuned, _, given = straight["given"]
    output = tmp_path / "out"
    told = Events.update

    def tell(self, state, loss):
        told(self, state, loss)
        if state.update == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", tell)
        with pytest.raises(TrainingInterrupted, match=r"after update 3 .*softprompt distill --resume"):
            softprompt.distill(chat_base, system_prompt=TEXT, output=output, **given, **RUN)
    assert sorted(path.name for path in state_path(output).parent.glob("targets-*")) == [
        f"targets-{block}.safetensors" for block in range(3)
    ]
    with pytest.raises(UsageError, match="holds no interrupted run of tune"):
        softprompt.tune(output=output, resume=True)
    calls = counted_calls(monkeypatch, "answered") + counted_calls(monkeypatch, "targets")
    resumed = softprompt.distill(output=output, resume=True)
    assert calls == []
    assert torch.equal(resumed.prompt().input, tuned.prompt().input)
    assert resumed.history == tuned.history


def test_a_second_ctrl_c_in_training_says_how_to_go_on_too(chat_base, asked, tmp_path, monkeypatch):
    stop_at(monkeypatch, Events, "update", 2)
    with pytest.raises(TrainingInterrupted, match=r"stopped at once.*softprompt distill --resume"):
        softprompt.distill(chat_base, system_prompt=TEXT, questions=asked, output=tmp_path / "out", **RUN)


@pytest.fixture(scope="module")
def left(chat_base, tmp_path_factory):
    """The output of a run that was stopped while the teacher read."""
    output, given = (
        tmp_path_factory.mktemp("left") / "out",
        [{"input": f"is parcel {number} late"} for number in range(9)],
    )
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        stop_at(patch, Teacher, "targets", 3)
        with pytest.raises(TrainingInterrupted):
            softprompt.distill(chat_base, system_prompt=TEXT, questions=given, output=output, **RUN)
    return output


@pytest.fixture
def stopped(left, tmp_path):
    """That output, to be changed."""
    return shutil.copytree(left, tmp_path / "out")


def test_it_is_among_the_interrupted_runs(stopped):
    (found,) = list_runs(stopped)
    assert (found.state, found.resume) == ("interrupted", f"softprompt distill --resume --output {stopped}")
    assert found.settings["num_virtual_tokens"] == 3
    assert found.settings["method"] == "distill"


@pytest.mark.parametrize("given", [{"system_prompt": "Another text."}, {"num_epochs": 9}, {"overwrite": True}])
def test_nothing_else_is_taken_when_a_run_goes_on(stopped, given):
    with pytest.raises(UsageError, match=f"leave {next(iter(given))} out"):
        softprompt.distill(output=stopped, resume=True, **given)


def edit_plan(output, change):
    """Write the plan of a run as a run of this version with other values would have."""
    path = state_path(output).with_name("plan.json")
    values = {**json.loads(path.read_text()), **SEAL}
    write_sealed(path, json.dumps(change(values)).encode())


def test_another_model_in_the_place_of_the_base_is_refused(stopped):
    edit_plan(stopped, lambda plan: {**plan, "fingerprint": "elsewhere"})
    with pytest.raises(TrainingError, match="base model's fingerprint was elsewhere"):
        softprompt.distill(output=stopped, resume=True)


def test_a_stage_of_another_plan_is_not_mixed_in(stopped):
    edit_plan(stopped, lambda plan: json.loads(json.dumps(plan).replace(TEXT, TEXT + " Be kind.")))
    with pytest.raises(TrainingError, match="belongs to another run"):
        softprompt.distill(output=stopped, resume=True)


def test_another_base_named_is_refused(stopped):
    with pytest.raises(UsageError, match="leave base_model out"):
        softprompt.distill("org/another", output=stopped, resume=True)


def test_a_run_of_another_command_is_not_gone_on_with(stopped):
    edit_plan(stopped, lambda plan: plan | {"command": "sweep"})
    with pytest.raises(UsageError, match="a run of sweep"):
        softprompt.distill(output=stopped, resume=True)


@pytest.mark.parametrize("name", ["plan.json", "questions.json", "targets-0.safetensors"])
def test_a_damaged_stage_is_said(stopped, name):
    path = state_path(stopped).with_name(name)
    flipped = bytearray(path.read_bytes())
    flipped[-9] ^= 1
    for content in (bytes(flipped), b"{", None):
        if content is None:
            write_sealed(path, json.dumps([SEAL]).encode())
        else:
            path.write_bytes(content)
        with pytest.raises(TrainingError, match=rf"{name} is damaged.*start again with overwrite=True"):
            softprompt.distill(output=stopped, resume=True)


def test_the_command_writes_a_prompt_and_says_what_was_kept_apart(chat_base, tmp_path, capsys, asked, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    words = ["distill", "--base-model", chat_base, "--system-prompt", str(tmp_path / "text.txt"), "--quiet"]
    words += ["--questions", str(tmp_path / "asked.jsonl"), "--num-virtual-tokens", "3", "--max-target-length", "6"]
    words += ["--max-steps", "2", "--lr", "0.01", "--output", str(tmp_path / "out")]
    assert run([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["virtual_tokens"], shown["steps"], shown["learning_rate"]) == (3, 2, 0.01)
    assert shown["questions"] == 9
    assert set(shown["held_out"]) >= {"divergence", "agreement"}
    assert run(words) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert run(["distill", "--resume", "--output", str(tmp_path / "out")]) == 2
    assert "no interrupted run of distill" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", "out", "--json"]) == 0
    found, told = capsys.readouterr()
    assert f"records of {Path('out', 'held_out.jsonl')}, which the prompt was made with" in told
    assert json.loads(found)["contest"]["rows"] == 1
    text = ["--system-prompt", "text.txt", "--base-model", chat_base]
    assert run(["distill", "--measure", "out", *text, "--silence-progress-bars"]) == 0


def test_the_command_reads_documents_forecasts_and_asks_for_an_output(chat_base, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["distill", "--base-model", chat_base, "--document", str(tmp_path / "text.txt"), "--self-study", "4"]
    words += ["--num-virtual-tokens", "3", "--max-target-length", "6", "--quiet"]
    assert run(words) == 2
    assert "distill needs --output DIR: without it the prompt would be lost" in capsys.readouterr().err
    assert run([*words, "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["questions"], shown["passages"]) == (4, 1)
