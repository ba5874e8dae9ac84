"""First values of a prompt: functions that return embeddings ``[P, H]`` in float32, and the ids of initial texts.

``embed`` maps token ids ``[N]`` to embeddings ``[N, H]`` and is the base's own embedding module,
so that a scale inside it (Gemma, BART) is part of the values, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from softprompt.bundled import source_of
from softprompt.errors import ConfigError, broken, no_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Embed = Callable[[Tensor], Tensor]

_RMS_SAMPLE = 4096
"""Embeddings looked at for the rms: enough for three digits, cheap for vocabularies of 256k."""


def normal(length: int, width: int, *, std: float, generator: torch.Generator | None) -> Tensor:
    """Draw embeddings ``[P, H]`` from N(0, std²)."""
    return torch.randn(length, width, generator=generator) * std


def fitted(ids: Sequence[int], length: int, text: str) -> list[int]:
    """Return ``length`` token ids: repeated when there are fewer, cut from the right when more.

    Args:
        ids: Token ids of a text.
        length: Virtual tokens wanted (P).
        text: Name of the option that holds the text, for messages.

    Raises:
        ConfigError: If there is no id at all.
    """
    if not ids:
        raise ConfigError(f"{text} has no tokens; give a text with at least one")
    return [ids[i % len(ids)] for i in range(length)]


def from_tokens(length: int, ids: Sequence[int], embed: Embed) -> Tensor:
    """Embed the tokens of a text, repeated or cut to ``length`` tokens.

    Raises:
        ConfigError: If there is no token at all.
    """
    return _embed(fitted(ids, length, "prompt_tuning_init_text"), embed)


def sampled(length: int, vocabulary: int, embed: Embed, *, generator: torch.Generator | None) -> Tensor:
    """Embed ``length`` tokens drawn uniformly from the vocabulary."""
    return _embed(torch.randint(0, vocabulary, (length,), generator=generator).tolist(), embed)


def from_labels(
    length: int,
    labels: Sequence[Sequence[int]],
    vocabulary: int,
    embed: Embed,
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Start the first virtual tokens at the labels and the others at sampled vocabulary.

    A label of several sub-tokens is the mean of their embeddings (Lester et al. 2021, 3.2).

    Raises:
        ConfigError: If there are more labels than virtual tokens, or an empty label.
    """
    if len(labels) > length:
        raise ConfigError(
            f"LABELS needs a virtual token for each of the {len(labels)} labels, num_virtual_tokens is "
            f"{length}; raise it, or use TEXT"
        )
    if not all(labels):
        raise ConfigError("LABELS found a label without tokens; remove the empty line")
    means = [_embed(ids, embed).mean(dim=0, keepdim=True) for ids in labels]
    rest = sampled(length - len(labels), vocabulary, embed, generator=generator)
    return torch.cat([*means, rest])


def text_token_ids(text: str, tokenizer: str, options: Mapping[str, Any] | None) -> list[int]:
    """Tokenise an initial text, special tokens included as in PEFT.

    Args:
        text: The text.
        tokenizer: Name or folder of the tokenizer.
        options: Keyword arguments of ``AutoTokenizer.from_pretrained``; ``add_special_tokens=False``
            among them leaves the tokenizer's special tokens out of the text.

    Raises:
        ConfigError: If the tokenizer cannot be loaded, or the text holds half a character.
    """
    _check_whole(text)
    given = dict(options or {})
    special = bool(given.pop("add_special_tokens", True))
    ids: list[int] = load_tokenizer(tokenizer, **given)(text, add_special_tokens=special)["input_ids"]
    return ids


def _check_whole(text: str) -> None:
    if problem := broken(text):
        raise ConfigError(f"the initial text holds {problem}; correct it")


def label_token_ids(labels: str, tokenizer: str) -> list[list[int]]:
    """Tokenise each line of a text by itself, without special tokens.

    Raises:
        ConfigError: If the tokenizer cannot be loaded, or the text holds half a character.
    """
    _check_whole(labels)
    loaded = load_tokenizer(tokenizer)
    return [loaded(line, add_special_tokens=False)["input_ids"] for line in labels.split("\n")]


def load_tokenizer(name: str, **options: object) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a name or folder; ``demo`` is the bundled model's.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer  # a prompt without a text does not wait for it

    try:
        source, more = source_of(name)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, **more, **{"trust_remote_code": False, **options}
        )
    except Exception as cause:
        first = no_folder(name) or (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ConfigError(
            f"the tokenizer {name!r} for the initial prompt cannot be loaded: {first[:160]}"
        ) from cause
    return tokenizer


def lookup(table: nn.Embedding) -> Embed:
    """Return the lookup of ids in a table wherever its weight is; an offloaded one takes them from anywhere."""
    device = None if table.weight.is_meta else table.weight.device
    return lambda ids: cast(Tensor, table(ids.to(device)))


@torch.no_grad()
def rms(embed: Embed, vocabulary: int) -> float:
    """Return the root mean square of an embedding, over evenly spaced ids of the vocabulary."""
    step = max(1, vocabulary // _RMS_SAMPLE)
    return float(embed(torch.arange(0, vocabulary, step)).float().square().mean().sqrt())


def drawn_seed(generator: torch.Generator | None) -> int:
    """Return a seed drawn from a generator; None is torch's global one."""
    return int(torch.randint(2**31 - 1, (), generator=generator))


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Make layers that are built inside the context depend on ``generator`` alone; None changes nothing."""
    if generator is None:
        yield
        return
    seed = drawn_seed(generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _embed(ids: Sequence[int], embed: Embed) -> Tensor:
    with torch.no_grad():
        return embed(torch.tensor(ids, dtype=torch.long)).detach().to("cpu", torch.float32).clone()
