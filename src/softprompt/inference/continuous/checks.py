"""Refusing a request before it waits, with what is wrong with it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from softprompt.backbone import Facts, key_value_shape, output_limit
from softprompt.engine import EngineRow, check_context, check_rows
from softprompt.errors import ConfigError
from softprompt.inference.continuous.request import Request
from softprompt.prompts import Prompt


def check_request(model: PreTrainedModel, facts: Facts, request: Request) -> None:
    """Refuse what the model cannot run.

    Raises:
        ConfigError: The prompt is not one for this model, or an option is none for serving.
        DataError: An id is no token of the model, or there is nothing to read.
        ContextOverflowError: Prompt, input and answer do not fit into the context.
    """
    if request.options.num_beams > 1:
        raise ConfigError(
            f"num_beams {request.options.num_beams} is not served, as beams cannot be streamed; leave it at 1"
        )
    if request.prompt is not None:
        _check_prompt(model, facts, request.prompt)
    if facts.is_encoder_decoder:
        _check_seq2seq(request)
    prompt = request.prompt
    check_rows(model, facts, [EngineRow(request.ids, (), prompt, request.at)])
    new = request.new_tokens
    if not facts.is_encoder_decoder:
        check_context(len(request.ids), request.virtual_tokens, facts.context_length, new=new)
        return
    in_decoder = 0 if prompt is None else prompt.decoder_tokens + prompt.prefix_tokens
    check_context(0, in_decoder, output_limit(model), new=new, what="decoder")


def _check_seq2seq(request: Request) -> None:
    if request.echo:
        raise ConfigError(
            "echo needs a decoder model: the input of an encoder-decoder is no part of its output; leave it out"
        )
    if request.options.preserve_input_text:
        raise ConfigError(
            "preserve_input_text needs a decoder model: the input of an encoder-decoder is no part of its "
            "output; leave it out"
        )


def _check_prompt(model: PreTrainedModel, facts: Facts, prompt: Prompt) -> None:
    if prompt.decoder is not None and not facts.is_encoder_decoder:
        raise ConfigError(
            f"the prompt has virtual tokens for a decoder beside an encoder, but {facts.architecture} has one "
            "input; give them as its input"
        )
    for part in (prompt.input, prompt.decoder):
        if part is not None and part.shape[1] != facts.token_dim:
            raise _misfit(facts, list(part.shape), f"[P, {facts.token_dim}]")
    if prompt.prefix is not None:
        shape, sizes = key_value_shape(model), list(prompt.prefix.shape)
        if [*sizes[:3], sizes[4]] != [shape.layers, 2, shape.heads, shape.width]:
            raise _misfit(facts, sizes, f"[{shape.layers}, 2, {shape.heads}, P, {shape.width}]")
    if not all(bool(torch.isfinite(part).all()) for part in prompt.tensors):
        raise ConfigError("the prompt holds values that are not finite; train or save it again")


def _misfit(facts: Facts, sizes: list[int], expected: str) -> ConfigError:
    return ConfigError(
        f"the prompt has shape {sizes}, {facts.architecture} takes {expected}; use the base it was made for"
    )
