"""``learning_rate="auto"``: what the probe tries, who judges, and that the run is then as with that rate."""

import json
import os
import shutil
import signal

import pytest
import torch

from softprompt.cli.main import run
from softprompt.errors import ConfigError, TrainingError, TrainingInterrupted
from softprompt.training import Events, TuneSettings, events, rate_probe, read_run, tracking, tune
from softprompt.training.examples import read_data
from softprompt.training.output import SEAL, state_path, write_sealed
from softprompt.training.preparation import prepare

QUICK = {
    "max_steps": 12,
    "batch_size": 4,
    "silence_progress_bars": True,
    "tuning_config": {"num_virtual_tokens": 3},
}


def prepared(base, rows, held_out=None, **options):
    settings = TuneSettings.from_dict({"learning_rate": "auto", **QUICK, **options})
    return prepare(base, read_data(rows, held_out, settings), settings)


def weights(tuned):
    return tuned.module.embedding.weight.detach()


def test_the_run_is_the_one_with_that_rate_and_says_what_was_tried(llama, rows, held_out, tmp_path, caplog):
    caplog.set_level("INFO", "softprompt")
    found = tune(llama, rows, held_out, lr="auto", output=tmp_path / "out", **QUICK)
    probed = found.metrics["learning_rate_probe"]
    rate = probed["learning_rate"]
    assert "8 updates each, 267 % of the run together; the loss on 8 validation records decides" in caplog.text
    for each in probed["rates"]:
        assert f"learning rate {each['learning_rate']:<8.3g} loss {each['loss']:.4f}" in caplog.text
    assert caplog.text.count("epoch 1:") == 1  # the run's own
    given = tune(llama, rows, held_out, lr=rate, **QUICK)
    assert torch.equal(weights(found), weights(given))
    assert found.history == given.history
    losses = [each["loss"] for each in probed["rates"]]
    assert rate == probed["rates"][losses.index(min(losses))]["learning_rate"]
    parts = found.metrics["seconds_by_part"]
    assert 0 < parts["trying rates"] <= found.metrics["seconds"]
    assert "trying rates" not in given.metrics["seconds_by_part"]
    assert (probed["updates"], probed["judged_by"]) == (8, "8 validation records")
    assert found.manifest.settings["learning_rate"] == found.metrics["learning_rate"] == rate
    assert read_run(tmp_path / "out" / "run.toml")["learning_rate"] == "auto"
    assert not (tmp_path / "out" / ".state").exists()


def test_the_rates_stand_around_the_methods_default_and_each_loss_is_that_of_its_short_run(llama, rows, held_out):
    first = prepared(llama, rows, held_out)
    before = {name: value.clone() for name, value in first.module.state_dict().items()}
    found = rate_probe.probe(first)
    assert all(torch.equal(value, before[name]) for name, value in first.module.state_dict().items())
    rates = [each["learning_rate"] for each in found["rates"]]
    assert rates == [factor * first.rates.prompt for factor in (0.1, 0.3, 1.0, 3.0)]
    for each in found["rates"]:
        alone = tune(llama, rows, held_out, **QUICK | {"lr": each["learning_rate"], "max_steps": 8})
        assert each["loss"] == pytest.approx(alone.history[-1]["validation"]["loss"], abs=1e-3)


def test_without_validation_records_that_are_not_trained_on_judge(llama, rows, monkeypatch):
    stages = []
    train = rate_probe.train_together
    monkeypatch.setattr(
        rate_probe, "train_together", lambda them, **k: stages.append(them[0].stage) or train(them, **k)
    )
    first = prepared(llama, rows)
    found = rate_probe.probe(first)
    assert found["judged_by"] == "4 held-out training records"
    assert (len(stages[0].rows), len(first.tasks[0].train)) == (len(rows) - 4, len(rows))
    assert rate_probe.probe(first) == found  # the seed decides


def test_no_demonstration_of_the_prompt_judges_a_rate(llama, rows):
    task = prepared(llama, rows).tasks[0]
    judged = rate_probe._judged(task, 73, {*task.train} - {task.train[-1]})
    assert judged.validation
    assert {*judged.validation} == {task.train[-1]}


def test_a_rate_whose_loss_is_not_finite_loses_and_all_of_them_are_an_error(llama, rows, held_out, monkeypatch):
    train = rate_probe.train_together

    def broken(them, **options):
        train(them[:-1], **options)
        them[-1].state.problem = "the gradient is inf"

    monkeypatch.setattr(rate_probe, "train_together", broken)
    first = prepared(llama, rows, held_out)
    found = rate_probe.probe(first)
    assert found["rates"][-1]["loss"] is None
    assert found["learning_rate"] != found["rates"][-1]["learning_rate"]
    monkeypatch.setattr(rate_probe, "FACTORS", (1.0,))
    with pytest.raises(TrainingError, match="the gradient is inf"):
        rate_probe.probe(first)


def test_a_resumed_run_keeps_the_rate_it_found(llama, rows, held_out, tmp_path, monkeypatch):
    straight = tune(llama, rows, held_out, lr="auto", **QUICK)
    update = Events.update

    def interrupt(self, state, loss):
        update(self, state, loss)
        if self._log is not None and state.update == 5:  # of the run itself, not of the probe
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", interrupt)
        with pytest.raises(TrainingInterrupted, match="after update 5 "):
            tune(llama, rows, held_out, lr="auto", output=tmp_path / "out", **QUICK)
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    found = state_path(tmp_path / "damaged").with_name(rate_probe.FILE)
    found.write_bytes(found.read_bytes()[:-5])
    assert torch.equal(
        weights(tune(llama, rows, held_out, output=tmp_path / "damaged", resume=True)), weights(straight)
    )
    monkeypatch.setattr(rate_probe, "probe", None)
    resumed = tune(llama, rows, held_out, output=tmp_path / "out", resume=True)
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.metrics["learning_rate_probe"] == straight.metrics["learning_rate_probe"]


RATES = [
    "[1]",
    "5",
    "null",
    "{}",
    "[[1,2]]",
    "[" * 100_000,
    *(f'{{"learning_rate": {each}}}' for each in ("0.5", "[]")),
]
"""What an edited file may hold instead of a sealed mapping."""


@pytest.mark.parametrize("text", RATES, ids=range(len(RATES)))
def test_a_rate_that_no_run_wrote_is_not_used(tmp_path, text):
    (tmp_path / rate_probe.FILE).write_text(text)
    assert rate_probe._kept(tmp_path / rate_probe.FILE) is None


@pytest.mark.parametrize(
    ("rate", "used"), [(0.5, True), ("0.5", False), (True, False), (-1.0, False), (None, False)]
)
def test_a_kept_rate_is_a_number_above_zero(tmp_path, rate, used):
    found = {"learning_rate": rate, "updates": 8}
    write_sealed(tmp_path / rate_probe.FILE, json.dumps({**SEAL, **found}).encode())
    assert rate_probe._kept(tmp_path / rate_probe.FILE) == (found if used else None)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"data": {"step": 1' + "0" * 400 + "}}", '{"data": [1]}', ""])
def test_a_line_of_a_log_that_has_no_step_is_past_every_update(line):
    assert events._step_of(line) == float("inf")


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "[1]", ""], ids=["deep", "number", "list", "empty"])
def test_what_a_tracker_cannot_read_it_has_not_kept(tmp_path, text):
    (tmp_path / "tracking.json").write_text(text)
    assert tracking._read(tmp_path / "tracking.json") == {}


def test_ctrl_c_while_rates_are_tried_leaves_nothing_and_says_so(llama, rows, held_out, tmp_path, monkeypatch):
    sent = []

    def interrupt(self, state, loss):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(Events, "update", interrupt)
    with pytest.raises(TrainingInterrupted, match="stopped while learning rates were tried; nothing is saved yet"):
        tune(llama, rows, held_out, lr="auto", output=tmp_path / "out", **QUICK)


def test_the_command_line_takes_the_word_and_no_other(llama, rows, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["tune", "--base-model", llama, "--train-data", data, "--max-steps", 2, "--output", tmp_path / "out"]
    assert run([*map(str, words), "--lr", "auto", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] > 0
    assert run([*map(str, words), "--lr", "best"]) == 2
    assert "'best' is not a valid float" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="learning_rate takes a number"):
        TuneSettings(learning_rate="best")
