"""What a listing shows of a prompt: a few words of its two small files, for each of its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.artifacts import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Manifest,
    check_config,
    manifest_of_task,
    parse_object,
)
from softprompt.errors import ArtifactError, SoftPromptError
from softprompt.prompts import CONFIG_NAME, PeftType
from softprompt.server.folder import FILES, Root, Signature

_TASKS = 1000
"""Tasks of a folder without a record; a number in a small file must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What the small files of a prompt say.

    Attributes:
        signature: Of the files it is about.
        created: When its configuration was written, seconds since 1970.
        facts: Plain JSON values for a listing.
        problem: Why it cannot be read; its weights may still be damaged where this is None.
    """

    signature: Signature
    created: int
    facts: dict[str, Any]
    problem: str | None = None


def outlined(root: Root, name: str, signature: Signature, most: int) -> Outline:
    """Read a prompt's small files.

    Raises:
        AdapterError: There is no such prompt.
    """
    stamp = signature[0]
    created = stamp[2] // 10**9 if stamp else 0
    if signature[FILES.index(WEIGHTS_NAME)] is None:
        problem = f"expected {WEIGHTS_NAME} in {name}, it has none: copy it there"
        return Outline(signature, created, {}, problem)
    try:
        config = _object(root, name, CONFIG_NAME, most) or {}
        check_config(config)
        record = _object(root, name, MANIFEST_NAME, most)
        manifest = None if record is None else Manifest.from_dict(record)
        tasks = tasks_of(config, manifest)
    except SoftPromptError as error:
        return Outline(signature, created, {}, str(error))
    facts = {
        "peft_type": str(config["peft_type"]),
        "virtual_tokens": config.get("num_virtual_tokens"),
        **(_reading(manifest) if tasks is None else _shared(tasks)),
        "tasks": tasks,
    }
    return Outline(signature, created, facts)


def tasks_of(config: Mapping[str, Any], manifest: Manifest | None) -> list[dict[str, Any]] | None:
    """Return how each task of a multitask prompt reads its input; None for a prompt that has none.

    Raises:
        ArtifactError: What the record keeps of a task cannot be used.
    """
    names = manifest.tasks if manifest and manifest.tasks else _numbers(config)
    if not names:
        return None
    return [
        {"name": name, **_reading(manifest and manifest_of_task(manifest, number))}
        for number, name in enumerate(names)
    ]


def _numbers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tasks without names are called by: their numbers."""
    count = config.get("num_tasks") or 1
    if config["peft_type"] != PeftType.MULTITASK_PROMPT_TUNING or count == 1:
        return ()
    if count > _TASKS:
        raise ArtifactError(
            f"expected at most {_TASKS:,} tasks without names, num_tasks is {count:,}: "
            f"name them in {MANIFEST_NAME}, or split the prompt"
        )
    return tuple(map(str, range(count)))


def _reading(manifest: Manifest | None) -> dict[str, Any]:
    """Return the same of one task; a folder without a record takes any text."""
    if manifest is None:
        return {"task": "generation", "labels": None, "template": "{{input}}"}
    labels = list(manifest.labels) if manifest.labels else None
    return {"task": manifest.task, "labels": labels, "template": manifest.template}


def _shared(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all tasks have alike, None where they differ."""
    first, *others = tasks
    return {
        key: first[key] if all(each[key] == first[key] for each in others) else None
        for key in ("task", "labels", "template")
    }


def _object(root: Root, name: str, file: str, most: int) -> dict[str, Any] | None:
    data = root.read(name, file, most)
    return None if data is None else parse_object(data.decode(errors="replace"), f"{name}/{file}")
