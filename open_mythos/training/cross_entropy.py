"""Cross entropy straight from features, a slice of the tokens at a time: the full logits are never held.

Shape letters: N tokens (B·S), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference", "softmax_gradient"]

# Logits of one slice: 256 MiB in bfloat16, enough rows to keep a GPU's matrix units busy.
_SLICE = 2**27

Rows = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor, ignore_index: int = -100
) -> Tensor:
    """Σ −log softmax(W x)[target] / divisor, with all logits at once; what :func:`linear_cross_entropy` must equal.

    Args:
        x: (N, D).
        weight: (V, D).
        targets: (N,) ids, or ``ignore_index`` where nothing is scored.
        divisor: scalar, such as the number of targets.
        ignore_index: see ``targets``.

    Returns:
        A scalar, float32 or wider.
    """
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum") / divisor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: Tensor,
    ignore_index: int = -100,
    rows: Rows | None = None,
) -> Tensor:
    """:func:`linear_cross_entropy_reference` in slices of tokens, with the gradients made on the way.

    The forward already knows every gradient up to a factor: it keeps them, (N, D) and (V, D), instead of the
    logits, (N, V). Without gradients wanted it keeps nothing. The weight's gradient is summed over slices in
    float32 or wider.

    Args:
        x: as in the reference.
        weight: as in the reference.
        targets: as in the reference.
        divisor: as in the reference; no gradient.
        ignore_index: as in the reference.
        rows: a faster :func:`softmax_gradient`.

    Returns:
        A scalar, float32 or wider.
    """
    rows = softmax_gradient if rows is None else rows
    rest = (weight, targets, divisor, ignore_index, rows, torch.is_grad_enabled())
    if not torch.is_autocast_enabled(x.device.type):
        return _LinearCrossEntropy.apply(x, *rest)
    # What autocast would do to a linear layer; inside, it would narrow products but not where they are written.
    x = x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype == torch.float32 else x
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, *rest)


def softmax_gradient(
    logits: Tensor, targets: Tensor, factor: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, and factor · (softmax − one-hot), its gradient.

    Args:
        logits: (N, V).
        targets: (N,).
        factor: scalar.
        ignore_index: rows with this target have neither loss nor gradient.

    Returns:
        (N,), float32 or wider, and (N, V) in the dtype of the logits.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = targets != ignore_index
    target = targets.masked_fill(~counts, 0).unsqueeze(-1)
    total = scores.logsumexp(-1, keepdim=True)
    loss = (total - scores.gather(-1, target)).squeeze(-1) * counts
    hot = torch.arange(scores.shape[-1], device=scores.device) == target
    gradient = ((scores - total).exp() - hot.to(scores.dtype)) * (counts.unsqueeze(-1) * factor)
    return loss, gradient.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: Tensor,
        ignore_index: int,
        rows: Rows,
        wanted: bool,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        narrow = weight.detach().to(x.dtype)
        factor = 1 / divisor.to(wide)
        wants_x, wants_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        loss = torch.zeros((), dtype=wide, device=x.device)
        size = max(1, _SLICE // weight.shape[0])
        for part, target, start in zip(
            x.split(size), targets.split(size), range(0, len(x), size), strict=True
        ):
            each, gradient = rows(part @ narrow.t(), target, factor, ignore_index)
            loss += each.sum()
            if grad_x is not None:
                torch.mm(gradient, narrow, out=grad_x[start : start + size])
            if grad_weight is not None:
                _add_product(grad_weight, gradient, part)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return loss * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad.to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = torch.mul(grad_weight, grad, out=torch.empty_like(grad_weight, dtype=ctx.dtype))
        return grad_x, grad_weight, None, None, None, None, None


def _add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add gradient (N, V) transposed times x (N, D) to the total (V, D), in the dtype of the total."""
    if x.dtype == total.dtype:
        total.addmm_(gradient.t(), x)
    elif x.is_cuda:
        torch.addmm(total, gradient.t(), x, out_dtype=total.dtype, out=total)
    else:
        total += gradient.t() @ x
