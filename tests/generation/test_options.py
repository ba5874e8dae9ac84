from __future__ import annotations

import dataclasses

import pytest

from softprompt.errors import ConfigError
from softprompt.generation import GenerationOptions


def test_defaults_are_caikits_greedy_twenty_tokens():
    options = GenerationOptions()
    assert (options.max_new_tokens, options.min_new_tokens) == (20, 0)
    assert options.decoding_method == "GREEDY"
    assert not options.samples


def test_every_option_has_help():
    for each in dataclasses.fields(GenerationOptions):
        assert each.metadata["help"].endswith("."), each.name


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p", "temperature", "seed"])
def test_a_sampling_option_under_greedy_is_refused_not_ignored(name):
    value = 1 if name in ("top_k", "seed") else 0.5
    with pytest.raises(ConfigError, match=f"{name} would be ignored under decoding_method GREEDY; choose SAMPLING"):
        GenerationOptions(decoding_method="GREEDY", **{name: value})
    GenerationOptions(decoding_method="SAMPLING", **{name: value})


@pytest.mark.parametrize(
    "asked", [{"temperature": 0.5}, {"temperature": 1}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}]
)
def test_sampling_follows_from_what_is_asked(asked):
    assert GenerationOptions(**asked, seed=3) == GenerationOptions(decoding_method="SAMPLING", **asked, seed=3)
    assert GenerationOptions.from_settings({"do_sample": True, **asked}) == GenerationOptions(**asked)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 3}, "seed would be ignored as nothing is sampled; give a temperature or leave it out"),
        ({"temperature": 0, "top_p": 0.9}, "top_p would be ignored at temperature 0; raise the temperature"),
        ({"temperature": 0.5, "num_beams": 2}, "num_beams 2 needs decoding_method GREEDY, got temperature"),
        ({"temperature": 0.5, "do_sample": False}, "temperature would be ignored under decoding_method GREEDY"),
        ({"do_sample": True, "decoding_method": "GREEDY"}, "do_sample=True contradicts decoding_method GREEDY"),
        ({"do_sample": 1}, "do_sample takes true or false; got 1"),
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_line(settings, words):
    with pytest.raises(ConfigError, match=words):
        GenerationOptions.from_settings(settings)


def test_do_sample_alone_samples():
    assert GenerationOptions.from_settings({"do_sample": True}).samples


def test_beams_and_sampling_exclude_each_other():
    with pytest.raises(ConfigError, match="num_beams 2 needs decoding_method GREEDY"):
        GenerationOptions(decoding_method="SAMPLING", num_beams=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": True}, "max_new_tokens takes a whole number; got True"),
        ({"max_new_tokens": 5.0}, "max_new_tokens takes a whole number; got 5.0"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0"),
        ({"min_new_tokens": 30}, "min_new_tokens 30 exceeds max_new_tokens 20"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0; got 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be finite; got nan"),
        ({"max_time": float("inf")}, "max_time must be finite; got inf"),
        ({"stop_sequences": "end"}, "put it in a list"),
        ({"stop_sequences": [""]}, "at least one character"),
        ({"exponential_decay_length_penalty": 3}, "expects the tokens to begin after and a factor"),
        ({"exponential_decay_length_penalty": (1, 2, 3)}, "and a factor, such as"),
        ({"exponential_decay_length_penalty": (-1, 2)}, "first number of exponential_decay"),
        ({"exponential_decay_length_penalty": (1.5, 2)}, "takes a whole number; got 1.5"),
        ({"exponential_decay_length_penalty": (1, 0)}, "second number of exponential_decay"),
        ({"decoding_method": "greedy"}, "is one of GREEDY, SAMPLING; got 'greedy'"),
        ({"decoding_method": "SAMPLING", "top_p": 1.5}, "top_p must be at most 1; got 1.5"),
        ({"decoding_method": "SAMPLING", "temperature": 0}, "temperature must be above 0; got 0"),
        ({"decoding_method": "SAMPLING", "seed": 2**63}, "seed must be at most"),
    ],
)
def test_values_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        GenerationOptions(**settings)


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        GenerationOptions.from_settings({"max_new_token": 3})


def test_stop_sequences_are_kept_as_a_tuple():
    assert GenerationOptions(stop_sequences=["a", "b"]).stop_sequences == ("a", "b")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "do_sample": False},
        {"temperature": 1.0, "decoding_method": "GREEDY"},
        {"temperature": 0},
        {"top_p": 1.0, "typical_p": 1, "top_k": 0, "min_p": 0.0},
        {"num_beams": 1, "repetition_penalty": 1.0, "top_k": None},
        {"do_sample": False, "num_return_sequences": 1, "use_cache": True, "length_penalty": 1.0},
        {"do_sample": None, "early_stopping": False, "no_repeat_ngram_size": 0},
    ],
)
def test_values_that_change_nothing_are_taken(settings):
    assert GenerationOptions.from_settings(settings) == GenerationOptions()


def test_filters_that_are_off_are_off_in_sampling_too():
    off = GenerationOptions(decoding_method="SAMPLING", top_k=0, min_p=0)
    assert off == GenerationOptions(decoding_method="SAMPLING")
    assert GenerationOptions(decoding_method="SAMPLING", temperature=1.0).temperature == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_return_sequences": 2}, "unknown setting 'num_return_sequences'"),
        ({"length_penalty": 2.0}, "unknown setting 'length_penalty'"),
        ({"temperature": True}, "temperature takes a number"),
        ({"top_k": -1}, "top_k must be at least 1"),
    ],
)
def test_values_that_ask_for_something_are_not(settings, words):
    with pytest.raises(ConfigError, match=words):
        GenerationOptions.from_settings(settings)
