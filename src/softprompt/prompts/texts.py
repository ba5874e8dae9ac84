"""Token ids of the text that a prompt starts as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softprompt.bundled import DEMO, model_directory
from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_token_ids(text: str, tokenizer: str, options: Mapping[str, Any] | None) -> list[int]:
    """Tokenise an initial text, special tokens included as in PEFT.

    Args:
        text: The text.
        tokenizer: Name or folder of the tokenizer.
        options: Keyword arguments of ``AutoTokenizer.from_pretrained``; ``add_special_tokens=False``
            among them leaves the tokenizer's special tokens out of the text.

    Raises:
        ConfigError: If the tokenizer cannot be loaded.
    """
    given = dict(options or {})
    special = bool(given.pop("add_special_tokens", True))
    ids: list[int] = load_tokenizer(tokenizer, **given)(text, add_special_tokens=special)[
        "input_ids"
    ]
    return ids


def label_token_ids(labels: str, tokenizer: str) -> list[list[int]]:
    """Tokenise each line of a text by itself, without special tokens.

    Raises:
        ConfigError: If the tokenizer cannot be loaded.
    """
    loaded = load_tokenizer(tokenizer)
    return [loaded(line, add_special_tokens=False)["input_ids"] for line in labels.split("\n")]


def load_tokenizer(name: str, **options: object) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a name or folder; ``demo`` is the bundled model's.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer  # a prompt without a text does not wait for it

    source = str(model_directory()) if name == DEMO else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as cause:
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ConfigError(
            f"the tokenizer {name!r} for the initial prompt cannot be loaded: {first[:160]}"
        ) from cause
    return tokenizer
