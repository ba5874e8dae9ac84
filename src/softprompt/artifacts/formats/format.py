"""One row of the table of formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt.artifacts.files import require_new_file, write_atomically
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter
from softprompt.artifacts.plain import PlainPrompt, plain_prompt, single_task
from softprompt.backbone import Base
from softprompt.errors import ArtifactError, ConfigError

Encode = Callable[[str], tuple[int, ...]]
"""The ids of a text as they stand behind a prompt, special tokens included."""


@dataclass(frozen=True, slots=True)
class Export:
    """A prompt to write, with what formats need besides it.

    Attributes:
        stored: The prompt, as it was read.
        to: Name of the format that is written.
        task: Which task of a multitask prompt.
        name: What the prompt is called in the output.
        others: Further prompts for the same base, by name.
        base: The base model; None where no format needs it.
        encode: Ids of a text for this base.
        source: Ids of the input of one request.
        overwrite: Whether the output may replace what is there.
    """

    stored: StoredAdapter
    to: str
    task: str | None = None
    name: str = "prompt"
    others: Mapping[str, StoredAdapter] = field(default_factory=dict)
    base: Base | None = None
    encode: Encode | None = None
    source: tuple[int, ...] | None = None
    overwrite: bool = False

    def plain(self) -> PlainPrompt:
        """Return the rows to write.

        Raises:
            ArtifactError: This format cannot express the prompt.
            ConfigError: A multitask prompt without a task.
        """
        return plain_prompt(single_task(self.stored, self.task), self.to)

    def loaded(self) -> Base:
        """Return the base.

        Raises:
            ConfigError: There is none.
        """
        if self.base is None:
            raise ConfigError(
                f"{self.to} needs the base model of the prompt; pass base_model (--base-model)"
            )
        return self.base


Lacks = Callable[[Path], str | None]
Source = str | Path
"""A path; only folders of PEFT's layout may be hub ids, which stay text."""
Read = Callable[[Source, Base | None], StoredAdapter]
Write = Callable[[Export, Path], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Format:
    """One layout.

    Attributes:
        name: What ``--to`` calls it.
        layout: The files, for people.
        lacks: What a path lacks to be one, None when it is one.
        read: Reads a path that is one; None for formats that are only written.
        write: Writes a prompt and returns facts worth reporting; None for formats only read.
        reads_with_base: Whether reading needs the base model.
        writes_with_base: Whether writing needs the base model.
        holds: Whether the output is a ``folder`` or a ``file``.
        loses: Fields of ``softprompt.json`` that the layout has no place for.
    """

    name: str
    layout: str
    lacks: Lacks
    read: Read | None
    write: Write | None
    reads_with_base: bool = False
    writes_with_base: bool = False
    holds: str = "folder"
    loses: tuple[str, ...] = ()

    def lost(self, manifest: Manifest | None, origin: Format) -> tuple[str, ...]:
        """Return what a format has on record of a prompt, and this one would not have."""
        if manifest is None:
            return ()
        fewer = (name for name in self.loses if name not in origin.loses)
        return tuple(name for name in fewer if getattr(manifest, name) not in _NOTHING)


MEASURED = ("metrics", "history", "settings", "data")
"""Fields that say how a prompt was made and how good it is."""

USED = ("task", "labels", "max_source_length", "max_target_length")
"""Fields that say how a prompt is used, besides its template."""

_NOTHING: tuple[Any, ...] = (None, (), {}, [], "generation")
"""Values that say nothing; free text is what every format is for."""


def write_failed(path: Path, error: Exception) -> ArtifactError:
    """Return the error for an output that the file system refused."""
    return ArtifactError(
        f"could not write {path} ({error}); nothing there was changed: free some space or choose "
        "another path"
    )


def write_output_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write an output that is one file.

    Raises:
        OutputExistsError: something is there that may not be overwritten.
        ArtifactError: the file system refused.
    """
    require_new_file(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise write_failed(path, error) from error
