"""Weights kept in fewer bits than they are used in: int8 with a factor for each stored row, or bfloat16.

A stored row is an output channel of a linear map and an input channel of an expert, so the factor meets an activation
and never a weight. :func:`open_mythos.inference.quantise.quantise` puts these modules into a model.

Shape letters: D model width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.expert_ops import combine, dispatch, sorted_weights
from open_mythos.model.moe import MoEFFN
from open_mythos.ops import gate

__all__ = ["CODES", "Coded", "CodedExperts", "CodedLinear"]

CODES = {"int8": torch.int8, "bfloat16": torch.bfloat16}
"""What weights may be kept as."""


class Coded(nn.Module):
    """A stack of matrices (…, rows, width) in a few bits a number.

    int8: w ≈ factor · code, code = round(w / factor), factor = max |w| / 127 over the row, in float32.
    bfloat16: w rounded.

    Args:
        weight: (…, rows, width), of any float dtype.
        kind: ``"int8"`` or ``"bfloat16"``.
    """

    codes: Tensor
    factor: Tensor | None

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        weight, factor = weight.detach(), None
        if kind == "int8":
            factor = weight.abs().amax(-1, keepdim=True).float() / 127
            # A row of zeros has no scale of its own.
            weight = (weight / factor.masked_fill(factor == 0, 1)).round_().clamp_(-127, 127)
            factor = factor.squeeze(-1)
        self.register_buffer("codes", weight.to(CODES[kind]).contiguous())
        self.register_buffer("factor", factor)

    def value(self, dtype: torch.dtype) -> Tensor:
        """The weight that these bits stand for, (…, rows, width)."""
        weight = self.codes.to(dtype)
        return weight if self.factor is None else weight * self.factor.to(dtype).unsqueeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coded:
        """Follow moves from device to device, but keep the dtypes, which are what this module is about."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self


class CodedLinear(nn.Module):
    """A linear map without bias whose weight is :class:`Coded`: y = factor ⊙ (codes · x).

    Args:
        linear: the map that it stands in for; its weight is read.
        kind: as for :class:`Coded`.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = (
            linear.in_features,
            linear.out_features,
            linear.weight.dtype,
        )
        self.coded = Coded(linear.weight, kind)

    @property
    def weight(self) -> Tensor:
        """(out, in), made anew each time it is asked for."""
        return self.coded.value(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y = F.linear(x, self.coded.codes.to(x.dtype))
        return y if self.coded.factor is None else y * self.coded.factor.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.coded.codes.device)).dtype
        return self


class CodedExperts(MoEFFN):
    """A :class:`MoEFFN` whose routed experts are :class:`Coded`. The router, which chooses them, stays exact.

    Args:
        moe: the mixture that it stands in for; its router and shared expert are taken over.
        kind: as for :class:`Coded`.
    """

    def __init__(self, moe: MoEFFN, kind: str) -> None:
        nn.Module.__init__(self)
        self.n_experts, self.topk, self.bias_rate = moe.n_experts, moe.topk, moe.bias_rate
        self.router, self.shared = moe.router, moe.shared
        self.register_buffer("router_bias", moe.router_bias)
        self.register_buffer("expert_load", moe.expert_load)
        self.coded_in, self.coded_out = Coded(moe.w_in, kind), Coded(moe.w_out, kind)

    def _routed(
        self, flat: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor
    ) -> Tensor:
        """Expert by expert, so that only those in use are widened. Reads the counts on the host."""
        rows = dispatch(flat, order, inverse, self.topk)
        weights = sorted_weights(weights, order, inverse).to(rows.dtype)
        sizes = counts.tolist()
        used = [e for e, size in enumerate(sizes) if size]
        out = []
        for e, block, share in zip(used, _blocks(rows, sizes), _blocks(weights, sizes), strict=True):
            hidden = gate(_product(block, self.coded_in, e), share)
            out.append(_product(hidden, self.coded_out, e))
        return combine(torch.cat(out), order, inverse, self.topk)


def _blocks(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return x.split([size for size in sizes if size])


def _product(x: Tensor, coded: Coded, e: int) -> Tensor:
    """(N, rows) times matrix e, (rows, width)."""
    if coded.factor is not None:
        x = x * coded.factor[e].to(x.dtype)
    return x @ coded.codes[e].to(x.dtype)
