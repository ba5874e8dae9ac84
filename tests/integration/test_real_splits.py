"""The benchmark's splits: no text is in two of them, and labels are as common as it says."""

from collections import Counter

import pytest


def _texts(rows):
    return {row["input"].lower() for row in rows}


@pytest.mark.parametrize(
    ("name", "path", "sizes"),
    [
        ("sms_spam", "data/sms_spam", (400, 100, 200)),
        ("sst2", "data/sst2", (800, 200, 400)),
        ("banking", "data/banking77", (400, 100, 300)),
    ],
)
def test_parts_are_balanced_and_disjoint(shared, real_data, name, path, sizes):
    [split] = getattr(real_data, name)(shared(path).parents[1])
    parts = split.train, split.validation, split.test
    assert tuple(len(part) for part in parts) == sizes
    assert sum(len(_texts(part)) for part in parts) == len(set().union(*map(_texts, parts)))
    for part in parts:
        assert len(set(Counter(row["output"] for row in part).values())) == 1


def test_folds_test_every_row_once(shared, real_data):
    folds = real_data.raft(shared("data/raft_twitter_complaints").parents[1])
    tested = [row["input"] for fold in folds for row in fold.test]
    assert len(tested) == len(set(tested)) == 50
    for fold in folds:
        assert len(fold.train) == 40
        assert not _texts(fold.train) & _texts(fold.test)


def test_british_words_lose_an_r_and_have_known_symbols(shared, real_data):
    root = shared("data/g2p_lexicon").parents[1]
    shared(real_data.G2P)
    [split] = real_data.british(root, real_data.drops_r)
    assert (len(split.train), len(split.validation), len(split.test)) == (1200, 128, 300)
    assert not _texts(split.train) & _texts(split.test)
    assert not _texts(split.validation) & _texts(split.test)


def test_dropping_r_is_the_only_difference(real_data):
    assert real_data.drops_r("wɔɾəɹ", "wɔɾə")
    assert not real_data.drops_r("wɔɾəɹ", "wɔtə")
    assert not real_data.drops_r("kæt", "kæt")
    assert not real_data.drops_r("kæt", "kæɹt")


def test_raising_a_schwa_is_the_only_difference(real_data):
    kit = "\N{LATIN LETTER SMALL CAPITAL I}"
    assert real_data.raises_schwa("ənəf", f"{kit}nəf")
    assert not real_data.raises_schwa("ənəf", f"{kit}n{kit}v")
    assert not real_data.raises_schwa("ənəf", "ənəf")
    assert not real_data.raises_schwa(f"k{kit}t", "kət")
