"""Prompts for a well-trained language model of 260 thousand parameters, on messages and tweets."""

import pytest

import softprompt

RAFT = {"input_field": "Tweet text", "output_field": "Label"}


@pytest.fixture(scope="module")
def spam(shared, real_data):
    [split] = real_data.sms_spam(shared("data/sms_spam").parents[1])
    return split


@pytest.mark.slow
def test_a_prompt_tells_spam_from_ham(shared, spam):
    tuned = softprompt.tune(
        shared("models/stories260K"),
        spam.train,
        spam.validation[:60],
        num_epochs=3,
        batch_size=8,
        verbalizer="{{input}}\nLabel (ham or spam):",
        tuning_config={
            "num_virtual_tokens": 20,
            "prompt_tuning_init_method": "TEXT",
            "prompt_tuning_init_text": "Is this text message spam or ham? Label:",
        },
    )
    base = softprompt.evaluate(tuned, spam.test[:100], without_prompt=True)
    report = softprompt.evaluate(tuned, spam.test[:100])
    assert base.rows == report.rows == 100
    assert report.accuracy >= 0.7
    assert report.accuracy >= base.accuracy + 0.15
    assert not report.collapsed


@pytest.mark.slow
def test_a_csv_file_with_named_columns(shared, tmp_path):
    train = shared("data/raft_twitter_complaints/train.csv")
    tuned = softprompt.tune(
        shared("models/stories260K"),
        train,
        num_epochs=3,
        batch_size=8,
        verbalizer="{{input}}\nLabel:",
        tuning_config={"num_virtual_tokens": 5},
        output=tmp_path / "prompt",
        **RAFT,
    )
    assert tuned.labels == ("complaint", "no complaint")
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    report = softprompt.evaluate(tuned, train)
    assert (report.rows, report.invalid) == (50, 0)
    loaded = softprompt.load(tmp_path / "prompt")
    again = softprompt.evaluate(loaded, train)
    assert again.to_dict() == report.to_dict()
    tweet = {
        "Tweet text": "@HQ my parcel is lost. Again!",
        "input": "@HQ my parcel is lost. Again!",
    }
    assert loaded(tweet) == loaded(tweet["input"]) == tuned(tweet["input"])
