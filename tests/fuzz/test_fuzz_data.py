"""Data files made to be wrong or costly: an error of ours with the line, soon, or records."""

from __future__ import annotations

import gc
import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data import read_records
from softprompt.errors import SoftPromptError

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
PIECES = ["{", "}", "[", "]", ",", ":", '"input"', '"output"', '"a"', '"', "1e999", "-0", "NaN", "null", "9" * 5000]
PIECES += [
    "\n",
    "\t",
    ";",
    "input",
    "output",
    "\\ud800",
    "\x00",
    "\x1b[2J",
    "\ufeff",
    "\u2028",
    '"messages"',
    '"role"',
    " ",
]
COSTLY = {
    "columns.csv": ",".join(f"c{number}" for number in range(100_000)) + "\n1\n",
    "columns.tsv": "\t".join(f"c{number}" for number in range(100_000)) + "\n1\n",
    "digits.jsonl": '{"input": "x", "output": ' + "9" * 5_000 + "}",
    "digits.json": '[{"input": "x", "output": ' + "9" * 5_000 + "}]",
    "long.jsonl": json.dumps({"input": "word " * 2_000_000, "output": "y"}),
    "long.csv": "input,output\n" + "word " * 2_000_000 + ",y\n",
    "turn.jsonl": json.dumps({"messages": [{"role": "assistant", "content": "x" * 10_000_000}]}),
    "system.jsonl": json.dumps({"prompt": "x", "completion": "y", "system": "x" * 10_000_000}),
    "deep.jsonl": '{"input": ' + "[" * 100_000,
    "messages.jsonl": json.dumps({"messages": "[" * 100_000}),
    "tools.jsonl": json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": "[" * 100_000}),
}


@settings(max_examples=int(EXAMPLES or 150), derandomize=not EXAMPLES)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=24), suffix=st.sampled_from(["jsonl", "json", "csv", "tsv"])
)
def test_any_text_is_records_or_an_error_of_ours(tmp_path_factory, pieces, suffix):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_text("".join(pieces), encoding="utf-8")
    try:
        assert read_records(path, require_target=False)
    except SoftPromptError as error:
        message = str(error)
        assert len(message) <= 1000
        assert not {"\x1b", "\x00", "\n"} & {*message}


DEEP = json.loads("[" * 900 + "]" * 900)
WORDS = ["text", "type", "role", "content", "from", "value", "user", "assistant", "tool_calls", "human", "gpt", ""]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*WORDS, DEEP]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)
PARTS = VALUES | st.lists(VALUES | st.fixed_dictionaries({"type": VALUES, "text": VALUES}), max_size=2)
TURNS = st.lists(
    st.fixed_dictionaries({"role": VALUES | st.sampled_from(["user", "assistant"]), "content": PARTS})
    | st.fixed_dictionaries({"from": VALUES | st.sampled_from(["human", "gpt"]), "value": PARTS})
    | VALUES,
    max_size=3,
)
CHATS = [
    ("messages", "tools"),
    ("conversations", "system"),
    ("prompt", "completion"),
    ("instruction", "input", "output"),
]


@settings(max_examples=int(EXAMPLES or 150), derandomize=not EXAMPLES)
@given(data=st.data(), columns=st.sampled_from(CHATS))
def test_any_values_in_a_chat_are_a_record_or_an_error_of_ours(data, columns):
    record = {name: data.draw(TURNS | VALUES) for name in columns}
    try:
        (found,) = read_records([record], require_target=False)
        if found.chat is not None:
            assert isinstance(found.chat.answer, str | None)
    except SoftPromptError as error:
        assert len(str(error)) <= 1000
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_made_to_be_costly_is_refused_soon(tmp_path, name):
    (tmp_path / name).write_text(COSTLY[name])
    begun = time.process_time()
    with pytest.raises(SoftPromptError) as caught:
        read_records(tmp_path / name)
    assert time.process_time() - begun < 2
    assert name in str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_many_lists_do_not_have_garbage_collected_again_and_again(tmp_path, form):
    line = '{"input": "x", "output": "y", "more": [' + ",".join(["[]"] * 200_000) + "]}"
    (tmp_path / f"t.{form}").write_text(line if form == "jsonl" else f"[{line}]")
    begun = []
    gc.callbacks.append(lambda phase, found: begun.append(found))
    try:
        (record,) = read_records(tmp_path / f"t.{form}")
    finally:
        gc.callbacks.pop()
    assert record.left_out == {"more": "list"}
    assert len(begun) < 20  # 570 where it is not held back


def test_a_number_of_too_many_digits_is_said_to_be_one():
    with pytest.raises(SoftPromptError, match="record 1: the number in the field 'input' has too many digits"):
        read_records([{"input": 10**5_000, "output": "y"}])


@pytest.mark.parametrize("name", ["pipe.jsonl", "device.csv"])
def test_what_is_no_file_is_not_read(tmp_path, name):
    if name == "pipe.jsonl":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(SoftPromptError, match="a device or a pipe"):
        read_records(tmp_path / name)
