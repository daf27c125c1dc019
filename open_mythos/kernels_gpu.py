"""What is left in several passes over memory, in one: Triton kernels.

The backward of the experts' gate is an operator that torch.compile can call, with a plain version that runs on other
devices and that the kernel is compared with. The compiler splits it into a sum over rows and a rest, which both read
everything; and it makes the gate's output again where it is at hand. The gate's forward serves where nothing is
compiled and nobody wants gradients: a long prompt, for whose lengths compiling does not pay.

Shape letters: N rows, F expert width.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["gate", "gate_backward", "gate_backward_reference", "gate_serves"]


def gate_backward_reference(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of y = silu(g) · u · w, with g and u the halves of ``hidden``, and y itself.

    Args:
        hidden: (N, 2F).
        weight: (N,).
        grad: (N, F), of y.

    Returns:
        Gradients of ``hidden`` (N, 2F) and of ``weight`` (N,), and y (N, F), each in its own dtype; computed in
        float32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    g, u = hidden.to(wide).chunk(2, -1)
    d, w = grad.to(wide), weight.to(wide).unsqueeze(-1)
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    plain = silu * u
    d_g = d * w * u * sigmoid * (1 + g * (1 - sigmoid))
    d_hidden = torch.cat((d_g, d * w * silu), -1)
    return d_hidden.to(hidden.dtype), (d * plain).sum(-1).to(weight.dtype), (plain * w).to(hidden.dtype)


@torch.library.custom_op("open_mythos::gate_backward", mutates_args=())
def gate_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gate_backward_reference`, on a GPU in one pass."""
    if not hidden.is_cuda:
        return gate_backward_reference(hidden, weight, grad)
    rows, width = grad.shape
    outputs = torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(grad)
    block = min(1024, 1 << (width - 1).bit_length())
    _gate_kernel()[(rows,)](
        hidden, weight, grad, outputs[0], outputs[1], outputs[2], width, BLOCK=block, num_warps=max(1, block // 256)
    )  # fmt: skip
    return outputs


@gate_backward.register_fake
def _(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(grad)


@cache
def _gate_kernel() -> Any:
    """Made on first use: Triton comes with torch for GPUs only."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(hidden, weight, grad, d_hidden, d_weight, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        w = tl.load(weight + row).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = column < width
            left = row * 2 * width + column
            g = tl.load(hidden + left, here, 0.0).to(tl.float32)
            u = tl.load(hidden + left + width, here, 0.0).to(tl.float32)
            d = tl.load(grad + row * width + column, here, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(g)
            silu = g * sigmoid
            total += d * silu * u
            tl.store(y + row * width + column, silu * u * w, here)
            tl.store(d_hidden + left, d * w * u * sigmoid * (1 + g * (1 - sigmoid)), here)
            tl.store(d_hidden + left + width, d * w * silu, here)
        tl.store(d_weight + row, tl.sum(total))

    return kernel


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def gate_serves(*tensors: Tensor) -> bool:
    """Whether :func:`gate` may work on these: on a GPU, contiguous, of one dtype, uncompiled and without gradients."""
    first = tensors[0]
    if not first.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    alike = all(x.dtype == first.dtype and x.is_contiguous() for x in tensors)
    return alike and first.dtype in (torch.bfloat16, torch.float16, torch.float32) and _has_triton()


def gate(hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(first half) · second half of the last axis, each row times its weight, in one pass.

    Args:
        hidden: (…, 2F).
        weight: (…,), or None.

    Returns:
        (…, F), computed in float32.
    """
    width = hidden.shape[-1] // 2
    y = hidden.new_empty(*hidden.shape[:-1], width)
    block = min(1024, 1 << (width - 1).bit_length())
    _gate_forward_kernel()[(hidden.numel() // (2 * width),)](
        hidden, hidden if weight is None else weight, y, width, WEIGHED=weight is not None, BLOCK=block,
        num_warps=max(1, block // 256),
    )  # fmt: skip
    return y


@cache
def _gate_forward_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(hidden, weight, y, width, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = column < width
            g = tl.load(hidden + row * 2 * width + column, here, 0.0).to(tl.float32)
            u = tl.load(hidden + row * 2 * width + width + column, here, 0.0).to(tl.float32)
            out = g * tl.sigmoid(g) * u
            if WEIGHED:
                out *= tl.load(weight + row).to(tl.float32)
            tl.store(y + row * width + column, out, here)

    return kernel
