"""Mixture of experts with a balancing bias (arXiv 2401.06066, 2408.15664).

Shape letters: N tokens (B·S), D model width, E experts, F expert width, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.expert_ops import (
    combine,
    dispatch,
    expert_mlps,
    expert_offsets,
    products_are_grouped,
    sorted_weights,
    top_k,
)
from open_mythos.model.layers import Expert

__all__ = ["MoEFFN"]

# Added to a share before its logarithm is taken.
_FLOOR = 0.05


class MoEFFN(nn.Module):
    """Top-k routed experts and always-active shared experts.

        l = W_r x,   I = top-k(l + b),   w = softmax(l_I)
        y = Σ_{i∈I} w_i · Expert_i(x) + Shared(x)

    The bias b chooses experts and never weights them, so it carries no gradient. It follows the load: every
    forward in training mode counts the slots each expert took, and the next one first moves b towards the
    experts that got fewer than their share. So balancing works in any training loop. Under activation
    recompute all counts grow alike, which leaves every share as it was. With a process group the counts are
    summed over ranks before they are used, so that b stays the same on all of them.

    Args:
        cfg: sizes, and ``router_bias_rate``, the step of b in logits.
    """

    router_bias: Tensor
    expert_load: Tensor
    # A scalar by which whoever trains slows the bias down, such as at the end; no part of the state.
    pace: Tensor | None = None
    # Count loads outside of training as well.
    counting = False

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.n_experts = cfg.n_experts
        self.topk = cfg.n_experts_per_tok
        self.bias_rate = cfg.router_bias_rate
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts, dtype=torch.float32))
        self.register_buffer("expert_load", torch.zeros(cfg.n_experts, dtype=torch.int64))
        self.w_in = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim, 2 * cfg.expert_dim))
        self.w_out = nn.Parameter(torch.empty(cfg.n_experts, cfg.expert_dim, cfg.dim))
        self.shared = Expert(cfg.dim, cfg.shared_dim) if cfg.shared_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        flat = x.reshape(-1, x.shape[-1])
        experts, weights = self.route(flat)
        order, inverse, counts = expert_offsets(experts, self.n_experts)
        if self.counting or (self.training and torch.is_grad_enabled()):
            self.expert_load += counts
        out = self._routed(flat, weights, order, inverse, counts)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)

    @property
    def grouped(self) -> bool:
        """Whether the experts are two grouped products here; otherwise the host reads how many tokens each one got."""
        return products_are_grouped(self.router.weight, self.w_in, self.w_out)

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Experts (N, k) of each token (N, D) and their weights (N, k), which sum to one.

        Softmax over the chosen logits equals the renormalised softmax over all of them, without its division
        by a sum that may be zero in low precision.
        """
        logits = self.router(flat)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        experts = top_k(logits + self.router_bias, self.topk)
        return experts, logits.gather(-1, experts).softmax(-1)

    def _routed(
        self, flat: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor
    ) -> Tensor:
        w_in: Tensor = self.w_in
        w_out: Tensor = self.w_out
        rows = flat
        if torch.is_autocast_enabled(flat.device.type):
            dtype = torch.get_autocast_dtype(flat.device.type)
            w_in, w_out, rows = w_in.to(dtype), w_out.to(dtype), flat.to(dtype)
        rows = dispatch(rows, order, inverse, self.topk)
        weights = sorted_weights(weights, order, inverse).to(rows.dtype)
        out = expert_mlps(rows, w_in, w_out, weights, counts)
        return combine(out, order, inverse, self.topk).to(flat.dtype)

    @torch.no_grad()
    def update_bias(self, forget: bool = True) -> None:
        """Move the bias towards underused experts by the loads counted since it forgot them.

        b_i ← b_i + rate · pace · (mean_j log s_j − log s_i), with s_i = load_i / mean load + 0.05. An expert whose
        logits drift ends where its step balances the drift, and the logarithm's step grows, where one in proportion
        to what is lacking is at most the rate. The 0.05 bounds it for an expert that got nothing, at three times
        the rate. Without counts nothing moves. The model calls this at the start of a training forward, once,
        outside every recomputed region.

        Args:
            forget: begin to count anew. Otherwise the next call follows these counts as well, which are less noisy.
        """
        if self.bias_rate == 0.0:
            return
        shares = self._shares()
        share = (shares + _FLOOR).log()
        step = self.bias_rate * (share.mean() - share) * (shares.sum() > 0)
        self.router_bias += step if self.pace is None else step * self.pace
        if forget:
            self.expert_load.zero_()

    @torch.no_grad()
    def least_share(self) -> Tensor:
        """The smallest of the counted loads, over their mean; a scalar."""
        return self._shares().min()

    def _shares(self) -> Tensor:
        """Counted loads over their mean, (E,), of all ranks together; zeros without counts."""
        load = self.expert_load.to(torch.float32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        return load / load.mean().clamp(min=1e-9)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEFFN:
        """Follow device moves, but keep the bias in at least float32: small steps vanish in bfloat16."""
        bias: Any = self.router_bias
        super()._apply(fn, recurse)
        if torch.finfo(self.router_bias.dtype).bits < 32:
            self.router_bias = bias.to(self.router_bias.device)
        return self
