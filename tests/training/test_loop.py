"""The loop against a toy engine whose loss is known in closed form."""

import io
import json
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from oracles.slow import only
from softprompt.data import TokenRow
from softprompt.engine import EngineRow, TargetLogProbs
from softprompt.errors import TrainingError, TrainingInterrupted
from softprompt.prompts import Prompt, PromptModule
from softprompt.training import Events, TuneSettings
from softprompt.training.events import LOG_FILE
from softprompt.training.loop import Candidate, train_together
from softprompt.training.objectives import Likelihood
from softprompt.training.optimisation import Rates, build_optimizer
from softprompt.training.sampling import Sampling
from softprompt.training.stage import Stage
from softprompt.training.state import RunState, Saving, Snapshot, Sums, load_states, save_states


class Rows(PromptModule):
    """Rows that are trained as they are."""

    def __init__(self, rows):
        super().__init__()
        self.weight = torch.nn.Parameter(rows)

    def materialize(self, task=0):
        return self.weight

    def stored(self):
        raise NotImplementedError

    def load_stored(self, tensors):
        raise NotImplementedError


class Product(Rows):
    """Rows that are the product of two parameters."""

    def __init__(self, rows):
        super().__init__(rows)
        self.factor = torch.nn.Parameter(torch.full((2, 1), 0.5))

    def materialize(self, task=0):
        return self.weight * self.factor


@dataclass(eq=False)
class ToyEngine:
    """log p of token t after source s is -(mean(prompt) - s - t)**2, with noise under dropout."""

    module: torch.nn.Module
    calls: int = 0
    broken_at: int | None = None
    interrupt_at: int | None = None
    on_interrupt: object = None
    name = "toy"

    def target_log_probs(self, rows):
        self.calls += 1
        if self.calls == self.interrupt_at:
            self.on_interrupt()
        values, index = [], []
        for number, row in enumerate(rows):
            for token in row.target:
                noise = torch.rand(()) if self.module.training else 0.0
                values.append(-((row.prompt.input.mean() - sum(row.source) - token - noise) ** 2))
                index.append(number)
        stacked = torch.stack(values)
        if self.calls == self.broken_at:
            stacked = torch.where(torch.tensor(index) == 1, stacked * float("nan"), stacked)
        return TargetLogProbs(stacked, torch.tensor(index))


ROWS = [TokenRow((i % 3,), tuple(range(1 + i % 4)), False, False) for i in range(11)]


class Run:
    """One run of the loop, in memory or with an output directory."""

    def __init__(self, output=None, engine=None, rows=ROWS, kind=Rows, tasks=None, **settings):
        defaults = {"num_epochs": 3, "batch_size": 2, "learning_rate": 0.1}
        self.settings = TuneSettings.from_dict(defaults | settings)
        torch.manual_seed(0)
        self.module = kind(torch.randn(2, 3))
        self.prompt = self.module.weight
        base = torch.nn.Dropout().eval()
        self.engine = engine or ToyEngine(base)
        self.engine.module = base
        sampling = Sampling(
            [len(row.source) + len(row.target) for row in rows],
            tasks or [0] * len(rows),
            self.settings.batch_size,
            self.settings.accumulate_steps,
            self.settings.seed,
        )
        self.stage = Stage(
            self.module,
            Likelihood(self.engine),
            rows,
            sampling,
            base,
            self.settings,
            0.1,
            rms=1.0,
            usual_rate=0.1,
        )
        self.optimizer = build_optimizer(self.settings, self.module, Rates(0.1))
        self.state, self.output, self.stopped = RunState(), output, False

    def save(self):
        if self.output:
            snapshot = Snapshot.of("toy", self.state, self.module, self.optimizer)
            save_states(self.output, {"": snapshot}, {})

    def load(self):
        snapshot = load_states(self.output, {})[0][""]
        assert snapshot.stage == "toy"
        snapshot.restore(self.module, self.optimizer)
        self.state = snapshot.run

    def check_stop(self):
        if self.stopped:
            raise TrainingInterrupted("stopped")

    def stop(self):
        self.stopped = True

    def go(self):
        total = self.stage.total_updates()
        log = self.output / LOG_FILE if self.output else None
        with Events(log, self.state, total, silent=True) as events:
            alone = Candidate(self.stage, self.state, self.optimizer, events)
            train_together([alone], check_stop=self.check_stop, saving=Saving(self.save))
        if alone.problem is not None:
            raise alone.problem
        return self.module.materialize().detach().clone()


def test_accumulated_micro_batches_give_the_gradient_of_the_whole():
    whole = Run(batch_size=11, accumulate_steps=1, max_grad_norm=0).go()
    parts = Run(batch_size=2, accumulate_steps=6, max_grad_norm=0).go()
    torch.testing.assert_close(parts, whole)


def test_the_last_partial_group_is_an_update_of_its_own_tokens():
    run = Run(batch_size=2, accumulate_steps=4, num_epochs=1)
    assert [len(update) for update in run.stage.sampling.updates(0)] == [4, 2]
    run.go()
    assert run.state.update == 2
    tokens = sum(len(row.target) for row in ROWS)
    assert run.state.history[0]["update"] == 2
    assert run.state.tokens == tokens + len(ROWS)


def test_the_logged_loss_is_the_mean_over_target_tokens(tmp_path):
    run = Run(output=tmp_path, batch_size=11, num_epochs=2)
    start = run.prompt.detach().mean()
    expected = [(start - sum(row.source) - token) ** 2 for row in ROWS for token in row.target]
    run.go()
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [line["name"] for line in lines] == ["loss", "loss"]
    assert [(line["data"]["epoch"], line["data"]["step"]) for line in lines] == [(0, 1), (1, 2)]
    assert lines[0]["data"]["value"] == pytest.approx(torch.stack(expected).mean().item())
    assert lines[0]["data"]["value"] == pytest.approx(run.state.history[0]["loss"])
    assert set(lines[0]["data"]) == {"epoch", "step", "value", "timestamp"}


def test_the_same_seed_repeats_and_another_does_not():
    assert torch.equal(Run(seed=1).go(), Run(seed=1).go())
    assert not torch.equal(Run(seed=1).go(), Run(seed=2).go())


def test_gradients_are_clipped():
    run = Run(num_epochs=1, batch_size=11, max_grad_norm=0.01)
    seen = []
    run.optimizer.step = lambda: seen.append(run.prompt.grad.norm().item())
    run.go()
    assert seen == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("dropout", only([True], [False, True]))
@pytest.mark.parametrize("kind", [Rows, Product])
@pytest.mark.parametrize("call", only([2, 9, 18], [1, 2, 4, 6, 9, 13, 18]))
def test_interrupted_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, call, dropout, optimizer, kind):
    settings = {"accumulate_steps": 3, "keep_dropout": dropout, "optimizer": optimizer}
    settings["kind"] = kind
    straight = Run(output=tmp_path / "a", **settings)
    expected = straight.go()

    engine = ToyEngine(None, interrupt_at=call)
    first = Run(output=tmp_path / "b", engine=engine, **settings)
    engine.on_interrupt = first.stop
    try:
        first.go()
    except TrainingInterrupted:
        first.save()
    else:
        assert call == 18  # the last batch: nothing is left to stop

    second = Run(output=tmp_path / "b", **settings)
    second.load()
    assert torch.equal(second.go(), expected)
    assert second.state.history == straight.state.history
    logs = [
        [json.loads(line)["data"] | {"timestamp": 0} for line in path.read_text().splitlines()]
        for path in (tmp_path / "a" / LOG_FILE, tmp_path / "b" / LOG_FILE)
    ]
    assert logs[0] == logs[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("silent", [False, True])
def test_a_progress_bar_is_shown_on_a_terminal_unless_silenced(monkeypatch, silent):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    state = RunState()
    with Events(None, state, 2, silent=silent) as events:
        state.add_update(Sums(2, 500, loss=3.0), seconds=0.5, rate=0.1)
        events.update(state, 1.5)
        events.epoch({"epoch": 1, "loss": 1.5})
    shown = terminal.getvalue()
    assert ("epoch 1, loss 1.5000, 1,000 tokens/s" in shown) is not silent
    assert (shown == "") is silent


def test_a_state_of_an_epoch_ago_drops_the_log_lines_since(tmp_path):
    run = Run(output=tmp_path, num_epochs=2)
    run.go()
    full = (tmp_path / LOG_FILE).read_text()
    again = Run(output=tmp_path, num_epochs=2)
    again.state = RunState(update=6, epoch=1)
    again.go()
    kept = (tmp_path / LOG_FILE).read_text().splitlines()
    assert len(kept) == len(full.splitlines()) == 12
    assert kept[:6] == full.splitlines()[:6]
    assert kept[6:] != full.splitlines()[6:]


def test_a_loss_that_is_not_finite_names_rows_and_update():
    run = Run(engine=ToyEngine(None, broken_at=3))
    update = run.stage.sampling.updates(0)[2][0]
    with pytest.raises(TrainingError, match=r"update 3 \(epoch 1\): the loss is not finite") as error:
        run.go()
    assert f"training rows {update[1] + 1})" in str(error.value)
    assert "the prompt itself is sound" in str(error.value)


def test_a_prompt_that_left_the_embeddings_scale_blames_the_learning_rate():
    run = Run(engine=ToyEngine(None, broken_at=2))
    run.stage = replace(run.stage, rms=1e-4, usual_rate=5.7e-5)
    with pytest.raises(TrainingError, match=r"1e\+03 x that rms\); try 5.7e-05 or less"):
        run.go()


def test_a_gradient_that_is_not_finite_stops():
    run = Run()
    run.prompt.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"update 1 \(epoch 1\): the gradient is"):
        run.go()


class ListedValidation:
    """Gives listed qualities epoch by epoch."""

    def __init__(self, qualities):
        self.qualities, self.seen = list(qualities), []

    def watch(self, found, streaks):
        pass

    def metrics(self, prompts):
        self.seen.append(prompts[0].input.clone())
        return {"accuracy": self.qualities[len(self.seen) - 1]}

    def quality(self, metrics):
        return [metrics["accuracy"]]


def test_the_best_prompt_is_kept_and_the_earlier_of_equals():
    validation = ListedValidation([0.5, 0.8, 0.8, 0.6])
    run = Run(num_epochs=4)
    run.stage = replace(run.stage, validation=validation)
    run.go()
    assert run.state.best_epoch == 2
    assert torch.equal(run.state.best["weight"], validation.seen[1])
    assert [point["validation"]["accuracy"] for point in run.state.history] == [0.5, 0.8, 0.8, 0.6]


def test_a_resumed_run_knows_the_best_quality(tmp_path):
    run = Run(output=tmp_path, num_epochs=2)
    run.stage = replace(run.stage, validation=ListedValidation([0.5, 0.8]))
    run.go()
    state = load_states(tmp_path, {})[0][""].run
    assert state.best_quality == run.state.best_quality == [0.8]
    assert torch.equal(state.best["weight"], run.state.best["weight"])
    state.offer([0.8], run.module.state_dict())
    assert (state.best_epoch, state.stale_epochs) == (2, 1)


def test_training_stops_when_patience_is_over():
    run = Run(num_epochs=10, early_stopping_patience=2)
    run.stage = replace(run.stage, validation=ListedValidation([0.5, 0.8, 0.8, 0.6, 0.9]))
    run.go()
    assert (run.state.epoch, run.state.best_epoch) == (4, 2)


@pytest.mark.parametrize("steps", [1, 3])
def test_every_parameter_behind_a_prompt_gets_the_gradient_of_the_whole(steps):
    run = Run(kind=Product, batch_size=11 // steps, accumulate_steps=6, max_grad_norm=0)
    prompt = Prompt(run.module.materialize())
    rows = [run.stage.rows[i] for batch in run.stage.sampling.updates(0)[0] for i in batch]
    rows = [EngineRow(row.source, row.target, prompt) for row in rows]
    loss = -run.engine.target_log_probs(rows).values.mean()
    expected = torch.autograd.grad(loss, list(run.module.parameters()))
    seen = []
    run.optimizer.step = lambda: seen.append([p.grad.clone() for p in run.module.parameters()])
    run.go()
    for found, wanted in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_pass_runs_behind_the_prompts_of_its_own_tasks_only():
    tasks = [0, 0, 1, 2, 2]
    rows = [TokenRow((task,), (1,), False, False) for task in tasks]
    run = Run(rows=rows, tasks=tasks, batch_size=2)
    run.module.weight = torch.nn.Parameter(torch.arange(3.0)[:, None])
    run.module.materialize = lambda task=0: run.module.weight[task : task + 1]
    seen = []

    def objective(rows, tasks):
        seen.append((tasks, [row.prompt for row in rows], [row.source[0] for row in rows]))
        return Likelihood(run.engine)(rows, tasks)

    objective.joins = False
    run.stage = replace(run.stage, objective=objective)
    run.optimizer = torch.optim.SGD([{"params": [run.module.weight], "lr": 0.0, "peak": 0.0}])
    run.go()
    for tasks, prompts, sources in seen:
        assert tasks == sources == [prompt.input.item() for prompt in prompts]
        assert len(set(prompts)) == len(set(tasks))
