"""``track=``: what trackers get of a run, resumed or not, of seeds and of a sweep; real ones where installed."""

import glob
import importlib.util
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import softprompt
from softprompt import tune
from softprompt.cli.main import run
from softprompt.errors import ConfigError, TrainingInterrupted
from softprompt.inference import TunedPrompt
from softprompt.training import Events, tracking

accelerate_tracking = pytest.importorskip("accelerate.tracking", reason="trackers go through accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

RUN = {
    "num_epochs": 3,
    "batch_size": 4,
    "tuning_config": {"num_virtual_tokens": 2},
    "silence_progress_bars": True,
}


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not in the dev extra")


@pytest.fixture
def recorded(monkeypatch):
    """Put a tracker that writes down what it gets, in place of TensorBoard's, which need not be installed."""
    told = []

    class Recorder(accelerate_tracking.GeneralTracker):
        name, requires_logging_directory = "tensorboard", True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            self.run = run_name

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            told.append(("settings", values, self.run))

        def log(self, values, step=None):
            told.append((step, values, self.run))

        def finish(self):
            told.append(("finished", None, self.run))

    monkeypatch.setattr(accelerate_tracking, "TensorBoardTracker", Recorder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    return told


def stop_at(monkeypatch, update):
    plain = Events.update

    def tell(self, state, loss):
        plain(self, state, loss)
        if state.update == update:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Events, "update", tell)


def interrupted(monkeypatch, update, *arguments, **options):
    with monkeypatch.context() as patch:
        stop_at(patch, update)
        with pytest.raises(TrainingInterrupted):
            tune(*arguments, **options)


def steps_of(told, name):
    return [step for step, values, _ in told if isinstance(step, int) and name in values]


def test_a_tracker_gets_settings_updates_validations_samples_and_path(llama, rows, held_out, tmp_path, recorded):
    tuned = tune(llama, rows, held_out, output=tmp_path / "out", track="tensorboard", **RUN)
    assert recorded[0][0] == "settings"
    assert recorded[0][1]["tuning_config/num_virtual_tokens"] == 2
    assert recorded[0][1]["base_model"] == str(llama)
    updates = tuned.metrics["updates"]
    assert (
        steps_of(recorded, "train/loss") == steps_of(recorded, "train/learning_rate") == list(range(1, updates + 1))
    )
    losses = [values["validation/loss"] for _, values, _ in recorded if values and "validation/loss" in values]
    assert losses == [point["validation"]["loss"] for point in tuned.history]
    (_, texts, _), end = recorded[-2:]
    assert texts["artifact"] == str(tmp_path / "out")
    assert held_out[0]["input"] in texts["samples"] and "target: `yes`" in texts["samples"]
    assert end[0] == "finished"
    assert len({name for _, _, name in recorded}) == 1


def test_a_resumed_run_goes_on_with_the_same_run_and_tells_nothing_twice(
    llama, rows, held_out, tmp_path, recorded, monkeypatch
):
    out = tmp_path / "out"
    interrupted(monkeypatch, 8, llama, rows, held_out, output=out, track=["tensorboard"], **RUN)
    state = out / ".state" / "state.safetensors"
    kept = state.read_bytes() if state.exists() else None
    assert recorded[-1][0] == "finished"
    tuned = tune(llama, rows, held_out, output=out, resume=True)
    assert kept is not None and tuned.metrics["updates"] == 18
    assert steps_of(recorded, "train/loss") == list(range(1, 19))
    assert steps_of(recorded, "validation/loss") == [6, 12, 18]
    assert Counter(each[0] for each in recorded)["settings"] == 1
    assert len({name for _, _, name in recorded}) == 1


def test_updates_that_a_kill_lost_are_not_told_again(llama, rows, held_out, tmp_path, recorded, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, 8, llama, rows, held_out, output=out, track="tensorboard", **RUN)
    record = json.loads((out / ".state" / "trackers.json").read_text())
    record["told"]["train"] = 11  # as if it had been killed three updates later, and the state were older
    (out / ".state" / "trackers.json").write_text(json.dumps(record))
    tune(llama, rows, held_out, output=out, resume=True)
    assert steps_of(recorded, "train/loss") == [*range(1, 9), *range(12, 19)]


@pytest.mark.slow
def test_seeds_and_the_candidates_of_a_sweep_have_names(llama, rows, held_out, tmp_path, recorded):
    short = RUN | {"num_epochs": 1}
    tune(llama, rows, held_out, seeds=2, track="tensorboard", **short)
    names = {name for _, values, _ in recorded if values for name in values}
    assert {"seed-73/train/loss", "seed-74/train/loss", "seed-74/validation/loss"} <= names
    recorded.clear()
    space = {"learning_rates": ["x0.1", "x1"], "eta": 2}
    softprompt.sweep(llama, rows, held_out, output=tmp_path / "s", space=space, track="tensorboard", **short)
    names = {name for _, values, _ in recorded if values for name in values}
    assert {"candidate-1/train/loss", "candidate-2/train/loss", "samples", "sweep/eta"} <= names
    assert [each[0] for each in recorded].count("finished") == 1
    winner = json.loads((tmp_path / "s" / "sweep.json").read_text())["best"]
    assert steps_of(recorded, f"candidate-{winner}/train/loss") == list(range(1, 7))


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(llama, rows, held_out, recorded, monkeypatch, caplog):
    plain = accelerate_tracking.TensorBoardTracker.log

    def log(self, values, step=None):
        if step == 2:
            raise OSError("no space left")
        plain(self, values, step)

    monkeypatch.setattr(accelerate_tracking.TensorBoardTracker, "log", log)
    tuned = tune(llama, rows, held_out, track="tensorboard", **RUN)
    assert tuned.metrics["updates"] == 18
    assert steps_of(recorded, "train/loss") == [1]
    assert sum("no space left" in each.message for each in caplog.records) == 1


def test_a_tracker_that_cannot_begin_ends_the_run_and_the_others_are_closed(
    llama, rows, held_out, tmp_path, recorded, monkeypatch
):
    class Offline:
        def __init__(self, *_, **__):
            raise OSError("no route to host\nat all")

    monkeypatch.setattr(accelerate_tracking, "TrackioTracker", Offline)
    with pytest.raises(ConfigError, match=r"^track trackio could not begin: .*no route to host[^\n]*$"):
        tune(llama, rows, held_out, output=tmp_path / "out", track="tensorboard,trackio", **RUN)
    assert [each[0] for each in recorded] == ["settings", "finished"]


def test_answers_that_cannot_be_given_are_told_as_such(llama, rows, held_out, tmp_path, recorded, monkeypatch):
    def refused(*_, **__):
        raise ConfigError("it does not fit")

    monkeypatch.setattr(TunedPrompt, "generate_rows", refused)
    tune(llama, rows, held_out, output=tmp_path / "out", track="tensorboard", **RUN)
    (samples,) = [each[1]["samples"] for each in recorded if each[1] and "samples" in each[1]]
    assert "answer: `(it does not fit)`, target: `yes`" in samples


def test_names_and_packages_are_checked_before_anything_is_read(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"got 'tensorbord' \(did you mean 'tensorboard'"):
        tune("no such model", tmp_path / "none", track="mlflow,tensorbord")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "mlflow" else name)
    words = ["--train-data", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert run(["tune", *words, "--track", "tensorboard,mlflow"]) == 2
    assert (
        "--track takes trackers that are installed; got tensorboard, mlflow without the package mlflow"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@installed("tensorboard")
def test_real_tensorboard_files(llama, rows, held_out, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    interrupted(monkeypatch, 8, llama, rows, held_out, output=out, track="tensorboard", **RUN)
    tuned = tune(llama, rows, held_out, output=out, resume=True)
    (folder,) = (path for path in (out / "tensorboard").iterdir())
    events = EventAccumulator(str(folder)).Reload()
    losses = events.Scalars("train/loss")
    assert [each.step for each in losses] == list(range(1, 19))
    logged = [json.loads(line)["data"]["value"] for line in (out / "training_logs.jsonl").read_text().splitlines()]
    assert [each.value for each in losses] == pytest.approx(logged, rel=1e-6)
    accuracies = [each.value for each in events.Scalars("validation/accuracy")]
    assert accuracies == pytest.approx([point["validation"]["accuracy"] for point in tuned.history])
    text = events.Tensors("artifact/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == str(out)
    assert glob.glob(f"{folder}/*/hparams.yml")


@pytest.mark.slow
@installed("mlflow")
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_local_mlflow(llama, rows, held_out, tmp_path, monkeypatch, store):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db" if store == "sqlite" else f"file://{tmp_path}/mlruns")
    out = tmp_path / "out"
    interrupted(monkeypatch, 8, llama, rows, held_out, output=out, track="mlflow", **RUN)
    tune(llama, rows, held_out, output=out, resume=True)
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    (experiment,) = mlflow.search_experiments(filter_string="name = 'softprompt'")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(each.step for each in history) == list(range(1, 19))
    assert found.data.params["tuning_config/num_virtual_tokens"] == "2"
    assert found.data.tags["artifact"] == str(out)
    assert held_out[0]["input"] in mlflow.artifacts.load_text(f"{found.info.artifact_uri}/samples.md")
    with mlflow.start_run() as own:  # a run of the user's own stays open, and has ours within it
        tune(llama, rows, held_out, track="mlflow", **(RUN | {"num_epochs": 1}))
        assert mlflow.active_run().info.run_id == own.info.run_id


@pytest.mark.slow
@installed("wandb")
def test_wandb_offline(llama, rows, held_out, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    out = tmp_path / "out"
    tune(llama, rows, held_out, output=out, track="wandb", **(RUN | {"num_epochs": 1}))
    (file,) = glob.glob(f"{tmp_path}/wandb/offline-run-*/run-out-*.wandb")
    told = wandb_history(Path(file).read_bytes())
    losses = [(values["update"], values["train/loss"]) for values in told if "train/loss" in values]
    logged = [json.loads(line)["data"]["value"] for line in (out / "training_logs.jsonl").read_text().splitlines()]
    assert losses == [(update, pytest.approx(loss, rel=1e-6)) for update, loss in enumerate(logged, 1)]
    assert [values["update"] for values in told if "validation/loss" in values] == [len(logged)]
    assert [values["artifact"] for values in told if "artifact" in values] == [str(out)]


def wandb_history(data):
    """Read what was logged from W&B's file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, parts, at, block = [], b"", 7, 1 << 15
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for a header: zeros up to the next block
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    history = [each.history.item for each in records if each.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in history
    ]


def test_trackio_gets_settings_then_values_then_the_end(llama, rows, held_out, tmp_path, monkeypatch):
    """By accelerate's own tracker, over a stand-in for the package: as its functions are called."""
    told = []

    class Run:
        def log(self, values, step=None):
            told.append(("log", values, step))

        def finish(self):
            told.append(("finish", None, None))

    class Config:
        def update(self, values, allow_val_change):
            told.append(("settings", values, allow_val_change))

    def init(project, **options):
        told.append(("init", project, options))
        return Run()

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, config=Config()))
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    out = tmp_path / "out"
    tuned = tune(llama, rows, held_out, output=out, track="trackio", **(RUN | {"num_epochs": 1}))
    updates = tuned.metrics["updates"]
    # Updates, the validation of the epoch, samples and path.
    assert [name for name, _, _ in told] == ["init", "settings", *["log"] * (updates + 2), "finish"]
    assert told[0][1:] == ("softprompt", {"name": told[0][2]["name"], "resume": "allow"})
    assert told[0][2]["name"].startswith("out-")
    assert told[1][1]["tuning_config/num_virtual_tokens"] == 2
    logged = [json.loads(line)["data"]["value"] for line in (out / "training_logs.jsonl").read_text().splitlines()]
    losses = [(values["update"], values["train/loss"]) for _, values, _ in told[2 : 2 + updates]]
    assert losses == [(update, pytest.approx(loss, rel=1e-6)) for update, loss in enumerate(logged, 1)]
    assert told[-3][1]["update"] == updates and "validation/loss" in told[-3][1]
    assert told[-2][1].keys() == {"samples", "artifact"}
    assert {step for name, _, step in told if name == "log"} == {None}
