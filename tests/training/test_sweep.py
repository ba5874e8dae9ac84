"""``sweep``: candidates side by side, the better ones trained further, and what is written of it."""

import importlib
import importlib.util
import json
import os
import signal
import sys

import pytest
import torch

import softprompt
from softprompt.cli.main import run
from softprompt.errors import (
    ConfigError,
    ProcessLostError,
    SoftPromptError,
    TrainingError,
    TrainingInterrupted,
    UsageError,
)
from softprompt.prompts import PromptTuningConfig
from softprompt.training import Events, TuneSettings, tune
from softprompt.training.gradients import Step
from softprompt.training.output import state_path
from softprompt.training.sweeps import halving
from softprompt.training.sweeps.halving import steps_of_rungs
from softprompt.training.sweeps.space import SweepSettings, grid_of

SETTINGS = {
    "max_steps": 4,
    "batch_size": 4,
    "tuning_config": {"num_virtual_tokens": 3},
    "silence_progress_bars": True,
}
SPACE = {"learning_rates": ["x0.1", "x1"], "inits": ["RANDOM", "SAMPLE_VOCAB"], "eta": 2}
RECORDS = [
    {"input": f"the film was {word} {more}", "output": "yes" if word in ("good", "fine") else "no"}
    for word in ("good", "bad", "fine", "poor")
    for more in ("news", "report it")
]
HELD_OUT = [{"input": f"it is {word}", "output": answer} for word, answer in (("good", "yes"), ("bad", "no"))]


def values(tuned):
    return next(iter(tuned.module.parameters())).detach()


@pytest.fixture(autouse=True)
def undrawn(swept, monkeypatch):
    """Draw the figures of one sweep only."""

    def missing(*args, **options):
        raise ConfigError("no matplotlib")

    for module, name in (("run", "training_curve"), ("sweeps.sweep", "sweep_figure")):
        monkeypatch.setattr(importlib.import_module(f"softprompt.training.{module}"), name, missing)


@pytest.fixture(scope="module")
def swept(bases, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "out"
    return softprompt.sweep(bases / "llama", RECORDS, HELD_OUT, output=output, space=SPACE, **SETTINGS), output


def quality(point):
    return point["validation"]["accuracy"], -point["validation"]["loss"]


def test_the_better_half_goes_on_and_the_last_is_trained_to_the_end(swept):
    found, _ = swept
    assert found.rungs == [1, 2, 4]
    assert [len(each.points) for each in found.candidates] == [3, 2, 1, 1]
    assert [point["steps"] for point in found.candidates[0].points] == [1, 2, 4]
    for rung, count in ((0, 2), (1, 1)):
        there = [each for each in found.candidates if len(each.points) > rung]
        on = {each.name for each in there if len(each.points) > rung + 1}
        ranked = sorted(there, key=lambda each: quality(each.points[rung]), reverse=True)
        assert on == {each.name for each in ranked[:count]}


def test_the_best_prompt_is_what_tune_makes_of_its_settings(swept, llama):
    found, output = swept
    stored = softprompt.load(output)
    assert torch.equal(values(stored), values(found.prompt))
    assert stored.metrics["sweep"] == {"candidates": 4, "rungs": [1, 2, 4], "by": "validation accuracy"}
    own = {k: v for k, v in stored.whole.settings.items() if k != "silence_progress_bars"}
    alone = tune(llama, RECORDS, HELD_OUT, **own)
    assert alone.metrics["learning_rate"] == pytest.approx(found.candidates[0].learning_rate)
    torch.testing.assert_close(values(alone), values(stored), rtol=0, atol=0.01 * alone.metrics["learning_rate"])
    assert stored.metrics["validation"] == pytest.approx(found.candidates[0].points[-1]["validation"])


def test_the_files_of_a_sweep_hold_every_candidate(swept):
    found, output = swept
    written = json.loads((output / "sweep.json").read_text())
    assert written == found.to_dict()
    assert written["best"] == found.candidates[0].name
    assert {each["choice"]["init"] for each in written["candidates"]} == {"RANDOM", "SAMPLE_VOCAB"}
    relative = {each["learning_rate"] for each in written["candidates"] if each["choice"]["learning_rate"] == "x1"}
    small = {each["learning_rate"] for each in written["candidates"] if each["choice"]["learning_rate"] == "x0.1"}
    assert small.pop() == pytest.approx(0.1 * relative.pop())
    assert (output / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert (output / "training_logs.jsonl").exists()
    assert not state_path(output).parent.exists()
    assert len(str(found).splitlines()) == 5


def test_an_interrupted_sweep_ends_as_if_it_never_was(swept, llama, tmp_path, monkeypatch):
    straight, _ = swept
    told, done = Events.update, []
    on = straight.candidates[0].name

    def tell(self, state, loss):
        told(self, state, loss)
        if state.update == 2 and self._of == f" of candidate {on}" and not done:  # in the second rung
            done.append(os.kill(os.getpid(), signal.SIGINT))

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", tell)
        with pytest.raises(TrainingInterrupted, match=f"softprompt sweep --resume --output {tmp_path}"):
            softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, space=SPACE, **SETTINGS)
    with pytest.raises(UsageError, match="softprompt sweep --resume"):
        tune(llama, RECORDS, HELD_OUT, output=tmp_path, resume=True)
    with pytest.raises(UsageError, match="tries what it was started with; leave that out to resume"):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, resume=True, space=SPACE)
    resumed = softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, resume=True)
    assert resumed.to_dict() == straight.to_dict()
    assert torch.equal(values(resumed.prompt), values(straight.prompt))


def test_a_sweep_that_loses_a_process_says_how_to_go_on(llama, tmp_path, monkeypatch):
    def lost(*given, **options):
        raise ProcessLostError("rank 1 of 2 ended: without a word")

    monkeypatch.setattr(halving, "train_together", lost)
    said = (
        f"^rank 1 of 2 ended: .*; training was stopped in rung 1 .* softprompt sweep --resume --output {tmp_path}"
    )
    with pytest.raises(ProcessLostError, match=said):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path / "out", space=SPACE, **SETTINGS)
    assert state_path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"output": None}, "a sweep needs an output directory, for its state and for the best prompt"),
        ({"train_data": None}, "train_data is missing; give a data file or records of input and output"),
        ({"config": PromptTuningConfig(num_virtual_tokens=2)}, "give tuning_config instead of config"),
        ({"learning_rate": 0.1}, "learning_rate would be ignored by a sweep; give learning_rates"),
        ({"seeds": 2}, "seeds would be ignored by a sweep; leave it out"),
        ({"restarts": 2}, "restarts would be ignored by a sweep; leave it out"),
        (
            {
                "train_data": {"a": RECORDS, "b": RECORDS},
                "validation_data": {"a": HELD_OUT, "b": HELD_OUT},
                "method": "multitask",
            },
            "a sweep takes one data set; sweep each task by itself",
        ),
    ],
)
def test_what_a_sweep_would_ignore_is_refused_before_anything_is_read(tmp_path, changed, told):
    given = {"train_data": RECORDS, "validation_data": HELD_OUT, "output": tmp_path / "out", "space": SPACE}
    with pytest.raises(SoftPromptError, match=told):
        softprompt.sweep("no such model", **{**given, **changed})
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_records_to_decide_by(llama, tmp_path):
    with pytest.raises(ConfigError, match="needs validation data"):
        softprompt.sweep(llama, RECORDS, output=tmp_path, space=SPACE, **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_candidate_that_diverges_is_no_end_of_the_sweep(llama, tmp_path):
    space = {"learning_rates": ["1e5", "x1"]}
    options = SETTINGS | {"optimizer": "adamw", "max_grad_norm": 0, "weight_decay": 30.0, "max_steps": 8}
    found = softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, space=space, **options)
    failed = [each for each in found.candidates if each.problem]
    assert [each.choice.learning_rate for each in failed] == ["1e5"]
    assert "not finite" in failed[0].problem
    assert found.candidates[0].points[-1]["steps"] == 8
    lost = next(line for line in str(found).splitlines() if line.startswith(failed[0].name))
    assert lost.endswith("-      not finite  -")


@pytest.mark.parametrize("from_update", [0, 2])
def test_a_sweep_whose_candidates_all_diverge_ends_in_one_line(llama, tmp_path, monkeypatch, from_update):
    apply = Step.apply

    def broken(step, optimizer):
        done = max((int(each["step"]) for each in optimizer.state.values()), default=0)
        if done >= from_update:
            step.problem = TrainingError("the loss is not finite")
        return apply(step, optimizer)

    monkeypatch.setattr(Step, "apply", broken)
    with pytest.raises(TrainingError, match="no candidate is left: the loss is not finite"):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path / "out", space=SPACE, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_candidate_that_its_patience_ends_counts_with_the_epoch_that_is_kept(llama, tmp_path):
    options = {**SETTINGS, "max_steps": None, "num_epochs": 9, "early_stopping_patience": 1, "choice_weight": 0}
    rare = [*RECORDS[:1], *(each | {"output": "no"} for each in RECORDS[1:])]
    space = {"learning_rates": ["2"]}
    found = softprompt.sweep(llama, rare, HELD_OUT[:1], output=tmp_path, space=space, **options)
    history, (point,) = found.prompt.history, found.candidates[0].points
    assert len(history) < 9
    assert point["validation"] == found.prompt.metrics["validation"] != history[-1]["validation"]


def test_a_prompt_as_long_as_its_demonstrations_has_no_length_of_its_own():
    settings = TuneSettings.from_dict({"method": "prefix", "demonstrations": 4})
    assert {each.length for each in grid_of(settings, SweepSettings())} == {None}
    with pytest.raises(ConfigError, match="as long as its demonstrations"):
        grid_of(settings, SweepSettings(lengths=["4"]))


def test_what_a_method_does_not_have_makes_no_more_candidates():
    settings = TuneSettings.from_dict(
        {"tuning_config": {"prompt_tuning_init_text": "Is it?", "prompt_tuning_init_method": "TEXT"}}
    )
    space = SweepSettings(
        learning_rates="x1, 0.1",
        inits=["TEXT", "RANDOM"],
        lengths=[4, 8],
        methods=["prompt_tuning", "prefix", "cpt"],
    )
    found = grid_of(settings, space)
    assert [sum(each.method == m for each in found) for m in ("prompt_tuning", "prefix", "cpt")] == [8, 4, 2]
    texts = {each.init: each.settings(settings).tuning_config.prompt_tuning_init_text for each in found}
    assert texts == {"TEXT": "Is it?", "RANDOM": None, None: None}
    few = SweepSettings(learning_rates="x1, 0.1", lengths=[4, 8, 16], candidates=4)
    assert grid_of(settings, few) == grid_of(settings, few)
    assert len(grid_of(settings, few)) == 4


def test_rungs_leave_one_candidate_for_the_last():
    assert steps_of_rungs(270, 27, 3, None) == [10, 30, 90, 270]
    assert steps_of_rungs(90, 9, 3, 2) == [30, 90]
    assert steps_of_rungs(90, 1, 3, None) == [90]
    assert steps_of_rungs(2, 27, 3, None) == [1, 2]


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"learning_rates": ["y3"]}, "numbers above 0, or x0.3"),
        ({"lengths": ["ten"]}, "lengths takes numbers"),
        ({"methods": ["prefx"]}, "prefix"),
        ({"rates": []}, "unknown setting 'rates'"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line(space, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        softprompt.sweep("demo", RECORDS, HELD_OUT, output=tmp_path, space=space)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs optuna")
@pytest.mark.slow
def test_optuna_proposes_the_same_candidates_for_a_seed_also_after_an_interruption(llama, tmp_path, monkeypatch):
    space = SPACE | {"learning_rates": ["x0.1", "x3"], "driver": "optuna", "candidates": 4}
    straight = softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path / "a", space=space, **SETTINGS)
    rates = {each.choice.factor for each in straight.candidates}
    assert len(rates) == 4
    assert all(0.1 <= rate <= 3 for rate in rates)
    told, done = Events.update, []

    def tell(self, state, loss):
        told(self, state, loss)
        if state.update == 1 and self._of == " of candidate 3" and not done:
            done.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(Events, "update", tell)
    with pytest.raises(TrainingInterrupted):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path / "b", space=space, **SETTINGS)
    resumed = softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path / "b", resume=True)
    assert resumed.to_dict() == straight.to_dict()


def test_a_missing_optuna_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "softprompt\[sweep\]"'):
        softprompt.sweep("demo", RECORDS, HELD_OUT, output=tmp_path, space={"driver": "optuna"})


def test_the_command_reads_a_run_file_with_a_sweep_table_that_tune_passes_over(bases, tmp_path, capsys):
    for name, records in (("train", RECORDS), ("held_out", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (tmp_path / "run.toml").write_text(
        f'base_model = "{bases / "llama"}"\ntrain_data = "{tmp_path / "train.jsonl"}"\nmax_steps = 2\n'
        f'validation_data = "{tmp_path / "held_out.jsonl"}"\n'
        '[tuning_config]\nnum_virtual_tokens = 2\n[sweep]\nlearning_rates = ["x1", 0.5]\nlengths = [2, 3]\n'
    )
    words = [
        "sweep",
        "--config",
        str(tmp_path / "run.toml"),
        "--output",
        str(tmp_path / "out"),
        "--lengths",
        "2,4",
        "--json",
    ]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    tried = {(each["choice"]["length"], each["choice"]["learning_rate"]) for each in found["candidates"]}
    assert tried == {(2, "x1"), (2, "0.5"), (4, "x1"), (4, "0.5")}
    assert (
        run(["tune", "--config", str(tmp_path / "run.toml"), "--output", str(tmp_path / "tuned"), "--quiet"]) == 0
    )
    assert run(["sweep", "--config", str(tmp_path / "run.toml"), "--output", str(tmp_path / "out")]) == 2
