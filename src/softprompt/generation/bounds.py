"""Upper limits of batch, KV cache and queue, for ``Serving`` and the HTTP server alike.

``max_step_tokens`` is 512 by measurement (``bench/serving.py`` and ``bench/decode_step.py`` use it):
from 512 to 2048 neither tokens a second nor label scoring gain, while the longest gap between two
tokens of an answer, as long inputs arrive, grows threefold.
"""

from __future__ import annotations

from dataclasses import dataclass

from softprompt.errors import ConfigError
from softprompt.fields import check, setting

_GROUP = "Batching and caching"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a batcher and a scorer use at most.

    Raises:
        ConfigError: A value is out of range, or a pass cannot hold one token of every row.
    """

    max_batch_rows: int = setting(
        32, "Maximum batch size: answers generated at the same time.", least=1, group=_GROUP
    )
    max_step_tokens: int = setting(
        512,
        "Maximum tokens in one forward pass; longer inputs are split over several (chunked "
        "prefill).",
        least=1,
        group=_GROUP,
    )
    max_cached_tokens: int = setting(
        65_536, "KV-cache size of the running answers, in tokens.", least=1, group=_GROUP
    )
    max_queue: int = setting(
        256,
        "Maximum number of waiting requests; more are refused (HTTP 429).",
        least=1,
        group=_GROUP,
    )
    max_score_rows: int = setting(
        512,
        "Maximum number of labels scored in one forward pass, over all inputs.",
        least=1,
        group=_GROUP,
    )
    max_prompts_resident: int = setting(
        64, "LRU cache of prompts: how many are kept in memory.", least=0, group=_GROUP
    )
    max_prompt_tokens: int = setting(
        16_384,
        "LRU cache of prompt keys and values: its size in virtual tokens.",
        least=0,
        group=_GROUP,
    )
    ordered_weights: bool = setting(
        True,
        "Keep a second copy of a float32 base's weights, ordered for the CPU's matrix "
        "products, where that is faster.",
        group=_GROUP,
    )

    def __post_init__(self) -> None:
        """Check every bound."""
        check(self)
        if self.max_step_tokens < self.max_batch_rows:
            raise ConfigError(
                f"max_step_tokens {self.max_step_tokens} is below max_batch_rows {self.max_batch_rows}, but "
                "every row needs a token in each pass; raise the one or lower the other"
            )
