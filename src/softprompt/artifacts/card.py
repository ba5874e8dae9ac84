"""The model card (``README.md`` in a prompt folder): what the prompt is, its use, its metrics."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from softprompt.artifacts.layout import OUR_KEYS
from softprompt.artifacts.manifest import Manifest
from softprompt.errors import HUB_NAME
from softprompt.fields import flat
from softprompt.prompts import PeftType

_CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]")
_BUNDLED = "demo"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_FOLDER = "path/to/this/folder"
_OWN_TAG = "- softprompt"
_YOUR_TEXT = "your text"
_SECTION = re.compile(r"\{\{[#^/][^{}]+\}\}")


def model_card(
    config: Mapping[str, Any],
    manifest: Manifest | None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """Return the card as Markdown with YAML front matter; it claims no licence by itself, and names no folder.

    Args:
        config: the content of ``adapter_config.json``.
        manifest: adds template, metrics, data and settings; None for a prompt without them.
        repo_id: the repository it is published in.
        license: identifier of its licence.
        datasets: Hub ids of the data sets it was trained on.
    """
    recorded = config.get("base_model_name_or_path") if manifest is None else manifest.base_model
    base, folder = _shown(str(recorded or "")), repo_id or _FOLDER
    found = _card_data(config, manifest, hub_name(base), repo_id)
    front = ModelCardData(license=license, datasets=list(datasets) or None, **found)
    sections = [f"---\n{front.to_yaml().strip()}\n---", _title(config, base)]
    if manifest is not None:
        sections.append(_with_softprompt(config, manifest, folder))
    sections.append(_with_peft(config, base, manifest, folder))
    if manifest is not None:
        versions = {**manifest.versions, "created": manifest.created}
        sections += [
            _format(manifest),
            _results(manifest.metrics),
            _table("Data", manifest.data),
            _table("Training settings", manifest.settings),
            _table("Versions", versions),
        ]
    return "\n\n".join(section for section in sections if section) + "\n"


def is_own_card(text: str) -> bool:
    """Return whether ``model_card`` wrote a README, which then may be replaced."""
    front = text.split("\n---\n", maxsplit=1)[0]
    return front.startswith("---\n") and {"library_name: peft", _OWN_TAG} <= set(front.splitlines())


def hub_name(base: str) -> str | None:
    """Return the Hub id that a base's name is, or the one whose cached files it is; None for another folder."""
    cached = _CACHED.search(base)
    if cached:
        return "/".join(filter(None, cached.groups()))
    # The hub rejects a card whose base_model is a path, so only ids go into the front matter.
    is_name = HUB_NAME.fullmatch(base) and (base == _BUNDLED or not os.path.exists(base))
    return base if is_name else None


def _shown(base: str) -> str:
    """Return what a card calls a base: its id, or its folder without those around it."""
    return hub_name(base) or (f"path/to/{os.path.basename(base)}" if os.path.isabs(base) else base)


def _card_data(
    config: Mapping[str, Any], manifest: Manifest | None, base: str | None, repo_id: str | None
) -> dict[str, Any]:
    """Return the metadata that the Hub searches and shows, as ``ModelCardData`` takes it."""
    kind = _task_type(config)
    found: dict[str, Any] = {"library_name": "peft", "tags": ["softprompt", "prompt-tuning"]}
    found["pipeline_tag"] = _PIPELINES.get(kind)
    if base and base != _BUNDLED:
        found |= {"base_model": base, "base_model_relation": "adapter"}
    if manifest is None:
        return found
    if manifest.task == "classification" and kind in _GENERATING:
        found["pipeline_tag"] = "text-classification"
    measured = manifest.metrics.get("validation")
    numbers = {name: value for name, value in (measured or {}).items() if isinstance(value, int | float)}
    path = str(manifest.data.get("validation", {}).get("path", "validation data"))
    if numbers:
        shared = {"task_type": found["pipeline_tag"], "dataset_type": "custom", "dataset_name": path}
        found["model_name"] = (repo_id or "").rpartition("/")[2] or "soft prompt"
        found["eval_results"] = [
            EvalResult(**shared, metric_type=name.split()[-1], metric_name=name, metric_value=value)
            for name, value in numbers.items()
        ]
    found["widget"] = [{"text": _example(manifest)}]
    return found


def _task_type(config: Mapping[str, Any]) -> str:
    value = config.get("task_type")
    return str(getattr(value, "value", value) or "")


def _example(manifest: Manifest | None) -> str:
    """Return what a model reads, its template's sections as if all fields had text."""
    if manifest is None:
        return _YOUR_TEXT
    text = _SECTION.sub("", manifest.template)
    for field in manifest.fields:
        text = text.replace(f"{{{{{field}}}}}", _YOUR_TEXT)
    return text


def _title(config: Mapping[str, Any], base: str) -> str:
    tokens = config.get("num_virtual_tokens")
    kind = _task_type(config) or "no task type"
    return (
        f"# Soft prompt for {f'`{base}`' if base else 'a frozen model'}\n\n"
        f"{tokens} trained vectors (virtual tokens, {kind}) that go in front of the input of "
        f"{'`' + base + '`' if base else 'the frozen base model'}, whose weights stay unchanged."
    )


def _with_softprompt(config: Mapping[str, Any], manifest: Manifest, folder: str) -> str:
    kind = _task_type(config)
    if kind in _GENERATING:
        fields = manifest.fields
        argument = '"your text"'
        if len(fields) > 1:
            argument = "{" + ", ".join(f'"{name}": "…"' for name in fields) + "}"
        lines = ["import softprompt", "", f'prompt = softprompt.load("{folder}")']
        lines += [f"print(prompt({argument}))"]
    else:
        # PEFT has a class of its own for features, transformers calls that plain AutoModel.
        auto = _AUTO_CLASSES.get(kind, "AutoModel")
        special = "ForFeatureExtraction" if kind == "FEATURE_EXTRACTION" else ""
        name = f"AutoPeft{auto.removeprefix('Auto')}{special}"
        lines = [f"from softprompt import {name}", "", f'model = {name}.from_pretrained("{folder}")']
    return _code("Use it with softprompt", *lines)


def _with_peft(config: Mapping[str, Any], base: str, manifest: Manifest | None, folder: str) -> str:
    kind = _task_type(config)
    auto = _AUTO_CLASSES.get(kind, "AutoModel")
    if config.get("peft_type") == PeftType.EXTENDED_PROMPT_TUNING:
        names = sorted(OUR_KEYS & config.keys())
        options = ", ".join(f"`{name}={config[name]}`" for name in names)
        return (
            "## With PEFT\n\nNot possible: this prompt has options that PEFT does not have "
            f"({options}), and PEFT would run another model. It refuses the `peft_type`."
        )
    lines = ["from peft import PeftModel"]
    if base == _BUNDLED:
        lines += ["from softprompt.backbone import load_base", ""]
        lines += [f'loaded = load_base("{_BUNDLED}")  # the model inside the softprompt package']
        lines += ["base, tokenizer = loaded.model, loaded.tokenizer"]
    else:
        name = json.dumps(base or "path/to/the/base/model")
        lines += [f"from transformers import {auto}, AutoTokenizer", ""]
        lines += [f"base = {auto}.from_pretrained({name})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({name})"]
    lines += [f'model = PeftModel.from_pretrained(base, "{folder}").eval()']
    if manifest and manifest.chat:
        lines += ['turn = [{"role": "user", "content": "your text"}]']
        lines += ["inputs = tokenizer.apply_chat_template("]
        lines += ['    turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"', ")"]
    else:
        text = json.dumps(_example(manifest), ensure_ascii=False)
        lines += [f'inputs = tokenizer({text}, return_tensors="pt")']
    if kind in _GENERATING:
        # Spelt out: tokenizers that also return token_type_ids make generate refuse **inputs.
        lines += ["tokens = model.generate("]
        lines += ['    input_ids=inputs["input_ids"],']
        lines += ['    attention_mask=inputs["attention_mask"],']
        lines += ["    max_new_tokens=20,", ")"]
        lines += ["print(tokenizer.decode(tokens[0], skip_special_tokens=True))"]
    else:
        lines += ["print(model(**inputs))"]
    return _code("Use it with PEFT", *lines)


def _format(manifest: Manifest) -> str:
    lines = ["## Input and output", "", "The input is rendered with this template:", ""]
    lines += [_fenced(manifest.template, ""), ""]
    if manifest.chat:
        lines = [
            lines[0],
            "",
            "Inputs are chats, rendered with the base model's chat template; a text is one turn.",
            "",
        ]
    lines += [f"Task: {manifest.task}."]
    if manifest.labels:
        lines[-1] += f" Labels: {', '.join(f'`{label}`' for label in manifest.labels)}."
    lines[-1] += (
        f" At most {manifest.max_source_length} tokens of input and {manifest.max_target_length} of output."
    )
    return "\n".join(lines)


def _results(metrics: Mapping[str, Any]) -> str:
    """Return the numbers as a table, and what is a remark on them above it."""
    remarks = [str(value) for value in metrics.values() if isinstance(value, str)]
    found = _table("Results", {name: value for name, value in metrics.items() if not isinstance(value, str)})
    return found.replace("\n\n", "\n\n" + "".join(f"Note: {each}.\n\n" for each in remarks), 1)


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in flat(values, ".").items()]
    return "\n".join([f"## {title}", "", "| name | value |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(shown.split()).replace("|", "\\|")


def _code(title: str, *lines: str) -> str:
    return f"## {title}\n\n" + _fenced("\n".join(lines), "python")


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
