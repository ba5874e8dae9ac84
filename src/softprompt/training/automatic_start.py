"""``prompt_tuning_init_method AUTO``: the ordinary initialisation that it stands for, by what is known of the task.

Labels where all targets are labels and each has room for a virtual token; else the text that was given; else the
words of the template, or of the chat template that renders the records; else sampled vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from softprompt.data import Verbalizer
from softprompt.training.tuning_config import AUTO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from softprompt.backbone import Base
    from softprompt.training.examples import TaskData
    from softprompt.training.settings import TuneSettings

logger = logging.getLogger(__name__)


def resolved(settings: TuneSettings, base: Base, data: Sequence[TaskData]) -> TuneSettings:
    """Return settings with an ordinary initialisation in the place of AUTO, and log which; others as they are."""
    tuning = settings.tuning_config
    if tuning.prompt_tuning_init_method != AUTO or not settings.starts_from_a_method:
        return settings
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
