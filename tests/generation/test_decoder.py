from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from oracles.slow import only
from oracles.solo import solo
from softprompt.backbone import Base
from softprompt.errors import ConfigError
from softprompt.generation import Decoder, Generation, GenerationOptions, Request
from softprompt.generation.answer import AnswerRules
from softprompt.generation.fallback_runner import PaddedGenerate
from softprompt.generation.options import Bounds

SOURCES = [(1, 40), (1, 41, 42, 43, 44, 45), (1, 50, 51), (1, *range(60, 72))]


@dataclass(frozen=True)
class Answering:
    """Rows of ids answered by a base without a prompt."""

    base: Base

    def decode(self, ids):
        return self.base.tokenizer.decode(ids, skip_special_tokens=True)

    def answers(self, sources, options, *, batch_size=16, cut=None):
        requests = [Request(source, options=options, decode=self.decode) for source in sources]
        ends = Decoder.of_batches(self.base, batch_size).run(requests)
        flags = cut or [False] * len(ends)
        return [Generation.of(end, cut=lost) for (end,), lost in zip(ends, flags, strict=True)]


@pytest.fixture(params=only(["llama", "t5"], ["llama", "bart", "t5"]))
def generator(request, tokenizer):
    return Answering(Base(request.getfixturevalue(request.param), tokenizer))


@pytest.fixture
def decoder_only(llama, tokenizer):
    return Answering(Base(llama, tokenizer))


def alone(generator, options, sources=SOURCES):
    """Each row's answer by transformers' own loop, which sampled answers tell their seed for."""
    return [solo(generator.base, Request(source, options=options, decode=generator.decode)) for source in sources]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        pytest.param({"repetition_penalty": 1.5}, marks=pytest.mark.slow),
        pytest.param({"min_new_tokens": 6}, marks=pytest.mark.slow),
        pytest.param({"exponential_decay_length_penalty": (1, 2.5)}, marks=pytest.mark.slow),
        {"exponential_decay_length_penalty": (0, 3.0), "num_beams": 3, "min_new_tokens": 3},
        pytest.param({"decoding_method": "SAMPLING", "seed": 3, "top_k": 20}, marks=pytest.mark.slow),
        {"decoding_method": "SAMPLING", "seed": 4, "top_p": 0.8, "temperature": 0.7},
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
def test_a_batch_gives_every_row_its_solo_answer(generator, settings):
    options = GenerationOptions(max_new_tokens=8, **settings)
    assert generator.answers(SOURCES, options, batch_size=3) == alone(generator, options)


def test_greedy_takes_the_likeliest_token_each_time(llama, decoder_only):
    with torch.no_grad():
        ids = torch.tensor([SOURCES[1]])
        for _ in range(6):
            best = llama(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    answer = decoder_only.answers([SOURCES[1]], GenerationOptions(max_new_tokens=6))[0]
    assert answer.text == decoder_only.decode(ids[0, len(SOURCES[1]) :].tolist())
    assert (answer.generated_tokens, answer.finish_reason) == (6, "max_tokens")
    assert answer.input_token_count == len(SOURCES[1])


def test_an_answer_ends_at_its_end_token_while_the_batch_runs_on(generator, monkeypatch):
    long = GenerationOptions(max_new_tokens=8)
    full = generator.base.model.generate(
        input_ids=torch.tensor([SOURCES[0]]), max_new_tokens=3, do_sample=False, num_beams=1
    )[0, -1]
    monkeypatch.setattr(generator.base.model.generation_config, "eos_token_id", [int(full)])
    answers = generator.answers(SOURCES, long)
    assert answers == alone(generator, long)
    assert answers[0].finish_reason == "eos_token"
    assert answers[0].generated_tokens <= 3


def test_a_stop_sequence_is_cut_from_the_answer_and_counted(decoder_only):
    plain = decoder_only.answers(SOURCES, GenerationOptions(max_new_tokens=8))
    stop = plain[1].text[3:5]
    options = GenerationOptions(max_new_tokens=8, stop_sequences=[stop])
    answers = decoder_only.answers(SOURCES, options)
    assert answers == alone(decoder_only, options)
    assert answers[1].finish_reason == "stop_sequence"
    assert answers[1].text == plain[1].text[: plain[1].text.index(stop)]
    assert answers[1].generated_tokens < 8
    for before, after in zip(plain, answers, strict=True):
        assert (stop in before.text) == (after.finish_reason == "stop_sequence")


def test_beams_stop_at_stop_sequences_too(decoder_only):
    plain = decoder_only.answers(SOURCES, GenerationOptions(max_new_tokens=8, num_beams=2))
    stop = plain[0].text[2:3]
    options = GenerationOptions(max_new_tokens=8, num_beams=2, stop_sequences=[stop])
    answers = decoder_only.answers(SOURCES, options)
    assert answers == alone(decoder_only, options)
    assert all(stop not in answer.text for answer in answers)


def test_the_time_limit_is_reported(decoder_only):
    options = GenerationOptions(max_new_tokens=60, max_time=1e-6)
    answer = decoder_only.answers([SOURCES[0]], options)[0]
    assert (answer.finish_reason, answer.generated_tokens) == ("time_limit", 1)


def test_sampling_repeats_by_seed_and_leaves_the_global_random_state_alone(generator):
    options = GenerationOptions(max_new_tokens=8, decoding_method="SAMPLING")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generator.answers([SOURCES[2]] * 4, options)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({answer.text for answer in first}) > 1
    for answer in first:
        again = generator.answers([SOURCES[2]], replace(options, seed=answer.seed))
        assert again == [answer]


def test_greedy_answers_carry_no_seed(decoder_only):
    assert decoder_only.answers([SOURCES[0]], GenerationOptions())[0].seed is None


def test_the_bases_own_search_settings_do_not_leak_in(bart, tokenizer, monkeypatch):
    generator = Answering(Base(bart, tokenizer))
    options = GenerationOptions(max_new_tokens=8)
    plain = generator.answers(SOURCES, options)
    for name, value in {"num_beams": 4, "no_repeat_ngram_size": 1, "min_length": 7}.items():
        monkeypatch.setattr(bart.generation_config, name, value)
    assert generator.answers(SOURCES, options) == plain


def test_end_tokens_come_from_the_tokenizer_and_the_base(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [5, 7])
    assert AnswerRules.of(Base(llama, tokenizer)).eos_ids == {2, 5, 7}


def test_a_pad_token_the_model_has_no_embedding_for_is_not_used(llama, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<new pad>"})
    generator = Answering(Base(llama, larger))
    padded = PaddedGenerate(generator.base, Bounds(), frozenset())
    assert padded.pad_id == larger.eos_token_id
    options = GenerationOptions(max_new_tokens=8, num_beams=2)
    assert generator.answers(SOURCES, options) == alone(generator, options)


def test_preserve_input_text_puts_the_input_in_front(decoder_only, tokenizer):
    source = (0, *tokenizer("the cat", add_special_tokens=False)["input_ids"])
    plain = decoder_only.answers([source], GenerationOptions(max_new_tokens=4))[0]
    kept = decoder_only.answers([source], GenerationOptions(max_new_tokens=4, preserve_input_text=True))[0]
    assert kept.text.startswith("the cat")
    assert kept == replace(plain, text=kept.text)
    stop = plain.text[1]
    cut = decoder_only.answers(
        [source],
        GenerationOptions(max_new_tokens=4, preserve_input_text=True, stop_sequences=[stop]),
    )[0]
    assert cut.text == "the cat" + plain.text[: plain.text.index(stop)]


def test_an_encoder_decoder_has_no_input_to_preserve(bart, tokenizer):
    generator = Answering(Base(bart, tokenizer))
    with pytest.raises(ConfigError, match="preserve_input_text needs a decoder model"):
        generator.answers([SOURCES[0]], GenerationOptions(preserve_input_text=True))


def test_no_rows_give_no_answers_and_a_batch_holds_at_least_one(decoder_only):
    assert decoder_only.answers([], GenerationOptions()) == []
    with pytest.raises(ConfigError, match="at least 1 row, got 0"):
        decoder_only.answers([SOURCES[0]], GenerationOptions(), batch_size=0)


def test_a_cut_input_is_reported_with_its_answer(decoder_only):
    answers = decoder_only.answers(SOURCES[:2], GenerationOptions(), cut=[False, True])
    assert [answer.input_cut for answer in answers] == [False, True]
    assert answers[1].to_dict()["input_cut"] is True


def test_requests_of_all_kinds_run_in_one_list(decoder_only):
    decode = decoder_only.decode
    options = [
        GenerationOptions(max_new_tokens=6, **more)
        for more in ({}, {"num_beams": 2}, {"decoding_method": "SAMPLING", "seed": 3}, {})
    ]
    requests = [Request(source, options=each, decode=decode) for source, each in zip(SOURCES, options, strict=True)]
    ends = Decoder(decoder_only.base, Bounds(max_batch_rows=2)).run(requests)
    found = [Generation.of(end, cut=False) for (end,) in ends]
    assert found == [solo(decoder_only.base, request) for request in requests]
