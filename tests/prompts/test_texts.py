"""Token ids of the initial text."""

from __future__ import annotations

import pytest

from oracles.tokenizers import byte_bpe
from softprompt.errors import ConfigError
from softprompt.prompts import label_token_ids, text_token_ids


@pytest.fixture(scope="module")
def words():
    return byte_bpe(bos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("tokenizer")
    words.save_pretrained(path)
    return str(path)


def test_special_tokens_stay_as_in_peft(folder, words):
    ids = text_token_ids("good or bad", folder, None)
    assert ids == words("good or bad")["input_ids"]
    assert ids[0] == words.bos_token_id


def test_special_tokens_can_be_left_out(folder, words):
    ids = text_token_ids("good or bad", folder, {"add_special_tokens": False})
    assert ids == words("good or bad", add_special_tokens=False)["input_ids"]
    assert words.bos_token_id not in ids


def test_tokenizer_kwargs_reach_the_tokenizer(folder):
    given = {"bos_token": "<unk>", "max_length": 512}
    assert text_token_ids("good", folder, given)
    assert given == {"bos_token": "<unk>", "max_length": 512}


def test_each_line_is_a_label_without_special_tokens(folder, words):
    ids = label_token_ids("complaint\nno complaint", folder)
    assert ids == [words(text, add_special_tokens=False)["input_ids"] for text in ("complaint", "no complaint")]


@pytest.mark.parametrize(
    ("read", "options"), [(text_token_ids, (None,)), (label_token_ids, ())], ids=["text", "labels"]
)
def test_a_missing_tokenizer_is_one_clear_error(read, options, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer '.*' for the initial prompt cannot be loaded") as caught:
        read("good", str(tmp_path / "none"), *options)
    assert "\n" not in str(caught.value)
