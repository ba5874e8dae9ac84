"""A prompt of one token makes an American spelling-to-phonemes model drop its r."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import softprompt


@pytest.fixture(scope="module")
def words(shared, real_data):
    shared(real_data.G2P)
    [split] = real_data.british(shared("data/g2p_lexicon").parents[1], real_data.drops_r)
    return split


@pytest.fixture(scope="module")
def tuned(shared, words, real_data):
    return softprompt.tune(
        shared(real_data.G2P),
        words.train[:400],
        words.validation[:50],
        num_epochs=4,
        batch_size=16,
        learning_rate=0.6,
        task="generation",
        max_target_length=40,
        tuning_config={"num_virtual_tokens": 1},
    )


def test_pronunciation_becomes_british(tuned, words):
    base = softprompt.evaluate(tuned, words.test[:80], without_prompt=True)
    report = softprompt.evaluate(tuned, words.test[:80])
    assert base.exact_match <= 0.05
    assert report.exact_match >= 0.2
    assert report.perplexity < 0.75 * base.perplexity


def test_a_saved_prompt_says_the_same(tuned, words, tmp_path):
    tuned.save(tmp_path / "prompt")
    loaded = softprompt.load(tmp_path / "prompt")
    inputs = [row["input"] for row in words.test[:12]]
    for settings in ({}, {"num_beams": 3}):
        answers = tuned.generate(inputs, max_new_tokens=40, **settings)
        assert loaded.generate(inputs, max_new_tokens=40, **settings) == answers
    report = softprompt.evaluate(tuned, words.test[:12])
    assert softprompt.evaluate(loaded, words.test[:12]) == report


def test_without_the_prompt_it_is_the_published_model(shared, tuned, words, real_data):
    plain = AutoModelForSeq2SeqLM.from_pretrained(shared(real_data.G2P)).eval()
    ids = tuned.tokenizer(words.test[0]["input"], return_tensors="pt").input_ids
    prompted = softprompt.PeftModel.of(tuned)
    with prompted.disable_adapter(), torch.no_grad():
        bare = prompted(input_ids=ids, labels=ids)
    prompted.detach()
    with torch.no_grad():
        expected = plain(input_ids=ids, labels=ids)
    assert torch.equal(bare.logits, expected.logits)
