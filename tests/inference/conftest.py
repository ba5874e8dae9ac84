from __future__ import annotations

import pytest

from oracles.byte_models import answer_log_prob, bart, byte_model, llama, t5, tokenizer

__all__ = ["answer_log_prob", "bart", "llama", "t5", "tokenizer"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer, llama, bart, t5):
    """The tiny models as a user has them: folders with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    other = byte_model("llama", 9)
    for name, model in {"llama": llama, "bart": bart, "t5": t5, "other": other}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root
