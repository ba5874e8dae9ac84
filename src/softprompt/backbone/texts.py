"""Token ids of a configuration's initial text."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softprompt.backbone.load import DEMO
from softprompt.bundled import model_directory
from softprompt.errors import ConfigError
from softprompt.prompts import PrefixTuningConfig, PromptTuningConfig


def text_token_ids(config: PromptTuningConfig | PrefixTuningConfig) -> list[int]:
    """Tokenise the initial text of a configuration, special tokens included as in PEFT.

    Raises:
        ConfigError: If the tokenizer cannot be loaded.
    """
    options = dict(config.tokenizer_kwargs or {})
    special = bool(options.pop("add_special_tokens", True))
    tokenizer = _tokenizer(config, options)
    if isinstance(config, PrefixTuningConfig):
        text = config.prefix_tuning_init_text
    else:
        text = config.prompt_tuning_init_text
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def label_token_ids(config: PromptTuningConfig) -> list[list[int]]:
    """Tokenise each line of ``prompt_tuning_init_text`` by itself, without special tokens.

    Raises:
        ConfigError: If the tokenizer cannot be loaded.
    """
    tokenizer = _tokenizer(config, {})
    lines = (config.prompt_tuning_init_text or "").split("\n")
    return [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]


def _tokenizer(
    config: PromptTuningConfig | PrefixTuningConfig, options: dict[str, object]
) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(config.tokenizer_name_or_path), **options)


def load_tokenizer(name: str, **options: object) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a name or folder.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    source = str(model_directory()) if name == DEMO else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as cause:
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ConfigError(
            f"the tokenizer {name!r} for the initial prompt cannot be loaded: {first[:160]}"
        ) from cause
    return tokenizer
