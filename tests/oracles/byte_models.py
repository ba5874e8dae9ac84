"""Fixtures: tiny random models with a byte-level tokenizer, nothing learned and everything checkable."""

from __future__ import annotations

import pytest
import torch

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


@torch.no_grad()
def _answer_log_prob(model, prompt, source, answer):
    """Log p of an answer's tokens, from one unpadded row of embeddings: slow and obvious."""
    source, answer = tuple(source), tuple(answer)
    if model.config.is_encoder_decoder:
        embed = model.get_encoder().get_input_embeddings()
        rows = torch.cat([prompt, embed(torch.tensor(source))]).unsqueeze(0)
        logits = model(inputs_embeds=rows, labels=torch.tensor([answer])).logits[0]
    else:
        rows = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(source + answer))])
        first = len(prompt) + len(source)
        logits = model(inputs_embeds=rows.unsqueeze(0)).logits[0, first - 1 :]
    return sum(float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(answer))


@pytest.fixture(scope="session")
def answer_log_prob():
    return _answer_log_prob
