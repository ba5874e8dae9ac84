"""A small probe that a fast path must pass before it is trusted.

Silent failures are real: models whose state is more than keys and values, attention that
ignores the mask it is given. The probe runs rows of unlike lengths under two prompts and under
none, and two more answers to the first row's input, through the candidate, and each row alone
through the plain path, and compares log-probabilities and prompt gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt.backbone import Base, torch_products
from softprompt.engine.predictions import Engine
from softprompt.engine.rows import EngineRow
from softprompt.prompts import Prompt

_LENGTHS = ((5, 2), (1, 1), (3, 3), (4, 1), (7, 2))
"""Source and target tokens of each probe row but the last two, which have the first one's source."""

_PARTS: tuple[tuple[int | None, int | None], ...] = (
    (0, None),
    (0, 1),
    (1, 0),
    (None, None),
    (1, 1),
    (0, None),
    (0, None),
)
"""Which value each probe row has in its input, and which before a seq2seq decoder's."""

PROBED_LENGTHS = (4, 3)
"""Virtual tokens of the two prompts of the probe."""

_TOLERANCE = {
    torch.float64: (1e-4, 5e-4),  # transformers computes softmax and norms in float32
    # T5 of random weights has 9e-4 between one row in a batch and alone, on the plain path itself.
    torch.float32: (1e-4, 2e-3),
    torch.float16: (2e-2, 5e-2),
    torch.bfloat16: (1e-1, 2e-1),
}
"""Largest difference by dtype: of log-probabilities, and of gradients relative to their norm."""


@contextmanager
def probing(base: Base) -> Iterator[None]:
    """Run the model as it is, whatever the caller is in: no dropout, autocast or inference mode.

    Every module is in its own mode again afterwards.
    """
    model = base.model
    with base.lock:
        training = [module for module in model.modules() if module.training]
        gradients = torch.is_grad_enabled()
        model.train(False)
        try:
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(gradients),
                torch.autocast(model.device.type, enabled=False),
            ):
                yield
        finally:
            for module in training:
                module.training = True


def difference(
    candidate: Engine,
    reference: Engine,
    base: Base,
    prefixes: Sequence[Tensor] | None = None,
    *,
    sees_input: bool = True,
) -> str | None:
    """Return how the candidate differs on the probe from the reference given one row at a time.

    Args:
        candidate: The engine to try.
        reference: The engine to trust.
        base: Their base.
        prefixes: Keys and values of the two prompts to probe with; None for random virtual tokens.
        sees_input: Whether an encoder's prompts attend to the input.

    Returns:
        How they differ, None when they do not.
    """
    facts = base.facts
    allowed, allowed_gradient = _TOLERANCE.get(base.dtype, _TOLERANCE[torch.float32])
    generator = torch.Generator().manual_seed(0)
    rows = _rows(min(facts.vocabulary, 1000), generator)
    values = prefixes or [
        (torch.randn(length, facts.token_dim, generator=generator) * facts.embedding_rms).to(
            base.device
        )
        for length in PROBED_LENGTHS
    ]
    kind = _Kind(
        prefix=prefixes is not None,
        both_sides=prefixes is None
        and hasattr(base.model, "prepare_decoder_input_ids_from_labels"),
        sees_input=sees_input,
    )
    with probing(base):
        with torch_products():
            expected, expected_gradients = _run(reference, rows, values, kind, alone=True)
        got, gradients = _run(candidate, rows, values, kind, alone=False)
    worst = float((got - expected).abs().max())
    if not worst <= allowed:
        return f"its log-probabilities differ by {worst:.2g} on the probe"
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        relative = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not relative <= allowed_gradient:
            return f"its prompt gradients differ by {relative:.2g} on the probe"
    return None


def _rows(top: int, generator: torch.Generator) -> list[EngineRow]:
    """Return the rows of the probe, without their prompts."""
    rows = []
    for source, target in _LENGTHS:
        ids = torch.randint(0, top, (source + target,), generator=generator).tolist()
        rows.append(EngineRow(tuple(ids[:source]), tuple(ids[source:])))
    first = rows[0]
    forked = (first.target[0], *rows[3].source[:2])
    return [*rows, replace(first, target=forked), replace(first, target=rows[2].source[:2])]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is made of the probe's values: keys and values, or virtual tokens on one side or both."""

    prefix: bool
    both_sides: bool
    sees_input: bool

    def prompts(self, values: Sequence[Tensor]) -> list[Prompt | None]:
        """Return the prompt of each probe row; rows that have the same share one object."""
        made: dict[tuple[int | None, int | None], Prompt | None] = {(None, None): None}
        found = []
        for first, beside in _PARTS:
            second = beside if self.both_sides else None
            if (first, second) not in made:
                before = None if first is None else values[first]
                decoder = None if second is None else values[second]
                made[first, second] = (
                    Prompt(prefix=before)
                    if self.prefix
                    else Prompt(before, decoder, sees_input=self.sees_input)
                )
            found.append(made[first, second])
        return found


def _run(
    engine: Engine, rows: Sequence[EngineRow], values: Sequence[Tensor], kind: _Kind, *, alone: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the log-probabilities of the rows' targets, and the gradients of the values."""
    with torch.enable_grad():
        leaves = [value.clone().requires_grad_() for value in values]
        own = [replace(row, prompt=p) for row, p in zip(rows, kind.prompts(leaves), strict=True)]
        passes = [[row] for row in own] if alone else [own]
        found = torch.cat([engine.target_log_probs(part).values for part in passes])
        gradients = torch.autograd.grad(found.sum(), leaves)
    return found.detach().float(), [gradient.float() for gradient in gradients]
