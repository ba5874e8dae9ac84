"""``seeds``, several prompts side by side, and ``restarts``, one after another while nothing is learnt."""

import os
import signal
from statistics import fmean, stdev

import pytest
import torch

import softprompt
from softprompt.cli.main import run
from softprompt.errors import ConfigError, TrainingError, TrainingInterrupted
from softprompt.training import Events, tune
from softprompt.training.gradients import Step
from softprompt.training.output import state_path

SETTINGS = {"num_epochs": 2, "batch_size": 4, "tuning_config": {"num_virtual_tokens": 3}, "learning_rate": 0.05}
RECORDS = [
    {"input": f"the film was {word} {more}", "output": "yes" if word in ("good", "fine") else "no"}
    for word in ("good", "bad", "fine", "poor")
    for more in ("news", "report it")
]
HELD_OUT = [
    {"input": f"it is {word}", "output": answer}
    for word, answer in (("good", "yes"), ("bad", "no"), ("poor", "no"))
]


def values(tuned):
    return tuned.module.embedding.weight.detach()


@pytest.fixture
def stopped_once(monkeypatch):
    """Send this process a Ctrl-C at an update, once."""

    def plan(update, seed):
        told, done = Events.update, []

        def tell(self, state, loss):
            told(self, state, loss)
            if state.update == update and str(seed) in self._of and not done:
                done.append(True)
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Events, "update", tell)

    return plan


@pytest.fixture(scope="module")
def three(bases, tmp_path_factory):
    output = tmp_path_factory.mktemp("three") / "out"
    return tune(bases / "llama", RECORDS, HELD_OUT, output=output, seeds=3, **SETTINGS), output


def test_the_best_of_several_seeds_is_kept_and_the_spread_recorded(three, llama):
    tuned, output = three
    record = tuned.metrics["seeds"]
    assert list(record["runs"]) == ["73", "74", "75"]
    for name, part in (("accuracy", "validation accuracy"), ("loss", "validation loss")):
        found = [each["validation"][name] for each in record["runs"].values()]
        assert record["mean"][part] == pytest.approx(fmean(found))
        assert record["std"][part] == pytest.approx(stdev(found))
    best = max(
        record["runs"].items(), key=lambda item: (item[1]["validation"]["accuracy"], -item[1]["validation"]["loss"])
    )
    assert (str(record["kept"]), record["by"]) == (best[0], "validation accuracy")
    alone = tune(llama, RECORDS, HELD_OUT, seed=record["kept"], **SETTINGS)
    torch.testing.assert_close(values(tuned), values(alone), rtol=0, atol=0.01 * SETTINGS["learning_rate"])
    assert tuned.metrics["validation"] == pytest.approx(alone.metrics["validation"], abs=1e-4)
    assert tuned.whole.settings["seed"] == record["kept"]
    assert softprompt.load(output).metrics["seeds"] == record


def test_the_other_prompts_are_kept_and_answer_as_an_ensemble(three):
    tuned, output = three
    others = sorted(output.glob("seeds/*"))
    assert [each.name for each in others] == [
        s for s in ("73", "74", "75") if s != str(tuned.metrics["seeds"]["kept"])
    ]
    members = [softprompt.load(each) for each in (output, *others)]
    assert len({tuple(values(each).flatten().tolist()) for each in members}) == 3
    assert softprompt.Ensemble(members)("good film") in tuned.labels
    for folder in (output, *others):
        assert (folder / "run.toml").exists()
        assert (folder / "training_logs.jsonl").exists()
    assert "seeds = 3" in (output / "run.toml").read_text()
    assert "seeds = 1" in (others[0] / "run.toml").read_text()
    assert not state_path(output).parent.exists()


def test_a_resumed_run_of_several_seeds_ends_bit_equal(three, llama, tmp_path, stopped_once, monkeypatch):
    straight, _ = three
    with monkeypatch.context():
        stopped_once(3, 73)  # of four, before the other seeds' third
        with pytest.raises(TrainingInterrupted, match="softprompt tune --resume"):
            tune(llama, RECORDS, HELD_OUT, output=tmp_path / "b", seeds=3, **SETTINGS)
    monkeypatch.undo()
    resumed = tune(llama, RECORDS, HELD_OUT, output=tmp_path / "b", resume=True)
    assert torch.equal(values(resumed), values(straight))
    assert resumed.metrics["seeds"]["runs"] == straight.metrics["seeds"]["runs"]


def test_without_validation_data_the_training_loss_decides_and_the_command_says_so(bases, tmp_path, capsys):
    lines = "input,output\n" + "".join(f"film {word},{word}\n" for word in ("good", "bad") * 4)
    (tmp_path / "rows.csv").write_text(lines)
    words = ["tune", "--train-data", str(tmp_path / "rows.csv"), "--base-model", str(bases / "llama")]
    words += ["--output", str(tmp_path / "out"), "--seeds", "2", "--num-epochs", "1", "--num-virtual-tokens", "2"]
    assert run(words) == 0
    *_, seeds, ensemble = capsys.readouterr().out.splitlines()
    assert "the best by the training loss, as there is no validation data" in seeds
    assert f"softprompt classify {tmp_path / 'out'} {tmp_path / 'out' / 'seeds'}" in ensemble


def test_a_run_that_learns_nothing_starts_again_with_the_next_seed(llama, caplog):
    tuned = tune(llama, RECORDS, restarts=2, **(SETTINGS | {"learning_rate": 1e-9}))
    record = tuned.metrics["seeds"]
    assert list(record["runs"]) == ["73", "74", "75"]
    assert all("nothing_learnt" in each for each in record["runs"].values())
    assert "starting again with seed 74, restart 1 of 2" in caplog.text
    losses = {seed: each["loss"] for seed, each in record["runs"].items()}
    assert str(record["kept"]) == min(losses, key=losses.get)


def test_a_restart_whose_loss_is_not_finite_does_not_lose_the_prompts_before_it(llama, monkeypatch, tmp_path):
    apply = Step.apply

    def broken(step, optimizer):
        if step.stage.settings.seed == 74:
            step.problem = TrainingError("the loss is not finite")
        return apply(step, optimizer)

    monkeypatch.setattr(Step, "apply", broken)
    tuned = tune(llama, RECORDS, output=tmp_path, restarts=2, **(SETTINGS | {"learning_rate": 1e-9}))
    runs = tuned.metrics["seeds"]["runs"]
    assert runs["74"] == {"problem": "the loss is not finite"}
    assert set(runs) == {"73", "74", "75"} and (tmp_path / "adapter_config.json").exists()


def test_a_run_that_learns_does_not_start_again(llama):
    tuned = tune(llama, RECORDS, restarts=1, **SETTINGS)
    assert "seeds" not in tuned.metrics


def test_an_interrupted_restart_goes_on(llama, tmp_path, stopped_once, monkeypatch):
    options = SETTINGS | {"learning_rate": 1e-9, "restarts": 1}
    straight = tune(llama, RECORDS, **options)
    with monkeypatch.context():
        stopped_once(2, 74)
        with pytest.raises(TrainingInterrupted):
            tune(llama, RECORDS, output=tmp_path, **options)
    monkeypatch.undo()
    resumed = tune(llama, RECORDS, output=tmp_path, resume=True)
    assert resumed.metrics["seeds"]["runs"] == straight.metrics["seeds"]["runs"]
    assert torch.equal(values(resumed), values(straight))
    assert not (tmp_path / "seeds").exists()


def test_seeds_and_restarts_exclude_each_other(llama):
    with pytest.raises(ConfigError, match="restarts would be ignored with several seeds"):
        tune(llama, RECORDS, seeds=2, restarts=1)
