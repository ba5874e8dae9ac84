"""What is known of the base that a prompt was made for, and whether two of them are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel

from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter
from softprompt.backbone import Fingerprint, input_embedding
from softprompt.errors import FingerprintError


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """A base as a prompt's files, or a model itself, tell it.

    Attributes:
        name: Its name or path; None when not known.
        width: H of its embeddings.
        fingerprint: Of its weights; None when not known.
    """

    name: str | None
    width: int
    fingerprint: Fingerprint | None

    @classmethod
    def of_stored(cls, stored: StoredAdapter) -> Self:
        """Return what a stored prompt tells; a fingerprint without content is not known.

        Raises:
            ArtifactError: The fingerprint on record is damaged.
        """
        manifest = stored.manifest
        values = manifest.base_fingerprint if manifest else None
        fingerprint = Fingerprint.from_dict(values) if values else None
        return cls(stored.base_model, stored.prompt.shape[1], fingerprint)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self:
        """Return what a loaded model tells."""
        width = input_embedding(model).weight.shape[1]
        return cls(str(model.name_or_path) or None, width, Fingerprint.of(model))

    def differs(self, other: RecordedBase) -> str | None:
        """Return why the other is not this base; None when it is.

        Fingerprints decide; where one of the two has none, the names do.
        """
        if self.width != other.width:
            return f"its rows are {other.width} wide, not {self.width}"
        here, there = self.fingerprint, other.fingerprint
        if here is not None and there is not None:
            if here.matches(there):
                return None
            return f"its base is {other.name} ({there.short}), not {self.name} ({here.short})"
        if self.name != other.name:
            return f"its base is {other.name}, not {self.name}, and not both have a fingerprint"
        return None


def check_base(
    manifest: Manifest | None, location: str, model: PreTrainedModel, *, ignore: bool = False
) -> None:
    """Raise for a base that a prompt was not made for.

    Args:
        manifest: What is on record of the prompt; without one nothing is known of its base.
        location: Folder of the prompt, for the message.
        model: The base.
        ignore: Accept any base.

    Raises:
        FingerprintError: If the fingerprints differ and that is not ignored.
    """
    # A prompt from a format that records no weights of its base has an empty fingerprint.
    if manifest is None or ignore or not manifest.base_fingerprint:
        return
    made_for = Fingerprint.from_dict(manifest.base_fingerprint)
    here = Fingerprint.of(model)
    if not made_for.matches(here):
        raise FingerprintError(
            f"the prompt in {location} was made for {manifest.base_model} "
            f"({made_for.model_type}, fingerprint {made_for.short}), this base is {model.name_or_path} "
            f"({here.model_type}, {here.short}); load its own base, or pass --ignore-fingerprint "
            "(ignore_fingerprint=True in Python)"
        )
