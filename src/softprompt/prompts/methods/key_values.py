"""What prefix tuning and cartridges share: PEFT's flat order of keys and values, and a text as first values.

A prompt of P virtual tokens is keys and values of every layer, ``[L, 2, A_kv, P, D]``. PEFT's files hold it flat,
``prompt_embeddings`` ``[P, L·2·A_kv·D]``: for each token layer 0's keys, layer 0's values, layer 1's keys and
so on, heads inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from softprompt.errors import ConfigError
from softprompt.fields import setting
from softprompt.prompts import PROMPT_KEY, PromptLearningConfig, Start, TaskType, fitted, text_token_ids


@dataclass(frozen=True, slots=True)
class FlatOrder:
    """Sizes of a prompt of keys and values, and the way to PEFT's flat order and back.

    Attributes:
        tokens: Virtual tokens (P).
        layers: Layers (L), of the decoder in a seq2seq model.
        heads: Heads of keys and values (A_kv).
        width: Width of a head (D).
        doubled: Whether a file has an empty layer behind each layer, as a seq2seq prompt's has: PEFT hands
            the decoder's layer l the keys and values of layer 2 l (its number of layers taken round).
    """

    tokens: int
    layers: int
    heads: int
    width: int
    doubled: bool

    @classmethod
    def of(cls, config: PromptLearningConfig) -> Self:
        """Read the sizes of a configuration.

        Raises:
            ConfigError: If one is missing, or they do not fit together.
        """
        found = []
        for name in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"):
            value = getattr(config, name)
            if value is None:
                raise ConfigError(f"{name} is missing; a prefix needs it before it is made")
            found.append(int(value))
        tokens, layers, heads, width = found
        if width % heads:
            raise ConfigError(f"token_dim {width} is not a multiple of num_attention_heads {heads}; leave both out")
        return cls(tokens, layers, heads, width // heads, config.task_type == TaskType.SEQ_2_SEQ_LM)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape ``[L, 2, A_kv, P, D]``."""
        return self.layers, 2, self.heads, self.tokens, self.width

    @property
    def columns(self) -> int:
        """Numbers of one virtual token, L·2·A_kv·D."""
        return self.layers * 2 * self.heads * self.width

    def unflattened(self, flat: Tensor) -> Tensor:
        """Return ``[P, L·2·A_kv·D]`` as keys and values ``[L, 2, A_kv, P, D]``."""
        split = flat.view(self.tokens, self.layers, 2, self.heads, self.width)
        return split.permute(1, 2, 3, 0, 4)

    def flattened(self, key_values: Tensor) -> Tensor:
        """Return keys and values ``[L, 2, A_kv, P, D]`` as ``[P, L·2·A_kv·D]``.

        Raises:
            ConfigError: If they have another shape.
        """
        if tuple(key_values.shape) != self.shape:
            raise ConfigError(
                f"the text's keys and values must be {list(self.shape)}, got {list(key_values.shape)}; "
                "leave num_layers, num_attention_heads and token_dim out"
            )
        return key_values.permute(3, 0, 1, 2, 4).reshape(self.tokens, -1)

    def stored(self, flat: Tensor) -> dict[str, Tensor]:
        """Return what a file holds of ``[P, L·2·A_kv·D]``; for seq2seq ``[P, 2·L·2·A_kv·D]``."""
        kept = flat.detach().cpu().float().clone()
        if self.doubled:
            layers = kept.view(self.tokens, self.layers, 1, -1)
            kept = torch.cat([layers, torch.zeros_like(layers)], dim=2).flatten(1)
        return {PROMPT_KEY: kept}

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors with the layers that are used, whatever their shapes are otherwise."""
        given = dict(tensors)
        flat = given.get(PROMPT_KEY)
        if self.doubled and flat is not None and flat.dim() == 2 and len(flat) == self.tokens:
            layer = self.columns // self.layers
            found = flat.shape[1] // layer
            if flat.shape[1] % layer == 0 and found in (self.layers, 2 * self.layers):
                used = torch.arange(self.layers, device=flat.device) * 2 % found
                given[PROMPT_KEY] = flat.view(self.tokens, found, layer)[:, used].flatten(1)
        return given


@dataclass
class KeyValueConfig(PromptLearningConfig):
    """A prompt of keys and values, which may start as those of a text.

    ``token_dim`` is A_kv times D and ``num_attention_heads`` is A_kv, as PEFT writes them for grouped
    queries. The settings of the text only matter when a prompt is made, so they are no part of its file.
    """

    keys_and_values: ClassVar[bool] = True
    text_option: ClassVar[str]
    """Name of the option that holds the text."""

    tokenizer_name_or_path: str | None = setting(None, "Tokenizer of the text.", ours=True)
    tokenizer_kwargs: dict[str, Any] | None = setting(None, "Keyword arguments of the tokenizer.", ours=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under PEFT's keys: PEFT hands a seq2seq decoder every second of its layers."""
        values = super().to_dict()
        if self.task_type is TaskType.SEQ_2_SEQ_LM and self.num_layers is not None:
            values |= {"num_layers": 2 * self.num_layers, "num_transformer_submodules": 2}
        return values

    def check_text(self, *also: str) -> None:
        """Raise ConfigError if the text lacks its tokenizer, or options (``also`` too) would be ignored."""
        given = getattr(self, self.text_option) is not None
        if given and not self.tokenizer_name_or_path:
            raise ConfigError(f"{self.text_option} needs tokenizer_name_or_path; name the base's tokenizer")
        for name in ("tokenizer_name_or_path", "tokenizer_kwargs", *also):
            if getattr(self, name) and not given:
                raise ConfigError(
                    f"{name} would be ignored without {self.text_option}; give the text, or leave it out"
                )

    def initial(self, start: Start) -> Tensor | None:
        """Return keys and values ``[L, 2, A_kv, P, D]`` of the text, repeated or cut to P tokens.

        None where there is no text, and under ``inference_mode``.

        Raises:
            ConfigError: If there is nothing to read the text with, or the base cannot start from a text.
        """
        words: str | None = getattr(self, self.text_option)
        if words is None or self.inference_mode:
            return None
        if start.key_values is None:
            raise ConfigError(f"{self.text_option} needs the base model; use get_peft_model")
        ids = text_token_ids(words, str(self.tokenizer_name_or_path or ""), self.tokenizer_kwargs)
        return start.key_values(fitted(ids, self.num_virtual_tokens or 0, self.text_option))


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Return the first tokens of a cache in PEFT's flat order, ``[P, L·2·A_kv·D]``.

    Args:
        past_key_values: Keys and values ``[1, A_kv, T, D]`` of every layer: a transformers cache (of an
            encoder-decoder model its decoder's), or a sequence of pairs.
        num_virtual_tokens: Tokens to keep (P).

    Raises:
        ConfigError: If this is no such cache, holds more than one row or too few tokens, or its layers differ.
    """
    pairs = _pairs(past_key_values)
    shapes = {tuple(part.shape) for pair in pairs for part in pair}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise ConfigError(
            "past_key_values must hold keys and values [1, A_kv, T, D] of one shape in all layers, got "
            f"{', '.join(map(str, map(list, sorted(shapes)))) or 'none'}; use a cache that keeps every token"
        )
    rows, heads, tokens, width = shapes.pop()
    if rows != 1:
        raise ConfigError(
            f"past_key_values must be of a single sequence (batch=1), got {rows} rows; pass one of them"
        )
    if tokens < num_virtual_tokens:
        raise ConfigError(
            f"Need at least {num_virtual_tokens} cached tokens, got {tokens}; give a longer text, or lower "
            "num_virtual_tokens"
        )
    order = FlatOrder(num_virtual_tokens, len(pairs), heads, width, doubled=False)
    layers = [torch.stack([part[0, :, :num_virtual_tokens] for part in pair]) for pair in pairs]
    return order.flattened(torch.stack(layers))


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of a cache, of all tokens that it has seen."""
    cache = getattr(cache, "self_attention_cache", cache)
    try:
        if hasattr(cache, "layers"):
            found = [_seen(layer) for layer in cache.layers]
        else:
            found = [(layer[0], layer[1]) for layer in cache]
    except (TypeError, AttributeError, IndexError, KeyError):
        found = []
    if not found or not all(isinstance(part, Tensor) for pair in found for part in pair):
        raise ConfigError(
            "past_key_values must be a transformers cache, or a sequence of (keys, values) for each layer, "
            f"got {type(cache).__name__}; pass the outputs' past_key_values"
        )
    return found


def _seen(layer: Any) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values ``[B, A_kv, T, D]``, without the free columns of a static cache."""
    tokens, kept = int(layer.get_seq_length()), layer.keys.shape[-2]
    if tokens > kept:
        raise ConfigError(
            f"past_key_values no longer holds the first tokens: a layer keeps {kept} of {tokens}; use a cache "
            "that keeps every token, such as DynamicCache()"
        )
    return layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
