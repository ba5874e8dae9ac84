"""The inputs that coverage-guided fuzzing begins with are read, and nonsense is an error of ours."""

from __future__ import annotations

import pytest

from fuzz.guided import SUFFIXES, one, read, seeds


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_seed_is_read_whole_and_refused_in_one_line_when_it_is_cut(tmp_path, suffix):
    path, seed = tmp_path / f"seed{suffix}", seeds()[suffix]
    path.write_bytes(seed)
    read(path)
    for end in range(0, len(seed), 1 + len(seed) // 20):
        one(bytes([SUFFIXES.index(suffix)]) + seed[:end], tmp_path)


def test_what_is_no_error_of_ours_comes_out(tmp_path, monkeypatch):
    def broken(path):
        raise KeyError(path.name)

    monkeypatch.setattr("fuzz.guided.read", broken)
    with pytest.raises(KeyError, match=r"input\.json"):
        one(b"", tmp_path)
