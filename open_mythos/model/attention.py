"""Grouped-query and multi-head latent attention: projections around a weightless core, keyed by slot.

Shape letters: B batch, S new tokens, C context tokens, H heads, G key/value heads, K head width, R latent rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.cache import KVCache
from open_mythos.model.layers import RMSNorm, apply_rope
from open_mythos.ops import (
    attention,
    causal_attention,
    latent_attention,
    latent_keys,
    linears,
    training_kernels_serve,
    turn_heads,
)

__all__ = ["GQAttention", "MLAttention", "SequenceContext", "distance_penalty"]


@dataclass(frozen=True)
class SequenceContext:
    """What every layer of one call shares: where its tokens stand and what they may see.

    Args:
        rope: (2, B or 1, S, 1, K) rotation table of the new tokens.
        mask: bool (B or 1, 1, S, C), True where a query may look; None when causality alone decides.
        cache: where keys and values are kept, or None.
        segments: (B, C) document of each column, -1 for padding; None without padding and documents.
        packed: the segments are documents.
        penalty: (B or 1, H, S, C) what the looped block's scores lose by distance, see :func:`distance_penalty`.
        memo: what is the same in every loop of this call, kept while no gradients are wanted.
    """

    rope: Tensor
    mask: Tensor | None = None
    cache: KVCache | None = None
    segments: Tensor | None = None
    packed: bool = False
    penalty: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def past(self) -> int:
        """Cached tokens before this call."""
        return 0 if self.cache is None else self.cache.length

    def scores(self, q: Tensor, local: bool) -> tuple[Tensor | None, bool]:
        """Mask of the scores of q (B, S, …), bool or what to add to them, and whether causality alone decides."""
        if local and self.penalty is not None:
            return self.penalty.to(q.dtype), False
        return self.mask, self.mask is None and q.shape[1] > 1

    def store(self, slot: str, **new: Tensor) -> dict[str, Tensor]:
        """The new tokens' tensors with the cached ones before them."""
        return new if self.cache is None else self.cache.write(slot, new)


def distance_penalty(mask: Tensor | None, past: int, new: int, slopes: Tensor, previous: int = 0) -> Tensor:
    """What scores lose by distance: heads that see the token before alone, then ALiBi (arXiv 2108.12409).

    A head of the second kind loses its slope times the distance, and sees nothing that the mask hides. The
    distance to a key is the number of tokens after it that the query sees, so padding and other documents do not
    count. Where there is no token before, heads of the first kind see the token itself.

    Args:
        mask: bool (B or 1, 1, S, C), or None: causal.
        past: C − S.
        new: S.
        slopes: (H − previous,), of the heads of the second kind.
        previous: heads of the first kind.

    Returns:
        (B or 1, H, S, C), in the slopes' dtype.
    """
    if mask is None:
        columns = torch.arange(past + new, device=slopes.device)
        mask = (columns <= columns[past:, None]).view(1, 1, new, past + new)
    seen = mask.sum(-1, keepdim=True)
    distance = seen - mask.cumsum(-1)
    penalty = (-slopes.view(1, -1, 1, 1) * distance).masked_fill(~mask, -torch.inf)
    if not previous:
        return penalty
    before = (distance == (seen > 1).to(distance.dtype)) & mask
    only = torch.zeros_like(distance, dtype=penalty.dtype).masked_fill(~before, -torch.inf)
    return torch.cat((only.expand(-1, previous, -1, -1), penalty), 1)


class GQAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads read G key/value heads, any 1 ≤ G ≤ H.

    Query head h reads key/value head ⌊h·G/H⌋. Cached: rotated keys and values, (B, C, G, K).

    Args:
        cfg: sizes; ``qk_norm`` adds an RMSNorm on each query and key head before the rotation.
        local: let scores fall with distance, where the context has a penalty.
    """

    def __init__(self, cfg: MythosConfig, local: bool = False) -> None:
        super().__init__()
        self.local = local
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.dropout = cfg.dropout

    def forward(self, x: Tensor, ctx: SequenceContext, slot: str) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        batch, new = x.shape[:2]
        q, k, v = (y.view(batch, new, -1, self.head_dim) for y in linears(x, self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, ctx.rope), apply_rope(k, ctx.rope)
        kv = ctx.store(slot, k=k, v=v)
        mask, causal = ctx.scores(x, self.local)
        out = attention(
            q.transpose(1, 2),
            kv["k"].transpose(1, 2),
            kv["v"].transpose(1, 2),
            scale=self.head_dim**-0.5,
            mask=mask,
            causal=causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.wo(out.transpose(1, 2).flatten(2))


class MLAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

        c = norm(W_dkv x)[:R],  k_rope = rope((W_dkv x)[R:])            cached: [c | k_rope], (B, C, R + K_rope)
        q = W_uq norm(W_dq x),  k = [W_uk c | k_rope],  v = W_uv c,  y = W_o softmax(q kᵀ / √K) v

    The rope key is one for all heads. With cached tokens and few new ones W_uk is absorbed into the query and
    W_uv into the output, so that attention runs on the latent itself; otherwise keys and values are built.
    Both compute the same; the cheaper by multiplications is taken.

    Args:
        cfg: sizes.
        local: let scores fall with distance, where the context has a penalty.
    """

    def __init__(self, cfg: MythosConfig, local: bool = False) -> None:
        super().__init__()
        self.local = local
        self.n_heads, self.rank = cfg.n_heads, cfg.kv_lora_rank
        self.rope_dim, self.nope_dim, self.v_dim = cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim
        self.scale = (self.rope_dim + self.nope_dim) ** -0.5
        self.q_down = nn.Linear(cfg.dim, cfg.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(cfg.q_lora_rank, cfg.norm_eps)
        self.q_up = nn.Linear(cfg.q_lora_rank, cfg.n_heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_down = nn.Linear(cfg.dim, cfg.kv_lora_rank + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, cfg.norm_eps)
        self.kv_up = nn.Linear(cfg.kv_lora_rank, cfg.n_heads * (self.nope_dim + self.v_dim), bias=False)
        self.wo = nn.Linear(cfg.n_heads * self.v_dim, cfg.dim, bias=False)
        self.dropout = cfg.dropout

    def forward(self, x: Tensor, ctx: SequenceContext, slot: str) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        absorb = ctx.past > 0 and self._absorbing_pays(x.shape[1], ctx.past + x.shape[1])
        low, shared = linears(x, self.q_down, self.kv_down)
        q = self.q_up(self.q_norm(low)).view(*x.shape[:2], self.n_heads, -1)
        c, k_rope = shared.split((self.rank, self.rope_dim), -1)
        if not absorb and training_kernels_serve(q, ctx.rope):
            return self.wo(self._attend_built(q, c, k_rope, ctx, slot))
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), -1)
        turned = apply_rope(torch.cat((q_rope, k_rope.unsqueeze(2)), 2), ctx.rope)
        q_rope, k_rope = turned[:, :, :-1], turned[:, :, -1]
        latent = torch.cat((self.kv_norm(c), k_rope), -1)
        latent = ctx.store(slot, latent=latent)["latent"]
        core = self._attend_absorbed if absorb else self._attend_expanded
        return self.wo(core(q_nope, q_rope, latent, ctx))

    def _absorbing_pays(self, new: int, context: int) -> bool:
        """Fewer multiplications per head and context token over the latent than over built keys and values."""
        up = self.rank * (self.nope_dim + self.v_dim)
        over_latent = new * (2 * self.rank + self.rope_dim) + new * up / context
        return over_latent < up + new * (self.nope_dim + self.rope_dim + self.v_dim)

    def _attend_built(self, q: Tensor, c: Tensor, k_rope: Tensor, ctx: SequenceContext, slot: str) -> Tensor:
        """What :meth:`_attend_expanded` computes, with each of its small steps in one kernel of the CPU."""
        q, c = turn_heads(q, ctx.rope), self.kv_norm(c)
        k_rope = turn_heads(k_rope.unsqueeze(2).contiguous(), ctx.rope).squeeze(2)
        if ctx.cache is not None:
            latent = ctx.store(slot, latent=torch.cat((c, k_rope), -1))["latent"]
            c, k_rope = latent.split((self.rank, self.rope_dim), -1)
        kv = self.kv_up(c).view(*c.shape[:2], self.n_heads, -1)
        k, v = latent_keys(kv, k_rope, self.nope_dim)
        mask, causal = ctx.scores(q, self.local)
        dropout = self.dropout if self.training else 0.0
        if causal and not dropout:
            return causal_attention(q, k, v, scale=self.scale).flatten(2)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = attention(*heads_first, scale=self.scale, mask=mask, causal=causal, dropout=dropout)
        return out.transpose(1, 2).flatten(2)

    def _attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, ctx: SequenceContext
    ) -> Tensor:
        c, k_rope = latent.split((self.rank, self.rope_dim), -1)
        k_nope, v = self.kv_up(c).view(*c.shape[:2], self.n_heads, -1).split((self.nope_dim, self.v_dim), -1)
        k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)), -1)
        mask, causal = ctx.scores(q_nope, self.local)
        out = attention(
            torch.cat((q_nope, q_rope), -1).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            scale=self.scale,
            mask=mask,
            causal=causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return out.transpose(1, 2).flatten(2)

    def _attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, ctx: SequenceContext
    ) -> Tensor:
        up = self.kv_up.weight.view(self.n_heads, self.nope_dim + self.v_dim, self.rank)
        w_uk, w_uv = up.split((self.nope_dim, self.v_dim), 1)
        batch, new = q_nope.shape[:2]
        into_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).transpose(0, 1)
        out = latent_attention(
            torch.cat((into_latent.reshape(batch, new, self.n_heads, self.rank), q_rope), -1),
            latent,
            self.rank,
            scale=self.scale,
            mask=ctx.scores(q_nope, self.local)[0],
            dropout=self.dropout if self.training else 0.0,
        )
        values = torch.bmm(out.flatten(0, 1).transpose(0, 1), w_uv.transpose(1, 2))
        return values.transpose(0, 1).reshape(batch, new, -1)
