"""Whether a vLLM server has the base of this one, by what it lists, how it tokenises, and what it finds likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from softprompt.errors import ServingError, UpstreamError, excerpt
from softprompt.server.upstream.fleet import UpstreamFacts

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.server.upstream.fleet import UpstreamServer

_PROBE = 'On 7 May 2024 she paid 1,250.00 € for it; "Größe: 42", wrote the  shop.\n\nIt came back the next day.'
_APART = 0.25
"""Most nats a token by which the probe may be off: in 8 bits SmolLM2-135M is 0.05 off, in 4 bits 1."""
_IGNORE = ", or --ignore-fingerprint"
_MOST_BYTES = 4 << 30
"""Bytes of the largest base that is run once here, with its weights mapped from their files."""


async def identified(
    server: UpstreamServer, base: Base, names: Sequence[str], own: Sequence[float] | None
) -> UpstreamFacts:
    """Return what a server says of itself; raises UpstreamError if it has another model.

    ``names`` are the base's; ``own`` is what ``probe_scores`` gives, which is not compared if empty. Of
    None the positions are not compared either: a server may stretch them by what the base's files do not say.
    """

    def other(why: str, instead: str = "") -> UpstreamError:
        what = "pass the --base-model that vLLM serves"
        return UpstreamError(f"it has another model than {base.name}: {why}; {what}{instead}")

    listed = _base_among((await server.whole("/v1/models"))["data"], names)
    version = (await server.whole("/version")).get("version", "")
    facts = UpstreamFacts(listed["id"], version, listed.get("max_model_len"))
    longest = base.facts.context_length
    # Positions that a rope stretches by a factor go further than the base's own.
    if "factor" not in str(getattr(base.model.config, "rope_parameters", "")) and longest and own is not None:
        if (facts.context_length or 0) > longest:
            raise other(f"it takes {facts.context_length:,} tokens, the base has {longest:,} positions", _IGNORE)
    for text in (_PROBE, "".join(base.tokenizer.all_special_tokens[:64])):
        asking = {"model": facts.model, "prompt": text, "add_special_tokens": False}
        try:
            found = (await server.whole("/tokenize", asking))["tokens"]
        except ServingError:  # not every router passes that on
            break
        if found != _ids(base, text):
            raise other(f"it reads {excerpt(text)!r} as other tokens")
    asking = {"model": facts.model, "prompt": _ids(base), "max_tokens": 1, "prompt_logprobs": 0}
    if own:
        (choice,) = (await server.whole("/v1/completions", asking))["choices"]
        pairs = list(zip(_ids(base), choice["prompt_logprobs"], strict=True))[1:]
        theirs = [each[str(token)]["logprob"] for token, each in pairs]
        apart = sum(abs(a - b) for a, b in zip(own, theirs, strict=True)) / len(own)
        if not apart <= _APART:
            raise other(f"log-probabilities of a text differ by {apart:.2f} nats a token", _IGNORE)
    return facts


def _base_among(listed: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Mapping[str, Any]:
    """Return which of a server's models is the base: by its name, or the only one that is no adapter of another."""
    known = {part for name in names for part in (name, Path(name).name)}
    named = [each for each in listed if known & {each["id"], each.get("root")}]
    bases = named or [each for each in listed if not each.get("parent")]
    if not named and len({each.get("root") or each["id"] for each in bases}) > 1:  # cards of one share a root
        shown = excerpt(", ".join(dict.fromkeys(each["id"] for each in bases)), 200)
        raise UpstreamError(f"it has several models ({shown}); name one of them with --served-model-name")
    return bases[0]


def _ids(base: Base, text: str = _PROBE) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def probe_scores(base: Base) -> list[float]:
    """Return log p of a text's tokens from the second on; none of one that is large, quantised or not all there."""
    model, given = base.model, torch.tensor([_ids(base)])
    model.tie_weights()  # of a tied head the embedding is there
    weights = dict(model.named_parameters())
    size = sum(each.numel() for each in weights.values()) * base.dtype.itemsize
    quantised = getattr(model.config, "quantization_config", None) is not None
    if size > _MOST_BYTES or quantised or any(each.is_meta for each in weights.values()):
        return []
    same_type = {name: each.to(base.dtype) for name, each in weights.items()}  # files may mix them
    try:
        logits = functional_call(model, same_type, kwargs={"input_ids": given.to(base.device)}).logits.cpu()
    except Exception:  # whatever a model's own code raises on weights that are only mapped
        return []
    found = logits[0, :-1].float().log_softmax(-1).gather(1, given[0, 1:, None])
    return [float(each) for each in found]
