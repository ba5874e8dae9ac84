"""What training notes of each virtual token."""

from __future__ import annotations

import pytest
import torch

from softprompt.artifacts import load_adapter
from softprompt.backbone import load_base
from softprompt.errors import ConfigError
from softprompt.inspection import drift_of, parts_of


@pytest.fixture
def stored(learnt):
    return load_adapter(learnt)


@pytest.fixture(scope="module")
def base():
    return load_base("demo")


def test_the_history_notes_how_far_each_virtual_token_is(stored, base):
    noted = drift_of(stored.manifest.history, stored.manifest.metrics)
    values = parts_of(stored)["input"]
    ids = base.tokenizer("Is this a complaint?", add_special_tokens=False).input_ids
    start = base.embedding.weight[(ids * 4)[:4]].detach().float()  # TEXT: the embeddings of the text
    assert (noted.epochs, noted.every) == ((1, 2), 1)
    kept = noted.epochs.index(noted.kept)
    assert noted.drift[kept] == pytest.approx((values - start).square().mean(1).sqrt().tolist(), rel=1e-3)
    assert noted.rms[kept] == pytest.approx(values.square().mean(1).sqrt().tolist(), rel=1e-3)
    assert min(noted.drift[0]) > 0


def test_only_the_evenly_spaced_tokens_of_a_long_prompt_are_noted(monkeypatch):
    from softprompt.prompts import PromptTuningConfig, Start
    from softprompt.training import stage

    monkeypatch.setattr(stage, "MOST_TOKENS", 2)
    table = torch.nn.Embedding(8, 4)
    module = PromptTuningConfig(num_virtual_tokens=5, token_dim=4, num_transformer_submodules=1).build(
        table, Start()
    )
    noted = stage.Movement(module)
    with torch.no_grad():
        next(iter(module.parameters()))[3] += 0.5
    point = noted.point()["virtual_tokens"]
    assert point["every"] == 3
    assert point["drift"] == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize(
    "damaged",
    [
        {"epoch": 1, "virtual_tokens": {"every": 1, "drift": [0.1]}},
        {"epoch": 1, "virtual_tokens": {"every": 1, "drift": ["x"], "rms": [0.1]}},
        {"epoch": 1, "virtual_tokens": {"every": 0, "drift": [0.1], "rms": [0.1]}},
        {"epoch": 1, "virtual_tokens": {"every": 1, "drift": [0.1, 0.2], "rms": [0.1]}},
        {"epoch": 1, "virtual_tokens": 7},
    ],
)
def test_damaged_notes_are_refused_in_words(damaged):
    with pytest.raises(ConfigError, match="damaged"):
        drift_of([damaged], {})


def test_prompts_of_before_have_no_notes():
    with pytest.raises(ConfigError, match="no notes"):
        drift_of([{"epoch": 1, "loss": 0.5}], {})
