"""Names that clients of OpenAI and vLLM send and that are not served, and which of their values ask for nothing.

Clients fill in defaults and echo whole answers: what asks for nothing is taken, anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

Neutral = Mapping[str, tuple[Any, ...] | None]
"""Values of a name that ask for nothing, beside null; None is any value, as it cannot change an answer."""


def _all(names: str, *values: Any) -> dict[str, tuple[Any, ...] | None]:
    return dict.fromkeys(names.split(), None if values == (Any,) else values)


PARAMETERS: Neutral = {
    # OpenAI's.
    **_all("audio dimensions moderation prediction web_search_options"),
    **_all("metadata parallel_tool_calls prompt_cache_key prompt_cache_options prompt_cache_retention", Any),
    **_all("safety_identifier", Any),
    **_all("echo store stream", False),
    **_all("functions tools", []),
    **_all("function_call tool_choice", "none", "auto"),
    **_all("best_of n", 1),
    "encoding_format": ("float",),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "verbosity": ("medium",),
    # vLLM's.
    **_all("allowed_token_ids cache_salt chat_template guided_choice guided_decoding_backend guided_grammar"),
    **_all("guided_json guided_regex kv_transfer_params prompt_embeds prompt_logprobs request_id"),
    **_all("structured_outputs truncate_prompt_tokens"),
    **_all("include_reasoning spaces_between_special_tokens", Any),
    **_all("add_generation_prompt add_special_tokens detokenize skip_special_tokens", True),
    **_all("continue_final_message early_stopping ignore_eos include_stop_str_in_output", False),
    **_all("return_token_ids return_tokens_as_token_ids use_beam_search", False),
    **_all("bad_words documents logits_processors stop_token_ids", []),
    **_all("chat_template_kwargs mm_processor_kwargs vllm_xargs", {}),
    "chat_template_content_format": ("auto", "string"),
    "length_penalty": (1,),
    "priority": (0,),
}
"""Parameters of a request."""
OF_MESSAGE: Neutral = {
    **_all("audio function_call tool_call_id"),
    **_all("annotations tool_calls", []),
    **_all("reasoning reasoning_content refusal", ""),
}
OF_PART: Neutral = {"annotations": ([],), "cache_control": None, "prompt_cache_breakpoint": None}
RESPONSES: Neutral = {
    **_all("access_programs conversation image previous_response_id prompt"),
    **_all("context_management include", []),
    "background": (False,),
    "max_tool_calls": None,
    "reasoning": ({}, {"effort": "none"}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Parameters of /v1/responses beside those of all requests."""
OF_ITEM: Neutral = {"id": None, "phase": None, "status": None}
OF_STREAM: Neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}

_ELSEWHERE = frozenset(
    "fields frequency_penalty input labels logprobs max_completion_tokens max_tokens messages presence_penalty "
    "prompt seed stop stream_options temperature top_logprobs top_p".split()
)
"""Parameters that some routes serve; null asks for nothing at the others."""
_INSTEAD = {
    "best_of": "send n for several answers",
    "function_call": "describe functions in a message",
    "functions": "describe them in a message",
    "conversation": "send the messages so far as input",
    "previous_response_id": "send the messages so far as input",
    "prompt_embeds": "send prompt as a text or token ids",
    "reasoning_effort": "leave it out",
    "stop_token_ids": "send stop with texts",
    "tools": "describe them in a message",
    "truncate_prompt_tokens": "send truncate_input=true to cut at the prompt's own limit",
    "use_beam_search": "send temperature 0 for the likeliest tokens",
}


_MOST_UNKNOWN = 8
"""Unknown names that are looked at: one is reported, and each costs an error of its own."""


def asked(values: Any, served: Collection[str], required: Collection[str], neutral: Neutral) -> Any:
    """Return what a part of a request asks for, without the values that ask for nothing.

    Args:
        values: The part as received; anything but an object is returned as it is.
        served: Names of the part that are served, of which null is the default.
        required: Those among them that have no default.
        neutral: Names that are not served.

    Raises:
        PydanticCustomError: ``not_served``, a value asks for what is not served.
    """
    if not isinstance(values, dict):
        return values
    kept: dict[str, Any] = {}
    unknown = 0
    for name, value in values.items():
        known = name in served or name in neutral or name in _ELSEWHERE
        if value is None and known and name not in required:
            continue
        if name in served or name not in neutral:
            unknown += name not in served
            if name in served or unknown <= _MOST_UNKNOWN:
                kept[name] = value
        elif not _asks_for_nothing(name, value, neutral[name]):
            instead = _INSTEAD.get(name, "leave it out")
            raise PydanticCustomError("not_served", "{name} is not served", {"name": name, "instead": instead})
    return kept


def _asks_for_nothing(name: str, value: Any, neutral: tuple[Any, ...] | None) -> bool:
    if neutral is None:
        return True
    if name == "logit_bias" and isinstance(value, dict):
        value = {token: bias for token, bias in value.items() if bias != 0}
    # To Python True is 1, to JSON it is not.
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)
