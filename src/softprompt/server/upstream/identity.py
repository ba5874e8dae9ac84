"""Whether a vLLM server has the base of this one, by what it lists, how it tokenises, and what it finds likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch.func import functional_call

from softprompt.errors import ServingError, UpstreamError, excerpt
from softprompt.server.upstream.fleet import UpstreamFacts

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.server.upstream.fleet import UpstreamServer

_PROBE = 'On 7 May 2024 she paid 1,250.00 € for it; "Größe: 42", wrote the  shop.\n\nIt came back the next day.'
_APART = 0.25
"""Nats a token by which the probe's log-probabilities may differ on average; see docs/serving.md."""
_MOST_BYTES = 4 << 30
"""Bytes of the largest base that is run once here, with its weights mapped from their files."""


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """What a server of the same base must say.

    Attributes:
        names: What the base may be called.
        longest: The most tokens that it has positions for; None is no limit.
        texts: Texts with their tokens, special tokens among them.
        log_probs: log p of the tokens of the first, from the second on; None where the base cannot be run here.
    """

    names: Sequence[str]
    longest: int | None
    texts: Mapping[str, list[int]]
    log_probs: list[float] | None

    @classmethod
    def of(cls, base: Base, names: Sequence[str], *, may_differ: bool) -> Self:
        """Take it from a base; the weights of one that ``may_differ`` are not compared."""
        special = base.tokenizer.all_special_tokens
        texts = [_PROBE, *(["".join(dict.fromkeys(special[:64] + special[-64:]))] if special else [])]
        ids = {text: list(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
        scores = None if may_differ else _scored(base, ids[_PROBE])
        return cls(names, _positions(base), ids, scores)

    async def checked(self, server: UpstreamServer) -> UpstreamFacts:
        """Return what a server says of itself.

        Raises:
            UpstreamError: It has another model.
        """
        listed = self._own((await server.whole("/v1/models"))["data"])
        version = (await server.whole("/version")).get("version", "")
        facts = UpstreamFacts(listed["id"], version, listed.get("max_model_len"))
        if self.longest and (facts.context_length or 0) > self.longest:
            raise self._other(f"it takes {facts.context_length:,} tokens, the base has {self.longest:,} positions")
        for text, ids in self.texts.items():
            asking = {"model": facts.model, "prompt": text, "add_special_tokens": False}
            try:
                found = (await server.whole("/tokenize", asking))["tokens"]
            except ServingError:  # not every router passes that on
                break
            if found != ids:
                raise self._other(f"it reads {excerpt(text)!r} as other tokens")
        if self.log_probs is not None:
            await self._check_scores(server, facts, self.log_probs)
        return facts

    async def _check_scores(self, server: UpstreamServer, facts: UpstreamFacts, own: list[float]) -> None:
        ids = self.texts[_PROBE]
        asking = {"model": facts.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        (choice,) = (await server.whole("/v1/completions", asking))["choices"]
        listed = list(zip(ids, choice["prompt_logprobs"], strict=True))[1:]
        found = [each[str(token)]["logprob"] for token, each in listed]
        apart = sum(abs(a - b) for a, b in zip(own, found, strict=True)) / len(own)
        if not apart <= _APART:
            raise self._other(f"log-probabilities of a text differ by {apart:.2f} nats a token", weights=True)

    def _own(self, listed: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return which of the models that a server lists is the base: by its name, or the one that there is."""
        known = {part for name in self.names for part in (name, Path(name).name)}
        named = [each for each in listed if known & {each["id"], each.get("root"), Path(each["id"]).name}]
        bases = named or [each for each in listed if not each.get("parent")]  # others are adapters of one
        if len(bases) > 1 and not named:
            shown = excerpt(", ".join(each["id"] for each in bases), 200)
            raise UpstreamError(f"it has several models ({shown}); name one of them with --served-model-name")
        return bases[0]

    def _other(self, why: str, *, weights: bool = False) -> UpstreamError:
        more = ", or --ignore-fingerprint if its weights are quantised" if weights else ""
        return UpstreamError(
            f"it has another model than {self.names[0]}: {why}; pass the --base-model that vLLM serves{more}"
        )


def _positions(base: Base) -> int | None:
    """Return how many tokens a base has positions for, None where a server may stretch them."""
    rope = getattr(base.model.config.get_text_config(), "rope_parameters", None) or {}
    parts = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    stretched = any(each.get("factor") or each.get("long_factor") for each in parts)
    return None if stretched else base.facts.context_length


@torch.no_grad()
def _scored(base: Base, ids: Sequence[int]) -> list[float] | None:
    """Return log p of tokens from the second on, None where the base is too large or lacks some weights.

    These are mapped from their files, in whatever type the files have.
    """
    model, given = base.model, torch.tensor([ids])
    model.tie_weights()  # of a tied head the embedding is there
    weights = dict(model.named_parameters())
    if any(each.is_meta for each in weights.values()) or getattr(model.config, "quantization_config", None):
        return None
    if sum(each.numel() for each in weights.values()) * base.dtype.itemsize > _MOST_BYTES:
        return None
    cast = {name: each.to(base.dtype) for name, each in weights.items()}
    logits = functional_call(model, cast, kwargs={"input_ids": given.to(base.device)}).logits
    found = logits[0, :-1].float().log_softmax(-1).gather(1, given[0, 1:, None].to(logits.device))
    return [float(each) for each in found[:, 0]]
