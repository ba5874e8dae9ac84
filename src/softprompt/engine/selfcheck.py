"""A small probe that a fast path must pass before it is trusted.

Silent failures are real: models whose state is more than keys and values, attention that
ignores the mask it is given. The probe runs rows of unlike lengths under two prompts and under
none, and two more answers to the first row's input, through the candidate, and each row alone
through the plain path, and compares log-probabilities and prompt gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import facts_of, locked, torch_products
from softprompt.engine.rows import Engine, EngineRow, TargetLogProbs, joined

_LENGTHS = ((5, 2, 0), (1, 1, 0), (3, 3, 1), (4, 1, -1), (7, 2, 1))
"""Source tokens, target tokens and prompt of each probe row."""

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
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Run the model as it is, whatever the caller is in: no dropout, autocast or inference mode.

    Every module is in its own mode again afterwards.
    """
    with locked(model):
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
    model: PreTrainedModel,
    prompts: Sequence[Tensor] | None = None,
) -> str | None:
    """Return how the candidate differs on the probe from the reference given one row at a time.

    None when it does not. ``prompts`` are the two prompts to probe with, random rows unless given.
    """
    facts = facts_of(model)
    allowed, allowed_gradient = _TOLERANCE.get(model.dtype, _TOLERANCE[torch.float32])
    generator = torch.Generator().manual_seed(0)
    rows = _rows(model, min(facts.vocabulary, 1000), generator)
    if prompts is not None:
        rows = [replace(row, decoder_prompt=-1) for row in rows]
    values = prompts or [
        (torch.randn(length, facts.token_dim, generator=generator) * facts.embedding_rms).to(
            model.device
        )
        for length in PROBED_LENGTHS
    ]
    with probing(model):
        with torch_products():
            expected, expected_gradients = _run(reference, rows, values, alone=True)
        got, gradients = _run(candidate, rows, values, alone=False)
    worst = float((got - expected).abs().max())
    if not worst <= allowed:
        return f"its log-probabilities differ by {worst:.2g} on the probe"
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        relative = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not relative <= allowed_gradient:
            return f"its prompt gradients differ by {relative:.2g} on the probe"
    return None


def _rows(model: PreTrainedModel, top: int, generator: torch.Generator) -> list[EngineRow]:
    rows = []
    for source, target, prompt in _LENGTHS:
        ids = torch.randint(0, top, (source + target,), generator=generator).tolist()
        rows.append(EngineRow(tuple(ids[:source]), tuple(ids[source:]), prompt))
    first = rows[0]
    forked = (first.target[0], *rows[3].source[:2])
    rows += [replace(first, target=forked), replace(first, target=rows[2].source[:2])]
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # Both sides of a seq2seq model, and one side alone.
        own = [-1, 1, 0, -1, 1, -1, -1]
        rows = [replace(row, decoder_prompt=p) for row, p in zip(rows, own, strict=True)]
    return rows


def _run(
    engine: Engine, rows: list[EngineRow], values: Sequence[Tensor], *, alone: bool
) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        prompts = [value.clone().requires_grad_() for value in values]
        found: TargetLogProbs = (
            joined([engine.target_log_probs([row], prompts) for row in rows])
            if alone
            else engine.target_log_probs(rows, prompts)
        )
        gradients = torch.autograd.grad(found.values.sum(), prompts)
    return found.values.detach().float(), [gradient.float() for gradient in gradients]
