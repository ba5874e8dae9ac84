"""Whether a base is the one that a prompt was made for, and whether two prompts are of one base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel

from softprompt.artifacts.stored_prompt import StoredPrompt
from softprompt.backbone import Base, Fingerprint, facts_of, input_embedding
from softprompt.errors import ArtifactError, FingerprintError
from softprompt.prompts import KEY_VALUE_METHODS, TaskType

_SEQ2SEQ = {TaskType.CAUSAL_LM: False, TaskType.SEQ_2_SEQ_LM: True}


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """What is known of a base, from a prompt's files or from a model itself.

    Attributes:
        name: Its name or path; None when not known.
        width: H of its embeddings.
        fingerprint: Of its weights; None when not known.
    """

    name: str | None
    width: int
    fingerprint: Fingerprint | None

    @classmethod
    def of_stored(cls, stored: StoredPrompt) -> Self:
        """Return the base that a stored prompt records; an empty fingerprint is an unknown one.

        Raises:
            ArtifactError: The recorded fingerprint is damaged.
        """
        return cls(stored.base_model, stored.values.shape[1], _recorded_fingerprint(stored))

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self:
        """Return the base that a loaded model is."""
        width = input_embedding(model).weight.shape[1]
        return cls(str(model.name_or_path) or None, width, Fingerprint.of(model))

    def differs(self, other: RecordedBase) -> str | None:
        """Return why the other is not this base; None when it is.

        Fingerprints decide; where one of the two has none, the names do.
        """
        if self.width != other.width:
            return f"its virtual tokens are {other.width} wide, not {self.width}"
        here, there = self.fingerprint, other.fingerprint
        if here is not None and there is not None:
            if here.matches(there):
                return None
            return f"its base is {other.name} ({there.short}), not {self.name} ({here.short})"
        if self.name != other.name:
            return f"its base is {other.name}, not {self.name}, and not both have a fingerprint"
        return None


def other_base(first: StoredPrompt, second: StoredPrompt) -> str | None:
    """Return why two prompts are not of one base; None when they are."""
    return RecordedBase.of_stored(first).differs(RecordedBase.of_stored(second))


def require_one_base(first: StoredPrompt, second: StoredPrompt) -> None:
    """Check that two prompts are of one base.

    Raises:
        FingerprintError: They are not; with the reason.
    """
    reason = other_base(first, second)
    if reason is not None:
        raise FingerprintError(
            f"{second.location} cannot go together with {first.location}: {reason}; use prompts of one base"
        )


def check_base(stored: StoredPrompt, model: PreTrainedModel, *, ignore: bool = False) -> None:
    """Check a model's weights against the fingerprint that a prompt records, where it has one.

    Args:
        stored: The prompt.
        model: The base.
        ignore: Use the base all the same.

    Raises:
        FingerprintError: The fingerprints differ and that is not ignored.
        ArtifactError: The recorded fingerprint is damaged.
    """
    made_for = None if ignore else _recorded_fingerprint(stored)
    if made_for is None:
        return
    here = Fingerprint.of(model)
    if not made_for.matches(here):
        raise FingerprintError(
            f"the prompt in {stored.location} was made for {stored.base_model} "
            f"({made_for.model_type}, fingerprint {made_for.short}), this base is {model.name_or_path} "
            f"({here.model_type}, {here.short}); load its own base, or pass --ignore-fingerprint "
            "(ignore_fingerprint=True in Python)"
        )


def check_fit(stored: StoredPrompt, base: Base) -> None:
    """Check that a base has the architecture and the width that a prompt needs, whatever its weights are.

    Raises:
        ArtifactError: It has others.
    """
    task, seq2seq = stored.config.get("task_type"), facts_of(base.model).is_encoder_decoder
    if task in _SEQ2SEQ and _SEQ2SEQ[task] != seq2seq:
        raise ArtifactError(
            f"the prompt in {stored.location} is for {task}, {base.name} is a "
            f"{'seq2seq' if seq2seq else 'causal'} model; name the base that it was made for"
        )
    if stored.config["peft_type"] not in KEY_VALUE_METHODS:
        check_width(stored.values.shape[1], base, stored.location)


def check_width(width: int, base: Base, where: str) -> None:
    """Check virtual tokens of width H against the embeddings of a base.

    Raises:
        ArtifactError: The widths differ.
    """
    own = facts_of(base.model).token_dim
    if width != own:
        raise ArtifactError(
            f"expected virtual tokens {own} wide in {where}, as the embeddings of {base.name}, got "
            f"{width}: name the base that the prompt was made for"
        )


def _recorded_fingerprint(stored: StoredPrompt) -> Fingerprint | None:
    # A format that records no weights of its base leaves the fingerprint empty.
    values = stored.manifest.base_fingerprint if stored.manifest else None
    return Fingerprint.from_dict(values) if values else None
