"""Attention and expert matmul: a plain reference beside each fast path, one signature for both.

Shape letters: B batch, S new tokens, C context tokens, H query heads, G key/value heads, K head width,
R latent width, N token slots, D model width, F expert width, E experts.
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
    "combine",
    "dispatch",
    "expert_mlps",
    "expert_mlps_reference",
    "expert_offsets",
    "gate",
    "gate_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "latent_attention",
    "latent_keys",
    "latent_keys_reference",
    "linears",
    "rms_norm",
    "rms_norm_reference",
    "sorted_weights",
    "swiglu",
    "swiglu_reference",
    "top_k",
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
    """:func:`gate_reference`, in one kernel where :mod:`open_mythos.fused` serves."""
    tensors = (x,) if weights is None else (x, weights)
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
    if rows.is_cuda and torch.compiler.is_compiling() and _experts_serve(rows, w_in, w_out):
        return _Experts.apply(rows, w_in, w_out, weights, counts.cumsum(0).to(torch.int32))
    return expert_mlps_reference(rows, w_in, w_out, weights, counts)


def _experts_serve(rows: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """Whether both products can be grouped: half of an aligned width, as the gate leaves it, need not be aligned."""
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
