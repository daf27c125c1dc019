"""The transformer block, and what turns it into a recurrence.

Shape letters: B batch, S new tokens, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.attention import GQAttention, MLAttention, SequenceContext
from open_mythos.model.layers import Expert, RMSNorm
from open_mythos.model.moe import MoEFFN
from open_mythos.model.recurrence import (
    ACTHalting,
    LoRAAdapter,
    LTIInjection,
    convergence_loss,
    loop_index_embedding,
)

__all__ = ["RecurrentBlock", "TransformerBlock"]


class TransformerBlock(nn.Module):
    """Pre-norm block: x ← x + attn(norm(x)); x ← x + ffn(norm(x)).

    Args:
        cfg: sizes and attention type.
        use_moe: the looped block: a mixture of experts instead of one dense feed-forward layer, and attention
            that may be local.
    """

    def __init__(self, cfg: MythosConfig, use_moe: bool = False) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = (MLAttention if cfg.attn_type == "mla" else GQAttention)(cfg, local=use_moe)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn = MoEFFN(cfg) if use_moe else Expert(cfg.dim, cfg.dense_dim)
        self.dropout = cfg.dropout

    def forward(self, x: Tensor, ctx: SequenceContext, slot: str) -> Tensor:
        """(B, S, D) → (B, S, D); keys and values go to ``slot`` of the context's cache."""
        x = x + self._drop(self.attn(self.attn_norm(x), ctx, slot))
        return x + self._drop(self.ffn(self.ffn_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class RecurrentBlock(nn.Module):
    """The shared block and what turns it into a recurrence:

        x = norm(h + loop_embedding(t) + e),   u = block(x) − x + lora(block(x), t)
        h' = A ⊙ h + B ⊙ e + u                                          (A inside (0, 1))

    With ``block_output="state"`` u keeps the block's input, as in the public release. ``update_norm`` and
    ``state_norm`` normalise u and h'.

    Args:
        cfg: sizes and choices.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.block = TransformerBlock(cfg, use_moe=True)
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        self.injection = LTIInjection(cfg.dim, b_init=0.1 if cfg.init == "upstream" else None)
        self.update_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.update_norm else None
        self.state_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.state_norm else None
        self.act = ACTHalting(cfg.dim, cfg.halt_bias_init)
        self.loop_dim = cfg.dim // 8 if cfg.loop_embedding else 0

    def forward(self, h: Tensor, e: Tensor, t: int | Tensor, ctx: SequenceContext, slot: str) -> Tensor:
        """State (B, S, D), injected input (B, S, D), loop index → next state (B, S, D).

        An index for each sequence, (B,), may be below zero: that sequence has not begun and keeps its state.
        """
        if isinstance(t, Tensor) and t.dim():
            new = self._advance(h, e, t.clamp(min=0), ctx, slot)
            return torch.where((t >= 0).view(-1, 1, 1), new, h)
        return self._advance(h, e, t, ctx, slot)

    def halting_loss(self, h: Tensor, final: Tensor) -> Tensor:
        """What the halting head has to learn from one loop's state: a loss for each position, (B, S)."""
        return convergence_loss(self.act(h), h, final, self.cfg.halt_tolerance)

    def _advance(self, h: Tensor, e: Tensor, t: int | Tensor, ctx: SequenceContext, slot: str) -> Tensor:
        seen = loop_index_embedding(h, t, self.loop_dim) if self.loop_dim else h
        x = self.norm(seen + e)
        out = self.block(x, ctx, slot)
        update = out if self.cfg.block_output == "state" else out - x
        if self.lora is not None:
            update = update + self.lora(out, t)
        if self.update_norm is not None:
            update = self.update_norm(update)
        h = self.injection(h, e, update, ctx.memo)
        return h if self.state_norm is None else self.state_norm(h)
