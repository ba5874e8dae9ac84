"""The vLLM servers of a server's settings, asked whether they have its base, and what they take.

The base is known by what a server lists, how it tokenises, and what it finds likely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from softprompt.errors import QueueFullError, ServingError, SoftPromptError, UpstreamError, UsageError, excerpt
from softprompt.generation import AnswerRules, GenerationOptions, Request
from softprompt.prompts import KEY_VALUE_METHODS, Prompt
from softprompt.server.middleware import keys_in
from softprompt.server.upstream.answers import UpstreamAnswers, scores_of
from softprompt.server.upstream.carriage import NO_EMBEDS, Carriage
from softprompt.server.upstream.fleet import Fleet, UpstreamFacts, UpstreamRequest, UpstreamServer, check_ids
from softprompt.server.upstream.scores import UpstreamScores

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.server.settings import ServeSettings

Refuses = Callable[[Mapping[str, Any]], str]

_ALIKE = 0.05
"""Most difference, in nats, of two log-probabilities of one input put in two ways; bfloat16's is 0.02."""
_PROBE = 'On 7 May 2024 she paid 1,250.00 € for it; "Größe: 42", wrote the  shop.\n\nIt came back the next day.'
_APART = 0.25
"""Most nats a token by which the probe may be off: in 8 bits SmolLM2-135M is 0.05 off, in 4 bits 1."""
_IGNORE = ", or --ignore-fingerprint"
_MOST_BYTES = 4 << 30
"""Bytes of the largest base that is run once here, with its weights mapped from their files."""


def upstream_of(base: Base, settings: ServeSettings) -> tuple[UpstreamAnswers, UpstreamScores, Refuses]:
    """Return what computes on the servers that settings name, and what says why some prompt is not for them.

    One of the servers must answer now.

    Raises:
        UsageError: None answers, one has another model, or vLLM does not serve this kind of base.
    """
    if base.is_encoder_decoder:
        raise UsageError("vLLM has no prompts before an encoder; serve this base with --engine own")
    rules = AnswerRules.of(base)
    carriage = Carriage(base, rules.eos_ids, settings.bounds.max_prompts_resident)
    scores = None if settings.ignore_fingerprint else probe_scores(base)
    names = (base.name, *settings.served_model_name)

    async def ask(server: UpstreamServer) -> UpstreamFacts:
        try:
            return await asked(server, base, carriage, await identified(server, base, names, scores))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UpstreamError("it does not answer as vLLM does; see --upstream") from error

    fleet = Fleet(settings.upstream, ask, seconds=settings.upstream_seconds, key=_key(settings.upstream_key_file))
    try:
        fleet.run(fleet.ask_all()).result()
    except SoftPromptError as error:
        fleet.stop()
        raise UsageError(f"{error}; start vLLM first, or see --upstream") from error
    # Forms are vLLM's to follow, so none of ours is made.
    own = AnswerRules(rules.decode, rules.eos_ids, rules.counts_input)
    answers = UpstreamAnswers(base, settings.bounds, own, carriage, fleet)
    takes = bool(carriage.extra) or any(facts.takes_embeds for facts in fleet.facts)
    return answers, UpstreamScores(base, settings.bounds, carriage, fleet), partial(why_not_on_vllm, takes)


def _key(path: str | None) -> str | None:
    if path is None:
        return None
    first, *more = keys_in(path)
    if more or not (first.isascii() and first.isprintable()):
        raise UsageError(f"the file {path} is to hold one API key, on one line, of ASCII characters")
    return first


def why_not_on_vllm(takes: bool, config: Mapping[str, Any]) -> str:
    """Return why vLLM does not run prompts of a configuration, and what does; empty where it does.

    ``takes`` says whether some server takes prompts at all.
    """
    if config.get("peft_type") in KEY_VALUE_METHODS:
        return f"{config['peft_type']} is keys and values, which vLLM does not take; serve it with --engine own"
    if config.get("task_type") == "FEATURE_EXTRACTION":
        return "it gives vectors, which vLLM does not give behind a prompt; serve it with --engine own"
    return "" if takes else NO_EMBEDS


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
    version = (await server.whole("/version", absent={})).get("version", "")
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


async def asked(server: UpstreamServer, base: Base, carriage: Carriage, facts: UpstreamFacts) -> UpstreamFacts:
    """Return what a server says and shows: ``facts``, whether it takes embeddings, and what its template does.

    The same input is sent as ids, as embeddings, and as embeddings beside a text: what is taken, and means the same
    as the ids, is used.

    Raises:
        UpstreamError: It has another model than the base.
    """
    ids = base.tokenizer("The answer is 42.", add_special_tokens=False)["input_ids"]
    options = GenerationOptions(max_new_tokens=1)
    if carriage.extra:
        last = Request((max(carriage.extra),), options=options, logprobs=1)
        try:
            await _scored(server, carriage.question(last, facts, stream=False))
        except ServingError as error:
            raise UpstreamError(
                f"it has not the extra vocabulary of {base.name}; serve that folder there"
            ) from error
    with torch.no_grad():
        first = Prompt(base.embedding(torch.tensor(ids[:1])))
    plain = Request(tuple(ids), options=options, logprobs=5)
    behind = Request(tuple(ids[1:]), first, options=options, logprobs=5)
    expected = await _scored(server, carriage.question(plain, facts, stream=False))
    embeds = replace(facts, takes_embeds=True)
    try:
        found = await _scored(server, carriage.question(behind, embeds, stream=False))
    except ServingError as error:
        if isinstance(error, UpstreamError | QueueFullError):
            raise
        return facts
    if not alike(expected, found):
        raise UpstreamError(
            f"it has another model than {base.name}, whose embeddings of a text give other log-probabilities than "
            "the text's ids; pass the --base-model that vLLM serves"
        )
    parts = replace(embeds, takes_parts=True)
    question = carriage.question(behind, parts, stream=False)
    try:
        beside = await _scored(server, question)
    except ServingError:  # its template puts more than it is given, or does not know such parts
        return embeds
    return parts if question.ids is not None and alike(found, beside) else embeds


def alike(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Whether log p of the likeliest tokens may be of one input; a token that one does not list is no likelier."""
    least = min(other.values())
    return all(
        abs(other[token] - value) <= _ALIKE if token in other else value <= least + _ALIKE
        for token, value in one.items()
    )


async def _scored(server: UpstreamServer, question: UpstreamRequest) -> dict[int, float]:
    """Return log p of the likeliest first tokens; raises UpstreamError if a text became other tokens."""
    answer = await server.whole(question.path, question.body)
    if question.ids is not None:
        check_ids(question, answer["prompt_token_ids"])
    return scores_of(answer["choices"][0])[0][1]
