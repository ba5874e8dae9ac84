"""``distill(track=...)``: the training goes to trackers as that of ``tune`` does."""

import pytest

import softprompt
from distillation.conftest import TEXT
from softprompt.training import tracking


def test_a_distillation_goes_to_trackers(chat_base, tmp_path, monkeypatch):
    told = []
    trackers = pytest.importorskip("accelerate.tracking")

    class Recorder(trackers.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir):
            super().__init__()

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None):
            told.append(values)

    monkeypatch.setattr(trackers, "TensorBoardTracker", Recorder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    sizes = {"num_virtual_tokens": 3, "max_source_length": 48, "max_target_length": 6, "max_steps": 2}
    softprompt.distill(
        chat_base,
        system_prompt=TEXT,
        questions=[{"input": f"is parcel {number} late"} for number in range(9)],
        output=tmp_path / "out",
        report=False,
        held_out=0.3,
        track="tensorboard",
        **sizes,
    )
    assert told[0]["max_steps"] == 2 and TEXT not in str(told[0])
    assert sum("train/loss" in each for each in told) == 2
    assert any("validation/divergence" in each for each in told)
    assert told[-1]["artifact"] == str(tmp_path / "out")
