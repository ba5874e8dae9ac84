"""The probe: what it draws, what it remembers, and how it leaves the base."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from oracles.families import causal
from softprompt.backbone import Base
from softprompt.engine import Engine, PlainEngine
from softprompt.engine.probe import (
    TOLERANCE,
    Drawn,
    difference,
    probing,
    remembered,
    scoring_difference,
    tolerance_of,
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
        (BackboneError("no such layer\nnor any other"), "no such layer"),
        (RuntimeError("shape '[1]' is invalid\nand more"), "RuntimeError: shape '[1]' is invalid"),
        (KeyError(), "KeyError: "),
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
    assert difference("outputs", 1e-5, 1e-4) == ""
    assert difference("outputs", 2e-4, 1e-4) == "its outputs differ by 0.0002 on the probe"
    assert "nan" in difference("outputs", math.nan, 1e-4)


def test_every_dtype_has_its_tolerance(base):
    assert tolerance_of(base) is TOLERANCE[torch.float32]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert tolerance_of(Base(causal("llama").to(dtype))) is TOLERANCE[dtype]
    assert TOLERANCE[torch.float32].outputs < TOLERANCE[torch.float16].outputs < TOLERANCE[torch.bfloat16].outputs


class Steep(Engine):
    """Scores as the plain path does, with gradients half as large again."""

    name = "steep"

    def run_alike(self, rows, head=None):
        right = PlainEngine(self._base, trusted=True).run_alike(rows, head)
        return replace(right, logits=right.logits + (right.logits - right.logits.detach()) / 2)


@pytest.mark.parametrize("keys_and_values", [False, True])
def test_wrong_gradients_are_seen(base, keys_and_values):
    plain, options = PlainEngine(base, trusted=True), {"keys_and_values": keys_and_values}
    with probing(base):
        assert scoring_difference(plain, plain, base, **options) == ""
        found = scoring_difference(Steep(base), plain, base, **options)
    assert found.startswith("its prompt gradients differ by 0.5")
