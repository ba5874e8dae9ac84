"""Products with frozen weights by oneDNN, where MKL is slow or the weights can be kept in the order it reads.

torch gives float32 products to MKL, which leaves AVX-512 unused on CPUs that are not Intel's.
oneDNN is in the same torch, computes the same sums, and takes half the time there. Those in bfloat16 are
oneDNN's in torch too: with weights kept in its order the numbers stay the same, and few rows take half the time.
Only the layers' ``forward`` is swapped for another product inside a pass: the weights stay where and as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_LINEAR = (nn.Linear, Conv1D)
_WORTH = {torch.float32: 2**21, torch.bfloat16: 2**18}
"""Multiplications of the smallest product for which calling oneDNN pays."""

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
    if not libraries.mkldnn.is_available() or not _has_its_parts():
        return False
    try:
        return b"GenuineIntel" not in Path("/proc/cpuinfo").read_bytes()
    except OSError:
        return False


@lru_cache(maxsize=1)
def orders_bfloat16() -> bool:
    """Tell whether the CPU multiplies bfloat16, which torch then leaves to oneDNN, and weights can be ordered."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return cast(Any, torch.backends).mkldnn.is_available() and _has_its_parts() and bool(native())


def _has_its_parts() -> bool:
    """Tell whether torch has what is used here and no part of its promises: a version may lack it."""
    needed = (
        (torch.ops.mkldnn, ("_linear_pointwise", "_reorder_linear_weight")),
        (torch._C, ("_are_functorch_transforms_active", "_is_tracing", "_len_torch_dispatch_stack")),
        (torch._C._functorch, ("is_legacy_batchedtensor",)),
        (forward_ad, ("_current_level",)),
    )
    return all(hasattr(home, name) for home, names in needed for name in names)


@final
class FrozenLinear:
    """The product of a linear layer whose weight takes no gradient; other calls get the layer's own.

    Args:
        module: The layer.
        keep: Keep a copy of the weight in the order oneDNN reads it in. It pays for few rows,
            where ordering takes longer than multiplying. It follows a weight that is written to or
            replaced, but writing through ``weight.data`` leaves no trace that could be seen.
    """

    def __init__(self, module: nn.Module, *, keep: bool) -> None:
        self.module = module
        self._keep = keep
        self._dtype = cast(Tensor, module.weight).dtype
        self._input_axis = 0 if isinstance(module, Conv1D) else 1
        # The weight it is of is kept with it: no other can then come to lie at its address.
        self._kept: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        """Return ``x W + b``, ``[..., O]`` of ``[..., I]``."""
        module = self.module
        if not named and len(args) == 1 and self._takes(args[0]):
            (x,) = args
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            assert weight is not None
            matrix = weight.t() if isinstance(module, Conv1D) else weight  # [O, I]
            if torch.is_grad_enabled() and x.requires_grad:
                return cast(Tensor, _Product.apply(x, matrix, bias))  # type: ignore[no-untyped-call]
            return _multiplied(x, self._ordered(weight, matrix) if self._keep else matrix, bias)
        return cast(Tensor, type(module).forward(module, *args, **named))

    def _takes(self, x: Any) -> bool:
        """Tell whether oneDNN may run a call, and is worth calling: most calls of small models are not."""
        if type(x) not in (Tensor, nn.Parameter) or _is_watched():
            return False
        weight, bias = (self.module._parameters.get(name) for name in ("weight", "bias"))
        if weight is None or x.numel() * weight.numel() < _WORTH[self._dtype] * weight.shape[self._input_axis]:
            return False
        width = weight.shape[self._input_axis : self._input_axis + 1]
        if x.shape[-1:] == width and _are_plain(self._dtype, x, weight, bias):
            return True
        self._kept = None
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        """Become the layer's own product in a copy: what is swapped in a model is not in its copies."""
        return getattr, (self.module, "forward")

    def _ordered(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """Return the copy, made again after the weight was written to or replaced."""
        version = 0 if weight.is_inference() else weight._version
        if self._kept is not None:
            of, then, ordered = self._kept
            if then == version and of.data_ptr() == weight.data_ptr():
                return ordered
        ordered = cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), None))
        self._kept = weight.detach(), version, ordered
        return ordered


_torch_only: ContextVar[bool] = ContextVar("softprompt_torch_products", default=False)


@contextmanager
def torch_products() -> Iterator[None]:
    """Leave every product in the context to torch, also of layers whose ``forward`` is swapped already."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


def frozen_linears(model: nn.Module, *, keep: bool = False) -> list[FrozenLinear]:
    """Return products for a model's linear layers on the CPU; none where torch's own are as fast.

    ``torch.backends.mkldnn.enabled = False`` leaves all to torch. A model of which parts are compiled
    keeps its own too: those would be compiled again for every pass. One whose layers
    are swapped by a pass around this one needs no others.
    """
    if torch.compiler.is_compiling() or _torch_only.get() or not cast(Any, torch.backends).mkldnn.enabled:
        return []
    faster = {torch.float32: is_faster_here(), torch.bfloat16: keep and orders_bfloat16()}
    dtypes = [dtype for dtype, here in faster.items() if here]
    products = []
    for each in model.modules():
        if isinstance(vars(each).get("forward"), FrozenLinear) or _is_compiled(each):
            return []
        if type(each) in _LINEAR and _is_dense_here(cast(Tensor, each.weight), dtypes):
            products.append(FrozenLinear(each, keep=keep))
    return products


def products_in(model: nn.Module) -> list[FrozenLinear]:
    """Return the products that a model's layers run now."""
    found = (vars(each).get("forward") for each in model.modules())
    return [each for each in found if isinstance(each, FrozenLinear)]


@contextmanager
def swapped_forwards(products: Iterable[FrozenLinear]) -> Iterator[None]:
    """Swap the ``forward`` of layers for these products inside the context; hold the model's lock around it.

    A layer whose ``forward`` somebody has replaced, before or meanwhile, is left alone.
    """
    changed: list[tuple[dict[str, Any], FrozenLinear]] = []
    try:
        for product in products:
            own = vars(product.module)
            if "forward" not in own:
                own["forward"] = product
                changed.append((own, product))
        yield
    finally:
        for own, product in changed:
            if own.get("forward") is product:
                del own["forward"]


class _Product(torch.autograd.Function):
    """``x W + b`` of a constant W ``[O, I]``; its gradient is one more such product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        # Checkpoints compare what is saved by shape: this is what torch's own product saves.
        ctx.save_for_backward(matrix.t())
        return _multiplied(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (transposed,) = ctx.saved_tensors
        (gradient,) = gradients
        if _is_watched() or torch._C._functorch.is_legacy_batchedtensor(gradient):
            return gradient @ transposed.t(), None, None
        return cast(Tensor, _Product.apply(gradient, transposed, None)), None, None  # type: ignore[no-untyped-call]


def _multiplied(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    more = padded_rows(len(rows)) - len(rows)
    if more:
        rows = F.pad(rows, (0, 0, 0, more))
    product = torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
    # Shrunk and not sliced: models may write into it, which autograd forbids for a view of ours.
    return cast(Tensor, product.resize_(*x.shape[:-1], product.shape[-1]))


def padded_rows(count: int) -> int:
    """Return how many rows are multiplied for ``count`` of them.

    oneDNN compiles a kernel of 0.6 MiB for every number of rows and keeps it, so rows of zeros make a
    few numbers of many. A function of the count alone: what ran before must not change the rounding.
    """
    if count > _ROWS[-1]:
        return -(-count // _ROW_STEP) * _ROW_STEP
    return _ROWS[bisect_left(_ROWS, count)]


def _is_watched() -> bool:
    """Tell whether operations must be torch's own: traced, transformed, counted or compared with.

    Forward-mode derivatives of oneDNN's would silently be zero.
    """
    return (
        torch.compiler.is_compiling()
        or _torch_only.get()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _is_dense_here(each: Tensor, dtypes: Collection[torch.dtype]) -> bool:
    return each.dtype in dtypes and each.device.type == "cpu" and each.layout == torch.strided


def _are_plain(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether these are plain tensors of a dtype on the CPU, and those of the layer frozen."""
    if torch.is_autocast_enabled("cpu"):
        return False
    for each in (weight, bias):
        if each is None:
            continue
        # Quantised weights are subclasses that claim a dtype they do not hold.
        if type(each) is not nn.Parameter or not _is_dense_here(each, (dtype,)):
            return False
        if each.requires_grad and torch.is_grad_enabled():
            return False
    return _is_dense_here(x, (dtype,))
