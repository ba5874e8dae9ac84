"""PEFT's prompt-learning methods as a table: the keys and the tensors of each one's folder.

The keys are those of PEFT 0.21's configuration classes; PEFT warns about any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.errors import ArtifactError
from softprompt.prompts import CONFIG_NAME, PeftType

PROMPT_KEY = "prompt_embeddings"
COLS_KEY = "prefix_task_cols"
ROWS_KEY = "prefix_task_rows"

Shape = tuple[int | None, ...]
"""Sizes a tensor must have; None accepts any."""

OUR_KEYS = frozenset({"prompt_sees_input", "output_model_types", "placement"})
"""Options that PEFT does not have; a config that holds one has a ``peft_type`` that PEFT refuses."""

_SHARED_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "token_dim",
    }
)
_TEXT_KEYS = frozenset(
    {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


@dataclass(frozen=True, slots=True)
class PeftLayout:
    """What the folder of one method holds.

    Attributes:
        keys: What ``adapter_config.json`` may hold.
        shapes: The tensors a config asks for, by name.
        meaning: How the sizes of ``prompt_embeddings`` are made, for messages.
    """

    keys: frozenset[str]
    shapes: Callable[[Mapping[str, Any]], dict[str, Shape]]
    meaning: str = "num_virtual_tokens * num_transformer_submodules, token_dim"


def layout_of(config: Mapping[str, Any]) -> PeftLayout:
    """Return the layout of the method that a config names.

    Raises:
        ArtifactError: another method than those of the table.
    """
    kind = config.get("peft_type")
    if kind not in list(PeftType):
        raise ArtifactError(
            f"expected peft_type {' or '.join(PeftType)} in {CONFIG_NAME}, came "
            f"{kind!r}: load other adapters with peft"
        )
    return LAYOUTS[PeftType(str(kind))]


def prompt_rows(config: Mapping[str, Any]) -> int:
    """Return P * S: virtual tokens times the transformer submodules that each get their own."""
    submodules = count_in(config, "num_transformer_submodules")
    if submodules is None:
        submodules = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    return (count_in(config, "num_virtual_tokens", required=True) or 0) * submodules


def count_in(config: Mapping[str, Any], key: str, *, required: bool = False) -> int | None:
    """Return a size of a config, None when it is not set.

    Raises:
        ArtifactError: it is no whole number above 0, or it is required and not set.
    """
    value = config.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(
            f"expected {key} in {CONFIG_NAME} to be a whole number above 0, came {value!r}: "
            "restore it from the original"
        )
    return value


def _rows(config: Mapping[str, Any]) -> dict[str, Shape]:
    return {PROMPT_KEY: (prompt_rows(config), count_in(config, "token_dim"))}


def _factors(config: Mapping[str, Any]) -> dict[str, Shape]:
    tasks, rank = (count_in(config, key) or 1 for key in ("num_tasks", "num_ranks"))
    rows, width = prompt_rows(config), count_in(config, "token_dim")
    return {
        PROMPT_KEY: (rows, width),
        COLS_KEY: (tasks, rows, rank),
        ROWS_KEY: (tasks, rank, width),
    }


def _keys_and_values(config: Mapping[str, Any]) -> dict[str, Shape]:
    # P whatever S is: PEFT gives both parts of a seq2seq model the same keys and values.
    layers, width = count_in(config, "num_layers"), count_in(config, "token_dim")
    columns = None if layers is None or width is None else layers * 2 * width
    return {PROMPT_KEY: (count_in(config, "num_virtual_tokens", required=True), columns)}


_PROMPT_TUNING = PeftLayout(_SHARED_KEYS | _TEXT_KEYS, _rows)

LAYOUTS: Mapping[PeftType, PeftLayout] = {
    PeftType.PROMPT_TUNING: _PROMPT_TUNING,
    PeftType.EXTENDED_PROMPT_TUNING: PeftLayout(_PROMPT_TUNING.keys | OUR_KEYS, _rows),
    PeftType.MULTITASK_PROMPT_TUNING: PeftLayout(
        _PROMPT_TUNING.keys
        | {
            "num_ranks",
            "num_tasks",
            "prompt_tuning_init_state_dict_path",
            "prompt_tuning_init_task",
        },
        _factors,
    ),
    PeftType.P_TUNING: PeftLayout(
        _SHARED_KEYS
        | {
            "encoder_dropout",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_reparameterization_type",
        },
        _rows,
    ),
    PeftType.PREFIX_TUNING: PeftLayout(
        _SHARED_KEYS | {"encoder_hidden_size", "init_weights", "prefix_projection"},
        _keys_and_values,
        "num_virtual_tokens, num_layers * 2 * token_dim",
    ),
    PeftType.CARTRIDGE: PeftLayout(
        _SHARED_KEYS | {"num_frozen_tokens"},
        _keys_and_values,
        "num_virtual_tokens, num_layers * 2 * token_dim",
    ),
    PeftType.CPT: PeftLayout(
        _SHARED_KEYS
        | {
            "cpt_mask",
            "cpt_token_ids",
            "cpt_tokens_type_mask",
            "opt_loss_decay_factor",
            "opt_projection_epsilon",
            "opt_projection_format_epsilon",
            "opt_weighted_loss_type",
            "tokenizer_name_or_path",
        },
        _rows,
    ),
}

PEFT_KEYS = _PROMPT_TUNING.keys
"""The keys of PEFT's ``PromptTuningConfig``."""
