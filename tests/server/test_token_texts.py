"""Places and bytes of tokens that are parts of characters, against the text decoded so far."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oracles.tokenizers import byte_bpe
from softprompt.server.logprobs import Position, Scores, TokenTexts, bytes_of

TEXT = "é is 日本 and 🙂!"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe(bos=True)


def test_offsets_are_those_of_the_decoded_text(tokenizer):
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    texts = TokenTexts(tokenizer)
    told = Scores(ids, [None] * len(ids), [()] * len(ids)).completion(texts, Position(7), top=False)
    before = [tokenizer.decode(ids[:i], skip_special_tokens=True) for i in range(len(ids))]
    assert any("\ufffd" in text for text in before)
    assert told["text_offset"] == [7 + len(text.rstrip("\ufffd")) for text in before]
    place = Position(7)
    assert [place.take(texts, token) for token in ids] == told["text_offset"]


def test_bytes_are_the_texts(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    told = Scores(ids, [-1.0] * len(ids), [()] * len(ids)).chat(TokenTexts(tokenizer))
    assert b"".join(bytes(each["bytes"]) for each in told["content"]) == TEXT.encode()


def test_bytes_that_never_become_a_character_are_counted(tokenizer):
    texts, place = TokenTexts(tokenizer), Position()
    first = tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    for _ in range(4):
        place.take(texts, first)
    assert place.at == len(tokenizer.decode([first] * 4))


def test_bytes_of_other_vocabularies():
    assert bytes_of("<0xE2>", "\ufffd") == b"\xe2"
    assert bytes_of("日", "\ufffd") is None
    assert bytes_of("ab", "\ufffd") is None


def test_the_space_of_a_sentencepiece_token_is_told():
    """Decoded alone it is lost, so the words of an answer would run together."""
    words = {word: number for number, word in enumerate("<unk> \u2581the \u2581parcel \u2581is \u2581late".split())}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    ids = tokenizer("the parcel is late", add_special_tokens=False)["input_ids"]
    told = Scores(ids, [-1.0] * len(ids), [()] * len(ids)).chat(TokenTexts(tokenizer))
    assert "".join(each["token"] for each in told["content"]) == " the parcel is late"
    assert bytes(told["content"][0]["bytes"])[:1] == b" "
