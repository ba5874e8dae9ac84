"""Public data sets, read as they were published."""

from __future__ import annotations

import pytest

from softprompt.data import label_set, read_records
from softprompt.errors import DataError

FILES = {
    "raft_twitter_complaints/train.csv": ("Tweet text", "Label", 50, 2),
    "banking77/train.csv": ("text", "category", 10003, 77),
    "sst2/dev.tsv": ("sentence", "label", 872, 2),
    "e2e_nlg/devset.csv": ("mr", "ref", 4672, None),
    "gsm8k/test.jsonl": ("question", "answer", 1319, None),
    "fewglue_32dev/BoolQ/dev32.jsonl": ("question", "label", 32, 2),
}


@pytest.mark.parametrize("path", FILES)
def test_rows_and_labels(shared, path):
    source, target, rows, labels = FILES[path]
    examples = read_records(shared(f"data/{path}"), input_field=source, output_field=target)
    assert len(examples) == rows
    found = label_set([example.target for example in examples], task=None)
    assert (found and len(found)) == labels


def test_an_unlabelled_file_needs_no_target(shared):
    path = shared("data/raft_twitter_complaints/test_unlabeled.csv")
    examples = read_records(path, input_field="Tweet text", require_target=False)
    assert {example.target for example in examples} == {None}


def test_a_file_without_header_or_suffix_is_refused(shared):
    with pytest.raises(DataError, match="expected one of the suffixes"):
        read_records(shared("data/sms_spam/SMSSpamCollection"))


def test_a_lexicon_is_no_list_of_records(shared):
    with pytest.raises(DataError, match=r"us_gold.json, line 1: expected a JSON list"):
        read_records(shared("data/g2p_lexicon/us_gold.json"))
