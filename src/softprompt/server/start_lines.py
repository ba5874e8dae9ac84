"""What a server says when it starts: what is ready, what is not and why, where to look, and a request to try."""

from __future__ import annotations

import json
import logging
import shlex
from typing import TYPE_CHECKING, Any

from softprompt.data import Verbalizer

if TYPE_CHECKING:
    from softprompt.generation import AnswerSource
    from softprompt.server.registry import Registry

logger = logging.getLogger(__name__)

_TEXT = "My parcel is two weeks late"


def log_prompts(registry: Registry, batcher: AnswerSource) -> None:
    """Log how many prompts are ready, and those that are not, or not under their own names."""
    ready, unusable = registry.sorted_out()
    parts = [f"{len(ready)} prompt{'s' * (len(ready) != 1)} ready"]
    parts += [f"{len(unusable)} unusable"] * bool(unusable)
    why = f" ({batcher.reason})" if batcher.reason else ""
    logger.info("%s: %s; %s engine%s", ", ".join(registry.base_names), ", ".join(parts), batcher.engine, why)
    for folder in registry.base_names:
        name = registry.root.name_of(folder)
        if name in {*ready, *unusable}:
            logger.warning(
                "the prompt in the folder %s has the base's name and is served as %s; rename the folder, or give "
                "the base another name with --served-model-name",
                *(folder, name),
            )
    for name, problem in unusable.items():
        logger.warning("the prompt %s cannot be served: %s", name, problem)


def log_addresses(registry: Registry, host: str, port: int, *, asks_for_key: bool) -> None:
    """Log where the server listens, where its page and its API's description are, and a request to try."""
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{'localhost' if host in ('0.0.0.0', '::') else shown}:{port}"
    logger.info("page %s/ and API %s/docs", url, url)
    ready, _ = registry.sorted_out()
    path, body = _example(registry, ready[0]) if ready else ("completions", {"prompt": _TEXT})
    body = {"model": ready[0] if ready else registry.base_names[0], **body}
    words = ["curl", f"{url}/v1/{path}", "-H", "Content-Type: application/json"]
    words += ["-H", "Authorization: Bearer KEY"] * asks_for_key
    logger.info("try %s", shlex.join([*words, "-d", json.dumps(body, ensure_ascii=False)]))
    logger.info("listening on http://%s:%d", shown, port)


def _example(registry: Registry, name: str) -> tuple[str, dict[str, Any]]:
    """Return a route and a body that a prompt answers."""
    facts = registry.outline(name).facts
    if facts["task_type"] == "FEATURE_EXTRACTION":
        return "embeddings", {"input": _TEXT}
    task = (facts["tasks"] or [facts])[0]
    chosen = {"task": task["name"]} if facts["tasks"] else {}
    fields = Verbalizer(task["template"]).fields
    classifies = task["task"] == "classification"
    if len(fields) > 1:
        return "classify" if classifies else "completions", {**chosen, "fields": dict.fromkeys(fields, _TEXT)}
    return ("classify", {**chosen, "input": _TEXT}) if classifies else ("completions", {**chosen, "prompt": _TEXT})
