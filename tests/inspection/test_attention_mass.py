"""Attention mass against plain transformers: embeddings joined by hand, eager attention, ``output_attentions``."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from oracles.caches import CACHE
from oracles.families import seq2seq, tiny
from softprompt.backbone import Base
from softprompt.engine import EngineRow
from softprompt.errors import BackboneError
from softprompt.inspection import attention_mass
from softprompt.prompts import Prompt

P, BEHIND = 3, -1
ROWS = [((5, 9, 7, 11), (8, 2)), ((6, 4, 12, 3, 10), (9, 13, 2))]


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(prompt, at=0):
    return [EngineRow(source, target, prompt, len(source) if at == BEHIND else at) for source, target in ROWS]


def stacked(layers):
    return torch.stack([layer[0] for layer in layers])  # [L, A, Q, K]


def check(mass, masses, answers):
    """Compare with the oracle's weights on virtual tokens, a list of ``[L, A, Q, P]``, one for each row."""
    by_head = torch.cat(masses, dim=2).mean(2)  # [L, A, P]
    assert mass.rows == len(ROWS)
    assert mass.text_tokens == sum(each.shape[2] for each in masses)
    for layer, own in zip(mass.layers, by_head, strict=True):
        heads = own.sum(1)
        assert layer.share == pytest.approx(float(heads.mean()), abs=1e-5)
        assert (layer.head_min, layer.head_max) == pytest.approx((float(heads.min()), float(heads.max())), abs=1e-5)
        assert layer.by_token == pytest.approx(own.mean(0).tolist(), abs=1e-5)
    if answers is None:
        assert all(layer.answering is None for layer in mass.layers)
    else:
        expected = torch.cat(answers, dim=2).mean(2).sum(2).mean(1)
        assert [layer.answering for layer in mass.layers] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("place", [0, 2, BEHIND])
def test_a_causal_prompt(place):
    model = tiny("llama", seed=3)
    virtual = drawn(P, model.config.hidden_size)
    mass = attention_mass(Base(model), rows_of(Prompt(input=virtual), place))
    assert list(mass) == ["self"]
    model.set_attn_implementation("eager")
    masses, answers, uniform = [], [], []
    for source, target in ROWS:
        at = len(source) if place == BEHIND else place
        text = model.get_input_embeddings()(torch.tensor(source + target))
        embeds = torch.cat([text[:at], virtual, text[at:]])[None]
        with torch.no_grad():
            weights = stacked(model(inputs_embeds=embeds, output_attentions=True).attentions)
        seeing = weights[:, :, at + P : -1, at : at + P]
        masses.append(seeing)
        answers.append(seeing[:, :, -len(target) :])  # behind the text a virtual token predicts the first one
        uniform += [P / (n + 1) for n in range(at + P, embeds.shape[1] - 1)]
    check(mass["self"], masses, answers)
    assert mass["self"].uniform == pytest.approx(sum(uniform) / len(uniform))


def test_keys_and_values_of_a_causal_model():
    model = tiny("llama", seed=3)
    shape = Base(model).key_value_shape
    prefix = drawn(len(model.model.layers), 2, shape.heads, P, shape.width)
    mass = attention_mass(Base(model), rows_of(Prompt(prefix=prefix)))
    model.set_attn_implementation("eager")
    masses, answers = [], []
    for source, target in ROWS:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix):
            cache.update(keys[None], values[None], index)
        with torch.no_grad():
            output = model(torch.tensor([source + target]), **{CACHE: cache}, output_attentions=True)
        weights = stacked(output.attentions)[:, :, :-1, :P]
        masses.append(weights)
        answers.append(weights[:, :, -len(target) :])
    check(mass["self"], masses, answers)


def test_prompts_in_encoder_and_decoder():
    model = seq2seq("bart").eval()
    width = model.config.d_model
    first, second = drawn(P, width), drawn(P, width, seed=2)
    mass = attention_mass(Base(model), rows_of(Prompt(input=first, decoder=second)))
    assert set(mass) == {"encoder", "cross", "self"}
    model.set_attn_implementation("eager")
    encoder, cross, own = [], [], []
    table = model.get_input_embeddings()
    for source, target in ROWS:
        embeds = torch.cat([first, table(torch.tensor(source))])[None]
        shifted = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([target]))
        behind = torch.cat([second, table(shifted[0])])[None]
        with torch.no_grad():
            output = model(inputs_embeds=embeds, decoder_inputs_embeds=behind, output_attentions=True)
        encoder.append(stacked(output.encoder_attentions)[:, :, P:, :P])
        cross.append(stacked(output.cross_attentions)[:, :, :, :P])
        own.append(stacked(output.decoder_attentions)[:, :, P:, :P])
    check(mass["encoder"], encoder, None)
    check(mass["cross"], cross, [each[:, :, -len(t) :] for each, (_, t) in zip(cross, ROWS, strict=True)])
    check(mass["self"], own, own)


def test_the_base_is_left_as_it_was():
    model = tiny("llama", seed=3)
    before = model.config._attn_implementation
    attention_mass(Base(model), rows_of(Prompt(input=drawn(P, model.config.hidden_size))))
    assert model.config._attn_implementation == before
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_model_that_does_not_tell_is_refused_in_words():
    model = tiny("falcon", seed=3)
    with pytest.raises(BackboneError, match="attention interface"):
        attention_mass(Base(model), rows_of(Prompt(input=drawn(P, model.config.hidden_size))))
