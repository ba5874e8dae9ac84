"""Starting an attached prefix or cartridge at keys and values of the base; PEFT's helpers under their names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt.backbone import text_key_values
from softprompt.errors import ConfigError
from softprompt.peft.model import PeftModel
from softprompt.prompts import PROMPT_KEY, prompt_embeddings_from_past_key_values


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Set a prefix or cartridge to the first tokens of a cache, frozen tokens included.

    Args:
        model: The model it is attached to.
        adapter_name: Its name; None is the active one.
        past_key_values: Cache of one sequence, without the prompt in it; see
            ``prompt_embeddings_from_past_key_values``.
        num_virtual_tokens: Tokens to take (P); the prompt's own number, or None.

    Returns:
        What was set, ``[P, L·2·A_kv·D]``.

    Raises:
        AdapterError: If there is no such prompt.
        ConfigError: If it is no prefix and no cartridge, is projected, or the cache does not fit.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    length = _length(model, name, num_virtual_tokens)
    values = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=length)
    model.encoder_of(name).load_stored({PROMPT_KEY: values})
    return values


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Set a prefix or cartridge to the keys and values of a text's first tokens.

    Only the tokens that are taken run through the base: in a causal model the others change nothing.

    Args:
        model: The model it is attached to.
        tokenizer: The base's tokenizer.
        text: The text, at least as long as the prompt.
        adapter_name: Name of the prompt; None is the active one.
        num_virtual_tokens: Tokens to take (P); the prompt's own number, or None.
        use_chat_template: Put the text in the system turn of the tokenizer's chat template, if it has one.
        max_length: Tokens to cut the text to first.

    Returns:
        What was set, ``[P, L·2·A_kv·D]``.

    Raises:
        AdapterError: If there is no such prompt.
        ConfigError: If it is no prefix and no cartridge, is projected, the text is too short, or the base's
            keys and values depend on an input.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    length = _length(model, name, num_virtual_tokens)
    ids = _token_ids(tokenizer, text, use_chat_template, max_length)[:length]
    if len(ids) < length:
        raise ConfigError(
            f"Need at least {length} cached tokens, got {len(ids)}; give a longer text, or lower "
            "num_virtual_tokens"
        )
    key_values = text_key_values(model.base_model, ids)
    cache = [(layer[0][None], layer[1][None]) for layer in key_values]
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=length
    )


def _length(model: PeftModel, name: str, given: int | None) -> int:
    """Return the virtual tokens of a prompt that can be set to keys and values."""
    encoder, config = model.encoder_of(name), model.peft_config[name]
    if not config.keys_and_values:
        raise ConfigError(
            f"Adapter '{name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {config.peft_type})."
        )
    if getattr(encoder, "transform", None) is not None:
        raise ConfigError(
            "keys and values do not tell the parameters of a prefix with prefix_projection=True; train the "
            "prefix directly"
        )
    length = int(config.num_virtual_tokens or 0)
    if given not in (None, length):
        raise ConfigError(
            f"num_virtual_tokens is {given}, but the prompt {name!r} has {length}; leave it out"
        )
    return length


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, templated: bool, max_length: int | None
) -> list[int]:
    """Return the token ids of a text, in the system turn of a chat where there is a template."""
    if templated and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "system", "content": text}]
        try:
            ids: Any = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)
            return list(ids)[:max_length]
        except (TypeError, ValueError):
            pass  # a tokenizer class with a signature of its own; its text is taken as it is
    cut = {"truncation": max_length is not None, "max_length": max_length}
    found: list[int] = tokenizer(text, **cut)["input_ids"]
    return found
