"""What a stored prompt is, in numbers: its record and its rows; figures come from these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.artifacts import StoredAdapter
from softprompt.errors import FingerprintError
from softprompt.inspection.neighbours import NearToken, Vocabulary, nearest_tokens
from softprompt.prompts import KEY_VALUE_METHODS


@dataclass(frozen=True, slots=True)
class PromptGeometry:
    """Numbers of the prompt's rows ``[R, H]``.

    ``rms`` is that of all entries, ``rms_ratio`` divides it by the base's embedding rms (None
    without the base), ``effective_rank`` is exp of the entropy of the normalised singular values
    (Roy and Vetterli 2007), between 1 and min(R, H) and 0 for a prompt of zeros.
    ``mean_pairwise_cosine`` is None for one row.
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
    included; ``nearest`` has one tuple per row, best first, and is None without a vocabulary.
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
    stored: StoredAdapter, table: Tensor | None = None, tokenizer: Vocabulary | None = None
) -> PromptSummary:
    """Summarise a stored prompt; nothing is loaded here.

    Args:
        stored: what ``load_adapter`` returned.
        table: the base model's input embeddings ``[V, H]``, for the rms ratio.
        tokenizer: the base model's, to name the nearest rows of ``table``.

    Raises:
        FingerprintError: the table has another width than the prompt.
    """
    prompt, manifest = stored.prompt.detach().float(), stored.manifest
    if stored.config.get("peft_type") in KEY_VALUE_METHODS:
        table = None  # keys and values of layers have no neighbours among the embeddings
    if table is not None and table.shape[1] != prompt.shape[1]:
        raise FingerprintError(
            f"expected an embedding table {prompt.shape[1]} wide, as the prompt's rows, came "
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
        template=record.get("template"),
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
    """Return the numbers of the rows ``prompt`` ``[R, H]``."""
    rows = prompt.detach().double()
    norms = rows.norm(dim=1)
    rms = rms_of(rows)
    return PromptGeometry(
        norms=tuple(norms.tolist()),
        norm_mean=float(norms.mean()),
        norm_min=float(norms.min()),
        norm_max=float(norms.max()),
        rms=rms,
        base_rms=base_rms,
        rms_ratio=rms / base_rms if base_rms else None,
        effective_rank=effective_rank(rows),
        mean_pairwise_cosine=mean_pairwise_cosine(rows),
    )


def rms_of(values: Tensor) -> float:
    """Return the root mean square of all entries."""
    norm = float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))
    return norm / math.sqrt(values.numel())


def effective_rank(rows: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of ``rows`` ``[R, H]``."""
    singular = torch.linalg.svdvals(rows.double())
    if float(singular.sum()) == 0:
        return 0.0
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


def mean_pairwise_cosine(rows: Tensor) -> float | None:
    """Return the mean cosine over all pairs of different rows ``[R, H]``, None for one row."""
    count = rows.shape[0]
    if count < 2:
        return None
    # The squared norm of the sum of unit vectors counts every ordered pair and every row itself.
    units = torch.nn.functional.normalize(rows.double(), dim=1)
    own = float(units.square().sum())
    return (float(units.sum(dim=0).square().sum()) - own) / (count * (count - 1))
