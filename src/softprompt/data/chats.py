"""Chat templates: the tokens around a user turn, with the prompt in the system turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from softprompt.data.special_tokens import SpecialFrame, encode
from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER = "SYSTEMTURN", "USERTURN"
"""Stand-ins that a template prints as they are, to see what it puts around them."""


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """What a tokenizer's chat template puts around one user turn behind a system turn.

    Attributes:
        frame: The ids before and behind the user's text.
        at: Ids of the frame before the content of the system turn, where the prompt goes.
        tail: Text behind the user's, at the end of which the answer begins.
    """

    frame: SpecialFrame
    at: int
    tail: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Read the frame off the tokenizer's chat template.

        Raises:
            ConfigError: There is no template, or it has no system turn of its own.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                "placement chat_system needs a tokenizer with a chat template, this one has none; "
                "use prefix, or a chat model"
            )
        turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            rendered = cast(Any, tokenizer).apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as cause:  # templates raise what they like
            raise ConfigError(
                f"placement chat_system needs a chat template with a system turn, this one says: {cause}; "
                "use prefix"
            ) from cause
        head, system, rest = str(rendered).partition(_SYSTEM)
        middle, user, tail = rest.partition(_USER)
        if not (system and user):
            raise ConfigError(
                "placement chat_system needs a chat template that prints the system turn before the user's; "
                "use prefix"
            )
        before, between, behind = encode(tokenizer, [head, middle, tail], special=False)
        return cls(SpecialFrame(before + between, behind), len(before), tail)
