"""Experts: tokens sorted to them, their matrix products, and back; a plain reference beside each fast path.

Shape letters: N token slots, D model width, F expert width, E experts, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos import fused, kernels_gpu
from open_mythos.ops import gate, gate_reference

__all__ = [
    "combine",
    "dispatch",
    "expert_mlps",
    "expert_mlps_reference",
    "expert_offsets",
    "grouped_linear",
    "grouped_linear_reference",
    "sorted_weights",
    "top_k",
]

# Up to here counting who came before is cheaper than sorting, which starts many small kernels.
_COUNTED_EXPERTS = 128


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last axis, in falling order; (N, E) → (N, k) int64.

    Compiled for a GPU it is k rounds of taking the largest, which become one kernel.
    """
    if not (scores.is_cuda and torch.compiler.is_compiling()):
        return scores.topk(k, dim=-1).indices
    return _rounds(scores, k)


def _rounds(scores: Tensor, k: int) -> Tensor:
    """:func:`top_k`, all different whatever the scores: two slots of one expert would send the sort astray."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    # What overflowed to -inf must still be above what is taken already; NaN stays, and is the largest.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    chosen: list[Tensor] = []
    for _ in range(k):
        chosen.append(scores.argmax(-1, keepdim=True))
        scores = scores.masked_fill(places == chosen[-1], -math.inf)
    return torch.cat(chosen, -1)


def expert_offsets(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort token slots by expert, those of one expert by token, on the device and without a host synchronisation.

    Args:
        experts: (N, k) experts of each token, all different.
        n_experts: E.

    Returns:
        ``order`` (N·k,): slot at each sorted place; ``inverse`` (N·k,): place of each slot; ``counts`` (E,):
        slots of each expert. All int64.
    """
    flat = experts.reshape(-1)
    slots = torch.arange(flat.numel(), device=flat.device)
    if n_experts > _COUNTED_EXPERTS:
        counts = torch.zeros(n_experts, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        # Narrow keys: a radix sort takes one pass per byte.
        order = (flat.to(torch.int16) if n_experts < 2**15 else flat).argsort(stable=True)
        return order, torch.empty_like(order).scatter_(0, order, slots), counts
    taken = (experts.unsqueeze(-1) == torch.arange(n_experts, device=flat.device)).any(1)
    # A CUDA kernel's sum down columns is a hundred times slower than along rows.
    if taken.is_cuda and not torch.compiler.is_compiling():
        seen = taken.t().contiguous().cumsum(1, dtype=torch.int32).t()
    else:
        seen = taken.cumsum(0, dtype=torch.int32)
    counts = taken.sum(0)
    first = counts.cumsum(0) - counts
    inverse = (seen + (first - 1)).gather(1, experts).reshape(-1)
    return torch.empty_like(inverse).scatter_(0, inverse, slots), inverse, counts


def _gather_sum(rows: Tensor, place: Tensor, k: int) -> Tensor:
    """Σ_i rows[place[n·k + i]]; (N·k, D), (N·k,) → (N, D)."""
    if not torch.is_grad_enabled() and fused.fit(rows):
        return fused.gather_sum(rows, place, k)
    return rows.index_select(0, place).view(-1, k, rows.shape[-1]).sum(1)


class _Dispatch(torch.autograd.Function):
    """Copy each token to its k slots, sorted by expert. The backward is a gather and a sum, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, inverse = ctx.saved_tensors
        return _gather_sum(grad, inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Undo the sort of :class:`_Dispatch` and sum; its backward is the forward of the other."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _gather_sum(y, inverse, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def dispatch(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Token rows in expert order.

    Args:
        x: (N, D).
        order: (N·k,) from :func:`expert_offsets`.
        inverse: likewise.
        k: experts per token.

    Returns:
        (N·k, D).
    """
    return _Dispatch.apply(x, order, inverse, k)


class _Sorted(torch.autograd.Function):
    """A permutation, whose backward is the other way round and not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def sorted_weights(weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Routing weights (N, k) in expert order, (N·k,)."""
    return _Sorted.apply(weights.reshape(-1), order, inverse)


def combine(y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Sum of each token's k rows, in a fixed order: the same bits at every run.

    Args:
        y: (N·k, D) in expert order, weighted.
        order: sort order.
        inverse: its inverse.
        k: experts per token.

    Returns:
        (N, D).
    """
    return _Combine.apply(y, order, inverse, k)


def grouped_linear_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Row block e of x times weight[e], one block after the other.

    Reads the counts on the host. Differentiating through ``unbind`` keeps the gradient of the stack one
    allocation; indexing ``weight[e]`` would build a full-size gradient for every expert.

    Args:
        x: (N, D), rows sorted by expert.
        weight: (E, D, F).
        counts: (E,) rows of each expert.

    Returns:
        (N, F).
    """
    blocks = x.split(counts.tolist())
    # Viewed in its own shape, which a compiler cannot add up from the blocks.
    products = torch.cat([block @ w for block, w in zip(blocks, weight.unbind(), strict=True)])
    return products.view(x.shape[0], weight.shape[2])


def _grouped_mm_serves(x: Tensor, weight: Tensor) -> bool:
    """What ``F.grouped_mm`` accepts: dtype, 16-byte strides, and on CUDA compute capability 8.0."""
    if not hasattr(F, "grouped_mm") or (x.dim(), weight.dim()) != (2, 3):
        return False
    size = x.element_size()
    if x.dtype != weight.dtype or (x.shape[1] * size) % 16 or (weight.shape[2] * size) % 16:
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    if torch.compiler.is_compiling():
        return x.dtype == torch.bfloat16  # the shape rule that tracing runs knows no other
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class _ContiguousGrad(torch.autograd.Function):
    """Identity; ``grouped_mm`` cannot take an expanded gradient, such as that of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """:func:`grouped_linear_reference` as one grouped matrix product where this build and device have it.

    On CUDA the grouped product serves bfloat16; other dtypes take the reference, which reads the counts on
    the host once a call.
    """
    if _grouped_mm_serves(x, weight):
        if torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and fused.fit(x, weight):
            return fused.grouped_linear(x, weight, counts)
        out = F.grouped_mm(x.contiguous(), weight, offs=counts.cumsum(0).to(torch.int32))
        return _ContiguousGrad.apply(out)
    return grouped_linear_reference(x, weight, counts)


def expert_mlps_reference(
    rows: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, counts: Tensor
) -> Tensor:
    """SwiGLU experts on rows sorted by expert, each row's hidden activations times its weight.

    Args:
        rows: (N, D).
        w_in: (E, D, 2F), gate and up side by side.
        w_out: (E, F, D).
        weights: (N,).
        counts: (E,) rows of each expert.

    Returns:
        (N, D).
    """
    # Weighted before the second product, which is linear: the backward then needs no expert's output.
    return grouped_linear(gate(grouped_linear(rows, w_in, counts), weights), w_out, counts)


def expert_mlps(rows: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """:func:`expert_mlps_reference`; compiled for a GPU with a backward that passes over the hidden rows once."""
    if rows.is_cuda and torch.compiler.is_compiling() and products_are_grouped(rows, w_in, w_out):
        return _Experts.apply(rows, w_in, w_out, weights, counts.cumsum(0).to(torch.int32))
    return expert_mlps_reference(rows, w_in, w_out, weights, counts)


def products_are_grouped(rows: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """Whether both products of these experts can be grouped, so that the host reads no counts.

    Half of an aligned width, as the gate leaves it, need not be aligned.
    """
    return _grouped_mm_serves(rows, w_in) and (w_out.shape[1] * w_out.element_size()) % 16 == 0


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        hidden = F.grouped_mm(rows, w_in, offs=ends)
        ctx.save_for_backward(rows, w_in, w_out, weights, ends, hidden)
        return F.grouped_mm(gate_reference(hidden, weights), w_out, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, w_in, w_out, weights, ends, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        d_y = F.grouped_mm(grad, w_out.transpose(1, 2), offs=ends)
        d_hidden, d_weights, y = kernels_gpu.gate_backward(hidden, weights, d_y)
        d_out = F.grouped_mm(y.t(), grad, offs=ends)
        d_in = F.grouped_mm(rows.t(), d_hidden, offs=ends)
        return F.grouped_mm(d_hidden, w_in.transpose(1, 2), offs=ends), d_in, d_out, d_weights, None
