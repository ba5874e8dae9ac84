"""Where a prompt stands in tokenised rows, and chat templates as frames around the text."""

from __future__ import annotations

import pytest

from oracles.tokenizers import byte_bpe
from softprompt.data import RowTokenizer, Verbalizer
from softprompt.errors import ConfigError
from softprompt.prompts import Placement

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORD = {"input": "the parcel is late", "output": "bad"}


def rows_of(placement, *, bos=True, chat=None, limit=64, template="Text: {{input}}"):
    tokenizer = byte_bpe(bos=bos)
    tokenizer.chat_template = chat
    return RowTokenizer(
        tokenizer,
        Verbalizer(template),
        max_source_length=limit,
        max_target_length=8,
        seq2seq=False,
        placement=Placement(placement),
    )


def test_prefix_bos_and_suffix():
    plain = rows_of("prefix")
    source, cut = plain.source(RECORD)
    assert source[0] == 1 and not cut
    assert plain.offset(source) == 0
    assert rows_of("after_bos").offset(source) == 1
    assert rows_of("suffix").offset(source) == len(source)
    for placement in ("after_bos", "suffix"):
        assert rows_of(placement).source(RECORD)[0] == source


def test_the_system_turn_of_a_chat():
    rows = rows_of("chat_system", chat=CHAT)
    source, _ = rows.source(RECORD)
    at = rows.offset(source)
    tokenizer = rows.tokenizer
    assert tokenizer.decode(source[:at]) == "<system>"
    assert tokenizer.decode(source[at:]) == ("</s><user>Text: the parcel is late</s><assistant>")
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": "Text: the parcel is late"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokenizer.decode(source) == rendered


def test_a_long_text_is_cut_inside_its_turn():
    whole, _ = rows_of("chat_system", chat=CHAT).source(RECORD)
    rows = rows_of("chat_system", chat=CHAT, limit=len(whole) - 2)
    source, cut = rows.source(RECORD)
    assert cut and len(source) <= len(whole) - 2
    text = rows.tokenizer.decode(source)
    assert text.startswith("<system></s><user>Text: the") and text.endswith("</s><assistant>")


def test_what_a_tokenizer_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="starts texts with a token of its own"):
        rows_of("after_bos", bos=False)
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        rows_of("chat_system")
    with pytest.raises(ConfigError, match="this one says: no system turn"):
        rows_of("chat_system", chat="{{ raise_exception('no system turn') }}")
    with pytest.raises(ConfigError, match="prints the system turn before"):
        rows_of("chat_system", chat="{{ messages[1].content }}")
