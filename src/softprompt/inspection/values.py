"""What the values of a prompt say by themselves, part by part, without running a model; and how far they moved.

A part is what stands in one place: the virtual tokens of the (encoder's) input, those before a decoder, the keys
and values of the layers, and each of these for every task of a multitask prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from softprompt.errors import ConfigError
from softprompt.inspection.summary import NearToken, PromptGeometry, geometry, nearest_tokens, rms_of
from softprompt.prompts import COLS_KEY, PROMPT_KEY, PeftType, lookup, similarity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt.artifacts import StoredPrompt
    from softprompt.backbone import Base

MOST_TOKENS = 128
"""Virtual tokens whose pairwise cosines are given; of a longer part those of evenly spaced ones."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CHUNK = 16_384

KEYS_AND_VALUES = "keys and values"


@dataclass(frozen=True, slots=True)
class Shell:
    """The norms of the vocabulary's embeddings, and where virtual tokens lie among them.

    Attributes:
        quantiles: Norm below which a share of the vocabulary lies, for each of ``QUANTILES``.
        shares: Share of the vocabulary with a smaller norm, of each virtual token ``[P]``, 0 to 1.
    """

    quantiles: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PartValues:
    """The numbers of one part of a prompt, ``[P, X]``; X is H, or L·2·A_kv·D for keys and values.

    Attributes:
        tokens: Virtual tokens (P).
        geometry: Norms, rank and mean cosine.
        cosines: Cosine of each pair of virtual tokens, of every ``every``-th one, rounded to four decimals.
        every: 1 but for parts of more than 128 virtual tokens.
        shell: Norms against the vocabulary's; None without the base, and for keys and values.
        nearest: Vocabulary tokens of highest cosine with each virtual token, best first; likewise.
        nearest_euclid: Those of least distance; likewise.
    """

    tokens: int
    geometry: PromptGeometry
    cosines: tuple[tuple[float, ...], ...]
    every: int
    shell: Shell | None = None
    nearest: tuple[tuple[NearToken, ...], ...] | None = None
    nearest_euclid: tuple[tuple[NearToken, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class PartSimilarity:
    """How alike two prompts are, or two parts of one: cosines between -1 and 1.

    Attributes:
        first: Name of the one.
        second: Name of the other.
        mean: Of the mean virtual tokens (Vu et al. 2022, SPoT, compare tasks by it).
        pairs: Mean over all pairs of a virtual token of the one and one of the other.
        matched: Mean over virtual tokens of one number; None where their lengths differ.
    """

    first: str
    second: str
    mean: float
    pairs: float
    matched: float | None


def parts_of(stored: StoredPrompt) -> dict[str, Tensor]:
    """Return the values of each part ``[P, X]`` of a stored prompt, float32.

    Raises:
        ArtifactError: Its tensors are not those of its configuration.
        ConfigError: Its options are not supported.
    """
    if stored.keys_and_values:
        return {KEYS_AND_VALUES: stored.values.detach().float()}
    if stored.config.get("peft_type") != PeftType.MULTITASK_PROMPT_TUNING:
        return _of_one(stored)
    names = (stored.manifest and stored.manifest.tasks) or map(str, range(len(stored.tensors[COLS_KEY])))
    found = {name: _of_one(stored.of_task(name)) for name in names}
    return {
        name if len(parts) == 1 else f"{name}, {part}": values
        for name, parts in found.items()
        for part, values in parts.items()
    }


def _of_one(stored: StoredPrompt) -> dict[str, Tensor]:
    prompt = replace(stored, tensors={PROMPT_KEY: stored.values}).prompt()  # trained heads are no virtual tokens
    found = {"input": prompt.input, "decoder": prompt.decoder}
    return {name: part.detach().float() for name, part in found.items() if part is not None}


def numbers_of(values: Tensor, base: Base | None, count: int) -> PartValues:
    """Return the numbers of one part ``[P, X]``.

    Args:
        values: What ``parts_of`` returned for it.
        base: The base whose embeddings it is compared with; None for keys and values, and where there is none.
        count: Nearest tokens to name for each virtual token.
    """
    every = -(-len(values) // MOST_TOKENS)
    units = normalize(values[::every].double(), dim=1)
    cosines = tuple(tuple(round(value, 4) for value in row) for row in (units @ units.T).tolist())
    if base is None:
        return PartValues(len(values), geometry(values), cosines, every)
    table, tokenizer, scale = base.embedding.weight, base.tokenizer, _scale(base)
    bare = values / scale  # as the table has them: Gemma's is scaled when it is read
    return PartValues(
        tokens=len(values),
        geometry=geometry(values, scale * rms_of(table)),
        cosines=cosines,
        every=every,
        shell=_shell(bare, table, tokenizer, scale),
        nearest=_scaled(nearest_tokens(bare, table, tokenizer, count), scale),
        nearest_euclid=_scaled(nearest_tokens(bare, table, tokenizer, count, "euclid"), scale),
    )


def _scale(base: Base) -> float:
    """Return by what the model multiplies the embeddings of its table."""
    ids = torch.arange(min(64, len(base.embedding.weight)))
    seen, table = lookup(base.embedding)(ids), base.embedding.weight[ids]
    return float(seen.detach().float().norm() / table.detach().float().norm())


def _scaled(nearest: tuple[tuple[NearToken, ...], ...], scale: float) -> tuple[tuple[NearToken, ...], ...]:
    return tuple(tuple(replace(each, distance=scale * each.distance) for each in row) for row in nearest)


def _shell(values: Tensor, table: Tensor, tokenizer: PreTrainedTokenizerBase, scale: float) -> Shell:
    known = range(0, min(len(table), len(tokenizer)), _CHUNK)
    parts = [table[start : min(start + _CHUNK, len(tokenizer))].detach() for start in known]
    norms = torch.cat([part.float().norm(dim=1).cpu() for part in parts]).sort().values
    at = torch.tensor([round(share * (len(norms) - 1)) for share in QUANTILES])
    shares = torch.searchsorted(norms, values.norm(dim=1)) / len(norms)
    return Shell(tuple((scale * norms[at]).tolist()), tuple(shares.tolist()))


def alike(parts: Mapping[str, Tensor], other: StoredPrompt, name: str) -> list[PartSimilarity]:
    """Return how alike parts are to those of the same names in another prompt; raises as ``parts_of``."""
    theirs = parts_of(other)
    return [similarity_of(parts[part], theirs[part], part, name) for part in parts if part in theirs]


def similarity_of(first: Tensor, second: Tensor, name: str, other: str) -> PartSimilarity:
    """Return how alike two parts ``[P_1, X]`` and ``[P_2, X]`` are; ``ConfigError`` where their widths differ."""
    mean, pairs = similarity(first, second), similarity(first, second, "pairs")
    matched = float(cosine_similarity(first, second).mean()) if first.shape == second.shape else None
    return PartSimilarity(name, other, mean, pairs, matched)


@dataclass(frozen=True, slots=True)
class Drift:
    """What training noted after each epoch of every ``every``-th virtual token: root mean squares over its values.

    Attributes:
        epochs: Numbers of the epochs (E).
        every: 1 but for prompts of more than 128 virtual tokens.
        drift: Of the change since the start ``[E, P]``.
        rms: Of the values ``[E, P]``.
        kept: The epoch whose prompt is the stored one, 0 for its start; None where that is not recorded.
    """

    epochs: tuple[int, ...]
    every: int
    drift: tuple[tuple[float, ...], ...]
    rms: tuple[tuple[float, ...], ...]
    kept: int | None


def drift_of(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Drift:
    """Return what a history notes of the virtual tokens.

    Raises:
        ConfigError: Nothing, as of prompts that were trained before such notes; or it is damaged.
    """
    points = [point for point in history if isinstance(point, Mapping) and "virtual_tokens" in point]
    if not points:
        raise ConfigError("the training history has no notes of the virtual tokens")
    try:
        notes = [point["virtual_tokens"] for point in points]
        kept = metrics.get("epoch")
        found = Drift(
            epochs=tuple(int(point["epoch"]) for point in points),
            every=int(notes[0]["every"]),
            drift=tuple(tuple(map(float, each["drift"])) for each in notes),
            rms=tuple(tuple(map(float, each["rms"])) for each in notes),
            kept=kept if isinstance(kept, int) else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the notes of the virtual tokens in the training history are damaged: {error!r}"
        ) from error
    if len({len(row) for row in (*found.drift, *found.rms)}) > 1 or not found.drift[0] or found.every < 1:
        raise ConfigError("the notes of the virtual tokens in the training history are damaged")
    return found
