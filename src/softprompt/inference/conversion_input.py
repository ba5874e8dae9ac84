"""What a conversion adds to the prompt it read: a record where there is none, and ids of texts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from softprompt.artifacts import Format, Manifest, Origin, StoredPrompt, manifest_of
from softprompt.backbone import Base, is_encoder_decoder
from softprompt.data import SpecialFrame, Verbalizer, encode
from softprompt.errors import ArtifactError, ConfigError, TemplateError
from softprompt.inference.requests import Request, fields_of, require_tokens, row_tokenizer

logger = logging.getLogger(__name__)

_NO_LIMIT = 10**9


@dataclass(frozen=True, slots=True)
class AskedInput:
    """The ids of one input, and whether it was longer than the prompt's limit and lost its end."""

    ids: tuple[int, ...]
    cut: bool


def recorded(
    stored: StoredPrompt,
    origin: Format,
    target: Format,
    base: Base | None,
    template: str | None,
) -> StoredPrompt:
    """Return a prompt with the record that its output needs.

    Args:
        stored: What was read.
        origin: The format it came in.
        target: The format it goes to.
        base: What is on record is taken from it; None where none was loaded.
        template: The verbalizer, for a source that has none.

    Raises:
        ArtifactError: The template on record has no placeholder.
        ConfigError: The source has a template already, or nothing is known of its base.
    """
    manifest = stored.manifest
    if manifest is None and (template is not None or target.name == "softprompt"):
        if base is None:
            raise ConfigError(
                f"{stored.location} has no softprompt.json, and one is made from the base model: pass "
                "base_model (--base-model), or use --to peft"
            )
        manifest = manifest_of(Origin.of_base(base), base)
    elif template is not None and not origin.reads_with_base:
        raise ConfigError(
            f"{stored.location} has a template of its own ({origin.name}); leave --template out"
        )
    if manifest is None:
        return stored
    try:
        Verbalizer(manifest.template)
    except TemplateError as error:
        raise ArtifactError(f"the template of {stored.location} cannot be used: {error}") from error
    return replace(stored, manifest=replace(manifest, template=template or manifest.template))


def encoder_of(base: Base) -> Callable[[str], tuple[int, ...]]:
    """Return what gives the ids of a text as rows have them: framed, without EOS in causal models."""
    frame = SpecialFrame.of(base.tokenizer)
    if not is_encoder_decoder(base.model):
        frame = SpecialFrame(frame.prefix, ())

    def ids(text: str) -> tuple[int, ...]:
        return frame.around(encode(base.tokenizer, [text], special=False)[0])

    return ids


def source_ids(stored: StoredPrompt, base: Base, text: Request) -> AskedInput:
    """Return the ids of one input under a prompt's template; what its limit cuts is warned of.

    Raises:
        TemplateError: The input lacks a field of the template.
        DataError: It has no tokens.
    """
    rows = row_tokenizer(base.tokenizer, stored.manifest or _unlimited(base))
    ids, cut = rows.source(fields_of(text, rows.verbalizer.fields))
    require_tokens([ids])
    if cut:
        logger.warning(
            "the input is longer than the prompt's max_source_length of %d tokens, and lost its end",
            rows.max_source_length,
        )
    return AskedInput(ids, cut)


def _unlimited(base: Base) -> Manifest:
    return replace(manifest_of(Origin.of_base(base), base), max_source_length=_NO_LIMIT)
