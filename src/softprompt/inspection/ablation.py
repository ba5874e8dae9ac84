"""Leave one out: how much worse the targets are predicted without each virtual token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.generation import score_rows
from softprompt.progress import progress_bar

if TYPE_CHECKING:
    from softprompt.engine import EngineRow
    from softprompt.inference import TunedPrompt
    from softprompt.prompts import Prompt

_BAR_SECONDS = 2.0
MOST_TOKENS = 64
"""Virtual tokens that are left out in turn; of a longer prompt evenly spaced ones."""


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """What leaving out each virtual token does to the loss; losses in nats per target token.

    The others stay as they are, one position nearer to the text where they stood before the one left out; of
    keys and values the same in all layers. A small number says that the others make up for one token, not that
    it holds nothing: leaving out two that stand in for each other may cost much.

    Attributes:
        rows: Rows that were scored.
        target_tokens: Their target tokens.
        loss: Behind the whole prompt.
        without_prompt: Behind none.
        every: Of every which virtual token; 1 but for prompts of more than 64.
        change: Loss without the virtual token less ``loss``; above 0 where it helps.
        standard_error: Of ``change`` over the rows; 0 for one row.
    """

    rows: int
    target_tokens: int
    loss: float
    without_prompt: float
    every: int
    change: tuple[float, ...]
    standard_error: tuple[float, ...]


def leave_one_out(tuned: TunedPrompt, rows: Sequence[EngineRow], batch_size: int) -> LeaveOneOut:
    """Score rows behind their prompt, behind none, and behind what is left without each virtual token.

    Several of these prompts share a pass of ``batch_size`` rows where there is room. Raises as ``score_rows``.
    """
    prompt = tuned.prompt()
    length = max(prompt.input_tokens, prompt.decoder_tokens, prompt.prefix_tokens)
    every = -(-length // MOST_TOKENS)
    left_out = list(range(0, length, every))
    lengths = torch.tensor([len(row.target) - len(row.unscored) for row in rows], dtype=torch.float64)

    def losses(prompts: Sequence[Prompt | None]) -> Tensor:
        """Return the summed loss of each row behind each prompt, ``[K, N]`` in nats."""
        behind = [replace(row, prompt=each, at=row.at if each else 0) for each in prompts for row in rows]
        return -score_rows(tuned.engine, behind, max_rows=batch_size).double().view(len(prompts), len(rows))

    whole, bare = losses([prompt, None])
    together = max(1, batch_size // len(rows))
    parts = []
    with progress_bar(len(left_out), "virtual token", delay=_BAR_SECONDS) as bar:
        for start in range(0, len(left_out), together):
            some = left_out[start : start + together]
            parts.append(losses([without(prompt, number) for number in some]))
            bar.update(len(some))
    changes = torch.cat(parts) - whole  # [K, N]
    total = float(lengths.sum())
    means = changes.sum(1, keepdim=True) / total  # [K, 1]
    # The error of a ratio of sums, by linearisation (Cochran 1977, section 2.11).
    spread = (changes - means * lengths).square().sum(1) * len(rows) / max(1, len(rows) - 1)
    return LeaveOneOut(
        rows=len(rows),
        target_tokens=int(total),
        loss=float(whole.sum()) / total,
        without_prompt=float(bare.sum()) / total,
        every=every,
        change=tuple(means[:, 0].tolist()),
        standard_error=tuple((spread.sqrt() / total).tolist()),
    )


def without(prompt: Prompt, number: int) -> Prompt | None:
    """Return a prompt without one virtual token, in each of its parts; None where nothing is left."""

    def cut(part: Tensor) -> Tensor:
        axis = 0 if part.dim() == 2 else 3
        return torch.cat(
            [part.narrow(axis, 0, number), part.narrow(axis, number + 1, part.shape[axis] - number - 1)], axis
        )

    left = prompt.map(cut)
    return left if left.tokens else None
