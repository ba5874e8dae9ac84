"""``callbacks=`` of tune, called as transformers' Trainer calls them; and the seconds of a run."""

from __future__ import annotations

import json
import time

import pytest
from safetensors import safe_open
from transformers import TrainerCallback

from softprompt import tune
from softprompt.errors import ConfigError
from softprompt.training.output import state_path

QUICK = {"num_epochs": 2, "batch_size": 8, "tuning_config": {"num_virtual_tokens": 2}}


class Recorder(TrainerCallback):
    """Keeps the names of the events, and what the run says with them."""

    def __init__(self):
        self.events, self.logs, self.metrics, self.seen = [], [], [], {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")
        self.seen = {"settings": args, "steps": state.max_steps, **kwargs}

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append("evaluate")
        self.metrics.append(metrics)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append(f"epoch {state.epoch:g}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")
        self.seen["history"] = state.log_history


def test_a_trainer_callback_is_called_as_trainer_does(llama, rows, held_out):
    recorder = Recorder()
    tuned = tune(llama, rows, held_out, callbacks=[recorder], **QUICK)
    epoch = ["step 1", "step 2", "step 3", "evaluate", "epoch 1"]
    second = ["step 4", "step 5", "step 6", "evaluate", "epoch 2"]
    assert recorder.events == ["begin", *epoch, *second, "end"]
    assert (recorder.seen["steps"], recorder.seen["settings"].num_epochs) == (6, 2)
    assert recorder.seen["model"] is tuned.base.model
    assert recorder.seen["stage"] == "prompt"
    assert recorder.metrics[-1]["eval_loss"] == tuned.history[-1]["validation"]["loss"]
    losses = [logs["loss"] for logs in recorder.logs if "loss" in logs]
    assert len(losses) == 6
    assert {"learning_rate", "epoch"} <= recorder.logs[0].keys()
    assert [each["step"] for each in recorder.seen["history"]] == [1, 2, 3, 3, 4, 5, 6, 6]


@pytest.mark.parametrize(
    ("wish", "updates", "epochs"), [("should_training_stop", 2, 1), ("should_epoch_stop", 4, 2)]
)
def test_a_callback_may_ask_to_stop(llama, rows, held_out, tmp_path, wish, updates, epochs):
    class Stop:
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 0:
                setattr(control, wish, True)
            return control

    tuned = tune(llama, rows, held_out, callbacks=[Stop], output=tmp_path / "out", **QUICK)
    assert (tuned.metrics["updates"], tuned.metrics["epochs"]) == (updates, epochs)
    assert "validation" in tuned.history[-1]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / ".state").exists()


def test_what_has_no_such_method_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="TrainerCallback"):
        tune("no such model", tmp_path / "no such file", callbacks=[print])


def test_seconds_are_wall_time_with_its_parts(llama, rows, held_out, monkeypatch):
    monkeypatch.setattr("oracles.probed._found", {})

    class Slow:
        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(0.1)

    started = time.perf_counter()
    metrics = tune(llama, rows, held_out, callbacks=[Slow()], **QUICK).metrics
    wall = time.perf_counter() - started
    parts = metrics["seconds_by_part"]
    assert set(parts) == {"loading", "probing", "training", "validation"}
    assert all(value > 0 for value in parts.values())
    assert sum(parts.values()) <= metrics["seconds"] - 0.2 + 0.05  # the callback's own time is in no part
    assert metrics["seconds"] == pytest.approx(wall, abs=0.3)


def test_an_error_of_a_callback_keeps_the_state_and_the_seconds_go_on(llama, rows, held_out, tmp_path):
    class Fails:
        def on_epoch_end(self, args, state, control, **kwargs):
            raise RuntimeError("the tracker is down")

    with pytest.raises(RuntimeError, match="the tracker is down"):
        tune(llama, rows, held_out, callbacks=[Fails()], output=tmp_path / "out", **QUICK)
    header = state_path(tmp_path / "out")
    with safe_open(header, framework="pt") as file:
        before = json.loads(file.metadata()["state"])["runs"][""]["run"]
    recorder = Recorder()
    resumed = tune(llama, rows, held_out, callbacks=[recorder], output=tmp_path / "out", resume=True)
    assert resumed.metrics["seconds"] >= sum(resumed.metrics["seconds_by_part"].values()) - 0.02
    assert resumed.metrics["seconds"] >= before["seconds"] + before["validation_seconds"]
    assert recorder.events[-1] == "end"
