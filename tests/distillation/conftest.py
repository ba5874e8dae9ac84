"""A tiny chat model as a folder, and a text with questions for it."""

from __future__ import annotations

import pytest

from oracles import families
from oracles.tokenizers import chat_bpe

TEXT = "Answer with one word: good or bad. The parcel service is late again, and label every input."


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled-base")
    families.widened(families.causal("llama", vocab_size=330, max_position_embeddings=512)).save_pretrained(folder)
    chat_bpe().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def asked():
    return [{"input": f"is parcel {number} late"} for number in range(9)]
