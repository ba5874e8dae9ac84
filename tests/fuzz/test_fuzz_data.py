"""Data files made to be wrong or costly: an error of ours with the line, soon, or records."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_made_to_be_costly_is_refused_soon(tmp_path, name):
    (tmp_path / name).write_text(COSTLY[name])
    begun = time.process_time()
    with pytest.raises(SoftPromptError) as caught:
        read_records(tmp_path / name)
    assert time.process_time() - begun < 2
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["pipe.jsonl", "device.csv"])
def test_what_is_no_file_is_not_read(tmp_path, name):
    if name == "pipe.jsonl":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(SoftPromptError, match="a device or a pipe"):
        read_records(tmp_path / name)
