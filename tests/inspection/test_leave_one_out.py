"""Leaving out each virtual token, against passes with the rest joined by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from oracles.families import tiny
from oracles.tokenizers import byte_bpe
from oracles.tuned import untrained
from softprompt.artifacts import Manifest
from softprompt.backbone import Base
from softprompt.engine import EngineRow
from softprompt.inspection import leave_one_out
from softprompt.inspection.ablation import without
from softprompt.prompts import Prompt, PromptTuningConfig

ROWS = [((5, 9, 7, 11), (8, 2)), ((6, 4, 12), (9, 13, 2)), ((3, 4), (7,))]


@pytest.fixture(scope="module")
def tuned():
    tokenizer = byte_bpe()
    model = tiny("llama", seed=3, vocab_size=len(tokenizer))
    manifest = Manifest(
        template="{{input}}",
        task="generation",
        labels=None,
        base_model="tiny",
        base_fingerprint={},
        max_source_length=40,
        max_target_length=8,
        dtype="float32",
        seq2seq=False,
    )
    return untrained(Base(model, tokenizer), PromptTuningConfig(num_virtual_tokens=5), manifest, seed=2)


def losses(model, virtual):
    """Return the summed loss of each row behind virtual tokens ``[P, H]``, without any code of ours."""
    found = []
    for source, target in ROWS:
        embeds = torch.cat([virtual, model.get_input_embeddings()(torch.tensor(source + target))])[None]
        with torch.no_grad():
            logits = model(inputs_embeds=embeds).logits[0, -len(target) - 1 : -1]
        found.append(float(cross_entropy(logits, torch.tensor(target), reduction="sum")))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_each_loss_is_that_of_the_other_virtual_tokens(tuned, batch_size):
    prompt, model = tuned.prompt(), tuned.base.model
    rows = [EngineRow(source, target, prompt) for source, target in ROWS]
    found = leave_one_out(tuned, rows, batch_size)
    lengths = torch.tensor([len(target) for _, target in ROWS], dtype=torch.float64)
    whole = losses(model, prompt.input)
    assert (found.rows, found.target_tokens, found.every) == (3, 6, 1)
    assert found.loss == pytest.approx(float(whole.sum()) / 6, abs=1e-5)
    assert found.without_prompt == pytest.approx(float(losses(model, prompt.input[:0]).sum()) / 6, abs=1e-5)
    for number, (change, error) in enumerate(zip(found.change, found.standard_error, strict=True)):
        kept = [i for i in range(5) if i != number]
        more = losses(model, prompt.input[kept]) - whole
        mean = more.sum() / 6
        assert change == pytest.approx(float(mean), abs=1e-5)
        spread = ((more - mean * lengths) ** 2).sum() * 3 / 2
        assert error == pytest.approx(float(spread.sqrt()) / 6, abs=1e-5)


def test_what_is_left_of_each_kind_of_prompt():
    values = torch.arange(12.0).view(4, 3)
    both = without(Prompt(input=values, decoder=values + 1), 1)
    assert both.input.equal(values[[0, 2, 3]])
    assert both.decoder.equal(values[[0, 2, 3]] + 1)
    prefix = torch.randn(2, 2, 1, 4, 3)
    assert without(Prompt(prefix=prefix), 3).prefix.equal(prefix[:, :, :, :3])
    assert without(Prompt(input=values[:1]), 0) is None


def test_of_a_long_prompt_evenly_spaced_tokens_are_left_out(tuned, monkeypatch):
    monkeypatch.setattr("softprompt.inspection.ablation.MOST_TOKENS", 2)
    prompt = tuned.prompt()
    rows = [EngineRow(source, target, prompt) for source, target in ROWS]
    found = leave_one_out(tuned, rows, 64)
    assert found.every == 3
    whole = losses(tuned.base.model, prompt.input)
    last = losses(tuned.base.model, prompt.input[[0, 1, 2, 4]])
    assert found.change[1] == pytest.approx(float((last - whole).sum()) / 6, abs=1e-5)
