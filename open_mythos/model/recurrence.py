"""What makes the block a recurrence: injection, loop embedding, per-loop LoRA, halting.

Shape letters: B batch, S sequence, D model width, T loops.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import ConfigError, MythosConfig

__all__ = [
    "ACTHalting",
    "HaltingWeights",
    "LTIInjection",
    "LoRAAdapter",
    "attach_loss",
    "convergence_loss",
    "loop_index_embedding",
]


_SLOPE = 1e-4  # beside the class, where a compiler finds it


class _Decay(torch.autograd.Function):
    """A = exp(−exp(clamp(s, low, high))), with a gradient that can lead any s back.

    It passes where a descent step leads inward, also from outside. The slope −A·exp(s) vanishes towards both
    ends (below 1e-35 at the upper one, far under any optimiser's epsilon), so its size is kept at _SLOPE
    or more; it is exact for s in (−9.2, 2.4), that is A in (1.3e-5, 0.9999).
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(s)
        ctx.bounds = (low, high)
        return torch.exp(-torch.exp(s.clamp(low, high)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (s,) = ctx.saved_tensors
        low, high = ctx.bounds
        inside = s.clamp(low, high)
        grad = -grad * torch.exp(inside - inside.exp()).clamp(min=_SLOPE)
        outward = ((s >= high) & (grad < 0)) | ((s <= low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


class LTIInjection(nn.Module):
    """The linear part of the loop, stable by construction (arXiv 2604.12946):

        h' = A ⊙ h + B ⊙ e + u,   A = exp(−exp(s)),   s = clamp(log_A + log_dt, −15, 4.4)

    Within the clamp A lies in (exp(−81.5), 1 − 3e-7): strictly inside (0, 1) in float32 for any finite
    parameter. The gradient still leads inward at the clamp and beyond, so no parameter is lost outside.
    A and the update are computed in at least float32 whatever the dtype of the weights.

    Args:
        dim: D.
        b_init: initial B; None takes 1 − A, with which the linear part alone settles at h = e.
    """

    LOW, HIGH = -15.0, 4.4

    def __init__(self, dim: int, b_init: float | None = None) -> None:
        super().__init__()
        self.b_init = 1 - math.exp(-1) if b_init is None else b_init
        self.log_A = nn.Parameter(torch.zeros(dim))
        self.log_dt = nn.Parameter(torch.zeros(1))
        self.B = nn.Parameter(torch.full((dim,), self.b_init))

    def get_A(self) -> Tensor:
        """The decay of each channel, (D,), strictly inside (0, 1), float32 or wider."""
        dtype = torch.promote_types(self.log_A.dtype, torch.float32)
        return _Decay.apply(self.log_A.to(dtype) + self.log_dt.to(dtype), self.LOW, self.HIGH)

    def forward(
        self, h: Tensor, e: Tensor, transformer_out: Tensor, memo: dict[str, Any] | None = None
    ) -> Tensor:
        """State (B, S, D), injected input (B, S, D) and update (B, S, D) → next state (B, S, D).

        A and B ⊙ e are the same in every loop of a call: without gradients they are kept in ``memo``.
        """
        fresh = memo is None or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if memo is None or fresh or self.B.is_inference():
            decay, drive = self.get_A(), self.B * e
        else:
            state = (self.log_A._version, self.log_dt._version, self.B._version)
            kept = memo.get("injection")
            if kept is None or kept[0] is not e or kept[1] != state:
                kept = memo["injection"] = (e, state, self.get_A(), self.B * e)
            decay, drive = kept[2:]
        return torch.addcmul(drive + transformer_out, decay, h).to(h.dtype)

    @torch.no_grad()
    def rescale(self, limit: float) -> float:
        """A ← A · limit / ρ(A) on the parameters when ρ(A) = max A exceeds ``limit``; returns the new ρ(A).

        Raises:
            ConfigError: ``limit`` is not inside (0, 1).
        """
        if not isinstance(limit, (int, float)) or not 0.0 < limit < 1.0:
            raise ConfigError(f"limit = {limit!r} is not allowed: it must be a number above 0 and below 1")
        decay = self.get_A().double()
        radius = decay.max()
        if radius > limit:
            # A hair inside, so that rounding to float32 does not lift the largest above the limit.
            s = torch.log(-torch.log(decay * (limit * (1 - 2e-7) / radius)))
            log_dt = self.log_dt.double().clamp(self.LOW, self.HIGH)
            self.log_dt.copy_(log_dt)
            self.log_A.copy_(s - self.log_dt.double())
        return float(self.get_A().max())


def loop_index_embedding(h: Tensor, loop_t: int | Tensor, loop_dim: int, theta: float = 10000.0) -> Tensor:
    """Add sin and cos of the loop index to the first ``loop_dim`` channels; defined for any loop.

    Args:
        h: (B, S, D).
        loop_t: loop index from 0, or one per sequence, (B,).
        loop_dim: channels that receive it.
        theta: base of the frequencies.

    Returns:
        (B, S, D).
    """
    dtype = torch.promote_types(h.dtype, torch.float32)  # bfloat16 cannot tell loop 257 from 256
    exponent = torch.arange(0, loop_dim, 2, device=h.device, dtype=dtype) / max(loop_dim, 1)
    index = loop_t.reshape(-1, 1, 1) if isinstance(loop_t, Tensor) else loop_t
    angles = index * theta**-exponent
    embedding = torch.cat((angles.sin(), angles.cos()), -1)[..., :loop_dim].to(h.dtype)
    return h + F.pad(embedding, (0, h.shape[-1] - loop_dim))


class LoRAAdapter(nn.Module):
    """Per-loop low-rank change of the shared block (arXiv 2410.20672): Δ(x, t) = (down(x) ⊙ scale_t) B.

    Loops beyond the table use its last row.

    Args:
        dim: D.
        rank: rank of the change.
        max_loops: rows of the table.
    """

    def __init__(self, dim: int, rank: int, max_loops: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.B = nn.Parameter(torch.zeros(rank, dim))
        self.scale = nn.Embedding.from_pretrained(torch.ones(max_loops, rank), freeze=False)

    def forward(self, x: Tensor, loop_t: int | Tensor) -> Tensor:
        """(B, S, D) → (B, S, D) for a loop index, or one per sequence, (B,)."""
        last = self.scale.num_embeddings - 1
        if isinstance(loop_t, Tensor):  # index_select: a compiler need not know which row
            scale = self.scale.weight.index_select(0, loop_t.reshape(-1).clamp(max=last)).unsqueeze(1)
        else:
            scale = self.scale.weight[min(loop_t, last)]
        return (self.down(x) * scale) @ self.B


class ACTHalting(nn.Module):
    """Probability that a position stops after this loop: sigmoid(w·h + b) (arXiv 1603.08983).

    Args:
        dim: D.
        bias_init: b at initialisation; negative values halt late.
    """

    def __init__(self, dim: int, bias_init: float = -3.0) -> None:
        super().__init__()
        self.bias_init = bias_init
        self.halt = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, S, D) → (B, S), in (0, 1)."""
        # Not one linear call: mixed precision keeps the bias, a vector, wider than the weight.
        return torch.sigmoid(F.linear(h, self.halt.weight.to(h.dtype)).squeeze(-1) + self.halt.bias)


class HaltingWeights:
    """Weight of each loop's state in what the coda reads, one loop at a time.

    - ``select``: one-hot, at the first loop where 1 − Π(1 − p) ≥ threshold, else at the last loop.
    - ``average``: p, the remainder at the loop where Σp reaches the threshold or at the last loop.
    - ``upstream``: as ``average`` but without the last loop's remainder, so that mass may be missing.

    The first two sum to one over any number of loops. ``off`` has no weights and needs no object of this class.

    Args:
        cfg: ``halting`` and ``act_threshold``.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        self.mode = cfg.halting
        self.threshold = cfg.act_threshold if self.mode == "upstream" else min(cfg.act_threshold, 1.0)
        self.mass: Tensor | None = None
        self.running: Tensor | None = None

    def observe(self, h: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """``select`` in one pass: the state selected so far, (B, S, D).

        A position takes every state up to the one at which it stops; so after the last loop it holds the
        state that :meth:`next` gives the weight one.

        Args:
            h: state after this loop, (B, S, D).
            p: its halting probabilities, (B, S).
            out: what the previous call returned; not read at the first.
        """
        out = h if self.running is None else torch.where(self.running.unsqueeze(-1), h, out)
        self._survive(p)
        return out

    def _survive(self, p: Tensor) -> None:
        """Mass here is what has not halted, Π(1 − p)."""
        left = 1 - (p if p.dtype == torch.float32 else p.to(torch.promote_types(p.dtype, torch.float32)))
        self.mass = left if self.mass is None else self.mass * left
        self.running = self.mass > 1 - self.threshold

    def next(self, p: Tensor, last: bool) -> Tensor:
        """Halting probabilities (B, S) of this loop, and whether it is the last → weights (B, S)."""
        p = p.to(torch.promote_types(p.dtype, torch.float32))
        if self.mode == "select":
            before = torch.ones_like(p, dtype=torch.bool) if self.running is None else self.running
            self._survive(p)
            return (before if last or self.running is None else before & ~self.running).to(p.dtype)
        if self.mass is None or self.running is None:
            self.mass, self.running = torch.zeros_like(p), torch.ones_like(p, dtype=torch.bool)
        crossing = self.mass + p >= self.threshold
        if self.mode == "average" and last:
            crossing = torch.ones_like(crossing)
        weight = torch.where(crossing, (1 - self.mass).clamp(min=0), p) * self.running
        self.mass = self.mass + p * self.running
        self.running = self.running & ~(self.mass >= self.threshold)
        if self.mode == "average":
            self.running = self.running & ~crossing
        return weight


def convergence_loss(p: Tensor, h: Tensor, final: Tensor, tolerance: float) -> Tensor:
    """Teach the halting head to stop where the state already is what it will be.

    Cross entropy of p against 1[‖h − h_T‖ ≤ tolerance · ‖h_T‖], of one loop before the last.

    Args:
        p: halting probabilities after this loop, (B, S).
        h: state after it, (B, S, D); read without gradient.
        final: state after the last loop, (B, S, D); read without gradient.
        tolerance: relative distance that counts as converged.

    Returns:
        (B, S), float32 or wider.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    with torch.no_grad():
        final = final.to(dtype)
        done = (h.to(dtype) - final).norm(dim=-1) <= tolerance * final.norm(dim=-1)
    p = p.to(dtype).clamp(1e-6, 1 - 1e-6)
    # Written out: autocast on CUDA refuses F.binary_cross_entropy whatever the dtype of its arguments.
    return -torch.where(done, p.log(), (-p).log1p())


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.loss_like


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """The same x; backward through it also descends ``loss`` with weight one, in anybody's training loop.

    The weight is one per backward whatever the caller's loss is multiplied by (gradient accumulation, loss
    scaling), and what it sends to the halting head counts in a global gradient norm.
    """
    return _AttachLoss.apply(x, loss)
