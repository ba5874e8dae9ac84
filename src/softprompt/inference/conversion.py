"""Converts prompts from one format to another."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from transformers import PreTrainedModel

from softprompt.artifacts import (
    Ask,
    Export,
    Format,
    Origin,
    Read,
    StoredPrompt,
    check_base,
    check_fit,
    detect,
    format_named,
    manifest_of,
    require_empty,
    require_new_file,
)
from softprompt.backbone import Base, load_base
from softprompt.data import SpecialFrame, Verbalizer, encode
from softprompt.errors import ArtifactError, ConfigError, OutputExistsError, TemplateError, nearest
from softprompt.inference.inputs import Fields, inputs_of, row_tokenizer
from softprompt.inference.loading import Named, Reading, recorded_base
from softprompt.prompts import Placement

if TYPE_CHECKING:
    from softprompt.generation import Input

logger = logging.getLogger(__name__)

_NO_LIMIT = 10**9

_NAMING, _REQUESTING = "extended-vocab", "vllm"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted, from where to where.

    Attributes:
        source_format: What it was recognised as.
        output_format: What it was written as.
        base_model: The base that was loaded for it; None when none was.
        facts: What the output format reports.
        lost: What is in the source's ``softprompt.json`` and not in the output, by its fields.
    """

    source: str
    source_format: str
    output: str
    output_format: str
    base_model: str | None
    facts: Mapping[str, Any]
    lost: tuple[str, ...] = ()


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    base_model: Named | None = None,
    task_name: str | int | None = None,
    text: Fields | None = None,
    name: str | None = None,
    add: Mapping[str, str | Path] | None = None,
    add_tasks: Mapping[str, str | int] | None = None,
    template: str | None = None,
    overwrite: bool = False,
    **reading: Unpack[Reading],
) -> Conversion:
    """Write a prompt in another format; the source's own is recognised from its files.

    Args:
        source: Folder or file of the prompt, or ``org/name`` on the Hub.
        destination: New folder or file.
        to: Name of a format; docs/formats.md has the table.
        base_model: Base of the prompt; needed where the source does not name it. A base that is
            loaded is checked against the prompt.
        task_name: Which task of a multitask prompt, by number or name.
        text: Input of the one request that ``vllm`` writes.
        name: What ``extended-vocab`` calls the prompt; None is the name of the source.
        add: Further prompts for ``extended-vocab``, by name.
        add_tasks: Which task of further multitask prompts, by the name in ``add``.
        template: Verbalizer of a source that has none of its own.
        overwrite: Replace what the destination holds.
        **reading: As for ``load``, but a ``torch_dtype`` of None keeps the checkpoint's.

    Raises:
        ArtifactError: The source fits no format or is damaged, or the format cannot express it.
        ConfigError: An option is missing, or would be ignored.
        TemplateError: The template has no placeholder.
        BackboneError: The base cannot be loaded.
        FingerprintError: The base is not the one the prompt was made for.
        OutputExistsError: The destination exists.
    """
    _check_paths(source, destination)
    target, output = format_named(to), Path(destination)
    _check_options(target, text, name, add, add_tasks, template)
    origin = detect(source)
    read = _reader(origin, source)
    _check_output(target, output, overwrite)
    ignore = reading.pop("ignore_fingerprint", False)
    stored, base = _opened(source, read, target, base_model, reading)
    others = _others(add or {}, add_tasks or {})
    if base is not None:
        for each in (stored, *others.values()):
            check_base(each, base.model, ignore=ignore)
            check_fit(each, base)
    lost = target.lost(stored.manifest, origin)
    chosen = None if task_name is None else str(task_name)
    stored = _recorded(stored, origin, target, base, template)
    given = None
    if text is not None and base is not None:
        given = _input_of(stored.of_task(chosen), base, text)
    export = Export(
        stored=stored,
        to=to,
        task=chosen,
        name=name or _name_of(source),
        others=others,
        base=base,
        encode=None if base is None else _encoder_of(base),
        ask=None if base is None else _asker_of(base),
        source=None if given is None else given.ids,
        at=0 if given is None else given.at,
        overwrite=overwrite,
    )
    write = cast(Callable[[Export, Path], Mapping[str, Any]], target.write)
    facts = {**write(export, output), **({} if given is None else {"input_cut": given.cut})}
    named = None if base is None else base.name
    return Conversion(str(source), origin.name, str(output), to, named, facts, lost)


def _check_paths(*given: object) -> None:
    for each in given:
        if not isinstance(each, str | Path):
            raise ConfigError(f"expected a path to convert, got {each!r}; give a str or a Path")


def _opened(
    source: str | Path, read: Read, target: Format, base_model: Named | None, reading: Mapping[str, Any]
) -> tuple[StoredPrompt, Base | None]:
    """Read the source, with the base where one is named or the output needs one."""
    base = None if base_model is None else _load(base_model, target, reading)
    stored = read(source, base)
    if base is None and target.writes_with_base:
        return stored, _load(recorded_base(stored), target, reading)
    if base is None and any(value is not None for value in reading.values()):
        raise ConfigError(
            f"{target.name} needs no base model here, so tokenizer, torch_dtype and device would be "
            "ignored; leave them out, or name a base_model to check the prompt against"
        )
    return stored, base


def _check_options(
    target: Format,
    text: Fields | None,
    name: str | None,
    add: Mapping[str, Any] | None,
    add_tasks: Mapping[str, Any] | None,
    template: str | None,
) -> None:
    if text is not None and target.name != _REQUESTING:
        raise ConfigError(f"text is the input of {_REQUESTING}'s request; {target.name} has none")
    if text is None and target.name == _REQUESTING:
        raise ConfigError("vllm writes the request for one input text; pass text (--text)")
    if (name is not None or add) and target.name != _NAMING:
        raise ConfigError(f"names and further prompts are for {_NAMING}, not for {target.name}")
    odd = sorted((add_tasks or {}).keys() - (add or {}).keys())
    if odd:
        raise ConfigError(
            f"a task is chosen for {odd[0]!r}, which is none of the further prompts "
            f"({', '.join(add or {}) or 'none'}){nearest(odd[0], add or {})}"
        )
    if template is not None:
        Verbalizer(template)
        if "template" in target.loses and target.name != _REQUESTING:
            raise ConfigError(f"{target.name} has no field for a template; leave --template out")


def _name_of(source: str | Path) -> str:
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


def _reader(origin: Format, source: str | Path) -> Read:
    if origin.read is None:
        raise ArtifactError(
            f"{source} is {origin.layout} ({origin.name}), which is only written; convert the "
            "prompt that it was made from"
        )
    return origin.read


def _check_output(target: Format, output: Path, overwrite: bool) -> None:
    """Refuse what may not be written before a base is loaded for it.

    A folder that already is a prompt of another format would be two at once.
    """
    if target.holds == "file":
        require_new_file(output, overwrite=overwrite)
        return
    if not overwrite:
        require_empty(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        found = detect(output)
    except ArtifactError:
        return
    if found.read is not target.read:
        raise OutputExistsError(
            f"{output} holds a prompt in the format {found.name}, and would be two at once; choose another folder"
        )


def _others(add: Mapping[str, str | Path], tasks: Mapping[str, str | int]) -> dict[str, StoredPrompt]:
    """Return further prompts by name, one task of each."""
    found = {}
    for name, path in add.items():
        origin = detect(path)
        if origin.reads_with_base:
            raise ConfigError(f"{path} ({origin.name}) does not name its base; convert it to softprompt first")
        stored = _reader(origin, path)(path, None)
        try:
            found[name] = stored.of_task(str(tasks[name]) if name in tasks else None)
        except ConfigError as error:
            raise ConfigError(f"further prompt {name}: {error}; say --add-task {name}=...") from error
    return found


def _load(base_model: Named, target: Format, reading: Mapping[str, Any]) -> Base:
    base = load_base(base_model, **reading)
    if target.name == _NAMING and isinstance(base_model, PreTrainedModel):
        # The export changes the model it saves.
        return Base(copy.deepcopy(base.model), base.tokenizer, base.name)
    return base


def _recorded(
    stored: StoredPrompt, origin: Format, target: Format, base: Base | None, template: str | None
) -> StoredPrompt:
    """Return a prompt with the manifest that its output needs: its own, or one made for a base."""
    manifest = stored.manifest
    if manifest is None and (template is not None or target.name == "softprompt"):
        if base is None:
            raise ConfigError(
                f"{stored.location} has no softprompt.json, and one is made from the base model: pass "
                "base_model (--base-model), or use --to peft"
            )
        manifest = manifest_of(Origin.of_base(base), base)
    elif template is not None and not origin.reads_with_base:
        raise ConfigError(f"{stored.location} has a template of its own ({origin.name}); leave --template out")
    if manifest is None:
        return stored
    try:
        Verbalizer(manifest.template)
    except TemplateError as error:
        raise ArtifactError(f"the template of {stored.location} cannot be used: {error}") from error
    return replace(stored, manifest=replace(manifest, template=template or manifest.template))


def _encoder_of(base: Base) -> Callable[[str], tuple[int, ...]]:
    """Return what gives the ids of a text as rows have them: framed, without EOS in causal models."""
    frame = SpecialFrame.of(base.tokenizer)
    if not base.is_encoder_decoder:
        frame = SpecialFrame(frame.prefix, ())

    def ids(text: str) -> tuple[int, ...]:
        return frame.around(encode(base.tokenizer, [text], special=False)[0])

    return ids


def _asker_of(base: Base) -> Ask:
    def ids(stored: StoredPrompt, request: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
        manifest = stored.manifest or manifest_of(Origin.of_base(base), base)
        whole = replace(stored, manifest=replace(manifest, max_source_length=_NO_LIMIT))
        given = _input_of(whole, base, request)
        return given.ids, given.at

    return ids


def _input_of(stored: StoredPrompt, base: Base, text: Fields) -> Input:
    """Return the tokens of one input under a prompt's template; truncation is logged."""
    unlimited = replace(manifest_of(Origin.of_base(base), base), max_source_length=_NO_LIMIT)
    placement = Placement(stored.config.get("placement", Placement.PREFIX))
    rows = row_tokenizer(base.tokenizer, stored.manifest or unlimited, placement)
    (given,) = inputs_of(rows, [text])
    if given.cut:
        logger.warning(
            "the input is longer than the prompt's max_source_length of %d tokens, and lost its end",
            rows.max_source_length,
        )
    return given
