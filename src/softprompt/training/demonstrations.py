"""Training records as the start of keys and values: the first tokens of some, or whole demonstrations.

Demonstrations: the prompt is as long as some training records in full, and starts at the base's keys and values of
them, as few-shot prompting does, and is trained from there (context tuning, arXiv:2507.04221). A record among them
does not see its own keys and values while it is trained on, which would show it its answer (leave one out).
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from softprompt.backbone import key_values
from softprompt.errors import ConfigError
from softprompt.prompts import PROMPT_KEY, FlatOrder
from softprompt.training.examples import first_tokens, tokens_of_example

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from softprompt.backbone import Base
    from softprompt.data import RowTokenizer, TokenRow
    from softprompt.prompts import PromptLearningConfig, PromptModule
    from softprompt.training.settings import TuneSettings

logger = logging.getLogger(__name__)

_TEXTS = ("prefix_tuning_init_text", "cartridge_init_text")


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """Training records as one text.

    Attributes:
        ids: Its tokens.
        hidden: The tokens of each record, but for the first of all, the attention sink.
    """

    ids: list[int]
    hidden: Mapping[TokenRow, frozenset[int]]


def with_demonstrations(
    config: PromptLearningConfig, rows: Sequence[TokenRow], tokenizer: RowTokenizer, settings: TuneSettings
) -> tuple[PromptLearningConfig, Demonstrations]:
    """Return a configuration as long as the demonstrations, and these: as many records of each label, in turns.

    Args:
        config: The other options.
        rows: The training records.
        tokenizer: What tokenised them.
        settings: Say how many.

    Raises:
        ConfigError: Something else says what the prompt is, or there are too few records.
    """
    count = settings.demonstrations or 0
    given = [name for name in (*_TEXTS, "init_weights", "prefix_projection") if getattr(config, name, None)]
    if settings.config is not None and settings.config.num_virtual_tokens is not None:
        given.append("num_virtual_tokens")
    if given:
        raise ConfigError(f"{given[0]} and demonstrations both say what the prompt is; give one of them")
    if tokenizer.seq2seq:
        raise ConfigError("demonstrations need a causal base: a decoder's keys depend on the input; leave them out")
    if count > len(rows):
        raise ConfigError(f"demonstrations is {count}, there are {len(rows)} training records; lower it")
    ids: list[int] = []
    hidden: dict[TokenRow, frozenset[int]] = {}
    for number, row in enumerate(_in_turns(rows, settings)[:count]):
        start = len(ids)
        ids += tokens_of_example(row, number, tokenizer)
        hidden[row] = hidden.get(row, frozenset()) | frozenset(range(max(start, 1), len(ids)))
    logger.info("the keys and values start at those of %d demonstrations, %d tokens", count, len(ids))
    return dataclasses.replace(config, num_virtual_tokens=len(ids)), Demonstrations(ids, hidden)


def _in_turns(rows: Sequence[TokenRow], settings: TuneSettings) -> list[TokenRow]:
    """Return rows in order, those of different labels in turns where a few targets come again and again."""
    targets: dict[tuple[int, ...], list[TokenRow]] = {}
    for row in rows:
        targets.setdefault(row.target, []).append(row)
    if settings.task == "generation" or 2 * len(targets) > len(rows):
        return list(rows)
    return [row for turn in zip_longest(*targets.values()) for row in turn if row is not None]


def key_values_start(
    module: PromptModule,
    base: Base,
    rows: Sequence[TokenRow],
    tokenizer: RowTokenizer,
    settings: TuneSettings,
    chosen: Demonstrations | None,
) -> Tensor | None:
    """Start keys and values that have no other start at those of training records.

    Returns:
        Keys and values of a text in the base, ``[L, 2, A_kv, T, D]``.
    """
    config = module.config
    assert config is not None
    if any(getattr(config, name, None) for name in _TEXTS):
        return module.prompt().detach().prefix
    ids = first_tokens(rows, config.num_virtual_tokens or 1, tokenizer) if chosen is None else chosen.ids
    values = key_values(base.model, ids)
    otherwise = getattr(config, "init_weights", None) or getattr(config, "prefix_projection", False)
    if otherwise or not (settings.init_from_records or chosen):
        return values
    if base.is_encoder_decoder:
        logger.info("the keys and values start at random: a decoder's depend on the input")
        return values
    module.load_stored({PROMPT_KEY: FlatOrder.of(config).flattened(values)})
    if chosen is None:
        logger.info("the keys and values start at those of the first training records, %d tokens", len(ids))
    return values
