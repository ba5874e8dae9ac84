"""Which base model a prompt was made for, and whether its weights stayed as they were.

Names lie (a folder is renamed, a repository is updated), so a fingerprint is taken from
the weights: a few hundred values spread over the backbone, head excluded, compared with a
tolerance that the same model loaded in bfloat16 stays within and another model does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.backbone.facts import facts_of
from softprompt.backbone.state import stamp_of, state_of
from softprompt.errors import ArtifactError

_TENSORS = 16
_TENSORS_PER_LAYER = 2
"""Names sort layer by layer, so two evenly spaced tensors a layer leave no layer out."""
_VALUES = 8
_TOLERANCE = 0.02
"""Relative to the rms of the sample: bfloat16 rounding is 0.004 at most, a retrained model far above."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Sizes and sampled weights of one base model.

    Attributes:
        model_type: ``config.model_type``.
        sizes: (V, H, L, A).
        values: Sampled weights, float32.
    """

    model_type: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> Self:
        """Take the fingerprint of a loaded model."""
        facts = facts_of(model)
        sizes = (facts.vocabulary, facts.token_dim, facts.num_layers, facts.num_attention_heads)
        # The head is new for every task; the backbone below it is what a prompt depends on.
        state = dict(model.base_model.named_parameters(remove_duplicate=True))
        names = sorted(n for n, p in state.items() if p.dim() > 1 and not p.is_meta)
        count = min(len(names), max(_TENSORS, _TENSORS_PER_LAYER * facts.num_layers))
        chosen = [names[i * len(names) // count] for i in range(count)]
        values: list[float] = []
        for name in chosen:
            flat = state[name].detach().reshape(-1)
            index = torch.linspace(0, flat.numel() - 1, _VALUES, dtype=torch.float64).long()
            values += [round(v, 6) for v in flat[index.to(flat.device)].float().tolist()]
        return cls(str(model.config.model_type), sizes, tuple(values))

    def matches(self, other: Fingerprint) -> bool:
        """Tell whether both come from the same weights, whatever dtype they were loaded in."""
        if self.model_type != other.model_type or self.sizes != other.sizes:
            return False
        if len(self.values) != len(other.values):
            return False
        mine, theirs = torch.tensor(self.values), torch.tensor(other.values)
        if not mine.numel():
            return True
        allowed = _TOLERANCE * (mine.square().mean().sqrt() + mine.abs()) + 1e-6
        return bool(((mine - theirs).abs() <= allowed).all())

    @property
    def short(self) -> str:
        """Twelve hex digits for people; equal fingerprints in one dtype have equal digits."""
        return hashlib.sha256(
            repr((self.model_type, self.sizes, self.values)).encode()
        ).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model_type": self.model_type,
            "sizes": list(self.sizes),
            "values": list(self.values),
            "short": self.short,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            ArtifactError: If a part is missing or of the wrong kind.
        """
        try:
            return cls(
                str(values["model_type"]),
                tuple(int(v) for v in values["sizes"]),
                tuple(float(v) for v in values["values"]),
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise ArtifactError(
                f"the base fingerprint in softprompt.json is damaged ({cause!r}); save the prompt again"
            ) from cause


def fingerprint_of(model: PreTrainedModel) -> Fingerprint:
    """Return the fingerprint of a model, taken once for each state of its weights.

    It is taken again after a weight was written to, replaced, moved or converted; a write through
    ``weight.data`` leaves no trace, so ``Fingerprint.of`` is for weights that somebody edits so.
    """
    stamp = tuple(stamp_of(weight) for weight in model.base_model.parameters())
    return state_of(model).once("fingerprint", lambda: Fingerprint.of(model), stamp)


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over every name, shape, dtype and byte of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
