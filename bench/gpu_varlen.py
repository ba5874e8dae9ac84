"""The forest's attention by variable-length attention (``torch.nn.attention.varlen``), and its kernels for a CPU.

Rows behind one prompt are two calls: every stretch (the prompt, each row) over itself, causally, and all rows'
tokens over the prompt; the two outputs are merged by their log-sum-exp. torch drops the gradient of the log-sum-exp
that it returns, so autograd through such a merge is wrong in silence. ``Merged`` therefore has the backward of ring
attention (Liu et al. 2023): each call's backward kernel is given the merged output and log-sum-exp, and the
gradients add up.

torch has these kernels for GPUs alone. ``on_cpu`` registers slow ones with torch's own operators, so that tests go
through the real arguments, schema and autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import varlen

CAUSAL, FULL = (-1, 0), (-1, -1)


@dataclass(frozen=True)
class Stretches:
    """A stream of a prompt and rows behind it.

    Attributes:
        ends: Where the stretches end in the stream, behind a 0, int32.
        over: The same of the rows together, and of the prompt.
        virtual: Tokens of the prompt.
        total: Tokens of the stream.
        longest: Tokens of the longest stretch.
    """

    ends: Tensor
    over: tuple[Tensor, Tensor]
    virtual: int
    total: int
    longest: int

    @classmethod
    def of(cls, virtual: int, lengths: Sequence[int], device: torch.device) -> Stretches:
        """Lay out a prompt and its rows."""
        sizes, total = torch.tensor([virtual, *lengths]), virtual + sum(lengths)
        ends = torch.cat([torch.zeros(1), sizes.cumsum(0)])
        both = [torch.tensor([0, size], dtype=torch.int32, device=device) for size in (total - virtual, virtual)]
        return cls(ends.to(device, torch.int32), (both[0], both[1]), virtual, total, int(sizes.max()))

    def calls(self) -> Iterator[tuple[slice, slice, list[Any], tuple[int, int]]]:
        """Yield the queries and keys of each call, its ends and longest stretches, and its window."""
        everything, prompt = slice(None), slice(self.virtual)
        yield everything, everything, [self.ends, self.ends, self.longest, self.longest], CAUSAL
        yield slice(self.virtual, None), prompt, [*self.over, self.total - self.virtual, self.virtual], FULL


class Merged(torch.autograd.Function):
    """Attention of a stream ``[N, A, D]`` over keys and values ``[N, A_kv, D]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stretches: Stretches, scale: float) -> Tensor:
        """Run the calls and merge what they give."""
        how: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        how["return_aux"] = varlen.AuxRequest(lse=True)
        (_, _, own, causal), (rows, prompt, behind, full) = stretches.calls()
        out, lse = varlen.varlen_attn(query, key, value, *own, window_size=causal, **how)
        there, mass = varlen.varlen_attn(query[rows], key[prompt], value[prompt], *behind, window_size=full, **how)
        merged, whole = out.float(), lse.clone()  # [N, A, D] and [A, N]
        whole[:, rows] = torch.logaddexp(lse[:, rows], mass)
        shares = [(part - whole[:, rows]).exp().T.unsqueeze(2) for part in (lse[:, rows], mass)]
        merged[rows] = merged[rows] * shares[0] + there.float() * shares[1]
        merged = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, merged, whole)
        ctx.stretches, ctx.scale = stretches, scale
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Add up what the calls' backward kernels give of the merged output."""
        query, key, value, out, lse = ctx.saved_tensors
        grad, rng = grads[0].contiguous(), torch.zeros(2, dtype=torch.uint64, device=query.device)
        found = [torch.zeros_like(each, dtype=torch.float32) for each in (query, key, value)]
        for rows, keys, how, window in ctx.stretches.calls():
            parts = torch.ops.torch_attn._varlen_attn_backward(
                grad[rows], query[rows], key[keys], value[keys], out[rows], lse[:, rows].contiguous(),
                *how, window == CAUSAL, rng, ctx.scale, list(window),
            )  # fmt: skip
            for whole, index, part in zip(found, (rows, keys, keys), parts, strict=True):
                whole[index] += part
        return *(each.to(query.dtype) for each in found), None, None


def merged(query: Tensor, key: Tensor, value: Tensor, stretches: Stretches, scale: float) -> Tensor:
    """Return ``[1, A, N, D]`` from queries ``[1, A, N, D]`` and keys and values ``[1, A_kv, N, D]``."""
    if query.shape[2] != stretches.total:
        raise ValueError(f"a stream of {stretches.total} tokens was laid out; got {query.shape[2]}")
    streams = [each[0].transpose(0, 1).contiguous() for each in (query, key, value)]
    return cast(Tensor, Merged.apply(*streams, stretches, scale)).transpose(0, 1).unsqueeze(0)  # type: ignore[no-untyped-call]


@cache
def on_cpu() -> None:
    """Register kernels for CPUs with torch's operators, once in a process."""
    cast(Any, varlen._varlen_attn).register_kernel("cpu")(_forward)
    cast(Any, varlen._varlen_attn_backward).register_kernel("cpu")(_backward)


def _scores(q: Tensor, k: Tensor, scale: float | None, *, causal: bool) -> Tensor:
    found = torch.einsum("qad,kad->aqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return found.masked_fill(~torch.ones(len(q), len(k), dtype=torch.bool).tril(), -torch.inf) if causal else found


def _stretches(cu_q: Tensor, cu_k: Tensor | None) -> Iterator[tuple[slice, slice]]:
    ends = [list(pairwise(each.tolist())) for each in (cu_q, cu_q if cu_k is None else cu_k)]
    for rows, keys in zip(*ends, strict=True):
        yield slice(*rows), slice(*keys)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    repeats = query.shape[1] // key.shape[1]
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    q, k, v = query.float(), *(each.float().repeat_interleave(repeats, 1) for each in (key, value))
    for rows, keys in _stretches(cu_seq_q, cu_seq_k):
        assert rows.stop - rows.start <= max_q and keys.stop - keys.start <= max_k
        scores = _scores(q[rows], k[keys], scale, causal=is_causal)
        lse[:, rows] = scores.logsumexp(2)
        out[rows] = torch.einsum("aqk,kad->qad", scores.softmax(2), v[keys]).to(out.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_seq_q: Tensor,
    cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool, _rng: Tensor, scale: float | None = None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    repeats, factor = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
    q, g, k, v = query.float(), grad_out.float(), *(x.float().repeat_interleave(repeats, 1) for x in (key, value))
    grads = [torch.zeros_like(each) for each in (q, k, v)]
    delta = (g * out.float()).sum(2).T.unsqueeze(2)  # [A, N, 1]
    for rows, keys in _stretches(cu_seq_q, cu_seq_k):
        weights = (_scores(q[rows], k[keys], factor, causal=is_causal) - lse[:, rows].unsqueeze(2)).exp()
        to_scores = weights * (torch.einsum("qad,kad->aqk", g[rows], v[keys]) - delta[:, rows]) * factor
        grads[0][rows] = torch.einsum("aqk,kad->qad", to_scores, k[keys])
        grads[1][keys] = torch.einsum("aqk,qad->kad", to_scores, q[rows])
        grads[2][keys] = torch.einsum("aqk,qad->kad", weights, g[rows])
    folded = [each.view(len(each), -1, repeats, each.shape[2]).sum(2) for each in grads[1:]]
    return grads[0].to(query.dtype), folded[0].to(key.dtype), folded[1].to(value.dtype)
