"""The probe that a fast way of running a model must pass before it is trusted.

Silent failures are real: models whose state is more than keys and values, attention that ignores
the mask it is given. So each such way runs a few short rows first, and its outputs and prompt
gradients must be those of a slower way that is trusted. What was found is kept in ``base.found``.
The candidates say how they are run; what they run is said here, and which differences are rounding is measured.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, cast, final

import torch
from torch import Tensor

from softprompt.backbone import (
    MARGIN,
    Base,
    evaluated,
    key_values,
    most_by_chains,
    most_by_rounding,
    off_by,
    rounded,
    stopping,
    torch_products,
)
from softprompt.engine.predictions import Engine
from softprompt.engine.rows import EngineRow
from softprompt.errors import MOST_OF_A_LINE, BackboneError, SoftPromptError, TrainingError, first_line
from softprompt.progress import phase
from softprompt.prompts import Prompt

logger = logging.getLogger(__name__)

T = TypeVar("T")


_PROMPT_LENGTHS = (4, 3)
_ROW_LENGTHS = ((5, 2), (1, 1), (3, 3), (4, 1), (7, 2))
"""Source and target tokens of each scored row but the last two, which have the first one's source."""

_PARTS: tuple[tuple[int | None, int | None], ...] = (
    (0, None),
    (0, 1),
    (1, 0),
    (None, None),
    (1, 1),
    (0, None),
    (0, None),
)
"""Which prompt each scored row has in its input, and which before a seq2seq decoder's."""


_COPIES = 4
"""Copies of a row alone where its gradient seems off. Of up to three rows MKL, on a CPU without AVX-512, adds the
terms of the LM head's gradient, as many as the vocabulary, one after the other: 49,152 of them are off by 6e-5.
That of the copies counts instead if such a chain explains how far it is off: a batch may be wrong itself."""

_DRAWS = 8
"""Draws of the noise for gradients: they jump where a ReLU's input changes its sign, which not every draw does."""


def measured(base: Base, run: Callable[[], T]) -> tuple[T, T]:
    """Return what the trusted way of running a base gives, and what it gives where rounding moves it."""
    with torch_products():
        expected = run()
        with rounded(base.model):
            return expected, run()


def difference(what: str, got: Tensor, expected: Tensor, moved: Tensor) -> str:
    """Return that outputs differ by more than rounding, NaN included; empty where they do not.

    Args:
        what: Their name.
        got: Those of the way to try.
        expected: Those of the trusted one.
        moved: Those of the trusted one where rounding moves it.
    """
    found, allowed = off_by(got, expected), most_by_rounding(expected, moved)
    if found <= allowed:
        return ""
    return f"its {what} differ by {found:.2g} of their spread on the probe (rounding: {allowed:.2g})"


def remembered(base: Base, name: str, find: Callable[[], str], *, otherwise: str = "") -> str:
    """Return why a way of running a base is not exact, empty where it is; found once, by a probe.

    Args:
        base: The base.
        name: Name of the answer in ``base.found``.
        find: Runs the probe, the base being set up for it; what it raises is an answer too.
        otherwise: What is done instead, for one line in the log; empty for no line.
    """
    if name not in base.found:
        with probing(base):
            if name not in base.found:  # another thread may have found it meanwhile
                problem = base.found[name] = _found(find)
                if problem and otherwise:
                    logger.info("%s for %s (%s)", otherwise, base.facts.architecture, problem)
    return cast(str, base.found[name])


def _found(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as cause:  # whatever a model's own code raises on our inputs
        return one_line(cause)


def one_line(cause: Exception) -> str:
    """Return the first line of what a model raised, after the exception's name where it is not ours."""
    first, name = first_line(cause, MOST_OF_A_LINE), type(cause).__name__
    return first if isinstance(cause, SoftPromptError) or first == name else f"{name}: {first}"


@contextmanager
def probing(base: Base) -> Iterator[None]:
    """Run the model as it is, whatever the caller is in: no dropout, autocast or inference mode.

    The context holds the base's lock. Every module is in its own mode again afterwards.
    """
    gradients = torch.is_grad_enabled()
    with (
        base.lock,
        phase("probing", f"probing {base.facts.architecture}"),
        evaluated(base.model),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast(base.device.type, enabled=False),
    ):
        yield


@final
class Drawn:
    """What probes run, drawn from one seed: the same in every process."""

    def __init__(self, base: Base) -> None:
        """Start drawing for a base."""
        self._base = base
        self._generator = torch.Generator().manual_seed(0)

    def tokens(self, count: int, *, padding: bool = False) -> tuple[int, ...]:
        """Return token ids.

        Args:
            count: How many.
            padding: Whether the padding id may be among them, as the end of an answer often is; some
                encoders take it for no token.
        """
        top, pad = min(self._base.facts.vocabulary, 1000), self._base.facts.pad_id
        ids = torch.randint(0, top, (count,), generator=self._generator)
        return tuple((ids if padding else ids.where(ids != pad, (pad + 1) % top)).tolist())

    def virtual_tokens(self, count: int) -> Tensor:
        """Return virtual tokens ``[P, H]`` of the size of the base's embeddings."""
        drawn = torch.randn(count, self._base.facts.token_dim, generator=self._generator)
        return (drawn * self._base.facts.embedding_rms).to(self._base.device)

    def keys_and_values(self, count: int) -> Tensor:
        """Return keys and values ``[L, 2, A_kv, P, D]``: the base's own of a text, where it keeps any.

        Raises:
            BackboneError: If the base's layers keep anything else.
        """
        shape = self._base.key_value_shape
        try:
            return key_values(self._base.model, self.tokens(count)).to(self._base.device)
        except BackboneError:  # an encoder
            size = (shape.layers, 2, shape.heads, count, shape.width)
            return torch.randn(*size, generator=self._generator).to(self._base.device)


def scoring_difference(
    candidate: Engine, reference: Engine, base: Base, *, keys_and_values: bool = False, sees_input: bool = True
) -> str:
    """Return how an engine scores otherwise than a reference given one row at a time; empty if it does not.

    Rows of unlike lengths stand behind two prompts and behind none, three of them answers to one input;
    log-probabilities and prompt gradients are compared.

    Args:
        candidate: The engine to try.
        reference: The engine to trust.
        base: Their base.
        keys_and_values: Whether the prompts are keys and values instead of virtual tokens.
        sees_input: Whether an encoder's prompts attend to the input.
    """
    drawn = Drawn(base)
    rows = _rows(drawn)
    draw = drawn.keys_and_values if keys_and_values else drawn.virtual_tokens
    values = [draw(length) for length in _PROMPT_LENGTHS]
    seq2seq = hasattr(base.model, "prepare_decoder_input_ids_from_labels")
    kind = _Kind(keys_and_values, seq2seq and not keys_and_values, sees_input)

    def trusted(copies: int = 1) -> tuple[Tensor, list[Tensor]]:
        return _run(reference, rows, values, kind, copies)

    (expected, alone), (moved, off) = measured(base, trusted)
    got, gradients = _run(candidate, rows, values, kind)
    found, bent = difference("log-probabilities", got, expected, moved), ""
    right = alone
    for attempt in range(0 if found else 1 + _DRAWS):
        if attempt == 1:
            with torch_products():
                scored, copied = trusted(_COPIES)
            most = most_by_chains(base.facts.vocabulary)
            chained = all(off_by(*pair) <= most for pair in zip(copied, alone, strict=True))
            if chained and not difference("log-probabilities", scored, expected, moved):
                right = copied
        elif attempt:
            with torch_products(), rounded(base.model, attempt - 1):
                _, off = trusted()
        parts = zip(gradients, right, off, alone, strict=True)
        bent = next(filter(None, (difference("prompt gradients", g, r, r + (o - a)) for g, r, o, a in parts)), "")
        if not bent:
            break
    return found or bent


def _rows(drawn: Drawn) -> list[EngineRow]:
    """Return the rows to score, without their prompts."""
    rows = []
    for source, target in _ROW_LENGTHS:
        ids = drawn.tokens(source + target, padding=True)
        rows.append(EngineRow(ids[:source], ids[source:]))
    first = rows[0]
    forked = (first.target[0], *rows[3].source[:2])
    return [*rows, replace(first, target=forked), replace(first, target=rows[2].source[:2])]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is made of the drawn values: keys and values, or virtual tokens on one side or both."""

    keys_and_values: bool
    both_sides: bool
    sees_input: bool

    def prompts(self, values: Sequence[Tensor]) -> list[Prompt | None]:
        """Return the prompt of each scored row; rows that have the same share one object."""
        made: dict[tuple[int | None, int | None], Prompt | None] = {(None, None): None}
        found = []
        for first, beside in _PARTS:
            second = beside if self.both_sides else None
            if (first, second) not in made:
                before = None if first is None else values[first]
                decoder = None if second is None else values[second]
                made[first, second] = (
                    Prompt(prefix=before)
                    if self.keys_and_values
                    else Prompt(before, decoder, sees_input=self.sees_input)
                )
            found.append(made[first, second])
        return found


def _run(
    engine: Engine, rows: Sequence[EngineRow], values: Sequence[Tensor], kind: _Kind, copies: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Return the log-probabilities of the rows' targets, and the gradients of the values.

    With ``copies`` each row stands that often in a batch of its own, of which the first counts; with 0 all in one.
    """
    with torch.enable_grad():
        leaves = [value.clone().requires_grad_() for value in values]
        own = [replace(row, prompt=p) for row, p in zip(rows, kind.prompts(leaves), strict=True)]
        batches = [[row] * copies for row in own] if copies else [own]
        parts = [engine.target_log_probs(batch).values.view(copies or 1, -1)[0] for batch in batches]
        found = torch.cat(parts)
        gradients = torch.autograd.grad(found.sum(), leaves)
    return found.detach().float(), [gradient.float() for gradient in gradients]


_FARTHEST = 2.0**-4
"""How far a prompt is moved at most to see what its gradient is worth, relative to its norm."""

_CHANGES = (0.3, 0.03, 0.003, 0.001)
"""By how many nats it is moved; the last only where rounding leaves half of it, for scores bent so sharply."""

_UNDEFINED = "an autograd kernel was not registered"
"""What torch says of an operation that it takes to have no gradient, and goes on."""

_BENT = 0.1
"""Share of a change by which the gradient may miss it: on so short a way a right one misses less."""


def gradient_problem(base: Base, prompt: Prompt, score: Callable[[Prompt], Tensor], *, measure: bool = True) -> str:
    """Return why the gradient of a prompt is not that of its scores, empty where it is.

    A module with weights that takes a gradient and returns none is a cause by itself. What no module shows (a
    detached sum, a wrong backward) shows in the loss: moved along its gradient, a prompt must change it as the
    gradient says, but for what rounding hides. A short step may be hidden, a long one may bend: one must agree.

    Args:
        base: The base.
        prompt: The prompt.
        score: Runs the base behind a prompt and returns what it gives a training row, ``[M]``: log-probabilities,
            or outputs of their size.
        measure: Whether to move the prompt; without, no pass without gradients is run.
    """
    with probing(base), torch.enable_grad():
        leaves = prompt.leaves()
        with stopping(base.model) as stops:
            total = score(leaves).double().sum()
        if not total.requires_grad:
            return f"{stops[0]} stops it" if stops else "no part of it reaches the prompt"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                gradients = torch.autograd.grad(total, leaves.tensors, materialize_grads=True)
            except Exception as cause:  # whatever a layer's own backward raises
                return f"backward raises {one_line(cause)}"
        stops += [str(each.message).split(": ")[0] for each in said if _UNDEFINED in str(each.message)]
        if stops:
            return f"{stops[0]} stops it"
        slope = math.hypot(*(float(each.double().norm()) for each in gradients))
        if not math.isfinite(slope) or slope == 0:
            return f"its norm is {slope:g} on a training row"
        with torch.no_grad():
            return _slope_problem(base, prompt, score, gradients, slope) if measure else ""


def _slope_problem(
    base: Base, prompt: Prompt, score: Callable[[Prompt], Tensor], gradients: Sequence[Tensor], slope: float
) -> str:
    """Return how the score changes otherwise than the gradients say, empty where it does not."""
    here = score(prompt).double()
    with rounded(base.model):
        hidden = MARGIN * float((score(prompt).double() - here).norm())
    if prompt.prefix is not None:
        unfed = _unfed_layer(prompt, lambda moved: float((score(moved).double() - here).norm()) > hidden, gradients)
        if unfed is not None:
            return f"none comes back to the keys and values of layer {unfed}, which it reads"
    size = math.hypot(*(float(each.double().norm()) for each in prompt.tensors))
    found = []
    for nats in _CHANGES if hidden < _CHANGES[-1] / 2 else _CHANGES[:-1]:
        length = min(nats / slope, _FARTHEST * (size or 1.0))
        ends = []
        for sign in (1, -1):
            along = iter(gradients)
            moved = prompt.map(lambda part: part + next(along).to(part) * (sign * length / slope))  # noqa: B023
            ends.append(float(score(moved).double().sum()))
        change, said = (ends[0] - ends[1]) / 2, length * slope
        if abs(change - said) <= _BENT * said + hidden:
            return ""
        found.append(f"{change:.2g} instead of {said:.2g}")
    return f"moved along it, a prompt changes the log-probability of a training row by {', '.join(found)}"


def _unfed_layer(prompt: Prompt, differs: Callable[[Prompt], bool], gradients: Sequence[Tensor]) -> int | None:
    """Return the first layer whose keys and values move the score and have a gradient of zeros, None without.

    A step along the whole gradient leaves such a layer where it is, so it would not show.
    """
    for layer, gradient in enumerate(gradients[0]):
        if not bool(gradient.any()):
            signs = torch.ones(len(gradients[0]), device=gradient.device).index_fill(
                0, torch.tensor([layer], device=gradient.device), -1
            )
            if differs(prompt.map(lambda part: part * signs.to(part).view(-1, 1, 1, 1, 1))):  # noqa: B023
                return layer
    return None


def require_gradient(
    base: Base, prompt: Prompt, score: Callable[[Prompt], Tensor], *, measure: bool = True
) -> None:
    """Check that a base passes on the gradient of a prompt; see ``gradient_problem``.

    Raises:
        TrainingError: It does not; training would go nowhere, or anywhere.
    """
    problem = gradient_problem(base, prompt, score, measure=measure)
    if problem:
        raise TrainingError(
            f"{base.facts.architecture} does not pass on the gradient of a prompt: {problem}; load the base "
            "anew (a pass without gradients may have packed its quantised weights), or train behind another one"
        )


def score_of(engine: Engine, row: EngineRow) -> Callable[[Prompt], Tensor]:
    """Return what gives a row's log-probabilities behind a prompt; see ``gradient_problem``."""
    return lambda prompt: engine.target_log_probs([replace(row, prompt=prompt)]).values
