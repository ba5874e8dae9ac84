"""Several prompts in one loop: each becomes what it would alone."""

import pytest
import torch

from softprompt.bundled import complaints
from softprompt.training import TuneSettings, gradients
from softprompt.training.examples import read_data
from softprompt.training.loop import train_together
from softprompt.training.objectives import Likelihood
from softprompt.training.preparation import prepare, varied
from softprompt.training.session import candidate_of

OPTIONS = {"max_steps": 5, "batch_size": 3, "limit": 12, "validation_split": 0.25, "choice_weight": 0}
VARIED = {
    "another seed": {"seed": 5},
    "rate": {"learning_rate": 0.02},
    "length": {"tuning_config": {"num_virtual_tokens": 7}},
    "initialisation": {
        "tuning_config": {"prompt_tuning_init_method": "TEXT", "prompt_tuning_init_text": "Complaint?"}
    },
    "smaller batches": {"batch_size": 2, "accumulate_steps": 2},
    "prefix": {"method": "prefix"},
    "context": {"method": "cpt"},
    "choice": {"choice_weight": 1.0},
    "choice, another seed": {"choice_weight": 1.0, "seed": 5},
}


RECORDS = [
    {"input": f"the film was {word} {more}", "output": "yes" if word in ("good", "fine") else "no"}
    for word in ("good", "bad", "fine", "poor")
    for more in ("news", "report it", "this is a film")
]


@pytest.fixture(scope="module")
def first(bases):
    settings = TuneSettings.from_dict(OPTIONS)
    return prepare(bases / "llama", read_data(RECORDS, None, settings), settings)


def candidates(first, *variants):
    return [candidate_of(varied(first, TuneSettings.from_dict(OPTIONS | each))) for each in variants]


def values(candidate):
    return candidate.stage.prompt.prompt().tensors[0].detach().clone()


@pytest.fixture(scope="module")
def alone(first):
    found = {}
    for name, options in VARIED.items():
        (candidate,) = candidates(first, options)
        train_together([candidate])
        found[name] = candidate
    return found


def assert_alike(candidate, other):
    """Adam divides a gradient by its own size, so rounding moves a number by parts of the learning rate."""
    assert candidate.state.update == other.state.update
    losses = [[point["loss"] for point in each.state.history] for each in (candidate, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    measured = [[point["validation"] for point in each.state.history] for each in (candidate, other)]
    for one, two in zip(*measured, strict=True):
        assert one == pytest.approx(two, abs=1e-4)
    moved = 0.01 * candidate.stage.learning_rate
    torch.testing.assert_close(values(candidate), values(other), rtol=0, atol=moved)


def test_each_of_several_prompts_becomes_what_it_would_alone(first, alone):
    together = candidates(first, *VARIED.values())
    train_together(together)
    for name, candidate in zip(VARIED, together, strict=True):
        assert_alike(candidate, alone[name])


@pytest.mark.slow
def test_they_are_as_alone_on_a_trained_model_too():
    settings = TuneSettings.from_dict(OPTIONS | {"max_steps": 3})
    demo = prepare("demo", read_data(complaints("train"), None, settings), settings)
    pairs = [
        [candidate_of(varied(demo, TuneSettings.from_dict(OPTIONS | {"max_steps": 3} | each))) for _ in range(2)]
        for each in ({"seed": 5}, {"tuning_config": {"num_virtual_tokens": 7}, "learning_rate": 0.02})
    ]
    train_together([each for each, _ in pairs])
    for candidate, alone in pairs:
        train_together([alone])
        assert_alike(candidate, alone)


def test_the_rows_of_all_go_through_the_base_in_one_pass(first, monkeypatch):
    passes = []
    run = type(first.engine).run_alike
    monkeypatch.setattr(type(first.engine), "run_alike", lambda *args: passes.append(len(args[1])) or run(*args))
    chosen = {"choice_weight": 1.0}
    train_together(candidates(first, {}, {"seed": 5}, {"method": "prefix"}, chosen, chosen | {"seed": 5}), until=1)
    assert passes == [6, 3, 12]  # prompts of virtual tokens; keys and values; two labels a row of two prompts

    monkeypatch.setattr(gradients, "JOINED_TOKENS", 1)
    passes.clear()
    train_together(candidates(first, {}, {"seed": 5}), until=1)
    assert passes == [3, 3]


def test_a_budget_of_tokens_splits_passes_and_changes_nothing(first, alone, monkeypatch):
    run, most = type(first.engine).run_alike, []

    def seen(engine, rows, *rest):
        if torch.is_grad_enabled():
            most.append(len(rows) * max(len(row.source) + len(row.target) for row in rows))
        return run(engine, rows, *rest)

    monkeypatch.setattr(type(first.engine), "run_alike", seen)
    longest = max(len(row.source) + len(row.target) for row in first.tasks[0].train)
    own = {"max_tokens_per_batch": 2 * longest}
    together = candidates(first, VARIED["another seed"] | own, VARIED["rate"] | own)
    train_together(together, until=4)
    assert max(most) <= 2 * longest < sum(most[:2])
    train_together(together)
    assert_alike(together[0], alone["another seed"])
    assert_alike(together[1], alone["rate"])


def test_candidates_can_be_dropped_and_the_others_go_on(first, alone):
    together = candidates(first, VARIED["another seed"], VARIED["rate"], VARIED["length"])
    train_together(together, until=2)
    assert [each.state.update for each in together] == [2, 2, 2]
    train_together(together[:2], until=3)
    train_together(together[:1])
    assert [each.state.update for each in together] == [5, 3, 2]
    assert_alike(together[0], alone["another seed"])


def test_a_candidate_whose_loss_is_not_finite_is_left_behind(first, alone):
    together = candidates(first, VARIED["another seed"], {"seed": 1})
    with torch.no_grad():
        next(together[1].stage.prompt.parameters()).fill_(float("nan"))
    train_together(together)
    assert "the loss is not finite" in str(together[1].problem)
    assert together[1].state.update == 0
    assert together[0].problem is None
    assert_alike(together[0], alone["another seed"])


def test_a_gradient_that_is_not_finite_does_not_reach_into_the_others(first, alone, monkeypatch):
    run = Likelihood.__call__

    def broken(objective, rows, tasks):
        loss = run(objective, rows, tasks)
        own = [i for i, row in enumerate(rows) if row.prompt.tokens == 7]
        if own:
            loss.values.register_hook(lambda grad: grad.where(loss.row_index < own[0], torch.nan))
        return loss

    monkeypatch.setattr(Likelihood, "__call__", broken)
    together = candidates(first, VARIED["another seed"], VARIED["length"])
    train_together(together)
    assert "the gradient is nan" in str(together[1].problem)
    assert_alike(together[0], alone["another seed"])


def test_all_states_are_at_the_border_of_an_update_when_the_run_is_stopped(first, alone):
    together, calls = candidates(first, VARIED["another seed"], VARIED["prefix"]), []

    def stop():
        calls.append(None)
        if len(calls) == 4:  # before the second pass of the second update
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(together, check_stop=stop)
    assert [each.state.update for each in together] == [1, 1]
    train_together(together)
    assert_alike(together[0], alone["another seed"])
    assert_alike(together[1], alone["prefix"])
