"""Prompts that answer otherwise than each other, on the bundled model."""

import pytest

from oracles.serving import write_prompt
from softprompt.backbone import load_base


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A folder of a classifier and a writer."""
    root, base = tmp_path_factory.mktemp("prompts"), load_base("demo")
    write_prompt(root / "complaints", base, seed=1, length=4)
    write_prompt(root / "writer", base, seed=2, length=3, task="generation", labels=None, template="{{input}}")
    return root


@pytest.fixture(scope="session")
def texts():
    return [
        f"The {word} broke after {days} days." for days in range(2, 10) for word in ("kettle", "phone", "chair")
    ]
