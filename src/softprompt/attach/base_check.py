"""Whether a base is the one that a prompt was made for."""

from __future__ import annotations

from transformers import PreTrainedModel

from softprompt.artifacts import Manifest
from softprompt.backbone import Fingerprint
from softprompt.errors import FingerprintError


def check_base(
    manifest: Manifest | None, location: str, model: PreTrainedModel, *, ignore: bool = False
) -> None:
    """Refuse a base that a prompt was not made for.

    Args:
        manifest: What is on record of the prompt; without one nothing is known of its base.
        location: Where the prompt is, for the message.
        model: The base.
        ignore: Use the base all the same.

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
