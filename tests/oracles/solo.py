"""One answer by itself, by transformers' own loop and the obvious rules: what every decoder must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from softprompt.backbone import Base
from softprompt.engine import generate_with_prompts
from softprompt.generation import Generation, GenerationOptions, Request


def solo(base: Base, request: Request, *, seed: int | None = None) -> Generation:
    """Return the answer to a request alone; one that samples without a seed takes ``seed``."""
    options, decode = request.options, request.decode
    assert decode is not None
    ids = torch.tensor([request.ids])
    seed = options.seed if options.seed is not None else seed
    kwargs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": options.max_new_tokens,
        "min_new_tokens": options.min_new_tokens or None,
        "num_beams": options.num_beams,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": sorted(ends_of(base)) or None,
        "exponential_decay_length_penalty": options.exponential_decay_length_penalty,
        "logits_processor": LogitsProcessorList(_processors(base, request, seed)),
        "early_stopping": False,
        "length_penalty": 1.0,
    }
    if not base.is_encoder_decoder:  # whose own loop would count the decoder's first token
        kwargs["repetition_penalty"] = float(options.repetition_penalty)
    at = [request.at] if request.at else None
    rows = generate_with_prompts(base, [request.prompt], kwargs, at=at)
    new = rows[0, 1 if base.is_encoder_decoder else ids.shape[1] :].tolist()
    found = ending(new, ends_of(base), options, decode, len(request.ids), seed)
    if not options.preserve_input_text:
        return found
    tokens = new[: found.generated_tokens]
    whole = decode([*request.ids, *tokens]).removesuffix(decode(tokens)) + found.text
    return replace(found, text=whole)


def ends_of(base: Base) -> frozenset[int]:
    config = base.model.generation_config.eos_token_id
    listed = config if isinstance(config, list) else [config]
    return frozenset(i for i in [*listed, base.tokenizer.eos_token_id] if i is not None)


def ending(
    new: list[int],
    ends: frozenset[int],
    options: GenerationOptions,
    decode: Any,
    inputs: int = 0,
    seed: int | None = None,
) -> Generation:
    """Return the answer in a row of new tokens with padding behind it, found from the whole row."""
    end = next((i for i, token in enumerate(new) if token in ends), None)
    tokens = new if end is None else new[: end + 1]
    for count in range(max(1, options.min_new_tokens), len(tokens) + 1):
        text = decode(tokens[:count])
        before = len(decode(tokens[: count - 1]).rstrip("\ufffd"))
        starts = [text.find(s, max(0, before - len(s) + 1)) for s in options.stop_sequences]
        if any(start >= 0 for start in starts):
            cut = text[: min(start for start in starts if start >= 0)]
            return Generation(cut, inputs, count, "stop_sequence", seed)
    if end is not None:
        return Generation(decode(tokens), inputs, len(tokens), "eos_token", seed)
    late = options.max_time is not None and len(tokens) < options.max_new_tokens
    return Generation(decode(tokens), inputs, len(tokens), "time_limit" if late else "max_tokens", seed)


def _processors(base: Base, request: Request, seed: int | None) -> list[Any]:
    options, found = request.options, list[Any]()
    start = 1 if base.is_encoder_decoder else len(request.ids)

    def penalised(ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        for token in set(ids[0, start:].tolist()):
            count = ids[0, start:].tolist().count(token)
            if base.is_encoder_decoder and options.repetition_penalty != 1:
                value, penalty = scores[0, token], options.repetition_penalty
                scores[0, token] = value / penalty if value > 0 else value * penalty
            scores[0, token] -= options.frequency_penalty * count + options.presence_penalty
        return scores

    found.append(penalised)
    if not options.samples:
        return found
    if options.temperature is not None:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        found.append(TopPLogitsWarper(float(options.top_p)))
    if options.min_p is not None:
        found.append(MinPLogitsWarper(float(options.min_p)))
    if options.typical_p is not None:
        found.append(TypicalLogitsWarper(float(options.typical_p)))
    generator = torch.Generator().manual_seed(seed or 0)

    def sampled(ids: Any, scores: Any) -> Any:
        waits = torch.empty(scores.shape[-1]).exponential_(generator=generator)
        return scores.float() - waits.clamp_min(torch.finfo(torch.float32).tiny).log()

    return [*found, sampled]
