"""The vLLM servers of a server's settings, asked what they are and what they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from softprompt.errors import QueueFullError, ServingError, SoftPromptError, UpstreamError, UsageError
from softprompt.generation import AnswerRules, GenerationOptions, Request
from softprompt.prompts import KEY_VALUE_METHODS, Prompt
from softprompt.server.middleware import keys_in
from softprompt.server.upstream.answers import UpstreamAnswers, scores_of
from softprompt.server.upstream.carriage import NO_EMBEDS, Carriage
from softprompt.server.upstream.fleet import Fleet, UpstreamFacts, UpstreamRequest, UpstreamServer, check_ids
from softprompt.server.upstream.identity import identified, probe_scores
from softprompt.server.upstream.scores import UpstreamScores

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.server.settings import ServeSettings

Refuses = Callable[[Mapping[str, Any]], str]

_ALIKE = 0.05
"""Most difference, in nats, of two log-probabilities of one input put in two ways; bfloat16's is 0.02."""


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
