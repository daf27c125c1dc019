"""Attention and the small steps around it: a plain reference beside each fast path, one signature for both.

Shape letters: B batch, S new tokens, C context tokens, H query heads, G key/value heads, K head width,
R latent width, D model width, F hidden width.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _has_any_global_hook

from open_mythos import fused, kernels_gpu

__all__ = [
    "attention",
    "attention_reference",
    "bare",
    "causal_attention",
    "gate",
    "gate_reference",
    "latent_attention",
    "latent_keys",
    "latent_keys_reference",
    "linears",
    "rms_norm",
    "rms_norm_reference",
    "swiglu",
    "swiglu_reference",
    "training_kernels_serve",
    "turn_heads",
    "turn_heads_reference",
]


def bare(module: nn.Module | None, kind: type) -> bool:
    """Whether calling the module does what its class says on its own weight, so that a kernel may stand in.

    Hooks, a replaced ``forward``, a parametrised or wrapped weight and a bias all say no.
    """
    if module is None or type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        return False
    return (
        "forward" not in module.__dict__
        and module._parameters.get("bias") is None
        and not _has_any_global_hook()
    )


def linears(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """Several projections of the same input; compiled for a GPU they are one product, and so is their backward.

    Args:
        x: (…, D).
        modules: linear maps from D.

    Returns:
        (…, width) of each module.
    """
    if x.is_cuda and torch.compiler.is_compiling() and all(bare(module, nn.Linear) for module in modules):
        weights: list[Any] = [module.weight for module in modules]
        return F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)
    return tuple(module(x) for module in modules)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm of the last axis, x / sqrt(mean(x²) + eps) · weight; (…, D), (D,) → (…, D) in x's dtype.

    Under autocast torch's operator refuses a weight wider than x.
    """
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm_reference`, on the CPU by a kernel or without gradients by fewer operators."""
    width = x.shape[-1]
    if x.device.type != "cpu" or x.dtype != weight.dtype:
        return rms_norm_reference(x, weight, eps)
    if torch.is_grad_enabled():
        x = x.contiguous()
        return (fused.rms_norm if fused.fit(x, weight) else rms_norm_reference)(x, weight, eps)
    if x.dtype not in (torch.float32, torch.float64):  # the short way is exact enough in these only
        return rms_norm_reference(x, weight, eps)
    # The fused operator is six small ones on the CPU; at decode their number is what costs.
    scale = torch.linalg.vector_norm(x, 2, -1, True).square_().mul_(1 / width).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)


def gate_reference(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(first half) · second half of the last axis, each row times its weight; (…, 2F), (…) → (…, F)."""
    left, right = x.chunk(2, -1)
    y = F.silu(left) * right
    return y if weights is None else y * weights.unsqueeze(-1)


def gate(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """:func:`gate_reference`, in one kernel where :mod:`open_mythos.fused` or a GPU's serves."""
    tensors = (x,) if weights is None else (x, weights)
    if kernels_gpu.gate_serves(*tensors):
        return kernels_gpu.gate(x, weights)
    return (fused.gate if fused.fit(*tensors) else gate_reference)(x, weights)


def swiglu_reference(x: Tensor, gate_up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate) · up) with gate and up the halves of gate_up(x) (arXiv 2002.05202); (…, D) → (…, D)."""
    return down(gate_reference(gate_up(x)))


def swiglu(x: Tensor, gate_up: nn.Module, down: nn.Module) -> Tensor:
    """:func:`swiglu_reference` with :func:`gate`."""
    return down(gate(gate_up(x)))


_TRAINING_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def training_kernels_serve(*tensors: Tensor) -> bool:
    """Whether :mod:`open_mythos.fused` may work on these: ordinary contiguous float32 on the CPU, seen by nobody."""
    return fused.fit(*tensors)


def turn_heads_reference(x: Tensor, rope: Tensor) -> Tensor:
    """The last P channels of each head rotated, channel i against i + P/2, by its position (arXiv 2104.09864).

    Args:
        x: (B, S, H, K + P).
        rope: (2, B or 1, S, 1, P): cos twice side by side, then −sin and sin.

    Returns:
        (B, S, H, K + P), in x's dtype; the arithmetic runs in the table's dtype.
    """
    (cos, sin), width = rope, rope.shape[-1]
    keep, turn = x.split((x.shape[-1] - width, width), -1)
    turned = torch.addcmul(turn * cos, turn.roll(width // 2, -1), sin).to(x.dtype)
    return torch.cat((keep, turned), -1) if keep.shape[-1] else turned


def turn_heads(x: Tensor, rope: Tensor) -> Tensor:
    """:func:`turn_heads_reference`, in one kernel where :mod:`open_mythos.fused` serves."""
    return fused.turn_heads(x, rope) if fused.fit(x, rope) else turn_heads_reference(x, rope)


def latent_keys_reference(kv: Tensor, shared: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """MLA's keys [first K of kv | shared] and values, the last V of kv.

    Args:
        kv: (B, S, H, K + V).
        shared: (B, S, P), the rotated rope key of all heads.
        nope: K.

    Returns:
        (B, S, H, K + P) and (B, S, H, V).
    """
    k, v = kv.split((nope, kv.shape[-1] - nope), -1)
    k = torch.cat((k, shared.unsqueeze(2).expand(-1, -1, kv.shape[2], -1)), -1)
    return k, v


def latent_keys(kv: Tensor, shared: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """:func:`latent_keys_reference`, in one kernel where :mod:`open_mythos.fused` serves."""
    shared = shared.contiguous()
    return (fused.keys if fused.fit(kv, shared) else latent_keys_reference)(kv, shared, nope)


def _heads_to_groups(n_heads: int, n_groups: int, device: torch.device) -> Tensor:
    """Key/value head read by each query head, (H,). Groups differ by at most one head when G does not divide H."""
    return torch.arange(n_heads, device=device) * n_groups // n_heads


def _expand_groups(x: Tensor, n_heads: int) -> Tensor:
    """(B, G, C, K) → (B, H, C, K)."""
    groups = x.shape[1]
    if groups == n_heads:
        return x
    if groups == 1:
        return x.expand(-1, n_heads, -1, -1)
    return x.index_select(1, _heads_to_groups(n_heads, groups, x.device))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, written out; what :func:`attention` must equal.

    Args:
        q: (B, H, S, K).
        k: (B, G, C, K).
        v: (B, G, C, Kv).
        scale: factor on the scores.
        mask: broadcastable to (B, H, S, C); bool: True where a query may look; otherwise what to add to the
            scores, −inf where it may not. Every row needs one column to look at.
        causal: query i of S sees keys 0..i; only for S == C, and not together with a mask.

    Returns:
        (B, H, S, Kv).
    """
    heads, length = q.shape[1], q.shape[2]
    scores = scale * (q @ _expand_groups(k, heads).transpose(-2, -1))
    if causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ _expand_groups(v, heads)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`attention_reference` through ``scaled_dot_product_attention``, with dropout on the weights.

    Unequal value and query widths leave SDPA's fast CPU kernel, so there the narrower side is padded with
    zeros, which changes no score and no output channel that is kept.
    """
    heads, groups, width, value_width = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    share = groups != heads
    if share and heads % groups:
        k, v, share = _expand_groups(k, heads), _expand_groups(v, heads), False
    if q.device.type == "cpu" and width != value_width:
        if value_width < width:
            v = F.pad(v, (0, width - value_width))
        else:
            q, k = F.pad(q, (0, value_width - width)), F.pad(k, (0, value_width - width))
    # The backends that take unequal widths differ fourfold on CUDA. cuDNN plans anew for every length, which
    # pays where lengths repeat, in training.
    repeats = torch.is_grad_enabled() or torch.compiler.is_compiling()
    with sdpa_kernel(_TRAINING_ORDER, set_priority=True) if q.is_cuda and repeats else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=share
        )
    return out[..., :value_width]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """:func:`attention` of a whole sequence, in one kernel where :mod:`open_mythos.fused` serves.

    Args:
        q: (B, S, H, K).
        k: (B, S, H, K).
        v: (B, S, H, Kv).
        scale: factor on the scores.

    Returns:
        (B, S, H, Kv).
    """
    if fused.attends(q, k, v):
        return fused.causal_attention(q, k, v, scale)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return attention(*heads_first, scale=scale, causal=True).transpose(1, 2)


def latent_attention(
    q: Tensor, latent: Tensor, rank: int, *, scale: float, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of all heads over one shared key/value head: MLA with its up-projections absorbed.

    Every head reads the same latent, so heads become rows of one matrix product instead of copies of the
    cache; the value is the first ``rank`` channels of the key.

    Args:
        q: (B, S, H, R + K_rope), queries in latent space, rope channels last.
        latent: (B, C, R + K_rope), the cache as stored.
        rank: R.
        scale: factor on the scores.
        mask: as :func:`attention` takes it, (B or 1, 1 or H, S, C), or None.
        dropout: probability on the attention weights.

    Returns:
        (B, S, H, R).
    """
    batch, length, heads, width = q.shape
    if mask is not None:
        mask = mask.transpose(1, 2).expand(-1, -1, heads, -1).reshape(mask.shape[0], 1, length * heads, -1)
    shared = latent.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q.reshape(batch, 1, length * heads, width),
        shared,
        shared,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
    )
    return out.view(batch, length, heads, width)[..., :rank]
