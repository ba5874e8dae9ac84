"""A tokenizer that knows the rows of prompts: special tokens at ids the base does not have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import AddedToken, PreTrainedTokenizerBase

from softprompt.errors import ArtifactError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = ("it broke again", " two  spaces", "Text : é 7\nLabel :")


@dataclass(frozen=True, slots=True)
class TextForm:
    """How a text says what the ids of a prompted input say.

    Attributes:
        before: What stands in front of the input's text.
        after: What stands behind it.
        add_special_tokens: How the tokenizer must be called.
    """

    before: str
    after: str
    add_special_tokens: bool


def check_name(name: str) -> None:
    """Check that a prompt's name can be part of a token.

    Raises:
        ConfigError: it has other characters than letters, digits, ``.``, ``_`` and ``-``, or is a path.
    """
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise ConfigError(
            f"a prompt's name is 1 to 64 letters, digits, '.', '_' and '-', came {name!r}; "
            "pass another (--name)"
        )


def token_text(name: str, index: int) -> str:
    """Return the special token of a prompt's row."""
    return f"<sp:{name}:{index}>"


def add_prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, lengths: Mapping[str, int]
) -> dict[str, list[int]]:
    """Add one special token per row and return their ids, all of them V or above.

    Args:
        tokenizer: changed in place. Where it has fewer ids than the base has embeddings, unused
            tokens fill the gap: the base can give those ids, so their rows must stay its own.
        vocabulary: rows of the base's embedding table (V).
        lengths: virtual tokens (P) by name.

    Raises:
        ArtifactError: the tokenizer already has such a token, or gives an id twice.
    """
    taken = tokenizer.get_vocab()
    free = max(taken.values(), default=-1) + 1
    _add(tokenizer, [f"<sp:unused:{index}>" for index in range(free, vocabulary)], taken)
    ids: dict[str, list[int]] = {}
    for name, length in lengths.items():
        texts = [token_text(name, index) for index in range(length)]
        _add(tokenizer, texts, taken)
        ids[name] = cast(list[int], tokenizer.convert_tokens_to_ids(texts))
    flat = [each for own in ids.values() for each in own]
    if len(set(flat)) != len(flat) or min(flat) < max(vocabulary, free):
        raise ArtifactError(
            f"expected ids from {max(vocabulary, free)} on for the prompt's tokens, the tokenizer "
            f"gave {flat[:3]}…; its ids have gaps, so use --to vllm or tgis"
        )
    return ids


def text_form(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ids: Sequence[int],
    encode: Callable[[str], tuple[int, ...]],
) -> TextForm | None:
    """Return a form of text that gives exactly the ids of a prompted input, None when none does.

    Args:
        tokenizer: the one with the prompt's tokens.
        prompt: the prompt's tokens as text.
        ids: their ids.
        encode: the ids of an input's text behind a prompt.
    """
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    for form in (
        TextForm(prompt, "", True),
        TextForm(prompt + bos, "", False),
        TextForm(prompt, eos, False),
        TextForm(prompt + bos, eos, False),
        TextForm(prompt + str(tokenizer.cls_token or ""), str(tokenizer.sep_token or ""), False),
    ):
        if all(_says(tokenizer, form, text, [*ids, *encode(text)]) for text in _PROBES):
            return form
    return None


def _says(
    tokenizer: PreTrainedTokenizerBase, form: TextForm, text: str, expected: list[int]
) -> bool:
    encoded: Any = tokenizer(
        form.before + text + form.after, add_special_tokens=form.add_special_tokens
    )
    return list(encoded["input_ids"]) == expected


def _add(tokenizer: PreTrainedTokenizerBase, texts: list[str], taken: Mapping[str, int]) -> None:
    known = [text for text in texts if text in taken]
    if known:
        raise ArtifactError(
            f"the tokenizer already has {known[0]!r}; convert onto the original base, or choose "
            "another name"
        )
    # Not normalized, nothing stripped: the text around the tokens keeps its spaces.
    tokens = [
        AddedToken(text, special=True, normalized=False, lstrip=False, rstrip=False)
        for text in texts
    ]
    tokenizer.add_tokens(tokens, special_tokens=True)
