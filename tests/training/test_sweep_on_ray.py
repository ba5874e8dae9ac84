"""A sweep whose candidates train on Ray, over a stand-in for it in this process, is the sweep without."""

import signal
import sys
from contextvars import Context

import pytest
import torch

import softprompt
from oracles.ray_stand_in import in_place_of_ray, sent
from softprompt.backbone import trust_code, trusts_code
from softprompt.cli.main import run
from softprompt.cluster import connected, device_there
from softprompt.errors import ConfigError, ProcessLostError, TrainingError
from softprompt.training import Snapshot, TuneSettings
from softprompt.training.output import state_path
from softprompt.training.state import RunState
from softprompt.training.sweeps import on_ray
from softprompt.training.sweeps.halving import Halving, Tried
from softprompt.training.sweeps.space import Combination
from training.test_sweep import HELD_OUT, RECORDS, SETTINGS, SPACE, swept, undrawn, values  # noqa: F401


def found_close(found, straight):
    """The same candidates in the same order, and the prompt to 1e-5."""
    assert found.rungs == straight.rungs
    for one, other in zip(found.candidates, straight.candidates, strict=True):
        assert (one.name, one.choice, one.learning_rate) == (other.name, other.choice, other.learning_rate)
        for point, expected in zip(one.points, other.points, strict=True):
            assert point["validation"] == pytest.approx(expected["validation"], abs=1e-5)
    torch.testing.assert_close(values(found.prompt), values(straight.prompt), rtol=0, atol=1e-5)


def test_the_sweep_is_the_same_and_goes_on_after_a_loss(swept, llama, tmp_path, monkeypatch):  # noqa: F811
    straight, _ = swept
    ray = in_place_of_ray(monkeypatch, lost={1})
    with pytest.raises(ProcessLostError, match=r"lost or failed: The actor died.*--resume.* --ray local$"):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, space=SPACE, ray="local", workers=2, **SETTINGS)
    assert ray.calls == 3  # two of the first rung, one of the second
    assert ray.killed == 2
    (tmp_path / "training_logs.jsonl").write_text("of an earlier run\n")
    ray = in_place_of_ray(monkeypatch)
    resumed = softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, resume=True, ray="local", workers=3)
    assert ray.calls == 3  # two of the second rung, one of the last
    found_close(resumed, straight)
    assert not state_path(tmp_path).parent.exists()
    assert (tmp_path / "sweep.json").exists()
    assert not (tmp_path / "training_logs.jsonl").exists()


def test_it_goes_on_without_ray_as_well(swept, llama, tmp_path, monkeypatch):  # noqa: F811
    in_place_of_ray(monkeypatch, lost={1})
    with pytest.raises(ProcessLostError):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, space=SPACE, ray="local", **SETTINGS)
    found_close(softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path, resume=True), swept[0])


def test_what_would_be_ignored_is_refused(llama, tmp_path, monkeypatch, capsys):
    assert run(["sweep", "--workers", "2", "--output", str(tmp_path / "out")]) == 2
    assert "--workers would be ignored without --ray" in capsys.readouterr().err
    in_place_of_ray(monkeypatch)
    options = {**SETTINGS, "track": "tensorboard"}
    with pytest.raises(ConfigError, match="track would be ignored on Ray"):
        softprompt.sweep(llama, RECORDS, HELD_OUT, output=tmp_path / "out", ray="local", **options)


class OnGpu(torch.Tensor):
    """A tensor that a process without a GPU cannot read."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a tensor of a GPU comes to a driver without one")


def test_what_comes_back_is_on_the_cpu(monkeypatch):
    there = torch.ones(2).as_subclass(OnGpu)
    tensors = {"prompt": {"p": there}, "best": {"p": there}, "optimizer": {"p/m": there}, "earlier": {"e": there}}
    found = Snapshot("a", RunState(best={"p": there}), tensors, {}, {})
    in_place_of_ray(monkeypatch)
    monkeypatch.setattr(on_ray, "prepare", lambda *given: None)
    monkeypatch.setattr(Halving, "train", lambda *given: None)
    monkeypatch.setattr(Halving, "kept", lambda halving: ({"1": found}, {}))
    settings = TuneSettings()
    back, _ = sent(on_ray.RungWorker("demo", [], settings, settings, bool).train(({}, {}), 0, None))
    assert torch.equal(back["1"].run.best["p"], torch.ones(2))
    assert {kind: list(own) for kind, own in back["1"].tensors.items()} == {k: list(v) for k, v in tensors.items()}


def test_workers_trust_code_where_the_command_does(monkeypatch):
    ray, told = in_place_of_ray(monkeypatch), []
    monkeypatch.setattr(on_ray, "prepare", lambda *given: told.append(trusts_code()))

    def begun(trust):
        trust()
        with on_ray.rungs_on_ray(ray, 1, 1, bool, "demo", [], TuneSettings(), TuneSettings()):
            pass

    for trust in (bool, trust_code):
        Context().run(begun, trust)
    assert told == [False, True]


def test_by_default_no_worker_is_without_a_candidate(monkeypatch):
    monkeypatch.setattr(on_ray, "prepare", lambda *given: None)
    for workers, made in ((None, 4), (5, 5)):
        ray = in_place_of_ray(monkeypatch, gpus=8)
        with on_ray.rungs_on_ray(ray, workers, 4, bool, "demo", [], TuneSettings(), TuneSettings()):
            assert ray.made == made


def test_a_worker_says_its_own_error(monkeypatch):
    def fails(*given):
        raise TrainingError("no candidate is left")

    monkeypatch.setattr(on_ray, "prepare", lambda *given: None)
    monkeypatch.setattr(Halving, "train", fails)
    ray = in_place_of_ray(monkeypatch)
    with on_ray.rungs_on_ray(ray, 1, 1, bool, "demo", [], TuneSettings(), TuneSettings()) as train:
        with pytest.raises(TrainingError, match=r"^no candidate is left$"):
            list(train([Tried("1", Combination("prompt", None, None, "x1"))], {}, 0, None))


def test_ray_is_looked_for_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--ray needs Ray"):
        softprompt.sweep(str(tmp_path / "absent"), RECORDS, HELD_OUT, output=tmp_path / "out", ray="local")


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    def late(**how):
        raise Exception("The current node timed out during startup.")  # Ray 2.60 raises just that

    ray = in_place_of_ray(monkeypatch)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late, raising=False)
    with pytest.raises(ConfigError, match=r"^--ray local: The current node timed out during startup\.$"):
        with connected("local"):
            pass


def test_sigterm_is_handled_as_before_and_what_ray_says_and_has_is_told(monkeypatch, capsys):
    def handles(number, frame):
        pass

    ray = in_place_of_ray(monkeypatch)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **how: signal.signal(signal.SIGTERM, handles), raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with connected("local"):
            assert signal.getsignal(signal.SIGTERM) == before
            print("a worker has died")  # as a thread of Ray does
        assert capsys.readouterr() == ("", "a worker has died\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert device_there() is None
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [3])
    assert device_there() == "cuda:0"
