"""``extended-vocab``: the base saved with prompts as extra vocabulary, for any engine to serve.

The rows of prompt NAME are the special tokens ``<sp:NAME:0>`` ..., in front of the input's ids.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softprompt.artifacts.files import require_empty, require_no_file, staged_folder
from softprompt.artifacts.formats.format import MEASURED, Export, Format, write_failed
from softprompt.artifacts.formats.vocabulary_rows import extend
from softprompt.artifacts.formats.vocabulary_tokens import (
    add_prompt_tokens,
    check_name,
    text_form,
    token_text,
)
from softprompt.artifacts.plain import PlainPrompt, plain_prompt, single_task
from softprompt.backbone import input_embedding, progress_on_terminals_only
from softprompt.errors import ConfigError, OutputExistsError

PROMPTS_FILE = "softprompt_prompts.json"
_NAME = "extended-vocab"


def _lacks(path: Path) -> str | None:
    return None if (path / PROMPTS_FILE).is_file() else f"no folder with {PROMPTS_FILE}"


def _write(export: Export, path: Path) -> Mapping[str, Any]:
    base = export.loaded()
    prompts = _prompts(export)
    _check_output(path, overwrite=export.overwrite)
    rows = {name: prompt.input_rows for name, prompt in prompts.items()}
    tokenizer, model = copy.deepcopy(base.tokenizer), base.model
    vocabulary = input_embedding(model).weight.shape[0]
    ids = add_prompt_tokens(tokenizer, vocabulary, {name: len(r) for name, r in rows.items()})
    extension = extend(model, rows, ids)
    _suppress(model, vocabulary, extension.vocabulary)
    entries = {
        name: _entry(export, tokenizer, prompts[name], name, own) for name, own in ids.items()
    }
    record = {
        "format_version": 1,
        "base_model": base.name,
        **asdict(extension),
        "prompts": entries,
    }
    try:
        with staged_folder(path) as staged, progress_on_terminals_only():
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            (staged / PROMPTS_FILE).write_text(text, encoding="utf-8")
    # ValueError: transformers refuses to save generation settings that contradict each other.
    except (OSError, ValueError) as error:
        raise write_failed(path, error) from error
    return record


def _prompts(export: Export) -> dict[str, PlainPrompt]:
    prompts = {export.name: export.plain()}
    for name, stored in export.others.items():
        if name in prompts:
            raise ConfigError(f"two prompts are called {name!r}; give one another name (--name)")
        prompts[name] = plain_prompt(single_task(stored, None), export.to)
    for name in prompts:
        check_name(name)
    return prompts


def _check_output(path: Path, *, overwrite: bool) -> None:
    if not overwrite:
        require_empty(path)
        return
    require_no_file(path)
    # The folder is replaced as a whole, so it must be one that this wrote.
    if path.is_dir() and any(path.iterdir()) and not (path / PROMPTS_FILE).is_file():
        raise OutputExistsError(
            f"{path} is no earlier export ({PROMPTS_FILE} is not in it), and an export replaces "
            "the whole folder: choose another one"
        )


def _suppress(model: PreTrainedModel, old: int, new: int) -> None:
    """Keep ``generate`` from giving ids that only prompts have."""
    settings = model.generation_config
    if settings is not None:
        known = settings.suppress_tokens or []
        settings.suppress_tokens = sorted({*known, *range(old, new)})


def _entry(
    export: Export, tokenizer: Any, prompt: PlainPrompt, name: str, ids: list[int]
) -> dict[str, Any]:
    text = "".join(token_text(name, index) for index in range(len(ids)))
    form = None if export.encode is None else text_form(tokenizer, text, ids, export.encode)
    manifest = prompt.stored.manifest
    template = manifest.template if manifest else "{{input}}"
    return {
        "token_ids": ids,
        "tokens": text,
        # A causal model's answer begins with the space that its template ends in.
        "template": template if prompt.seq2seq else template.rstrip(" "),
        "max_source_length": manifest.max_source_length if manifest else None,
        "max_target_length": manifest.max_target_length if manifest else None,
        "labels": list(manifest.labels) if manifest and manifest.labels else None,
        "text": None if form is None else asdict(form),
    }


EXTENDED_VOCABULARY = Format(
    _NAME,
    f"a model folder with {PROMPTS_FILE}",
    _lacks,
    None,
    _write,
    writes_with_base=True,
    loses=(*MEASURED, "task", "base_fingerprint"),
)
