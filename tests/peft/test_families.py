"""Batched equals alone, on every architecture, both padding sides, mixed prompts."""

from __future__ import annotations

import pytest
import torch

from oracles.families import CAUSAL, causal
from oracles.naive import padded, solo_greedy, solo_logits
from oracles.slow import only
from softprompt import PromptTuningConfig, get_peft_model

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34]]
NAMES = ["a", "__base__", "b"]
NO_EMBEDS = {"mpt"}
"""Models whose forward takes no inputs_embeds have no naive oracle; they are held to their solo run."""


def attached(name):
    model = causal(name)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6), "a")
    prompted.add_adapter("b", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return model, prompted


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", only(["gpt2", "llama", "mixtral", "gemma3", "bloom", "mpt"], CAUSAL))
def test_mixed_batch_equals_solo(name, side):
    model, prompted = attached(name)
    ids, mask = padded(ROWS, side)
    with torch.no_grad():
        logits = prompted(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
        for i, row in enumerate(ROWS):
            row_ids = torch.tensor(row)
            if name in NO_EMBEDS:
                expected = prompted(input_ids=row_ids[None], adapter_names=[NAMES[i]]).logits[0]
                expected = expected[-len(row) :]
            else:
                prompt = None if NAMES[i] == "__base__" else prompted.prompt_encoder[NAMES[i]].materialize()
                expected = solo_logits(model, prompt, row_ids)
            text = logits[i, 6:][mask[i].bool()]
            torch.testing.assert_close(text, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", only(["gpt2", "llama", "mixtral", "gemma3", "bloom", "mpt"], CAUSAL))
def test_generate_equals_solo(name):
    model, prompted = attached(name)
    ids, mask = padded(ROWS, "left")
    out = prompted.generate(
        input_ids=ids,
        attention_mask=mask,
        adapter_names=NAMES,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
    )
    assert out[:, : ids.shape[1]].tolist() == ids.tolist()
    for i, row in enumerate(ROWS):
        solo = prompted.generate(
            input_ids=torch.tensor([row]),
            adapter_names=[NAMES[i]],
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )
        assert out[i, ids.shape[1] :].tolist() == solo[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "opt"])
def test_generate_equals_cacheless_greedy(name):
    model, prompted = attached(name)
    row = torch.tensor(ROWS[0])
    out = prompted.generate(input_ids=row[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected = solo_greedy(model, prompted.prompt_encoder["a"].materialize(), row, 8)
    assert out[0, len(row) :].tolist() == expected
