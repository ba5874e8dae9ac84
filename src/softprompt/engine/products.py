"""Products with frozen float32 weights by oneDNN, where MKL is slow.

torch gives float32 products to MKL, which leaves AVX-512 unused on CPUs that are not Intel's.
oneDNN is in the same torch, computes the same sums, and takes half the time there. Only the
layers' ``forward`` is lent another body inside a pass: the weights stay where and as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_LINEAR = (nn.Linear, Conv1D)
_WORTH = 2**16
"""Elements of the smallest weight for which calling oneDNN pays."""

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROW_STEP = 16


@lru_cache(maxsize=1)
def is_faster_here() -> bool:
    """Tell whether oneDNN's float32 products are the faster ones on this machine.

    Decided by what the machine is, not by a race: the same machine always rounds alike.
    """
    libraries: Any = torch.backends
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not libraries.mkl.is_available():
        return False
    # Not part of torch's promises, so a version may lack it.
    if not libraries.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@final
class FrozenLinear:
    """The body of a linear layer whose weight takes no gradient; other calls get the layer's own.

    Args:
        module: The layer.
        keep: Keep a copy of the weight in the order oneDNN reads it in. It pays for few rows,
            where ordering takes longer than multiplying.
    """

    def __init__(self, module: nn.Module, *, keep: bool) -> None:
        self.module = module
        self._keep = keep
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W + b``, ``[..., O]`` of ``[..., I]``."""
        weight, bias = cast(Tensor, self.module.weight), cast("Tensor | None", self.module.bias)
        if not _takes(x, weight, bias):
            return cast(Tensor, type(self.module).forward(self.module, x))
        matrix = weight.t() if isinstance(self.module, Conv1D) else weight  # [O, I]
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Product.apply(x, matrix, bias))  # type: ignore[no-untyped-call]
        return _multiplied(x, self._ordered(weight, matrix) if self._keep else matrix, bias)

    def _ordered(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """Return the copy, made again after the weight was written to or replaced."""
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._kept is None or self._kept[0] != state:
            self._kept = state, torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), None)
        return self._kept[1]


_torch_only: ContextVar[bool] = ContextVar("softprompt_torch_products", default=False)


@contextmanager
def torch_products() -> Iterator[None]:
    """Leave every product in the context to torch: what oneDNN's are compared with."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


def frozen_linears(model: nn.Module, *, keep: bool = False) -> list[FrozenLinear]:
    """Return bodies for a model's linear layers; none where torch's own are as fast."""
    if torch.compiler.is_compiling() or _torch_only.get() or not is_faster_here():
        return []
    return [
        FrozenLinear(each, keep=keep)
        for each in model.modules()
        if type(each) in _LINEAR and cast(Tensor, each.weight).numel() >= _WORTH
    ]


def bodies_in(model: nn.Module) -> list[FrozenLinear]:
    """Return the bodies that a model's layers are lent now."""
    found = (vars(each).get("forward") for each in model.modules())
    return [each for each in found if isinstance(each, FrozenLinear)]


@contextmanager
def lent_bodies(bodies: Iterable[FrozenLinear]) -> Iterator[None]:
    """Let layers run these bodies inside the context; hold the model's lock around it.

    A layer whose ``forward`` somebody has replaced already is left alone.
    """
    changed: list[dict[str, Any]] = []
    try:
        for body in bodies:
            own = vars(body.module)
            if "forward" not in own:
                own["forward"] = body
                changed.append(own)
        yield
    finally:
        for own in changed:
            del own["forward"]


class _Product(torch.autograd.Function):
    """``x W + b`` of a constant W ``[O, I]``; its gradient is one more such product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(matrix)
        return _multiplied(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (matrix,) = ctx.saved_tensors
        (gradient,) = gradients
        return cast(Tensor, _Product.apply(gradient, matrix.t(), None)), None, None  # type: ignore[no-untyped-call]


def _multiplied(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    count = len(rows)
    padded = F.pad(rows, (0, 0, 0, padded_rows(count) - count))
    product = torch.ops.mkldnn._linear_pointwise(padded, matrix, bias, "none", [], "")
    return cast(Tensor, product[:count].view(*x.shape[:-1], -1))


def padded_rows(count: int) -> int:
    """Return how many rows are multiplied for ``count`` of them.

    oneDNN compiles a kernel of 0.6 MiB for every number of rows and keeps it, so rows of zeros make a
    few numbers of many. A function of the count alone: what ran before must not change the rounding.
    """
    if count > _ROWS[-1]:
        return -(-count // _ROW_STEP) * _ROW_STEP
    return _ROWS[bisect_left(_ROWS, count)]


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether oneDNN may run a call: plain float32 tensors on the CPU, and a frozen layer."""
    if torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    for each in (weight, bias):
        if each is None:
            continue
        # Quantised weights are subclasses that claim a dtype they do not hold.
        if type(each) is not nn.Parameter or each.dtype != torch.float32 or each.is_meta:
            return False
        if each.requires_grad and torch.is_grad_enabled():
            return False
    return x.dtype == torch.float32 and x.device.type == "cpu" == weight.device.type
