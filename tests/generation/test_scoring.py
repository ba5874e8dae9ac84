from __future__ import annotations

import pytest
import torch

from oracles.slow import only
from softprompt.backbone import Base
from softprompt.engine import EngineRow
from softprompt.engine import build_engine as engine_of
from softprompt.errors import ConfigError
from softprompt.generation import label_rows, per_token, rows_of_whole_inputs, score_rows
from softprompt.generation.labels import check_label_ids
from softprompt.prompts import Prompt

SOURCES = [(0, 40), (0, 41, 42, 43, 44, 45), (0, 50, 51), (0, 60)]
LABELS = [(70, 1), (71, 72, 73, 1), (70, 75, 1)]


def prompt_rows(width=32):
    return torch.randn(3, width, generator=torch.Generator().manual_seed(2))


def build_engine(model):
    return engine_of(Base(model))


def score_labels(engine, prompt, sources, labels, *, batch_size=64, normalize=False):
    rows = [row for source in sources for row in label_rows(source, labels, prompt)]
    size = rows_of_whole_inputs(batch_size, len(labels))
    scores = score_rows(engine, rows, max_rows=size).view(len(sources), len(labels))
    return per_token(scores, [len(ids) for ids in labels]) if normalize else scores


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
@pytest.mark.parametrize("batch_size", only([2, 100], [1, 2, 5, 100]))
def test_batched_scores_equal_one_at_a_time(request, answer_log_prob, name, batch_size):
    model = request.getfixturevalue(name)
    prompt = prompt_rows()
    expected = torch.tensor([[answer_log_prob(model, prompt, s, k) for k in LABELS] for s in SOURCES])
    scores = score_labels(build_engine(model), Prompt(prompt), SOURCES, LABELS, batch_size=batch_size)
    assert torch.allclose(scores, expected, atol=2e-5)


def test_without_a_prompt_the_base_is_scored(llama, answer_log_prob):
    expected = answer_log_prob(llama, torch.empty(0, 32), SOURCES[1], LABELS[1])
    scores = score_labels(build_engine(llama), None, SOURCES, LABELS)
    assert float(scores[1, 1]) == pytest.approx(expected, abs=2e-5)


def test_each_row_meets_its_own_prompt(llama):
    prompts = [Prompt(prompt_rows()), Prompt(2 * prompt_rows())]
    engine = build_engine(llama)
    rows = [row for prompt in prompts for each in SOURCES for row in label_rows(each, LABELS, prompt)]
    first, second = score_rows(engine, rows, max_rows=64).view(2, len(SOURCES), len(LABELS))
    assert torch.allclose(second, score_labels(engine, prompts[1], SOURCES, LABELS), atol=2e-5)
    assert torch.allclose(first, score_labels(engine, prompts[0], SOURCES, LABELS), atol=2e-5)
    assert not torch.allclose(second, first, atol=1e-2)


def test_normalised_scores_are_per_token(llama):
    engine = build_engine(llama)
    raw = score_labels(engine, Prompt(prompt_rows()), SOURCES, LABELS)
    each = score_labels(engine, Prompt(prompt_rows()), SOURCES, LABELS, normalize=True)
    assert torch.allclose(each, raw / torch.tensor([2.0, 4.0, 3.0]))


def test_a_long_prompt_is_run_once_for_all_passes(llama, answer_log_prob, monkeypatch):
    prompt = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    engine, lengths = build_engine(llama), []
    score_labels(engine, Prompt(prompt), SOURCES, LABELS, batch_size=1)  # probes are over now
    hook = llama.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    scores = score_labels(engine, Prompt(prompt), SOURCES, LABELS, batch_size=1)
    hook.remove()
    assert len(lengths) == 1 + len(SOURCES)
    assert sum(lengths) < 2 * 64
    expected = torch.tensor([[answer_log_prob(llama, prompt, s, k) for k in LABELS] for s in SOURCES])
    assert torch.allclose(scores, expected, atol=2e-5)


class CountingEngine:
    name = "counting"

    def __init__(self, engine):
        self.engine = engine
        self.sizes = []

    def target_log_probs(self, rows):
        assert all(isinstance(row, EngineRow) for row in rows)
        self.sizes.append(len(rows))
        return self.engine.target_log_probs(rows)


def test_a_pass_holds_whole_inputs_and_keeps_no_graph(llama):
    engine = CountingEngine(build_engine(llama))
    prompt = Prompt(prompt_rows().requires_grad_())
    scores = score_labels(engine, prompt, SOURCES, LABELS, batch_size=7)
    assert engine.sizes == [6, 6]
    engine.sizes.clear()
    score_labels(engine, prompt, SOURCES, LABELS, batch_size=1)
    assert engine.sizes == [3, 3, 3, 3]
    assert not scores.requires_grad


def test_no_sources_give_no_scores(llama):
    assert score_labels(build_engine(llama), None, [], LABELS).shape == (0, 3)


def test_a_batch_of_no_rows_is_refused(llama):
    with pytest.raises(ConfigError, match="at least 1 row"):
        score_labels(build_engine(llama), None, SOURCES, LABELS, batch_size=0)


@pytest.mark.parametrize(
    ("labels", "ids", "words"),
    [
        ([], [], "at least one label"),
        (["a"], [()], "'a' has no tokens"),
        (["a", "b"], [(4, 1), (4, 1)], "'a' and 'b' have the same tokens"),
        (["a", "a"], [(4, 1), (4, 1)], "'a' and 'a' have the same tokens"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, ids, words):
    with pytest.raises(ConfigError, match=words):
        check_label_ids(labels, ids)
