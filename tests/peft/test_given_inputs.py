"""What a caller may give to forward beside ids and a 2-D mask: 4-D masks, embeddings, encoder outputs, caches."""

from __future__ import annotations

import pytest
import torch

from oracles.caches import CACHE
from oracles.families import causal, seq2seq
from oracles.naive import padded, solo_logits
from softprompt import PromptTuningConfig, get_peft_model
from softprompt.backbone import input_embedding
from softprompt.errors import ConfigError

P = 3
FIRST, SECOND = [5, 6, 7, 8], [20, 21, 22]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prompted(model, task="CAUSAL_LM", **config):
    torch.manual_seed(1)
    return get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=P, **config)).eval()


def apart(kind):
    """A mask ``[1, 1, T, T]`` under which two texts in one row do not see each other."""
    sees = torch.block_diag(*(torch.ones(len(row), len(row)).tril() for row in (FIRST, SECOND))).bool()[None, None]
    return sees if kind == "bool" else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_text_behind_a_4d_mask_sees_the_prompt_and_itself(name, kind):
    ours = prompted(causal(name))
    positions = torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
    logits = ours(
        input_ids=torch.tensor([FIRST + SECOND]), attention_mask=apart(kind), position_ids=positions
    ).logits[0, P:]
    prompt = ours.prompt_encoder["default"].embedding.weight
    for own, row in ((logits[: len(FIRST)], FIRST), (logits[len(FIRST) :], SECOND)):
        alone = solo_logits(ours.base_model, prompt, torch.tensor(row))
        torch.testing.assert_close(own, alone, **CLOSE)


def test_a_4d_mask_needs_one_length_of_prompt():
    ours = prompted(causal("llama"))
    ours.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 1))
    ids = torch.tensor([FIRST, FIRST])
    mask = torch.ones(2, 1, 4, 4).tril().bool()
    with pytest.raises(ConfigError, match="4-D attention_mask needs the same prompt length in every row"):
        ours(input_ids=ids, attention_mask=mask, adapter_names=["default", "longer"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_do_what_their_ids_do(side):
    ours = prompted(causal("llama"))
    ids, mask = padded([FIRST, SECOND], side)
    by_ids = ours(input_ids=ids, attention_mask=mask).logits
    by_embeddings = ours(inputs_embeds=input_embedding(ours.base_model)(ids), attention_mask=mask).logits
    real = torch.cat([torch.ones(2, P, dtype=torch.bool), mask.bool()], dim=1)
    if side == "left":  # the prompt stands next to its text
        real = torch.cat([mask.bool(), torch.ones(2, P, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(by_embeddings[real], by_ids[real], **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_outputs_that_hold_the_prompt_are_read_behind_the_texts_own_mask(name):
    ours = prompted(seq2seq(name), "SEQ_2_SEQ_LM")
    ids, mask = padded([FIRST, SECOND], "right")
    given = {"attention_mask": mask, "decoder_input_ids": torch.tensor([[2, 11, 12], [2, 13, 14]])}
    whole = ours(input_ids=ids, **given)
    states = whole.encoder_last_hidden_state
    assert states.shape[1] == P + ids.shape[1]
    torch.testing.assert_close(ours(encoder_outputs=(states,), **given).logits, whole.logits, **CLOSE)


def test_a_cache_that_holds_the_prompt_needs_no_mask():
    ours = prompted(causal("llama"))
    ids = torch.tensor([FIRST + SECOND])
    cache = ours(input_ids=ids[:, :4], use_cache=True)[CACHE]
    rest = ours(input_ids=ids[:, 4:], **{CACHE: cache}).logits
    torch.testing.assert_close(rest, ours(input_ids=ids).logits[:, P + 4 :], **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_mask_of_the_decoders_text_goes_on_behind_a_cache_that_holds_the_prompt(name):
    ours = prompted(seq2seq(name), "SEQ_2_SEQ_LM", output_model_types=["DECODER"])
    ids, answer = torch.tensor([FIRST]), torch.tensor([[2, 11, 12, 13]])
    whole = ours(input_ids=ids, decoder_input_ids=answer).logits
    cache = ours(input_ids=ids, decoder_input_ids=answer[:, :2], use_cache=True).past_key_values
    rest = {"decoder_input_ids": answer[:, 2:], "decoder_attention_mask": torch.ones_like(answer)}
    found = ours(input_ids=ids, past_key_values=cache, **rest).logits
    torch.testing.assert_close(found, whole[:, P + 2 :], **CLOSE)


def test_position_ids_are_refused_where_the_base_takes_none():
    ours = prompted(causal("bloom"))
    with pytest.raises(ConfigError, match="BloomForCausalLM takes no position_ids; leave them out"):
        ours(input_ids=torch.tensor([FIRST]), position_ids=torch.arange(4)[None])


def test_a_prompt_behind_the_first_token_needs_to_see_the_ids():
    ours = prompted(causal("llama"), placement="after_bos")
    embeddings = input_embedding(ours.base_model)(torch.tensor([FIRST]))
    with pytest.raises(ConfigError, match="placement after_bos needs input_ids; pass them, or give prompt_at"):
        ours(inputs_embeds=embeddings, attention_mask=torch.ones(1, 4, dtype=torch.long))
