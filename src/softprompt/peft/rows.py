"""What each row of a call has: its prompt, its task, where the prompt stands, and a context's own labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import cached_tokens, start_id
from softprompt.engine import IGNORED, Layout, placement_of
from softprompt.errors import AdapterError, ConfigError
from softprompt.peft.adapters import BASE
from softprompt.peft.inputs import text_mask, tokens_of
from softprompt.prompts import CPTConfig, Placement, PromptLearningConfig, TaskType, cpt_columns, cpt_loss

TaskIds = Tensor | Sequence[int] | int
"""One task for the batch, or one a row."""

PromptAt = Tensor | Sequence[int] | int
"""Real tokens before the prompt, for the batch or for each row."""


class RowPrompt(NamedTuple):
    """The prompt of one row: its name, ``__base__`` for none, and its task."""

    name: str
    task: int = 0


def chosen_rows(
    names: Sequence[str] | None,
    task_ids: TaskIds | None,
    *,
    active: str,
    batch: int,
    tasks_of: Callable[[str], int | None],
) -> list[RowPrompt]:
    """Return the prompt of each of a call's ``batch`` rows: the caller's names, or the active prompt for all.

    ``task_ids`` is one task for all rows or for each, 0 for prompts with one task and for none;
    ``tasks_of`` gives the tasks (K) of a named multitask prompt, None for any other.

    Raises:
        AdapterError: If there is not one name a row.
        ConfigError: If task ids are missing, given to prompts without tasks, or out of range.
    """
    chosen = [active] * batch if names is None else list(names)
    if len(chosen) != batch:
        raise AdapterError(f"adapter_names must hold one name a row: {batch} rows, got {len(chosen)} names")
    known = {name: None if name == BASE else tasks_of(name) for name in dict.fromkeys(chosen)}
    if task_ids is None:
        for name, count in known.items():
            if count is not None:
                raise ConfigError(f"task_ids cannot be None: {name!r} has {count} tasks; give the task of each row")
        return [RowPrompt(name) for name in chosen]
    if all(count is None for count in known.values()):
        raise ConfigError("task_ids belong to multitask prompts; this prompt has one task, leave them out")
    tasks = one_a_row("task_ids", task_ids, batch)
    for name, task in set(zip(chosen, tasks, strict=True)):
        count = known[name]
        if count is None and task:
            raise ConfigError(
                f"task_ids of rows without tasks are 0, row prompt {name!r} has got {task}; use 0 there"
            )
        if count is not None and not 0 <= task < count:
            raise ConfigError(f"task_ids of {name!r} go from 0 to {count - 1}, got {task}; use one of those")
    return [RowPrompt(name, task) for name, task in zip(chosen, tasks, strict=True)]


def one_a_row(what: str, values: Tensor | Sequence[int] | int, batch: int) -> list[int]:
    """Return one integer a row from one for all, or one for each.

    Raises:
        ConfigError: If ``values`` is something else; ``what`` names it.
    """
    try:
        given = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        given = None
    whole = given is not None and not given.is_floating_point() and given.dtype != torch.bool
    if given is None or not whole or given.dim() > 1 or given.numel() not in (1, batch):
        got = repr(values) if given is None else f"{given.dtype} {list(given.shape)}"
        raise ConfigError(
            f"{what} must be one integer, or one for each of the {batch} rows, got {got.removeprefix('torch.')}"
        )
    return [int(value) for value in given.expand(batch).tolist()]


def prompt_offsets(
    model: PreTrainedModel,
    rows: Sequence[RowPrompt],
    configs: dict[str, PromptLearningConfig],
    inputs: dict[str, Any],
    given: PromptAt | None,
) -> list[int] | None:
    """Return how many real tokens stand before each row's prompt, None when all prompts stand in front.

    Without ``given``, the caller's own offsets, a suffix stands behind the input: before the first label
    of its row, and behind all tokens of a row without labels.

    Raises:
        ConfigError: If offsets are of the wrong shape or would be ignored, or a placement needs them.
    """
    if given is not None:
        offsets = one_a_row("prompt_at", given, len(rows))
        if min(offsets) < 0:
            raise ConfigError(f"prompt_at counts tokens from 0 on, got {min(offsets)}")
        _check_in_input(rows, configs, offsets)
        return offsets
    placements = [Placement.PREFIX if row.name == BASE else placement_of(configs[row.name]) for row in rows]
    encoded = inputs.get("encoder_outputs") is not None
    if encoded or all(placement is Placement.PREFIX for placement in placements):
        return None
    if Placement.CHAT_SYSTEM in placements:
        raise ConfigError(
            "placement chat_system needs prompt_at, the tokens before the prompt in each row; "
            "softprompt.load(...) knows the chat template and finds it by itself"
        )
    mask = text_mask(inputs, tokens_of(inputs))
    none = [0] * len(rows)
    begins = _begins(model, inputs, mask) if Placement.AFTER_BOS in placements else none
    predicts = any(config.task_type is TaskType.CAUSAL_LM for config in configs.values())
    labels = inputs.get("labels") if predicts and not cached_tokens(inputs) else None
    behind = Placement.SUFFIX in placements
    ends = _ends(mask, labels, [p is Placement.SUFFIX for p in placements]) if behind else none
    return [
        {Placement.PREFIX: 0, Placement.AFTER_BOS: begin, Placement.SUFFIX: end}[placement]
        for placement, begin, end in zip(placements, begins, ends, strict=True)
    ]


def _check_in_input(
    rows: Sequence[RowPrompt], configs: dict[str, PromptLearningConfig], offsets: Sequence[int]
) -> None:
    """Refuse an offset of a prompt that has no virtual tokens in the (encoder's) input."""
    for row, offset in zip(rows, offsets, strict=True):
        config = configs.get(row.name)
        if config is None:
            continue
        decoder = "ENCODER" not in config.model_types()
        if offset and (decoder or config.keys_and_values):
            where = "before the decoder's input" if decoder else "before all tokens of each layer"
            raise ConfigError(f"prompt_at would be ignored: the prompt {row.name!r} stands {where}; leave it out")


def _ends(mask: Tensor, labels: Tensor | None, wanted: Sequence[bool]) -> list[int]:
    """Return the real tokens of each row before its first label; all of a row without one.

    A prompt behind its row's labels would predict none of them and get no gradient.
    """
    real = mask.long()
    if labels is None:
        return [int(count) for count in real.sum(1).tolist()]
    answered = (labels != IGNORED).long().cumsum(1).to(real.device) > 0
    before = [int(count) for count in real.masked_fill(answered, 0).sum(1).tolist()]
    for number, (count, behind) in enumerate(zip(before, wanted, strict=True)):
        if behind and not count:
            raise ConfigError(
                f"placement suffix stands between input and answer, but row {number} begins with a label; "
                f"give the input's labels {IGNORED}, or give prompt_at"
            )
    return before


def _begins(model: PreTrainedModel, inputs: dict[str, Any], mask: Tensor) -> list[int]:
    """Return 1 for rows that begin with the token that starts every text, else 0."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise ConfigError("placement after_bos needs input_ids; pass them, or give prompt_at")
    first = mask.long().argmax(1, keepdim=True)
    start = start_id(model)
    found = ids.gather(1, first.to(ids.device))[:, 0]
    return [int(i) for i in (torch.ones_like(found) if start is None else found == start).tolist()]


TYPES = "input_type_mask"
"""Argument of PEFT's forward: what each token of the text is."""


@dataclass(frozen=True, slots=True)
class ContextLabels:
    """Labels ``[B, T]`` and token types ``[B, T]`` of a call, kept from the base, whose loss is another."""

    config: CPTConfig
    labels: Tensor
    types: Tensor | None

    def scored(self, outputs: Any, layout: Layout | None) -> Any:
        """Return the base's outputs with the loss of context and text.

        Raises:
            ConfigError: If the context is not among the call's columns.
        """
        if layout is None:
            raise ConfigError(
                "labels of a context-aware prompt need the whole row, this call goes on from a cache; "
                "leave the cache or labels out"
            )
        labels, types = cpt_columns(self.config, self.labels, self.types, context=layout.slot, text=layout.text)
        if isinstance(outputs, tuple):
            return (cpt_loss(outputs[0], labels, types, self.config), *outputs)
        loss = cpt_loss(outputs.logits, labels, types, self.config)
        return dataclasses.replace(outputs, loss=loss)


def without_context_labels(
    inputs: dict[str, Any], names: Sequence[str], configs: Mapping[str, PromptLearningConfig]
) -> tuple[dict[str, Any], ContextLabels | None]:
    """Return a call's arguments for the base, and the labels that go into the context's loss instead.

    Raises:
        ConfigError: If rows with labels have different prompts, one of them a context.
    """
    contexts = {name: config for name, config in configs.items() if isinstance(config, CPTConfig)}
    if not contexts:
        return inputs, None
    inputs = dict(inputs)
    types, labels = inputs.pop(TYPES, None), inputs.get("labels")
    used = set(names)
    if labels is None or not used & contexts.keys():
        return inputs, None
    if len(used) > 1:
        raise ConfigError(
            f"labels with context-aware prompts need one prompt for the batch, got {', '.join(sorted(used))}; "
            "split the batch"
        )
    del inputs["labels"]
    return inputs, ContextLabels(contexts[used.pop()], labels, types)
