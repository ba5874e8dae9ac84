"""``softprompt.json``: what using a prompt again needs and PEFT's files do not hold."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Literal

from softprompt.backbone import Base
from softprompt.data import PLACEHOLDER
from softprompt.errors import ArtifactError, nearest
from softprompt.untrusted import MOST_LABEL, MOST_LABELS, MOST_TEMPLATE, fits, type_name

FORMAT_VERSION = 1
_OPTIONAL = frozenset({"tasks", "weights_sha256", "chat"})
_TUPLES = ("labels", "tasks")
_MOST = {"template": MOST_TEMPLATE, "labels": MOST_LABELS, "tasks": MOST_LABELS}
"""Characters of a text, items of a list."""
_MEASURED = {"loss": float, "accuracy": float}
_PARTS: Mapping[str, Mapping[str, Any]] = {
    "data": {"train": {}, "validation": {}},
    "metrics": {**_MEASURED, "validation": _MEASURED},
    "history": {**_MEASURED, "epoch": int, "update": int, "learning_rate": float, "validation": _MEASURED},
    "settings": {"input_field": str, "output_field": str, "tuning_config": {}},
}
"""Types of what is read of nested values, or what is inside them; all may be absent or null."""
_RECORDED_PACKAGES = ("softprompt", "torch", "transformers", "safetensors")
_MAX_TOKENS = (256, 128)
"""Input and answer lengths where a format does not record them."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of ``softprompt.json``; each field is described in ``docs/formats.md``.

    ``history`` holds one point per epoch: ``{"epoch", "update", "loss", "learning_rate",
    "validation": {...}}``. ``weights_sha256`` is filled in when the folder is written.
    ``tasks`` names the tasks of a multitask prompt in the order of their ids. ``chat`` says that inputs are
    chats, which the tokenizer's chat template renders, and that a text is one turn of the user.
    """

    format_version: int = FORMAT_VERSION
    template: str
    task: Literal["classification", "generation"]
    labels: tuple[str, ...] | None
    base_model: str
    base_fingerprint: dict[str, Any]
    max_source_length: int
    max_target_length: int
    dtype: str
    seq2seq: bool
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    created: str = field(default_factory=_now)
    weights_sha256: str | None = None
    tasks: tuple[str, ...] | None = None
    chat: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the template's fields, each once."""
        return tuple(dict.fromkeys(PLACEHOLDER.findall(self.template)))

    def is_of_chats(self, placement: object) -> bool:
        """Whether the chat template puts the inputs of a prompt so placed: a text is one turn of the user."""
        return self.chat or (placement == "chat_system" and self.template == "{{input}}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes ``None``."""
        pairs = ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))
        return {name: _plain(value, name) for name, value in pairs}

    def to_json(self) -> str:
        """Return the text of ``softprompt.json``."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Rebuild a manifest from ``to_dict``'s values.

        Raises:
            ArtifactError: a newer format, an unknown or missing key, or a value of a wrong type.
        """
        _check_version(values)
        hints = typing.get_type_hints(cls)
        for name in values:
            if name not in hints:
                raise ArtifactError(
                    f"unknown key {name!r} in softprompt.json{nearest(name, hints)}: "
                    "remove it, or read the folder with the softprompt that wrote it"
                )
        missing = [name for name in hints if name not in values and name not in _OPTIONAL]
        if missing:
            raise ArtifactError(
                f"softprompt.json lacks {', '.join(missing)}: restore it from the original, or "
                "delete it to load the prompt as a plain PEFT folder"
            )
        return cls(**{name: _checked(name, value, hints[name]) for name, value in values.items()})


def manifest_of_task(manifest: Manifest, number: int) -> Manifest:
    """Return the manifest of one task of a multitask prompt; the whole where it has none for each.

    Template, kind and label set of each task are in ``data["tasks"]`` by the task's name.

    Raises:
        ArtifactError: its entry for the task lacks one of them.
    """
    if not manifest.tasks or number >= len(manifest.tasks) or "tasks" not in manifest.data:
        return manifest
    name, kept = manifest.tasks[number], manifest.data["tasks"]
    own = kept.get(name) if isinstance(kept, Mapping) else kept
    if own is None:
        return manifest
    hints = typing.get_type_hints(Manifest)
    if not isinstance(own, Mapping) or not {"template", "task", "labels"} <= own.keys():
        raise ArtifactError(
            f"expected template, task and labels of the task {name!r} in softprompt.json's data: "
            "restore the file from the original"
        )
    own = {"chat": False, **own}
    changes = {key: _checked(key, own[key], hints[key]) for key in ("template", "task", "labels", "chat")}
    return dataclasses.replace(manifest, **changes)


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of virtual tokens that were stored without a ``softprompt.json``.

    Attributes:
        base_model: Name of the base.
        seq2seq: Whether the base has an encoder and a decoder.
        template: The verbalizer of its inputs.
        dtype: dtype of the base in training.
        settings: Further values for ``softprompt.json``.
    """

    base_model: str
    seq2seq: bool
    template: str = "{{input}}"
    dtype: str = "float32"
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of_base(cls, base: Base) -> Origin:
        """Return what a base says of prompts that were made for it."""
        facts = base.facts
        dtype = str(base.model.dtype).removeprefix("torch.")
        return cls(base.name, facts.is_encoder_decoder, dtype=dtype)


def manifest_of(origin: Origin, base: Base | None) -> Manifest:
    """Return a manifest for a prompt that has none: generation, with the default lengths."""
    return Manifest(
        template=origin.template,
        task="generation",
        labels=None,
        base_model=origin.base_model,
        base_fingerprint={} if base is None else base.fingerprint_record(),
        max_source_length=_MAX_TOKENS[0],
        max_target_length=_MAX_TOKENS[1],
        dtype=origin.dtype,
        seq2seq=origin.seq2seq,
        settings=dict(origin.settings or {}),
    )


def _check_version(values: Mapping[str, Any]) -> None:
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"softprompt.json has format_version {version}, this softprompt reads up to "
            f"{FORMAT_VERSION}: upgrade with `pip install -U softprompt`"
        )
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ArtifactError(
            f"expected format_version {FORMAT_VERSION} in softprompt.json, got {version!r}: "
            "restore the file, or delete it to load the prompt as a plain PEFT folder"
        )


def _checked(name: str, value: Any, hint: Any) -> Any:
    counted = name in _MOST and value is not None
    if (
        counted
        and fits(value, hint)
        and (len(value) > _MOST[name] or (name != "template" and max(map(len, value), default=0) > MOST_LABEL))
    ):
        raise ArtifactError(
            f"expected at most {_MOST[name]:,} for {name} in softprompt.json, in a list {MOST_LABEL:,} characters "
            f"each, got {len(value):,}: check that it is what it should be"
        )
    if fits(value, hint) and (hint is not int or value > 0):
        for each in value if name == "history" else [value] if name in _PARTS else []:
            if name == "history" and each.get("epoch") is None:
                raise _wrong("history.epoch", None, int)
            _check_parts(name, each, _PARTS[name])
        return tuple(value) if name in _TUPLES and value is not None else value
    raise _wrong(name, value, hint)


def _check_parts(name: str, value: Any, wanted: Any) -> None:
    """Check the type of a nested value, or with a mapping of types those of what is inside."""
    hint = dict if isinstance(wanted, Mapping) else wanted
    if not fits(value, hint):
        raise _wrong(name, value, hint)
    for part, inner in wanted.items() if hint is dict else ():
        if value.get(part) is not None:
            _check_parts(f"{name}.{part}", value[part], inner)


def _wrong(name: str, value: Any, hint: Any) -> ArtifactError:
    return ArtifactError(
        f"expected {name} in softprompt.json to be {type_name(hint)}, got {type(value).__name__} "
        f"{str(value)[:40]!r}: restore the file from the original"
    )


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # str(): members of a string enum are written as their value.
        return str.__str__(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ArtifactError(
        f"expected plain JSON values in softprompt.json, {where} is a {type(value).__name__}: "
        "convert it to a number, text, list or dict first"
    )
