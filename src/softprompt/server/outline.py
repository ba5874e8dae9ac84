"""What a listing shows of a prompt: a few words of its two small files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softprompt.artifacts.layout import MANIFEST_NAME, check_config, parse_object
from softprompt.artifacts.manifest import Manifest
from softprompt.errors import SoftPromptError
from softprompt.prompts.configs import CONFIG_NAME
from softprompt.server.folder import Root, Signature


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
    try:
        config = _object(root, name, CONFIG_NAME, most) or {}
        check_config(config)
        record = _object(root, name, MANIFEST_NAME, most)
        manifest = None if record is None else Manifest.from_dict(record)
    except SoftPromptError as error:
        return Outline(signature, created, {}, str(error))
    facts = {
        "peft_type": str(config["peft_type"]),
        "virtual_tokens": config.get("num_virtual_tokens"),
        "task": manifest.task if manifest else "generation",
        "labels": list(manifest.labels) if manifest and manifest.labels else None,
        "template": manifest.template if manifest else "{{input}}",
        "tasks": list(manifest.tasks) if manifest and manifest.tasks else None,
    }
    return Outline(signature, created, facts)


def _object(root: Root, name: str, file: str, most: int) -> dict[str, Any] | None:
    data = root.read(name, file, most)
    return None if data is None else parse_object(data.decode(errors="replace"), f"{name}/{file}")
