import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.training import TuneSettings
from softprompt.training.optimisation import Rates, build_optimizer, rate_factor, set_rates


def _module(*shape):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(*shape))
    return module.weight, module


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(1, 200),
    st.floats(0, 1),
)
def test_every_update_of_every_schedule_moves_and_one_reaches_the_peak(schedule, total, warmup):
    factors = [rate_factor(schedule, update, total, warmup) for update in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


def test_linear_schedule_rises_then_falls_in_updates():
    factors = [rate_factor("linear", update, 10, 0.2) for update in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_constant_schedule_stays():
    assert {rate_factor("constant", update, 10, 0.0) for update in range(10)} == {1.0}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_both_optimizers_minimise(name):
    prompt, module = _module(3, 4)
    optimizer = build_optimizer(TuneSettings(optimizer=name), module, Rates(0.1))
    for step in range(60):
        set_rates(optimizer, 1 - step / 60)
        optimizer.zero_grad()
        prompt.square().sum().backward()
        optimizer.step()
    assert prompt.detach().abs().max() < 0.2


def test_weight_decay_is_passed_on():
    prompt, module = _module(1, 2)
    optimizer = build_optimizer(TuneSettings(weight_decay=0.5), module, Rates(0.1))
    prompt.grad = torch.zeros(1, 2)
    optimizer.step()
    assert prompt.detach().tolist() == [[pytest.approx(0.95)] * 2]


def test_task_matrices_have_a_rate_of_their_own():
    _, module = _module(2, 2)
    module.prefix_task_cols = torch.nn.Parameter(torch.ones(2, 1))
    module.fixed = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = build_optimizer(TuneSettings(), module, Rates(0.3, 0.4))
    set_rates(optimizer, 0.5)
    rates = {tuple(group["params"][0].shape): group["lr"] for group in optimizer.param_groups}
    assert rates == {(2, 2): 0.15, (2, 1): 0.2}
