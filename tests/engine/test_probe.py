"""The probe: what it draws, what it remembers, and how it leaves the base."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from oracles.families import causal, seq2seq
from oracles.slow import only
from softprompt.backbone import Base, most_by_rounding, off_by, rounded
from softprompt.engine import Engine, PlainEngine
from softprompt.engine.probe import (
    Drawn,
    difference,
    measured,
    probing,
    remembered,
    scoring_difference,
)
from softprompt.errors import BackboneError


@pytest.fixture
def base():
    return Base(causal("llama"))


def test_an_answer_is_found_once_for_all_handles(base, caplog):
    calls = []

    def find():
        calls.append(1)
        return "it is slow"

    with caplog.at_level(logging.INFO, logger="softprompt.engine.probe"):
        for each in (base, Base.of(base.model)):
            assert remembered(each, "a way", find, otherwise="another way") == "it is slow"
    assert calls == [1] and base.found["a way"] == "it is slow"
    assert [r.message for r in caplog.records] == ["another way for LlamaForCausalLM (it is slow)"]


@pytest.mark.parametrize("otherwise", ["", "another way"])
def test_what_is_exact_is_not_logged(base, caplog, otherwise):
    with caplog.at_level(logging.INFO):
        assert remembered(base, "a way", lambda: "", otherwise=otherwise) == ""
        assert remembered(base, "a way", lambda: "asked twice", otherwise=otherwise) == ""
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BackboneError("no such layer\nnor any other"), "no such layer nor any other"),
        (RuntimeError("shape '[1]' is invalid\nand more"), "RuntimeError: shape '[1]' is invalid"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_a_model_raises_is_one_line(base, error, line):
    def find():
        raise error

    assert remembered(base, "a way", find) == line


def test_the_base_is_left_as_it_was(base):
    base.model.train()
    base.model.model.layers[1].eval()
    modes = [module.training for module in base.model.modules()]

    def find():
        assert not any(module.training for module in base.model.modules())
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        raise RuntimeError("in the middle")

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        remembered(base, "a way", find)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert [module.training for module in base.model.modules()] == modes


def test_drawing_is_the_same_every_time_and_avoids_padding(base):
    one, other = Drawn(base), Drawn(base)
    ids = one.tokens(500)
    assert ids == other.tokens(500) and len(ids) == 500
    assert base.facts.pad_id not in ids and set(ids) <= set(range(base.facts.vocabulary))
    assert base.facts.pad_id in Drawn(base).tokens(500, padding=True)
    assert torch.equal(one.virtual_tokens(3), other.virtual_tokens(3))
    shape, drawn = base.key_value_shape, one.keys_and_values(3)
    assert drawn.shape == (shape.layers, 2, shape.heads, 3, shape.width)


def test_rounding_is_no_difference():
    expected = torch.linspace(-1, 1, 9)
    off = torch.tensor([1.0, -1.0] * 4 + [1.0])
    assert difference("outputs", expected - 2e-5 * off, expected, expected + 1e-5 * off) == ""
    found = difference("outputs", expected + 2e-4 * off, expected, expected + 1e-5 * off)
    assert found == "its outputs differ by 0.00031 of their spread on the probe (rounding: 4.7e-05)"
    for broken in (math.nan, math.inf):
        wrong = expected.clone()
        wrong[3] = broken
        assert difference("outputs", wrong, expected, expected + 1e-5)
        assert difference("outputs", expected, wrong, expected + 1e-5)
        assert difference("outputs", expected, expected, wrong)


def test_no_noise_lets_another_function_pass():
    expected = torch.linspace(-1, 1, 9)
    assert difference("outputs", -expected, expected, expected + 10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "opt"])
def test_rounding_is_measured_on_the_model_itself(name):
    """Noise covers what float64 says of float32's error, and half dtypes have theirs."""
    model = causal(name)
    ids = torch.arange(1, 9).unsqueeze(0)
    noise = {}
    with torch.no_grad():
        exact = causal(name).double()(input_ids=ids).logits
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            base = Base(model.to(dtype))
            expected, moved = measured(base, lambda: model(input_ids=ids).logits)
            assert not torch.equal(expected, moved) and torch.equal(expected, model(input_ids=ids).logits)
            noise[dtype] = most_by_rounding(expected, moved)
            error = off_by(expected, exact)
            if dtype == torch.float32:
                assert error < noise[dtype] < 100 * error
    assert noise[torch.float32] < noise[torch.float16] < noise[torch.bfloat16] / 2


class Steep(Engine):
    """Scores as the plain path does, with gradients half as large again."""

    name = "steep"

    def run_alike(self, rows, head=None):
        right = PlainEngine(self._base, trusted=True).run_alike(rows, head)
        return replace(right, logits=right.logits + (right.logits - right.logits.detach()) / 2)


@pytest.mark.parametrize("keys_and_values", only([False], [False, True]))
def test_wrong_gradients_are_seen(base, keys_and_values):
    plain, options = PlainEngine(base, trusted=True), {"keys_and_values": keys_and_values}
    with probing(base):
        assert scoring_difference(plain, plain, base, **options) == ""
        found = scoring_difference(Steep(base), plain, base, **options)
    assert found.startswith("its prompt gradients differ by 0.5 ")


class Chained(Engine):
    """Scores as the plain path does, with a gradient that is off where a row is alone, as in MKL for few rows."""

    name = "chained"

    def __init__(self, base, alone, together=0):
        super().__init__(base)
        self._errors = alone, together

    def run_alike(self, rows, head=None):
        right = PlainEngine(self._base, trusted=True).run_alike(rows, head)
        error = self._errors[len(rows) > 1]
        return replace(right, logits=right.logits + (right.logits - right.logits.detach()) * error)


@pytest.mark.parametrize("keys_and_values", only([True], [False, True]))
def test_a_trusted_gradient_that_is_off_in_a_row_alone_refuses_nothing_right(keys_and_values):
    base, options = Base(causal("llama", vocab_size=4096)), {"keys_and_values": keys_and_values}
    plain, chained = PlainEngine(base, trusted=True), Chained(base, alone=1e-4)
    with probing(base):
        assert scoring_difference(plain, chained, base, **options) == ""
        assert scoring_difference(Steep(base), chained, base, **options).startswith(
            "its prompt gradients differ by 0.5"
        )


@pytest.mark.parametrize(("alone", "together"), only([(0, 0.01), (0.01, 0)], [(0, 0.5), (0, 0.01), (0.01, 0)]))
def test_a_batch_is_trusted_only_where_a_sum_in_one_chain_explains_it(alone, together):
    base = Base(causal("llama", vocab_size=4096))
    engine = Chained(base, alone, together)
    with probing(base):
        assert scoring_difference(engine, engine, base).startswith("its prompt gradients differ by")


class Rounded(Engine):
    """Scores as the plain path does, off by rounding."""

    name = "rounded"

    def __init__(self, base, seed):
        super().__init__(base)
        self._seed = seed

    def run_alike(self, rows, head=None):
        with rounded(self._base.model, self._seed):
            return PlainEngine(self._base, trusted=True).run_alike(rows, head)


@pytest.mark.parametrize("seeds", only([range(100, 102)], [range(100, 102), range(102, 106)]))
def test_a_sum_that_rounding_moves_over_zero_is_no_other_function(monkeypatch, seeds):
    """A ReLU there has the one slope or the other; as in T5-small, where one unit in a million stands so."""
    base = Base(seq2seq("t5"))
    layer = base.model.encoder.block[0].layer[-1].DenseReluDense
    inputs = []
    handle = layer.wi.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    plain = PlainEngine(base, trusted=True)
    with probing(base):
        assert scoring_difference(plain, plain, base) == ""
        handle.remove()
        token = inputs[0][0, 2]
        with torch.no_grad():
            row = layer.wi.weight[0]
            row -= token * (row @ token) / (token @ token)
            layer.wo.weight[:, 0] *= 8
        found = [scoring_difference(Rounded(base, seed), plain, base) for seed in seeds]
        monkeypatch.setattr("softprompt.engine.probe._DRAWS", 1)
        once = (scoring_difference(Rounded(base, seed), plain, base) for seed in seeds)
        assert not any(found)
        assert any(once)
