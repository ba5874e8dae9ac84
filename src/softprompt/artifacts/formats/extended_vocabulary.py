"""``extended-vocab``: the base saved with prompts as extra vocabulary, for any engine to serve.

The virtual tokens of prompt NAME are the special tokens ``<sp:NAME:0>`` ..., in front of the input's ids, or as
text in the system message of a chat.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts import StoredPrompt, require_empty, require_no_file, staged_folder
from softprompt.artifacts.formats.extended_model import extend
from softprompt.artifacts.formats.format import MEASURED, Export, Format, input_tokens, plain_prompt, write_failed
from softprompt.backbone import input_embedding, progress_on_terminals_only
from softprompt.data import Verbalizer
from softprompt.errors import ArtifactError, ConfigError, OutputExistsError
from softprompt.prompts import Placement

PROMPTS_FILE = "softprompt_prompts.json"
_NAME = "extended-vocab"
_PROMPT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PLACEMENTS = (Placement.PREFIX, Placement.CHAT_SYSTEM)
_PROBES = ("it broke again", " two  spaces", "Text : é 7\nLabel :")
_OWN = "Be brief."
"""What a probe has in its system message besides the prompt."""


def _lacks(path: Path) -> str | None:
    return None if (path / PROMPTS_FILE).is_file() else f"no folder with {PROMPTS_FILE}"


def _write(export: Export, path: Path) -> Mapping[str, Any]:
    base = export.loaded()
    prompts = _prompts(export)
    _check_output(path, overwrite=export.overwrite)
    tokens = {
        name: input_tokens(plain_prompt(stored, export.to, _PLACEMENTS), stored.location)
        for name, stored in prompts.items()
    }
    tokenizer, model = copy.deepcopy(base.tokenizer), base.model
    vocabulary = input_embedding(model).weight.shape[0]
    ids = add_prompt_tokens(tokenizer, vocabulary, {name: len(own) for name, own in tokens.items()})
    entries = {name: _entry(export, tokenizer, prompts[name], name, own) for name, own in ids.items()}
    extension = extend(model, tokens, ids)
    _suppress(model, vocabulary, extension.vocabulary)
    record = {"format_version": 1, "base_model": base.name, **asdict(extension), "prompts": entries}
    try:
        with staged_folder(path) as staged, progress_on_terminals_only():
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            (staged / PROMPTS_FILE).write_text(text, encoding="utf-8")
    # ValueError: transformers refuses to save generation settings that contradict each other.
    except (OSError, ValueError) as error:
        raise write_failed(path, error) from error
    return record


def _prompts(export: Export) -> dict[str, StoredPrompt]:
    prompts = {export.name: export.single()}
    for name, stored in export.others.items():
        if name in prompts:
            raise ConfigError(f"two prompts are called {name!r}; give one another name (--name)")
        prompts[name] = stored.of_task(None)
    for name in prompts:
        check_name(name)
    return prompts


def _check_output(path: Path, *, overwrite: bool) -> None:
    if not overwrite:
        require_empty(path)
        return
    require_no_file(path)
    # The folder is replaced as a whole, so it must be an earlier export.
    if path.is_dir() and any(path.iterdir()) and not (path / PROMPTS_FILE).is_file():
        raise OutputExistsError(
            f"{path} is no earlier export ({PROMPTS_FILE} is not in it), and an export replaces "
            "the whole folder: choose another one"
        )


def _suppress(model: PreTrainedModel, old: int, new: int) -> None:
    """Keep ``generate`` from giving ids that only prompts have."""
    settings = model.generation_config
    if settings is not None:
        known = settings.suppress_tokens or []
        settings.suppress_tokens = sorted({*known, *range(old, new)})


def _entry(export: Export, tokenizer: Any, stored: StoredPrompt, name: str, ids: list[int]) -> dict[str, Any]:
    text = "".join(token_text(name, index) for index in range(len(ids)))
    manifest, placement = stored.manifest, _placement(stored)
    chat = placement is Placement.CHAT_SYSTEM or bool(manifest and manifest.chat)
    messages = _messages(export, tokenizer, stored, text, ids) if chat else None
    if placement is Placement.CHAT_SYSTEM and messages is None:
        raise ArtifactError(
            f"expected the chat template to print the virtual tokens of {stored.location} in a system message "
            "where softprompt puts them, it prints other ids; train with --placement prefix, or use --to vllm"
        )
    form = None if export.encode is None or chat else text_form(tokenizer, text, ids, export.encode)
    template = manifest.template if manifest else "{{input}}"
    return {
        "token_ids": ids,
        "tokens": text,
        "placement": str(placement),
        # A causal model's answer begins with the space that its template ends in.
        "template": template if stored.seq2seq or chat else template.rstrip(" "),
        "messages": messages,
        "max_source_length": manifest.max_source_length if manifest else None,
        "max_target_length": manifest.max_target_length if manifest else None,
        "labels": list(manifest.labels) if manifest and manifest.labels else None,
        "text": None if form is None else asdict(form),
    }


def _placement(stored: StoredPrompt) -> Placement:
    return Placement(stored.config.get("placement", Placement.PREFIX))


def _messages(
    export: Export, tokenizer: Any, stored: StoredPrompt, text: str, ids: list[int]
) -> list[dict[str, str]] | None:
    """Return the messages of a request to a prompt, with its template in the user's turn.

    None where the exported tokenizer prints them as other ids than softprompt reads.
    """
    assert export.ask is not None  # it comes with the base
    manifest, in_system = stored.manifest, _placement(stored) is Placement.CHAT_SYSTEM
    chat = bool(manifest and manifest.chat)
    template = Verbalizer(manifest.template if manifest and not chat else "{{input}}")
    for probe in _PROBES:
        fields = dict.fromkeys(template.fields, probe)
        turn = {"role": "user", "content": template.render(fields)}
        # Only a prompt of chats may have text of the caller's behind it in the system message.
        for own in ("", _OWN) if chat and in_system else ("",):
            system = [{"role": "system", "content": own}] if own else []
            asked, at = export.ask(stored, {"messages": [*system, turn]} if chat else fields)
            if in_system:
                system = [{"role": "system", "content": text + own}]
            printed = tokenizer.apply_chat_template([*system, turn], add_generation_prompt=True, return_dict=False)
            if [*asked[:at], *ids, *asked[at:]] != [*([] if in_system else ids), *printed]:
                return None
    system = [{"role": "system", "content": text}] if in_system else []
    return [*system, {"role": "user", "content": template.template}]


@dataclass(frozen=True, slots=True)
class TextForm:
    """How to write a prompted input as text that tokenises to its ids.

    Attributes:
        before: Text before the input's.
        after: Text behind it.
        add_special_tokens: How the tokenizer must be called.
    """

    before: str
    after: str
    add_special_tokens: bool


def check_name(name: str) -> None:
    """Raise ConfigError unless a prompt's name can be part of a special token."""
    if not _PROMPT_NAME.fullmatch(name) or set(name) == {"."}:
        raise ConfigError(
            f"a prompt's name is 1 to 64 letters, digits, '.', '_' and '-', got {name!r}; pass another (--name)"
        )


def token_text(name: str, index: int) -> str:
    """Return the special token of a virtual token."""
    return f"<sp:{name}:{index}>"


def add_prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, lengths: Mapping[str, int]
) -> dict[str, list[int]]:
    """Add one special token per virtual token and return their ids, all of them V or above.

    Args:
        tokenizer: changed in place. Where it has fewer ids than the base has embeddings, unused
            tokens fill the gap: the base can generate those ids, so their embeddings must stay its own.
        vocabulary: size of the base's embedding table (V).
        lengths: virtual tokens (P) by name.

    Raises:
        ArtifactError: the tokenizer already has such a token, or gives an id twice.
    """
    taken = tokenizer.get_vocab()
    free = max(taken.values(), default=-1) + 1
    _add(tokenizer, [f"<sp:unused:{index}>" for index in range(free, vocabulary)], taken)
    ids: dict[str, list[int]] = {}
    for name, length in lengths.items():
        texts = [token_text(name, index) for index in range(length)]
        _add(tokenizer, texts, taken)
        ids[name] = cast(list[int], tokenizer.convert_tokens_to_ids(texts))
    flat = [each for own in ids.values() for each in own]
    if len(set(flat)) != len(flat) or min(flat) < max(vocabulary, free):
        raise ArtifactError(
            f"expected ids from {max(vocabulary, free)} on for the prompt's tokens, the tokenizer "
            f"gave {flat[:3]}…; its ids have gaps, so use --to vllm or tgis"
        )
    return ids


def text_form(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int], encode: Callable[[str], tuple[int, ...]]
) -> TextForm | None:
    """Return a form of text that gives exactly the ids of a prompted input, None when none does.

    Args:
        tokenizer: the one with the prompt's tokens.
        prompt: the prompt's tokens as text.
        ids: their ids.
        encode: the ids of an input's text behind a prompt.
    """
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    for form in (
        TextForm(prompt, "", True),
        TextForm(prompt + bos, "", False),
        TextForm(prompt, eos, False),
        TextForm(prompt + bos, eos, False),
        TextForm(prompt + str(tokenizer.cls_token or ""), str(tokenizer.sep_token or ""), False),
    ):
        if all(_says(tokenizer, form, text, [*ids, *encode(text)]) for text in _PROBES):
            return form
    return None


def _says(tokenizer: PreTrainedTokenizerBase, form: TextForm, text: str, expected: list[int]) -> bool:
    encoded: Any = tokenizer(form.before + text + form.after, add_special_tokens=form.add_special_tokens)
    return list(encoded["input_ids"]) == expected


def _add(tokenizer: PreTrainedTokenizerBase, texts: list[str], taken: Mapping[str, int]) -> None:
    known = [text for text in texts if text in taken]
    if known:
        raise ArtifactError(
            f"the tokenizer already has {known[0]!r}; convert onto the original base, or choose another name"
        )
    # Not normalized, nothing stripped: the text around the tokens keeps its spaces.
    tokens = [AddedToken(text, special=True, normalized=False, lstrip=False, rstrip=False) for text in texts]
    tokenizer.add_tokens(tokens, special_tokens=True)


EXTENDED_VOCABULARY = Format(
    _NAME,
    f"a model folder with {PROMPTS_FILE}",
    _lacks,
    None,
    _write,
    writes_with_base=True,
    loses=(*MEASURED, "task", "base_fingerprint"),
)
