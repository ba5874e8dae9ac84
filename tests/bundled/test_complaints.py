"""The shipped data set keeps what its card promises."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from softprompt.bundled import complaints
from softprompt.data import label_set, read_records

SPLITS = ("train", "validation", "test")
LABELS = ("complaint", "no complaint")


@pytest.fixture(scope="module")
def splits():
    return {split: read_records(complaints(split)) for split in SPLITS}


@pytest.fixture(scope="module")
def texts(splits):
    return [example.fields["input"] for split in SPLITS for example in splits[split]]


def word_trigrams(text):
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def pairs_with_common_trigrams(texts, least):
    """Return pairs whose word 3-gram Jaccard similarity is at least ``least``."""
    grams = [word_trigrams(text) for text in texts]
    holders = {}
    for index, own in enumerate(grams):
        for gram in own:
            holders.setdefault(gram, []).append(index)
    candidates = {pair for having in holders.values() for pair in itertools.combinations(having, 2)}
    return [
        (texts[a], texts[b]) for a, b in candidates if len(grams[a] & grams[b]) >= least * len(grams[a] | grams[b])
    ]


def pairs_spelt_alike(texts, least):
    """Return pairs whose difflib ratio is at least ``least``.

    Only likely pairs are compared in full: the characters that two texts have in common, in any
    order, bound the ratio from above, and texts this alike share far more than a quarter of
    their 3-grams of characters.
    """
    lowered = [text.lower() for text in texts]
    alphabet = sorted(set("".join(lowered)))
    counts = np.array([[text.count(char) for char in alphabet] for text in lowered])
    grams = [{text[start : start + 3] for start in range(len(text) - 2)} for text in lowered]
    found = []
    for a, text in enumerate(lowered):
        common = np.minimum(counts[a], counts[a + 1 :]).sum(axis=1)
        bound = 2 * common / (len(text) + counts[a + 1 :].sum(axis=1))
        for b in a + 1 + np.flatnonzero(bound >= least):
            if 8 * len(grams[a] & grams[b]) >= len(grams[a]) + len(grams[b]):
                matcher = difflib.SequenceMatcher(None, text, lowered[b], autojunk=False)
                if matcher.ratio() >= least:
                    found.append((texts[a], texts[b]))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_is_one_message_and_its_label(split):
    lines = complaints(split).read_text(encoding="utf-8").splitlines()
    for line in lines:
        record = json.loads(line)
        assert list(record) == ["input", "output"]
        assert record["output"] in LABELS
        assert record["input"] == record["input"].strip() != ""
        assert "\n" not in record["input"]


def test_there_are_enough_messages(splits):
    assert sum(len(examples) for examples in splits.values()) >= 600
    assert all(len(examples) >= 100 for examples in splits.values())


@pytest.mark.parametrize("split", SPLITS)
def test_the_labels_are_balanced(splits, split):
    targets = Counter(example.target for example in splits[split])
    assert abs(targets["complaint"] - targets["no complaint"]) <= 0.02 * targets.total()
    assert label_set([example.target for example in splits[split]]) == LABELS


def test_no_two_messages_share_half_of_their_word_trigrams(texts):
    assert pairs_with_common_trigrams(texts, 0.5) == []


def test_no_two_messages_are_spelt_alike(texts):
    assert pairs_spelt_alike(texts, 0.8) == []


def test_the_two_checks_find_planted_duplicates(texts):
    original = max(texts, key=len)
    copied = [*texts, original[:-9] + " today.", original.upper()]
    assert len(pairs_with_common_trigrams(copied, 0.5)) >= 2
    assert len(pairs_spelt_alike(copied, 0.8)) == 3


def test_messages_vary_in_length_and_tone(texts):
    lengths = [len(text.split()) for text in texts]
    assert np.percentile(lengths, 10) * 1.7 <= np.percentile(lengths, 90)
    openings = Counter(" ".join(text.lower().split()[:2]) for text in texts)
    assert openings.most_common(1)[0][1] <= 0.05 * len(texts)
