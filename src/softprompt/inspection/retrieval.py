"""Retrieval: the prompts of a folder that are most similar to a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt.artifacts import load_adapter, other_base, other_parts
from softprompt.errors import ArtifactError, ConfigError, SoftPromptError, no_folder
from softprompt.prompts import Measure, similarity


@dataclass(frozen=True, slots=True)
class Similar:
    """One prompt and its cosine with the given one, between -1 and 1.

    ``weight`` is its share of the similarities found, those below 0 counted as 0: the weights of a
    weighted average (Vu et al. 2022). All weights are 0 when no similarity is positive.
    """

    prompt: str
    similarity: float
    weight: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A folder that was not compared, and why."""

    folder: str
    reason: str


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The most similar prompts, best first, and the folders that were not compared."""

    found: tuple[Similar, ...]
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def similar_prompts(
    prompt: str | Path, folder: str | Path, *, top: int | None = None, measure: Measure = "mean"
) -> Retrieval:
    """Compare a stored prompt with those in the subfolders of a folder.

    The prompt itself is left out. Prompts of other bases or for other parts of the model, and
    folders that hold no readable prompt, are listed as skipped.

    Args:
        prompt: The prompt to compare with.
        folder: Each subfolder of it is a prompt.
        top: How many to return; None returns all.
        measure: ``mean`` compares the mean virtual tokens, ``pairs`` all pairs of virtual tokens.

    Raises:
        ArtifactError: The prompt or the folder cannot be read, or the folder is empty.
        ConfigError: ``top`` is less than 1, or the measure is not supported.
    """
    if top is not None and top < 1:
        raise ConfigError(f"top expects at least 1, got {top}")
    query = load_adapter(prompt)
    tokens, parts = query.virtual_tokens().flatten(0, 1), query.model_types()
    here = Path(query.location).resolve()
    scored: list[tuple[float, str]] = []
    skipped: list[Skipped] = []
    for path in _subfolders(Path(folder)):
        if path.resolve() == here:
            continue
        try:
            other = load_adapter(path)
            reason = other_base(query, other) or other_parts(other.model_types(), parts)
            candidate = tokens if reason else other.virtual_tokens().flatten(0, 1)
        except (SoftPromptError, OSError) as error:
            reason = str(error)
        if reason is not None:
            skipped.append(Skipped(str(path), reason))
        else:
            scored.append((similarity(tokens, candidate, measure), str(path)))
    best = sorted(scored, key=lambda each: (-each[0], each[1]))[:top]
    return Retrieval(_weighted(best), tuple(skipped))


def _weighted(best: Sequence[tuple[float, str]]) -> tuple[Similar, ...]:
    total = sum(max(cosine, 0.0) for cosine, _ in best)
    return tuple(Similar(path, cosine, max(cosine, 0.0) / total if total else 0.0) for cosine, path in best)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ArtifactError(f"expected a folder of prompts, {no_folder(folder) or f'{folder} is not a folder'}")
    found = sorted(each for each in folder.iterdir() if each.is_dir())
    if not found:
        raise ArtifactError(f"{folder} holds no folders; give the one whose subfolders are prompts")
    return found
