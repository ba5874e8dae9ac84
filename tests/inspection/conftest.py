"""A vocabulary without a tokenizer."""

from __future__ import annotations

import pytest


class Letters:
    """A vocabulary of a, b, c, ... whose token 1 is no whole character."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def convert_ids_to_tokens(self, ids):
        return f"<byte {ids}>"

    def decode(self, token_ids):
        return "\ufffd" if token_ids == [1] else chr(ord("a") + token_ids[0])


@pytest.fixture
def letters():
    return Letters
