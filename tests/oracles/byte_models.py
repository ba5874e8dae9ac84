"""Fixtures: tiny random models with a byte-level tokenizer, nothing learned and everything checkable."""

from __future__ import annotations

import pytest

from oracles.families import tiny
from oracles.tokenizers import byte_bpe


def byte_model(name, seed):
    length = {} if name == "t5" else {"max_position_embeddings": 96}
    return tiny(name, seed=seed, vocab_size=len(byte_bpe()), **length)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_bpe()


@pytest.fixture(scope="session")
def llama():
    return byte_model("llama", 5)


@pytest.fixture(scope="session")
def bart():
    return byte_model("bart", 6)


@pytest.fixture(scope="session")
def t5():
    return byte_model("t5", 7)
