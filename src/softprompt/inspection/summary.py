"""A stored prompt in numbers: its manifest, the geometry of its virtual tokens, its nearest tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from softprompt.errors import FingerprintError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt.artifacts import StoredPrompt

NEAREST = 3
_CHUNK = 16_384
"""Tokens compared at once."""


@dataclass(frozen=True, slots=True)
class NearToken:
    """A vocabulary token close to a virtual token.

    ``cosine`` is between -1 and 1, ``distance`` that of Euclid, in the unit of the embeddings.
    """

    token_id: int
    token: str
    cosine: float
    distance: float


@dataclass(frozen=True, slots=True)
class PromptGeometry:
    """Norms, rank and cosines of the stored values ``[P*S, H]``.

    ``rms`` is that of all entries, ``rms_ratio`` divides it by the base's embedding rms (None without the base),
    ``effective_rank`` is exp of the entropy of the normalised singular values (Roy and Vetterli 2007), between 1
    and min(P*S, H), and 0 for a prompt of zeros. ``mean_pairwise_cosine`` is None for one virtual token.
    """

    norms: tuple[float, ...]
    norm_mean: float
    norm_min: float
    norm_max: float
    rms: float
    base_rms: float | None
    rms_ratio: float | None
    effective_rank: float
    mean_pairwise_cosine: float | None


@dataclass(frozen=True, slots=True)
class PromptSummary:
    """What `softprompt info` shows; the fields of the manifest are None for PEFT's own folders.

    ``rows`` is P*S, ``width`` is H, ``parameters`` and ``bytes`` count every stored tensor, heads
    included; ``nearest`` has one tuple per virtual token, best first, and is None without a vocabulary.
    """

    location: str
    base_model: str | None
    fingerprint: str | None
    task_type: str | None
    task: str | None
    labels: tuple[str, ...] | None
    template: str | None
    virtual_tokens: int
    rows: int
    width: int
    parameters: int
    bytes: int
    heads: tuple[str, ...]
    geometry: PromptGeometry
    nearest: tuple[tuple[NearToken, ...], ...] | None
    metrics: dict[str, Any] | None
    created: str | None
    versions: dict[str, str] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


def describe(
    stored: StoredPrompt, table: Tensor | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PromptSummary:
    """Summarise a stored prompt; nothing is loaded here.

    Args:
        stored: what ``load_adapter`` returned.
        table: the base model's input embeddings ``[V, H]``, for the rms ratio.
        tokenizer: the base model's, to name the nearest tokens of ``table``.

    Raises:
        FingerprintError: the table has another width than the prompt.
    """
    prompt, manifest = stored.values.detach().float(), stored.manifest
    if stored.keys_and_values:
        table = None  # keys and values of layers have no neighbours among the embeddings
    if table is not None and table.shape[1] != prompt.shape[1]:
        raise FingerprintError(
            f"expected an embedding table {prompt.shape[1]} wide, as the prompt's virtual tokens, got "
            f"{table.shape[1]}: load the base model that the prompt was made for"
        )
    nearest = None
    if table is not None and tokenizer is not None:
        nearest = nearest_tokens(prompt, table, tokenizer)
    tensors = stored.tensors
    record: Mapping[str, Any] = manifest.to_dict() if manifest else {}
    return PromptSummary(
        location=stored.location,
        base_model=record.get("base_model") or stored.config.get("base_model_name_or_path"),
        fingerprint=record.get("base_fingerprint", {}).get("short"),
        task_type=stored.config.get("task_type"),
        task=record.get("task"),
        labels=manifest.labels if manifest else None,
        template="the base's chat template" if record.get("chat") else record.get("template"),
        virtual_tokens=stored.config["num_virtual_tokens"],
        rows=prompt.shape[0],
        width=prompt.shape[1],
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        heads=tuple(sorted(name for name in tensors if name.startswith("base_model."))),
        geometry=geometry(prompt, rms_of(table) if table is not None else None),
        nearest=nearest,
        metrics=record.get("metrics"),
        created=record.get("created"),
        versions=record.get("versions"),
    )


def geometry(prompt: Tensor, base_rms: float | None = None) -> PromptGeometry:
    """Return the geometry of virtual tokens ``prompt`` ``[P*S, H]``."""
    tokens = prompt.detach().double()
    norms = tokens.norm(dim=1)
    rms = rms_of(tokens)
    return PromptGeometry(
        norms=tuple(norms.tolist()),
        norm_mean=float(norms.mean()),
        norm_min=float(norms.min()),
        norm_max=float(norms.max()),
        rms=rms,
        base_rms=base_rms,
        rms_ratio=rms / base_rms if base_rms else None,
        effective_rank=effective_rank(tokens),
        mean_pairwise_cosine=mean_pairwise_cosine(tokens),
    )


def rms_of(values: Tensor) -> float:
    """Return the root mean square of all entries."""
    norm = float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))
    return norm / math.sqrt(values.numel())


def effective_rank(tokens: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of ``tokens`` ``[P, H]``."""
    singular = torch.linalg.svdvals(tokens.double())
    if float(singular.sum()) == 0:
        return 0.0
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


def mean_pairwise_cosine(tokens: Tensor) -> float | None:
    """Return the mean cosine over all pairs of different virtual tokens ``[P, H]``, None for one."""
    count = tokens.shape[0]
    if count < 2:
        return None
    # The squared norm of the sum of unit vectors counts every ordered pair and every token itself.
    units = normalize(tokens.double(), dim=1)
    own = float(units.square().sum())
    return (float(units.sum(dim=0).square().sum()) - own) / (count * (count - 1))


def nearest_tokens(
    prompt: Tensor,
    table: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    count: int = NEAREST,
    measure: Literal["cosine", "euclid"] = "cosine",
) -> tuple[tuple[NearToken, ...], ...]:
    """Return the tokens nearest to each virtual token of ``prompt`` ``[P, H]``, best first.

    A diagnostic, not an explanation: a virtual token between two tokens need mean neither of them.
    Entries of ``table`` ``[V, H]`` past the tokenizer's length are padding and are left out.
    """
    tokens = prompt.detach().cpu().float()
    vocabulary = min(table.shape[0], len(tokenizer))
    best = torch.empty(prompt.shape[0], 0)
    ids = torch.empty(prompt.shape[0], 0, dtype=torch.int64)
    # Chunks: a float32 copy of a large bf16 table would take gigabytes.
    for start in range(0, vocabulary, _CHUNK):
        chunk = table[start : min(start + _CHUNK, vocabulary)].detach().cpu().float()
        found = -torch.cdist(tokens, chunk) if measure == "euclid" else normalize(tokens) @ normalize(chunk).T
        numbers = torch.arange(start, start + chunk.shape[0]).expand_as(found)
        best, ids = torch.cat([best, found], dim=1), torch.cat([ids, numbers], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, order)
    near = table[ids.flatten().to(table.device)].detach().cpu().float().view(*ids.shape, -1)  # [P, count, H]
    cosines = cosine_similarity(tokens.unsqueeze(1), near, dim=-1)
    distances = (tokens.unsqueeze(1) - near).norm(dim=-1)
    return tuple(
        tuple(
            NearToken(token_id, _shown(tokenizer, token_id), cosine, distance)
            for token_id, cosine, distance in zip(*each, strict=True)
        )
        for each in zip(ids.tolist(), cosines.tolist(), distances.tolist(), strict=True)
    )


def _shown(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = str(tokenizer.decode([token_id]))
    # A byte-level token can be part of a character, which decodes to the replacement sign.
    return str(tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in text or not text else text
