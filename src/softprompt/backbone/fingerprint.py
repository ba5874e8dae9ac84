"""Whether two models are one: sizes and sampled weights, however the weights are stored.

Measured on a real model (30 layers, 1,680 samples): bfloat16 moves a weight by at most 2^-8 of itself, and five
steps of fine-tuning at a learning rate of 1e-5 move 60 samples further than that. Quantised layers are off by 1 %
(8 bits) to 13 % (4 bits) of their rms, at most 38 % in eight samples of one layer; independent weights by 141 %.
So a layer that either side has quantised tells models apart, not a model from its fine-tuned self. What quantisers
leave alone does: the norms, and mostly the embeddings.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone.facts import facts_of
from softprompt.backbone.sharding import whole
from softprompt.errors import ArtifactError, BackboneError

_MATRICES, _VECTORS = 16, 16
_MATRICES_PER_LAYER = 2
"""Names sort layer by layer, so two evenly spaced matrices a layer leave no layer out."""
_VALUES = 8
_IDS = (2, 9, 40, 300, 1500, 6000, 25_000, 100_000)
"""Embeddings that are sampled by their id, so that a table with more or fewer tokens has the same ones."""
_ROUNDING, _SMALLEST = 1.5 * 2**-8, 1e-6
"""Of a weight: bfloat16's, with a second rounding; and of the six digits that are kept."""
_QUANTISED, _QUANTISED_LAYER = 0.35, 0.8
"""Root mean square difference of quantised samples, of all layers and of one, in units of their rms."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Sizes and sampled weights of one base model.

    Attributes:
        model_type: ``config.model_type``.
        sizes: (V, H, L, A).
        values: Sampled weights, float32, eight of each name; NaN where a weight cannot be read.
        names: The parameter of each eight: matrices, then vectors, then ``name[ids]`` for embeddings by id. Empty
            in files of earlier versions, which sampled the same matrices.
        quantised: Which of the names are not stored as floating point.
    """

    model_type: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    names: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> Self:
        """Take the fingerprint of a loaded model, which is left as it is; what cannot be read is left out."""
        sizes: tuple[int, ...] = ()
        try:
            facts = facts_of(model)
            sizes = (facts.vocabulary, facts.token_dim, facts.num_layers, facts.num_attention_heads)
        except (BackboneError, AttributeError):  # no language model
            pass
        # The head is new for every task; the backbone below it is what a prompt depends on.
        body: nn.Module = getattr(model, "base_model", model)
        owners, state = dict(body.named_modules()), dict(body.named_parameters(remove_duplicate=True))
        values: list[float] = []
        names, quantised = [], []
        for label, name, index in _samples(state, owners, sizes):
            plain, exact = _plain(owners[name.rpartition(".")[0]], name.rpartition(".")[2], state[name])
            names.append(label)
            values += _picked(plain, index)
            if not exact:
                quantised.append(label)
        packed = getattr(model.config, "quantization_config", None) is not None
        if not quantised and (packed or str(getattr(model, "name_or_path", "")).endswith(".gguf")):
            quantised = names  # quantised files, read as floats
        kind = str(getattr(model.config, "model_type", ""))
        return cls(kind, sizes, tuple(values), tuple(names), tuple(quantised))

    def matches(self, other: Fingerprint) -> bool:
        """Tell whether both come from the same weights, however they are stored."""
        return self.differs(other) is None

    def differs(self, other: Fingerprint) -> str | None:
        """Return why the other is not the same model; None when it is, or when no weights can be compared."""
        if self.model_type != other.model_type:
            return f"one is a {self.model_type}, the other a {other.model_type}"
        if self.sizes[1:] != other.sizes[1:] and self.sizes and other.sizes:
            return f"sizes (width, layers, heads) are {list(self.sizes[1:])} and {list(other.sizes[1:])}"
        loose = {*self.quantised, *other.quantised}
        moved, distances = 0, []
        pairs = list(self._common(other))
        for name, mine, theirs in pairs:
            apart = (mine - theirs).abs()
            if name not in loose:
                moved += int((apart > _ROUNDING * mine.abs() + _SMALLEST).sum())
            else:
                scale = torch.maximum(mine.square().mean(), theirs.square().mean()).sqrt() + _SMALLEST
                distances.append(float(apart.square().mean().sqrt() / scale))
        if moved:
            return f"{moved} of {sum(len(mine) for _, mine, _ in pairs)} sampled weights differ"
        mean = math.sqrt(sum(d * d for d in distances) / len(distances)) if distances else 0.0
        if mean > _QUANTISED or max(distances, default=0.0) > _QUANTISED_LAYER:
            return f"weights are {mean:.0%} apart, too far for quantisation"
        return None

    def stored_otherwise(self, other: Fingerprint) -> str | None:
        """Return how the same model is stored otherwise; None where nothing is seen of it."""
        ways = []
        if set(self.quantised) != set(other.quantised):
            ways.append("other layers quantised")
        if self.sizes and other.sizes and self.sizes[0] != other.sizes[0]:
            ways.append(f"{other.sizes[0]:,} tokens instead of {self.sizes[0]:,}")
        pairs = list(self._common(other))
        if not pairs:
            ways.append("weights that cannot be compared")
        elif not ways and any(not torch.equal(mine, theirs) for _, mine, theirs in pairs):
            ways.append("weights rounded otherwise")
        return ", ".join(ways) or None

    def _common(self, other: Fingerprint) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the samples that both have, by name; those by position in a table only for tables of one size."""
        mine, theirs = self._chunks(other.names), other._chunks(self.names)
        named = bool(self.names and other.names)
        resized = self.sizes[:1] != other.sizes[:1]
        for name in mine.keys() & theirs.keys():
            if (resized or not named) and f"{name}[ids]" in {*self.names, *other.names}:
                continue
            first, second = torch.tensor(mine[name]), torch.tensor(theirs[name])
            known = ~(first.isnan() | second.isnan())
            if known.any():
                yield name, first[known], second[known]

    def _chunks(self, names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
        labels = self.names or names or tuple(map(str, range(len(self.values))))
        parts = (self.values[i : i + _VALUES] for i in range(0, len(self.values), _VALUES))
        return dict(zip(labels, parts, strict=False))

    @property
    def short(self) -> str:
        """Twelve hex digits for people; equal fingerprints in one dtype have equal digits."""
        return hashlib.sha256(repr((self.model_type, self.sizes, self.values)).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model_type": self.model_type,
            "sizes": list(self.sizes),
            "values": [None if math.isnan(value) else value for value in self.values],
            "names": list(self.names),
            "quantised": list(self.quantised),
            "short": self.short,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote, also in earlier versions.

        Raises:
            ArtifactError: If a part is missing or of the wrong kind.
        """
        try:
            return cls(
                str(values["model_type"]),
                tuple(int(v) for v in values["sizes"]),
                tuple(math.nan if v is None else float(v) for v in values["values"]),
                tuple(str(v) for v in values.get("names", ())),
                tuple(str(v) for v in values.get("quantised", ())),
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise ArtifactError(
                f"the base fingerprint in softprompt.json is damaged ({cause!r}); save the prompt again"
            ) from cause


def _samples(
    state: Mapping[str, Tensor], owners: Mapping[str, nn.Module], sizes: tuple[int, ...]
) -> Iterator[tuple[str, str, Tensor | None]]:
    """Yield what is sampled: its label, its parameter, and the flat places in it (None: evenly spaced)."""
    matrices = sorted(name for name, weight in state.items() if weight.dim() > 1)
    vectors = sorted(name for name, weight in state.items() if weight.dim() == 1)
    layers = sizes[2] if sizes else 0
    for names, most in ((matrices, max(_MATRICES, _MATRICES_PER_LAYER * layers)), (vectors, _VECTORS)):
        count = min(len(names), most)
        for i in range(count):
            name = names[i * len(names) // count]
            yield name, name, None
    for name in matrices:
        vocabulary, width = state[name].shape[0], state[name].shape[-1]
        if sizes[:1] == (vocabulary,) and isinstance(owners[name.rpartition(".")[0]], nn.Embedding):
            places = [id_ * width + k * width // _VALUES if id_ < vocabulary else -1 for k, id_ in enumerate(_IDS)]
            yield f"{name}[ids]", name, torch.tensor(places)


def _picked(plain: Tensor | None, places: Tensor | None) -> list[float]:
    """Return eight values of a weight, rounded to six digits; NaN for places that it does not have."""
    if plain is None or not plain.numel():
        return [math.nan] * _VALUES
    flat = plain.reshape(-1)
    if places is None:
        places = torch.linspace(0, flat.numel() - 1, _VALUES, dtype=torch.float64).long()
    found = flat[places.clamp(min=0).to(flat.device)].float().tolist()
    return [
        round(value, 6) if place >= 0 else math.nan for value, place in zip(found, places.tolist(), strict=True)
    ]


def _plain(owner: nn.Module, name: str, weight: Tensor) -> tuple[Tensor | None, bool]:
    """Return a weight as floating point, None where it cannot be read, and whether it is stored so."""
    if weight.is_meta:
        offloaded = getattr(getattr(owner, "_hf_hook", None), "weights_map", None)
        if offloaded is None:
            return None, True
        weight = offloaded[name]
    weight = whole(weight)
    if type(weight) in (Tensor, nn.Parameter) and weight.dtype in _FLOATS:
        return weight.detach(), True
    try:
        return _dequantised(owner, weight.detach(), weight), False
    except Exception:  # whatever a quantiser raises: saving and loading a prompt do not depend on it
        return None, False


def _dequantised(owner: nn.Module, data: Tensor, weight: Any) -> Tensor | None:
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bits
        functional, state = import_module("bitsandbytes.functional"), weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            unpacked = functional._convert_weight_packed_for_cpu_inverse
            data, state = unpacked(weight.data, copy.copy(state))
        return cast(Tensor, functional.dequantize_4bit(data, state))
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(owner, "state", None), "SCB", None)
    if scales is not None:  # bitsandbytes, 8 bits
        return cast(Tensor, data.float() * scales.view(-1, 1).to(data.device) / 127)
    return None if type(weight) in (Tensor, nn.Parameter) else cast(Tensor, weight.dequantize())
