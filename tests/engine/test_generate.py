"""transformers' generate behind prompts, against generate on embeddings or a cache filled by hand."""

import pytest
import torch
from transformers import DynamicCache

from oracles.caches import CACHE
from oracles.families import H, tiny
from softprompt.backbone import Base
from softprompt.engine import generate_with_prompts
from softprompt.errors import ConfigError, ContextOverflowError
from softprompt.prompts import Prompt

P = 4


def virtual_tokens(seed, count=P):
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def greedy(**inputs):
    return {**inputs, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def test_each_row_behind_its_own_prompt():
    model = tiny("llama")
    rows = [([3, 7, 9, 11], Prompt(input=virtual_tokens(0))), ([5, 8], None),
            ([13, 4, 6], Prompt(input=virtual_tokens(1, 2)))]  # fmt: skip
    width = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
    kwargs = greedy(input_ids=padded, attention_mask=mask)
    got = generate_with_prompts(Base.of(model), [prompt for _, prompt in rows], kwargs)
    for (ids, prompt), answer in zip(rows, got, strict=True):
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        if prompt is not None:
            embeds = torch.cat([prompt.input[None], embeds], 1)
        expected = model.generate(**greedy(inputs_embeds=embeds))[0]
        assert torch.equal(answer[width:], expected)
    assert "prepare_inputs_for_generation" not in vars(model)
    assert not model.get_input_embeddings()._forward_pre_hooks


@torch.no_grad()
def test_inside_the_input():
    model = tiny("llama")
    prompt, ids = Prompt(input=virtual_tokens(0)), torch.tensor([[3, 7, 9, 11]])
    got = generate_with_prompts(Base.of(model), [prompt], greedy(input_ids=ids), at=[2])
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :2], prompt.input[None], embeds[:, 2:]], 1)
    assert torch.equal(got[0, 4:], model.generate(**greedy(inputs_embeds=embeds))[0])


@torch.no_grad()
def test_keys_and_values():
    model = tiny("llama")
    shape = Base.of(model).key_value_shape
    size = (shape.layers, 2, shape.heads, P, shape.width)
    prefix = torch.randn(size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 7, 9, 11]])
    kwargs = greedy(input_ids=ids, num_beams=2, num_return_sequences=2)
    got = generate_with_prompts(Base.of(model), [Prompt(prefix=prefix)], kwargs)
    assert got.shape == (2, 10)
    cache = DynamicCache()
    for index, layer in enumerate(prefix):
        cache.update(layer[:1], layer[1:], index)
    sequence = ids
    for _ in range(6):
        logits = model(sequence[:, cache.get_seq_length() - P :], **{CACHE: cache}).logits
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)
    single = generate_with_prompts(Base.of(model), [Prompt(prefix=prefix)], greedy(input_ids=ids))
    assert torch.equal(single, sequence)


@torch.no_grad()
def test_before_an_encoder():
    model = tiny("t5")
    prompt, ids = Prompt(input=virtual_tokens(0)), torch.tensor([[3, 7, 9, 11]])
    got = generate_with_prompts(Base.of(model), [prompt], greedy(input_ids=ids))
    embeds = torch.cat([prompt.input[None], model.get_input_embeddings()(ids)], 1)
    assert torch.equal(got, model.generate(**greedy(inputs_embeds=embeds)))


@torch.no_grad()
@pytest.mark.parametrize("mask", [True, False])
def test_before_an_encoder_embeddings_and_outputs_do_what_their_ids_do(mask):
    model = tiny("bart")
    base, prompt, ids = Base.of(model), Prompt(input=virtual_tokens(0)), torch.tensor([[3, 7, 9, 11]])
    masked = {"attention_mask": torch.ones_like(ids)} if mask else {}
    expected = generate_with_prompts(base, [prompt], greedy(input_ids=ids, **masked))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate_with_prompts(base, [prompt], greedy(inputs_embeds=embeds, **masked)), expected)
    states = model.get_encoder()(
        inputs_embeds=torch.cat([prompt.input[None], embeds], 1), attention_mask=torch.ones(1, P + 4)
    )
    given = greedy(encoder_outputs=states, **masked)
    assert torch.equal(generate_with_prompts(base, [prompt], given), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_mask_of_the_decoders_own_text_goes_behind_its_prompt(name):
    """Also in the steps from a cache on; columns of ones change nothing, and padding is not seen."""
    model = tiny(name)
    base, prompt, start = Base.of(model), Prompt(decoder=virtual_tokens(0)), model.config.decoder_start_token_id
    ids = torch.tensor([[3, 7, 9, 11]])
    rows = [[start, 5, 6], [start, 9]]
    alone = [
        generate_with_prompts(base, [prompt], greedy(input_ids=ids, decoder_input_ids=torch.tensor([row])))[0]
        for row in rows
    ]
    begun = {"decoder_input_ids": torch.tensor(rows[:1]), "decoder_attention_mask": torch.ones(1, 3).long()}
    assert torch.equal(generate_with_prompts(base, [prompt], greedy(input_ids=ids, **begun))[0], alone[0])
    if name == "t5":  # whose positions are those between tokens
        padded, mask = torch.tensor([rows[0], [0, *rows[1]]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
        both = {"decoder_input_ids": padded, "decoder_attention_mask": mask}
        found = generate_with_prompts(base, [prompt] * 2, greedy(input_ids=ids.repeat(2, 1), **both))
        assert torch.equal(found[0], alone[0])
        assert torch.equal(found[1, 1:], alone[1])


@torch.no_grad()
def test_without_any_prompt_it_is_the_models_own():
    model, ids = tiny("llama"), torch.tensor([[3, 7, 9, 11]])
    expected = model.generate(**greedy(input_ids=ids))
    assert torch.equal(generate_with_prompts(Base.of(model), [None], greedy(input_ids=ids)), expected)


def test_what_is_refused():
    base, prompt = Base.of(tiny("llama")), Prompt(input=virtual_tokens(0))
    ids = torch.tensor([[3, 7]])
    with pytest.raises(ConfigError, match="does not work with soft prompts"):
        generate_with_prompts(base, [prompt], {"input_ids": ids, "assistant_early_exit": 1})
    with pytest.raises(ContextOverflowError, match="new tokens exceed"):
        generate_with_prompts(base, [prompt], {"input_ids": ids, "max_new_tokens": 10**6})
    with pytest.raises(ConfigError, match="use the tokenizer that belongs to it"):
        generate_with_prompts(base, [prompt], {"input_ids": ids + 10**6})
    with pytest.raises(ConfigError, match="needs placement prefix"):
        generate_with_prompts(base, [prompt], {"input_ids": ids, "prefill_chunk_size": 1}, at=[1])
    cache = base.model(ids, use_cache=True)[CACHE]
    with pytest.raises(ConfigError, match="prefill_chunk_size does not go with a filled cache; leave one out"):
        generate_with_prompts(base, [prompt], {"input_ids": ids, "prefill_chunk_size": 1, CACHE: cache})
