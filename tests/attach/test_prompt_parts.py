import pytest
import torch

from softprompt.attach import Places
from softprompt.engine import EngineRow

ROW = EngineRow((1, 2), (3,), at=1)


@pytest.mark.parametrize(
    ("types", "seq2seq", "indices"),
    [
        (None, False, [(0, -1), (1, -1)]),
        (["DECODER"], False, [(0, -1), (1, -1)]),
        (None, True, [(0, -1), (1, -1)]),
        (["ENCODER"], True, [(0, -1), (1, -1)]),
        (["DECODER"], True, [(-1, 0), (-1, 1)]),
        (["ENCODER", "DECODER"], True, [(0, 1), (2, 3)]),
        (["DECODER", "ENCODER"], True, [(0, 1), (2, 3)]),
    ],
)
def test_rows_point_at_the_parts_of_their_prompt(types, seq2seq, indices):
    places = Places.of(types, seq2seq=seq2seq)
    found = [places.row(ROW, number) for number in range(2)]
    assert [(row.prompt, row.decoder_prompt) for row in found] == indices
    assert all((row.source, row.target, row.at) == ((1, 2), (3,), 1) for row in found)


def test_the_first_half_is_the_encoders():
    places = Places.of(["ENCODER", "DECODER"], seq2seq=True)
    values = [torch.arange(4.0)[:, None], torch.arange(4.0, 8.0)[:, None]]
    parts = places.parts(values)
    assert [part[:, 0].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert places.submodules == 2


def test_a_part_that_gets_nothing_is_none_and_keys_and_values_stay_whole():
    rows, both = torch.ones(4, 2), ["ENCODER", "DECODER"]
    assert Places.of(["DECODER"], seq2seq=True).split(rows) == (None, rows)
    assert Places.of(["ENCODER"], seq2seq=True).split(rows) == (rows, None)
    assert [len(part) for part in Places.of(both, seq2seq=True).split(rows)] == [2, 2]
    keys_and_values = torch.ones(2, 2, 1, 4, 2)
    assert Places.of(both, seq2seq=True).split(keys_and_values) == (keys_and_values, None)
