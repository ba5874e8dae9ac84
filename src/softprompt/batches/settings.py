"""What can be set for a batch on Ray, each with its help text. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softprompt.fields import check, setting

_RAY = "Batches on Ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How a batch is cut, computed and written.

    Raises:
        ConfigError: A value is out of range.
    """

    prompt_column: str | None = setting(
        None, "Column that names each record's prompt, a folder in that of the command.", group=_RAY
    )
    output_format: Literal["jsonl", "parquet"] = setting("jsonl", "Format of the output's files.", group=_RAY)
    part_size: int = setting(1000, "Records of one part, which is computed by one worker.", least=1, group=_RAY)
    workers: int | None = setting(
        None, "Workers; by default one for each GPU, or without GPUs one for each machine.", least=1, group=_RAY
    )

    def __post_init__(self) -> None:
        """Refuse wrong values."""
        check(self)
