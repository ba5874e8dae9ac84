"""A prompt in front of what is scored is computed once: keys and values are kept, and no score changes."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from oracles.served import served
from oracles.slow import only
from softprompt.engine import EngineRow, ResidentPrompts
from softprompt.errors import ContextOverflowError
from softprompt.generation import Batcher, Bounds, GenerationOptions, Request, Scorer
from softprompt.inference import Serving
from softprompt.prompts import Prompt

LABELS = ["yes", "no", "yet"]
TEXTS = ["It leaks.", "", "Thank you for the very kind help of yesterday.", "It works."]
FAMILIES = ("gpt2", "llama", "mistral", "gemma2")


def strong(name, **more):
    """A base whose weights are large enough for a prompt to matter."""
    base = served(name, **more)
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return base


@contextmanager
def virtual_tokens_run(model):
    """Count the prompt rows that passes of the model run."""
    seen, vocabulary = [], model.get_input_embeddings().weight.shape[0]

    def count(module, args):
        seen.append(int((args[0] >= vocabulary).sum()))

    handle = model.get_input_embeddings().register_forward_pre_hook(count, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def scoring(base, residents):
    scorer = Scorer(base.base, Bounds(), residents)
    scorer.start()
    try:
        yield scorer
    finally:
        scorer.stop()


def submit(scorer, prompt, rows):
    return scorer.submit([replace(row, prompt=prompt) for row in rows])


@pytest.mark.parametrize("family", only(["llama", "gemma2"], FAMILIES))
def test_cold_and_warm_scores_are_those_of_each_prompt_alone(family):
    base = strong(family, kinds=("plain", "other", "suffix", "after_bos"))
    pairs = list(itertools.product(TEXTS, base.prompts))
    texts, names = [text for text, _ in pairs], [name for _, name in pairs]
    with Serving(base.prompts) as serving:
        for _ in range(2):
            found = serving.classify(texts, names, LABELS)
            for text, name, scores in zip(texts, names, found, strict=True):
                (alone,) = base.prompts[name].classify([text], LABELS)
                assert scores.scores == pytest.approx(alone.scores, abs=1e-5)
                assert scores.label == alone.label
        # In front stand two of the four; "after_bos" has a token before it, "suffix" all of them.
        stats = serving.batcher.stats
        assert (stats.resident_prompts, stats.prompt_misses, stats.prompt_hits) == (2, 2, 2)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_kept_prompts_share_a_pass_with_rows_and_prefix_tuning(family):
    base = strong(family)
    asked = [(name, EngineRow((5, 6, 7), (8, 9))) for name in base.values]
    asked += [("plain", EngineRow((), (8,))), ("other", EngineRow((4,) * 20, (3,)))]
    asked += [("suffix", EngineRow((5, 6), (7,), at=2))]
    waits = Scorer(base.base, Bounds(), ResidentPrompts(8, 100))
    for _ in range(2):
        futures = [submit(waits, base.values[name], [row]) for name, row in asked]
        if not waits.healthy:
            waits.start()
        for (name, row), future in zip(asked, futures, strict=True):
            request = Request(row.source, base.values[name], row.at)
            expected = sum(base.log_probs(request, row.target))
            assert float(future.result(30)) == pytest.approx(expected, abs=1e-5)
    waits.stop()


def test_a_warm_pass_runs_no_prompt_rows():
    base = strong("llama", kinds=("plain", "other"))
    rows = [EngineRow((5, 6, 7), label) for label in ((8,), (9, 4))]
    with scoring(base, ResidentPrompts(8, 100)) as scorer:
        submit(scorer, base.values["other"], rows).result(30)  # what is probed once per model
        with virtual_tokens_run(base.model) as run:
            cold = submit(scorer, base.values["plain"], rows).result(30)
        assert sum(run) == 5
        with virtual_tokens_run(base.model) as run:
            warm = submit(scorer, base.values["plain"], rows).result(30)
        assert run == [0]
        assert torch.allclose(cold, warm, atol=1e-6)
        with virtual_tokens_run(base.model) as run:  # its last place predicts what follows
            submit(scorer, base.values["plain"], [EngineRow((), (8,))]).result(30)
        assert run == [5]


def test_a_changed_prompt_is_new_and_the_least_used_one_goes():
    base = strong("llama", kinds=("plain",))
    residents = ResidentPrompts(2, 7)
    generator = torch.Generator().manual_seed(5)
    prompts = [Prompt(torch.randn(3, 32, generator=generator)) for _ in range(4)]
    large = Prompt(torch.randn(8, 32, generator=generator))
    row = EngineRow((5, 6, 7), (8,))
    with scoring(base, residents) as scorer:
        for prompt in [*prompts, large, *prompts]:
            alone = sum(base.log_probs(Request(row.source, prompt), row.target))
            assert float(submit(scorer, prompt, [row]).result(30)) == pytest.approx(alone, abs=1e-5)
            assert len(residents) <= 2 and residents.tokens <= 7
        assert (residents.misses, residents.hits) == (8, 0)
        submit(scorer, prompts[-1], [row]).result(30)
        assert residents.hits == 1
        changed = Prompt(prompts[-1].input + 0.1)
        submit(scorer, changed, [row]).result(30)
    assert residents.misses == 9


def test_generation_and_scores_share_what_is_kept():
    base = strong("llama", kinds=("plain",))
    with Serving(base.prompts, Bounds(max_prompts_resident=4)) as serving:
        serving.generate(["It leaks."], "plain", options=GenerationOptions(max_new_tokens=2))
        serving.classify(["It leaks."], "plain", LABELS)
        stats = serving.batcher.stats
    assert (stats.resident_prompts, stats.prompt_misses, stats.prompt_hits) == (1, 1, 1)


@pytest.mark.parametrize("family", only(["bloom"], ["bloom", "t5"]))
def test_models_without_a_decode_forest_keep_their_rows(family):
    base = served(family, kinds=("plain",))
    batcher = Batcher(base.base)
    residents = ResidentPrompts(8, 100)
    rows = [EngineRow((5, 6, 7), (8,))]
    with scoring(base, residents) as scorer:
        one, two = (submit(scorer, base.values["plain"], rows).result(30) for _ in range(2))
    batcher.stop()
    assert torch.equal(one, two) and not len(residents) and not residents.misses
    assert not len(batcher.residents)


def test_a_prompt_beyond_the_context_is_refused_before_it_is_computed():
    base = served("gpt2", kinds=("plain",))
    long = Prompt(torch.randn(70, 32))
    with scoring(base, ResidentPrompts(8, 100)) as scorer:
        with pytest.raises(ContextOverflowError, match="70 virtual tokens"):
            submit(scorer, long, [EngineRow((5, 6), (7,))]).result(30)
        assert scorer.healthy
