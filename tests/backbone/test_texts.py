"""Token ids of the initial text."""

from __future__ import annotations

import pytest

from oracles.tokenizers import byte_bpe
from softprompt import PromptTuningConfig
from softprompt.backbone import label_token_ids, text_token_ids
from softprompt.errors import ConfigError


@pytest.fixture(scope="module")
def words():
    return byte_bpe(bos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("tokenizer")
    words.save_pretrained(path)
    return str(path)


def config(folder, text, init="TEXT", **kwargs):
    return PromptTuningConfig(
        num_virtual_tokens=8,
        prompt_tuning_init=init,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=folder,
        tokenizer_kwargs=kwargs or None,
    )


def test_special_tokens_stay_as_in_peft(folder, words):
    ids = text_token_ids(config(folder, "good or bad"))
    assert ids == words("good or bad")["input_ids"]
    assert ids[0] == words.bos_token_id


def test_special_tokens_can_be_left_out(folder, words):
    ids = text_token_ids(config(folder, "good or bad", add_special_tokens=False))
    assert ids == words("good or bad", add_special_tokens=False)["input_ids"]
    assert words.bos_token_id not in ids


def test_tokenizer_kwargs_reach_the_tokenizer(folder):
    given = {"bos_token": "<unk>", "max_length": 512}
    assert text_token_ids(config(folder, "good", **given))
    assert given == {"bos_token": "<unk>", "max_length": 512}


def test_each_line_is_a_label_without_special_tokens(folder, words):
    ids = label_token_ids(config(folder, "complaint\nno complaint", init="LABELS"))
    assert ids == [
        words(text, add_special_tokens=False)["input_ids"] for text in ("complaint", "no complaint")
    ]


@pytest.mark.parametrize("read", [text_token_ids, label_token_ids])
def test_a_missing_tokenizer_is_one_clear_error(read, tmp_path):
    with pytest.raises(
        ConfigError, match=r"tokenizer '.*' for the initial prompt cannot be loaded"
    ) as caught:
        read(config(str(tmp_path / "none"), "good"))
    assert "\n" not in str(caught.value)
