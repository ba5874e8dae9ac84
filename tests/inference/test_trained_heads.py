"""A prompt with a trained language-model head answers, scores and is saved with it; the base stays as it is."""

from __future__ import annotations

import pytest
import torch

from oracles.solo import solo
from oracles.tuned import untrained
from softprompt import PromptTuningConfig
from softprompt.artifacts import Manifest
from softprompt.backbone import load_base, replaced_modules
from softprompt.errors import ConfigError
from softprompt.evaluation import evaluate
from softprompt.generation import GenerationOptions, Request
from softprompt.inference import Serving, TunedPrompt, load

TEXTS = ["the cat", "a much longer text, with the words at the end"]
LABELS = ["good", "bad thing"]


@pytest.fixture
def tuned(folders):
    base = load_base(folders / "llama")
    manifest = Manifest(
        template="{{input}}",
        task="generation",
        labels=None,
        base_model=str(folders / "llama"),
        base_fingerprint=base.fingerprint.to_dict(),
        max_source_length=60,
        max_target_length=12,
        dtype="float32",
        seq2seq=False,
    )
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["lm_head"])
    plain = untrained(base, config, manifest, seed=5)
    width = base.model.config.hidden_size
    head = torch.nn.Linear(width, base.model.config.vocab_size, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(6)))
    return TunedPrompt(base, plain.module, plain.config, manifest, heads={"lm_head": head})


def expected(tuned, text):
    source, _ = tuned.rows.source({"input": text})
    options = GenerationOptions(max_new_tokens=8)
    request = Request(source, tuned.prompt(), options=options, decode=tuned.rows.decode)
    with replaced_modules(tuned.base, tuned.heads):
        return solo(tuned.base, request)


def test_answers_and_scores_are_those_of_the_head(tuned):
    ids = torch.tensor([[5, 6, 7]])
    before = tuned.base.model(ids).logits
    answers = tuned.generate(TEXTS, max_new_tokens=8)
    assert answers == [expected(tuned, text) for text in TEXTS]
    bare = TunedPrompt(tuned.base, tuned.module, tuned.config, tuned.whole)
    assert answers != bare.generate(TEXTS, max_new_tokens=8)
    assert answers == tuned.generate(TEXTS, max_new_tokens=8)
    scores = tuned.classify(TEXTS, LABELS)
    assert [each.scores for each in scores] != [each.scores for each in bare.classify(TEXTS, LABELS)]
    rows = [{"input": text, "output": "good"} for text in TEXTS]
    assert evaluate(tuned, rows).perplexity != evaluate(bare, rows).perplexity
    assert torch.equal(tuned.base.model(ids).logits, before)


def test_it_is_saved_and_loaded_with_its_head_and_not_served(tuned, tmp_path):
    tuned.save(tmp_path / "prompt")
    again = load(tmp_path / "prompt")
    assert torch.equal(again.heads["lm_head"].weight, tuned.heads["lm_head"].weight)
    assert again.generate(TEXTS, max_new_tokens=8) == tuned.generate(TEXTS, max_new_tokens=8)
    for refused in (lambda: Serving({"it": again}), lambda: again.stream("x")):
        with pytest.raises(ConfigError, match=r"trained modules \(base_model.lm_head.weight\)"):
            refused()


def test_a_snapshot_does_not_follow_what_is_trained_on(tuned):
    before = tuned.prompt().input
    kept = tuned.snapshot()
    with torch.no_grad():
        tuned.module.embedding.weight.add_(1)
    assert torch.equal(kept.prompt().input, before)
    assert torch.equal(tuned.prompt().input, before + 1)
    assert kept.prompt() is kept.of_task(0).prompt()
