"""A vocabulary without a tokenizer."""

from __future__ import annotations

import pytest

from softprompt import inspect_prompt, tune


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


KINDS = [("it broke again", "complaint"), ("lovely, thank you", "no complaint")]


@pytest.fixture(scope="session")
def records():
    """Sixteen records of two labels."""
    return [{"input": f"{text} {i}", "output": label} for i in range(8) for text, label in KINDS]


@pytest.fixture(scope="session")
def learnt(records, tmp_path_factory):
    """The folder of a prompt that was trained for two epochs on the bundled model."""
    folder = tmp_path_factory.mktemp("learnt") / "prompt"
    tune(
        "demo",
        records,
        records[:6],
        verbalizer="Message: {{input}}\nLabel:",
        num_epochs=2,
        batch_size=8,
        output=folder,
        tuning_config={
            "num_virtual_tokens": 4,
            "prompt_tuning_init_method": "TEXT",
            "prompt_tuning_init_text": "Is this a complaint?",
        },
        silence_progress_bars=True,
    )
    return folder


@pytest.fixture(scope="session")
def found(learnt, records):
    """Its inspection on eight of the records, set against itself."""
    return inspect_prompt(learnt, records, against=[learnt], silence_progress_bars=True, limit=8)
