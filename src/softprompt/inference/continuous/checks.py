"""Refusing a request before it waits, with what is wrong with it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import Facts, key_value_shape, output_limit
from softprompt.engine import EngineRow, check_context, check_rows, is_keys_and_values
from softprompt.errors import ConfigError
from softprompt.inference.continuous.request import PromptValue, Request


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
    value = None if request.prompt is None else request.prompt.value
    row = EngineRow(request.ids, (), -1 if value is None else 0, request.at)
    check_rows(model, facts, [row], [] if value is None else [value])
    new = request.new_tokens
    if not facts.is_encoder_decoder:
        check_context(len(request.ids), request.virtual_tokens, facts.context_length, new=new)
        return
    in_decoder = request.virtual_tokens
    if value is not None and not is_keys_and_values(value):
        in_decoder -= int(value.shape[0])
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


def _check_prompt(model: PreTrainedModel, facts: Facts, prompt: PromptValue) -> None:
    if prompt.decoder is not None and not facts.is_encoder_decoder:
        raise ConfigError(
            f"prompt {prompt.key!r} has rows for a decoder beside an encoder, but {facts.architecture} has "
            "one input; give them as its value"
        )
    for value in (prompt.value, prompt.decoder):
        if value is not None:
            _check_value(model, facts, prompt.key, value)


def _check_value(model: PreTrainedModel, facts: Facts, key: str, value: Tensor) -> None:
    expected = f"[P, {facts.token_dim}]"
    fits = value.dim() == 2 and value.shape[1] == facts.token_dim
    if is_keys_and_values(value):
        shape = key_value_shape(model)
        expected = f"[{shape.layers}, 2, {shape.heads}, P, {shape.width}]"
        sizes = list(value.shape)
        fits = [*sizes[:3], sizes[4]] == [shape.layers, 2, shape.heads, shape.width]
    if not fits:
        raise ConfigError(
            f"prompt {key!r} has shape {list(value.shape)}, {facts.architecture} takes {expected}; use the base "
            "it was made for"
        )
    if not bool(torch.isfinite(value).all()):
        raise ConfigError(
            f"prompt {key!r} holds values that are not finite; train or save it again"
        )
