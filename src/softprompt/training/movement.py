"""How far virtual tokens have moved since training began: a few numbers in each point of the history."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from softprompt.prompts import PromptModule

MOST_TOKENS = 128
"""Virtual tokens of which numbers are kept; of a longer prompt they are those of evenly spaced ones."""


@final
class Movement:
    """Remembers where a prompt started, which is where it is now.

    A run that is continued makes its first values again from its seed, so nothing of this is in its state.
    """

    def __init__(self, prompt: PromptModule) -> None:
        prompt.eval()  # one with dropout of its own would start elsewhere each time
        self._prompt, self._start = prompt, _values(prompt)

    def values(self) -> tuple[Tensor, Tensor]:
        """Return the values of each task's virtual tokens ``[K, P, X]``, and what training changed of them."""
        now = _values(self._prompt)
        return now, now - self._start

    def point(self) -> dict[str, Any]:
        """Return what goes into the history: root mean squares over the values of a virtual token.

        ``drift`` is that of what training changed, ``rms`` that of the values, both for every ``every``-th virtual
        token, from the first on, to four digits; with several tasks they are root mean squares over these too.
        """
        now, change = self.values()
        every = -(-now.shape[1] // MOST_TOKENS)
        found = {"drift": _rms(change, every), "rms": _rms(now, every)}
        return {"virtual_tokens": {"every": every, **found}}


@torch.no_grad()
def _values(prompt: PromptModule) -> Tensor:
    return torch.stack([prompt.prompt(task).by_token.detach().clone() for task in range(prompt.num_tasks)])


def _rms(values: Tensor, every: int) -> list[float]:
    found = values.double().square().mean((0, 2)).sqrt()  # [P]
    return [float(f"{value:.4g}") for value in found[::every].tolist()]
