"""How a prompted input is put to a vLLM server: as ids, as embeddings beside a text, or as embeddings alone.

- Ids: the base alone; and a prompt whose virtual tokens the server has as extra vocabulary (an ``extended-vocab``
  export, which is then our base as well).
- Parts: P virtual tokens, encoded once for each prompt, and the text, in a chat whose template passes both on. Only
  for ids that are what the tokenizer makes of their text, which is checked for each request.
- Embeds: the whole input embedded here. Always exact on ids.

vLLM reads embeddings with ``torch.load``; nothing that a client sent is ever among them but through its ids.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from softprompt.artifacts import MOST_TEXT_BYTES, PROMPTS_FILE, parse_object, pickled_bytes, read_bytes
from softprompt.errors import ArtifactError, ConfigError
from softprompt.server.upstream.fleet import UpstreamRequest

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.generation import GenerationOptions, Request
    from softprompt.prompts import Prompt
    from softprompt.server.upstream.fleet import UpstreamFacts

_PLACEHOLDER = "<prompt_embeds>"
"""What vLLM keeps for itself in texts that stand beside embeddings."""
_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_UNSERVED = {"typical_p": None, "exponential_decay_length_penalty": None, "preserve_input_text": False}


@final
class Carriage:
    """Puts requests to servers; any thread may call.

    Args:
        base: The base, whose embedding is there.
        eos_ids: Tokens that end an answer.
        kept: Of how many prompts the encoded virtual tokens, and their ids, are kept.

    Raises:
        ArtifactError: The base is an export whose record cannot be read.
    """

    def __init__(self, base: Base, eos_ids: frozenset[int], kept: int) -> None:
        self._base = base
        self._eos_ids = sorted(eos_ids)
        self._exported = _exported(base)
        self._encoded: Callable[[Prompt], str] = lru_cache(kept)(self._encode)
        self.extra = frozenset(token for ids, _ in self._exported for token in ids)
        self.extra_ids: Callable[[Prompt], list[int] | None] = lru_cache(kept)(self._extra_ids)

    def _extra_ids(self, prompt: Prompt) -> list[int] | None:
        """Return the ids of a prompt's virtual tokens, None where the base is no export that has these values."""
        assert prompt.input is not None
        for ids, rows in self._exported:
            own = prompt.input.to(rows)
            if own.shape == rows.shape and torch.allclose(own, rows, rtol=4 * torch.finfo(rows.dtype).eps, atol=0):
                return ids
        return None

    def check(self, request: Request) -> None:
        """Raise ConfigError for what vLLM does not do as it is asked here."""
        options, prompt = request.options, request.prompt
        for name, off in _UNSERVED.items():
            if getattr(options, name) != off:
                raise ConfigError(f"{name} is not served by vLLM; leave it out, or serve with --engine own")
        if prompt is None:
            return
        if prompt.input is None or prompt.decoder is not None:
            raise ConfigError("vLLM takes virtual tokens in the input alone; serve this prompt with --engine own")
        by_ids = self.extra_ids(prompt) is not None
        for name, asked in (("repetition_penalty", options.repetition_penalty != 1), ("echo", request.echo)):
            if asked and not by_ids:
                raise ConfigError(
                    f"{name} looks at the input's tokens, which vLLM lacks behind embeddings; leave it out, or "
                    "serve the prompt as extra vocabulary (convert --to extended-vocab)"
                )

    def question(
        self, request: Request, facts: UpstreamFacts, seed: int | None = None, **more: Any
    ) -> UpstreamRequest:
        """Return what to send to a server for one answer to a request; ``more`` are further settings.

        Raises:
            ConfigError: The server has not what the prompt needs.
        """
        settings = {**self._settings(request, seed), "model": facts.model, **more}
        ids, at, prompt = list(request.ids), request.at, request.prompt
        if prompt is None:
            return UpstreamRequest(_COMPLETIONS, {**settings, "prompt": ids})
        if (extra := self.extra_ids(prompt)) is not None:
            return UpstreamRequest(_COMPLETIONS, {**settings, "prompt": [*ids[:at], *extra, *ids[at:]]})
        if not facts.takes_embeds:
            raise ConfigError(NO_EMBEDS)
        if facts.takes_parts and (texts := self._texts(ids[:at], ids[at:])) is not None:
            return self._parts(settings, prompt, texts, ids, at)
        assert prompt.input is not None
        table = self._base.embedding
        with torch.no_grad():
            before, behind = (table(torch.tensor(part, dtype=torch.long)) for part in (ids[:at], ids[at:]))
        whole = torch.cat([before, prompt.input.to(before), behind])
        return UpstreamRequest(_COMPLETIONS, {**settings, "prompt_embeds": encoded(whole)})

    def _parts(
        self, settings: dict[str, Any], prompt: Prompt, texts: tuple[str, str], ids: Sequence[int], at: int
    ) -> UpstreamRequest:
        before, behind = ([{"type": "text", "text": text}] if text else [] for text in texts)
        virtual = {"type": "prompt_embeds", "data": self._encoded(prompt)}
        likeliest = settings.pop("logprobs", None)
        if likeliest is not None:
            settings |= {"logprobs": True, "top_logprobs": likeliest}
        message = {"role": "user", "content": [*before, virtual, *behind]}
        return UpstreamRequest(_CHATS, {**settings, "messages": [message], "add_generation_prompt": False}, ids, at)

    def _settings(self, request: Request, seed: int | None) -> dict[str, Any]:
        """Return the settings that both routes know; all are given, for a server has defaults of its own."""
        options = request.options
        found: dict[str, Any] = {
            "max_tokens": request.new_tokens,
            "min_tokens": options.min_new_tokens,
            "ignore_eos": True,
            "stop_token_ids": self._eos_ids,
            "repetition_penalty": options.repetition_penalty,
            "frequency_penalty": options.frequency_penalty,
            "presence_penalty": options.presence_penalty,
            "stream": True,
            "return_token_ids": True,
            **_sampling(options, seed),
        }
        if request.logprobs is not None:
            found |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        if self.extra:
            found["logit_bias"] = {str(token): -100 for token in sorted(self.extra)}
        form = {"choice": list(options.choices), "regex": options.regex, "json": options.json_schema}
        if asked := {name: value for name, value in form.items() if value}:
            found["structured_outputs"] = asked
        return found

    def _texts(self, before: list[int], behind: list[int]) -> tuple[str, str] | None:
        """Return the texts of ids, None where one does not become these ids again."""
        tokenizer, texts = self._base.tokenizer, list[str]()
        for ids in (before, behind):
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            again = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            if again != ids or _PLACEHOLDER in text:
                return None
            texts.append(text)
        return texts[0], texts[1]

    def _encode(self, prompt: Prompt) -> str:
        assert prompt.input is not None
        return encoded(prompt.input.to(self._base.embedding.weight.dtype))


NO_EMBEDS = (
    "the vLLM server takes no embeddings; start it with --enable-prompt-embeds, or serve the prompt as extra "
    "vocabulary (convert --to extended-vocab, and that folder as --base-model here and there)"
)


def encoded(tokens: Tensor) -> str:
    """Return virtual tokens ``[P, H]`` as vLLM takes them: the base64 of what ``torch.save`` writes."""
    return base64.b64encode(pickled_bytes(tokens.detach().cpu().clone())).decode()


def _sampling(options: GenerationOptions, seed: int | None) -> dict[str, Any]:
    if not options.samples:
        return {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return {
        "temperature": 1.0 if options.temperature is None else options.temperature,
        "top_p": 1.0 if options.top_p is None else options.top_p,
        "top_k": options.top_k or 0,
        "min_p": options.min_p or 0.0,
        "seed": seed,
    }


def _exported(base: Base) -> list[tuple[list[int], Tensor]]:
    """Return ids and values ``[P, H]`` of the prompts that a base has as extra vocabulary."""
    path = Path(base.name, PROMPTS_FILE)
    if not path.is_file():
        return []
    text = read_bytes(path, MOST_TEXT_BYTES).decode(errors="replace")
    try:
        entries = [each["token_ids"] for each in parse_object(text, str(path))["prompts"].values()]
        with torch.no_grad():
            return [(ids, base.embedding(torch.tensor([index(token) for token in ids]))) for ids in entries]
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"expected prompts with token_ids of {base.name} in {path}, it has others: export it again"
        ) from error
