"""What a prompt starts from, by the task's data: what AUTO stands for, and training records.

The default is a normal draw where all targets are labels, else sampled vocabulary (docs/quality.md has the table).

AUTO is labels where all targets are labels and each has room for a virtual token; else the text that was given;
else the words of the template, or of the chat template that renders the records; else sampled vocabulary.

Records are the start of keys and values, the first tokens of some or whole demonstrations, and CPT's context. With
demonstrations the prompt is as long as some training records in full, and starts at the base's keys and values of
them, as few-shot prompting does, and is trained from there (context tuning, arXiv:2507.04221). A record among them
does not see its own keys and values while it is trained on, which would show it its answer (leave one out).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

from softprompt.backbone import key_values
from softprompt.data import Verbalizer
from softprompt.errors import ConfigError
from softprompt.prompts import PROMPT_KEY, FlatOrder
from softprompt.training.tuning_config import AUTO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from softprompt.backbone import Base
    from softprompt.data import RowTokenizer, TokenRow
    from softprompt.prompts import CPTConfig, PromptLearningConfig, PromptModule
    from softprompt.training.examples import TaskData
    from softprompt.training.settings import TuneSettings

logger = logging.getLogger(__name__)

_TEXTS = ("prefix_tuning_init_text", "cartridge_init_text")
_BEFORE, _INPUT, _AFTER, _LABEL = 1, 2, 3, 4
"""What a token of an example is: template before the input, input, template behind it, label."""


def resolved(settings: TuneSettings, base: Base, data: Sequence[TaskData]) -> TuneSettings:
    """Return settings that name an initialisation, in the place of AUTO or none, and log which, but for RANDOM."""
    tuning = settings.tuning_config
    if tuning.prompt_tuning_init_method not in (AUTO, None) or not settings.starts_from_a_method:
        return settings
    if tuning.prompt_tuning_init_method is None:
        texts = not settings.multitask and any(task.labels is None for task in data)
        if texts:
            logger.info("the prompt starts from SAMPLE_VOCAB, the default where targets are no labels")
        default = replace(tuning, prompt_tuning_init_method="SAMPLE_VOCAB" if texts else "RANDOM")
        return replace(settings, tuning_config=default)
    labels = {label for task in data for label in task.labels or ()}
    known, given = all(task.labels for task in data), tuning.prompt_tuning_init_text
    text, special, why = given, tuning.prompt_tuning_init_special_tokens, "as given"
    if known and len(labels) <= tuning.num_virtual_tokens:
        method, text, special = "LABELS", None, True
        why = f"{len(labels)} labels" + (", not prompt_tuning_init_text" if given else "")
    elif given:
        method = "TEXT"
    elif words := next((found for task in data if (found := _words(task, base))), ""):
        method, text, special, why = "TEXT", words, False, f"the words of the template {words!r}"
    else:
        method, why = "SAMPLE_VOCAB", "neither labels nor words to start from"
    if known and method != "LABELS":
        why += f"; {len(labels)} labels are more than the {tuning.num_virtual_tokens} virtual tokens"
    logger.info("the prompt starts from %s: %s", method, why)
    changes = {"prompt_tuning_init_text": text, "prompt_tuning_init_special_tokens": special}
    changes["prompt_tuning_init_method"] = method
    return replace(settings, tuning_config=replace(tuning, **cast(Any, changes)))


def _words(task: TaskData, base: Base) -> str:
    """Return what a task's template says around the record's own text; empty where that has no letter."""
    if task.chats and base.tokenizer.chat_template and not base.is_encoder_decoder:
        said = _of_chat_template(base)
    else:
        said = " ".join(Verbalizer(task.plain_template).literals) if task.plain_template else ""
    words = " ".join(said.split())
    return words if any(each.isalnum() for each in words) else ""


def _of_chat_template(base: Base) -> str:
    """Return what the chat template prints around an empty turn, without special tokens; empty if it refuses."""
    tokenizer = cast(Any, base.tokenizer)
    turn = [{"role": "user", "content": ""}]
    try:
        printed = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception:  # templates raise what they like
        return ""
    ids = tokenizer(printed, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


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
    return replace(config, num_virtual_tokens=len(ids)), Demonstrations(ids, hidden)


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


def first_tokens(rows: Sequence[TokenRow], count: int, tokenizer: RowTokenizer) -> list[int]:
    """Return tokens of the first records, one behind the other; repeated where there are too few.

    Args:
        rows: The records, at least one.
        count: Tokens wanted.
        tokenizer: What tokenised the records.
    """
    ids: list[int] = []
    for number, row in enumerate(rows):
        ids += tokens_of_example(row, number, tokenizer)
        if len(ids) >= count:
            break
    return (ids * -(-count // len(ids)))[:count]


def tokens_of_example(row: TokenRow, number: int, tokenizer: RowTokenizer) -> tuple[int, ...]:
    """Return the tokens of a record with its answer behind ``number`` others."""
    return (*row.source[_starts_text(row, number, tokenizer) :], *row.target)


def with_context(
    config: CPTConfig, rows: Sequence[TokenRow], tokenizer: RowTokenizer, *, count: int, room: int | None
) -> tuple[CPTConfig, int]:
    """Return a configuration whose context is the first records, and how many these are.

    Args:
        config: The other options.
        rows: The records, at least one.
        tokenizer: What tokenised the records; tells the template's tokens from the input's.
        count: Records wanted.
        room: Tokens that the context may have; one record is taken whether it fits or not. None is no limit.
    """
    ids: list[int] = []
    kinds: list[int] = []
    used = 0
    for number, row in enumerate(rows[:count]):
        own_ids, own_kinds = _example(row, number, tokenizer)
        if used and room is not None and len(ids) + len(own_ids) > room:
            break
        ids += own_ids
        kinds += own_kinds
        used += 1
    made = replace(config, num_virtual_tokens=None, cpt_token_ids=ids, cpt_mask=None, cpt_tokens_type_mask=kinds)
    return made, used


def _example(row: TokenRow, number: int, tokenizer: RowTokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of a record and what each of them is, as ``cpt_tokens_type_mask`` has it."""
    empty, _ = tokenizer.source(dict.fromkeys(tokenizer.verbalizer.fields, ""))
    most = min(len(row.source), len(empty))
    before = _shared(row.source, empty, most)
    after = _shared(row.source[::-1], empty[::-1], most - before)
    inside = len(row.source) - before - after
    kinds = [_BEFORE] * before + [_INPUT] * inside + [_AFTER] * after + [_LABEL] * len(row.target)
    start = _starts_text(row, number, tokenizer)
    ids = [*row.source, *row.target]
    return ids[start:], [kind + _LABEL * number for kind in kinds[start:]]


def _shared(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Return how many tokens two texts have in common at their start."""
    pairs = zip(one[:most], other[:most], strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), most)


def _starts_text(row: TokenRow, number: int, tokenizer: RowTokenizer) -> int:
    """Return how many tokens to leave out: the token that starts every text stands in front alone."""
    bos = tokenizer.tokenizer.bos_token_id
    return int(number > 0 and bos is not None and row.source[:1] == (bos,))
