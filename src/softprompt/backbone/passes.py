"""Passes that leave a base as it was, that are off by rounding, and that say where a gradient gets lost.

Two ways of running a model add the same terms in another order, so they differ by rounding. How much that is
depends on the model, its dtype and its inputs, so it is measured: the trusted way runs once more with the output
of every module off by as much as another order of its sum could move it (Monte Carlo arithmetic, Parker 1997).
A difference of a few times that is rounding; a larger one is another function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone.state import state_of

MARGIN = 3.0
"""How many times the measured noise a difference may be: both are one draw, of root mean squares."""

MOST = 0.4
"""What no difference may exceed, however large the noise: a gradient half as large again is wrong in any dtype."""

_SINGLE = torch.finfo(torch.float32).eps / 2
"""One rounding of what softmax and norms are computed in, and products of half dtypes added in."""


@contextmanager
def unpacked(model: PreTrainedModel) -> Iterator[None]:
    """Keep quantised layers from repacking their weights inside the context; hold the model's lock around it.

    bitsandbytes rewrites the 4-bit weights of a layer that runs on a CPU in evaluation mode on an input without
    gradient: they lose digits, and from then on no gradient goes through the layer. In training mode it does
    not, and nothing else of such a layer depends on the mode.
    """
    if torch.compiler.is_compiling():
        yield
        return
    known = state_of(model).once("quantised layers", lambda: [ref(m) for m in model.modules() if _packs(m)])
    found = [layer for each in known if (layer := each()) is not None and not layer.training]
    for layer in found:
        layer.training = True
    try:
        yield
    finally:
        for layer in found:
            layer.training = False


def _packs(module: nn.Module) -> bool:
    return hasattr(module, "quant_state") and next(module.children(), None) is None


@contextmanager
def evaluated(model: PreTrainedModel) -> Iterator[None]:
    """Run a model in evaluation mode inside the context; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        with unpacked(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def rounded(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """Run a model inside the context with every module's output, and its gradient, off by rounding.

    A stored value is off by one rounding of its dtype, a sum of n terms by sqrt(n) of those of its accumulator
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.8). The latter are of the terms' size,
    however small their sum: a sum near zero may change its sign, and with it a ReLU its slope. The same noise
    every time for a seed.
    """
    generator = torch.Generator().manual_seed(seed)

    def off(value: Any, terms: int, sums: bool) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        drawn = (torch.rand(value.shape, generator=generator) * 2 - 1).to(value.device, value.dtype)
        stored, summed = torch.finfo(value.dtype).eps / 2, math.sqrt(terms) * _SINGLE
        if not sums:
            return value + value * drawn * max(stored, summed)
        size = value.detach().float().square().mean(-1, keepdim=True).sqrt().to(value.dtype)
        return value + drawn * (value * stored + size * summed)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        first = next((each for each in inputs if isinstance(each, Tensor) and each.is_floating_point()), None)
        terms = 1 if first is None or not first.dim() else first.shape[-1]
        sums = first is not None and _multiplies(module)
        noisy = [off(each, terms, sums) for each in (output if type(output) is tuple else (output,))]
        return tuple(noisy) if type(output) is tuple else noisy[0]

    with ExitStack() as stack:
        for each in model.modules():
            if next(each.children(), None) is None:
                stack.enter_context(each.register_forward_hook(hook))
        yield


def off_by(got: Tensor, expected: Tensor) -> float:
    """Return how far values lie from the expected ones, against how far those lie apart (root mean squares)."""
    expected = expected.double()
    apart = (expected - expected.mean()).norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((got.double() - expected).norm() / apart)


def most_by_rounding(expected: Tensor, moved: Tensor) -> float:
    """Return the largest ``off_by`` of another order of the same sums; NaN where there is no saying.

    Args:
        expected: What the trusted way returned.
        moved: What it returned inside ``rounded``.
    """
    found = MARGIN * (off_by(moved, expected) + off_by(expected.double() * (1 + _SINGLE), expected))
    return min(found, MOST) if math.isfinite(found) else math.nan


def most_by_chains(terms: int) -> float:
    """Return the largest ``off_by`` of so many terms added one after the other (Higham 2002, section 3.1)."""
    return min(terms * _SINGLE, MOST)


@contextmanager
def stopping(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that names the modules, as they run inside the context, which stop a gradient.

    Such a module has weights, and a tensor that requires a gradient came in and none went out.
    """
    found: list[str] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
            came, left = list(_tensors((inputs, named))), list(_tensors(output))
            if torch.is_grad_enabled() and left and _flows(came) and not _flows(left):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    with ExitStack() as stack:
        for name, each in model.named_modules():
            if _multiplies(each):
                stack.enter_context(each.register_forward_hook(hook_of(name), with_kwargs=True))
        yield found


def _multiplies(module: nn.Module) -> bool:
    """Tell whether a module has weights beside embedding tables, which read of a tensor its shape alone."""
    parts = (part for part in module.modules() if not isinstance(part, nn.Embedding))
    return any(weight.dim() > 1 for part in parts for weight in part.parameters(recurse=False))


def _flows(tensors: list[Tensor]) -> bool:
    return any(each.requires_grad for each in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a call's arguments or a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
