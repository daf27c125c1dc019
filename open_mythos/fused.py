"""Training's steps between matrix products on the CPU, each in one kernel both ways (kernels_train.c).

Each function here equals a few PyTorch operators, in float32, and differentiates itself; :mod:`open_mythos.ops`,
:mod:`open_mythos.expert_ops` and the layers have those operators beside it and decide by :func:`fit`. A gradient of
a gradient is taken through those operators. On CUDA, in other dtypes, under autocast, ``torch.compile`` and function
transforms, and where kernels.c could not be built, none of this runs.

Shape letters: B batch, S sequence, N tokens, D width, F hidden width, H heads, K nope width, P rope width, V value
width, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import TensorWeakRef

from open_mythos import kernels
from open_mythos.kernels import fit

__all__ = [
    "attends",
    "causal_attention",
    "fit",
    "gate",
    "gather_sum",
    "grouped_linear",
    "keys",
    "rms_norm",
    "turn_heads",
]


def _plainly(operators: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Any:
    """Gradients that can be differentiated again: those of PyTorch's operators on the same inputs."""
    with torch.enable_grad():
        # Aliases: an input that was computed from another one must not be differentiated through that.
        aliases = tuple(x.view_as(x) for x in inputs)
        out = operators(*aliases)
        outs = out if isinstance(out, tuple) else (out,)
        needed = [x for x in aliases if x.requires_grad]  # never empty: backward would not have been called
        found = iter(torch.autograd.grad(outs, needed, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in aliases)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        kernels.call("om_norm", x, weight, eps, scale.numel(), width, torch.get_num_threads(), y, scale)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():

            def operators(x: Tensor, weight: Tensor) -> Tensor:
                return F.rms_norm(x, weight.shape, weight, ctx.eps)

            return (*_plainly(operators, (x, weight), (grad,)), None)
        grad, width, threads = grad.contiguous(), x.shape[-1], torch.get_num_threads()
        dx, dw, room = torch.empty_like(x), torch.empty_like(weight), x.new_empty(threads * width)
        kernels.call("om_norm_back", grad, x, weight, scale, scale.numel(), width, threads, room, dx, dw)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the last axis, x / sqrt(mean(x²) + eps) · weight; (…, D), (D,) → (…, D)."""
    return _Norm.apply(x, weight, eps)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None) -> Tensor:
        hidden = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], hidden)
        kernels.call("om_gate", x, weights, y.numel() // hidden, hidden, torch.get_num_threads(), y)
        ctx.save_for_backward(x, weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        inputs = (x,) if weights is None else (x, weights)
        if torch.is_grad_enabled():

            def operators(x: Tensor, weights: Tensor | None = None) -> Tensor:
                left, right = x.chunk(2, -1)
                y = F.silu(left) * right
                return y if weights is None else y * weights.unsqueeze(-1)

            return (*_plainly(operators, inputs, (grad,)), None)[:2]
        grad, hidden, dx = grad.contiguous(), x.shape[-1] // 2, torch.empty_like(x)
        d_weights = None if weights is None else torch.empty_like(weights)
        kernels.call(
            *("om_gate_back", grad, x, weights, grad.numel() // hidden, hidden),
            *(torch.get_num_threads(), dx, d_weights),
        )
        return dx, d_weights


def gate(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(first half) · second half of the last axis, each row times its weight; (…, 2F), (…) → (…, F)."""
    return _Gate.apply(x, weights)


def gather_sum(rows: Tensor, place: Tensor, k: int) -> Tensor:
    """Σ_i rows[place[n·k + i]], without gradients; (N·k, D), (N·k,) → (N, D)."""
    width = rows.shape[1]
    out = rows.new_empty(rows.shape[0] // k, width)
    kernels.call("om_gather_sum", rows, place, len(out), k, width, torch.get_num_threads(), out)
    return out


def _rope_of(rope: Tensor, x: Tensor) -> tuple[int, int, int]:
    """Strides of the table (2, B or 1, S, 1, P) between cosines and sines and between rows, and tokens a row."""
    return rope.stride(0), 0 if rope.shape[1] == 1 else rope.stride(1), x.shape[1]


def _turn(x: Tensor, rope: Tensor, sign: float) -> Tensor:
    batch, length, heads, width = x.shape
    turned, out = rope.shape[-1], torch.empty_like(x)
    kernels.call(
        *("om_turn_heads", x, rope, *_rope_of(rope, x), sign, batch * length, heads),
        *(width - turned, turned, torch.get_num_threads(), out),
    )
    return out


class _TurnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Tensor) -> Tensor:
        ctx.save_for_backward(rope)
        return _turn(x, rope, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rope,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a rotation's transpose is the rotation back, and that is linear
            return _TurnHeads.apply(grad.contiguous(), torch.stack((rope[0], -rope[1]))), None
        return _turn(grad.contiguous(), rope, -1.0), None


def turn_heads(x: Tensor, rope: Tensor) -> Tensor:
    """The last P channels of each head rotated by its position; (B, S, H, K + P), (2, B or 1, S, 1, P) → x's shape."""
    return _TurnHeads.apply(x, rope)


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, shared: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        (batch, length, heads, both), rope = kv.shape, shared.shape[-1]
        k, v = (
            kv.new_empty(batch, length, heads, nope + rope),
            kv.new_empty(batch, length, heads, both - nope),
        )
        ctx.sizes = (batch * length, heads, nope, rope, both - nope)
        ctx.shape = kv.shape
        kernels.call("om_keys", kv, shared, *ctx.sizes, torch.get_num_threads(), k, v)
        return k, v

    @staticmethod
    def backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> Any:
        _, _, nope, rope, _ = ctx.sizes
        if torch.is_grad_enabled():
            return torch.cat((d_k[..., :nope], d_v), -1), d_k[..., nope:].sum(2), None
        d_k, d_v = d_k.contiguous(), d_v.contiguous()
        d_kv, d_shared = d_k.new_empty(ctx.shape), d_k.new_empty(*ctx.shape[:2], rope)
        kernels.call("om_keys_back", d_k, d_v, *ctx.sizes, torch.get_num_threads(), d_kv, d_shared)
        return d_kv, d_shared, None


def keys(kv: Tensor, shared: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """MLA's keys [first K of kv | shared] and values, the last V of kv.

    Args:
        kv: (B, S, H, K + V).
        shared: (B, S, P), the rotated rope key of all heads.
        nope: K.

    Returns:
        (B, S, H, K + P) and (B, S, H, V).
    """
    return _Keys.apply(kv, shared, nope)


MAX_LENGTH = 1024
"""A thread keeps one head's queries, keys and values at hand; for longer sequences PyTorch's way is the better one."""


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`causal_attention` takes these: what :func:`fit` asks, whole vectors, and not too long."""
    lanes = 16
    whole = q.shape == k.shape and q.shape[-1] % lanes == 0 and v.shape[-1] % lanes == 0
    return whole and q.shape[1] <= MAX_LENGTH and fit(q, k, v)


def _room(q: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int, int, Tensor]:
    """Sizes, threads, and a room for each thread."""
    (batch, length, heads, width), value, threads = q.shape, v.shape[-1], torch.get_num_threads()
    own = kernels.call("om_causal_room", length, width, value)
    return batch, length, heads, width, value, threads, own, q.new_empty(threads * own)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, sums = torch.empty_like(v), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        kernels.call("om_causal", q, k, v, scale, *_room(q, v), y, sums)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, y, sums = ctx.saved_tensors
        if torch.is_grad_enabled():

            def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                scores = ctx.scale * torch.einsum("bshe,bthe->bhst", q, k)
                later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
                weights = scores.masked_fill(later, -torch.inf).softmax(-1)
                return torch.einsum("bhst,bthv->bshv", weights, v)

            return (*_plainly(operators, (q, k, v), (grad,)), None)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernels.call("om_causal_back", grad.contiguous(), q, k, v, y, sums, ctx.scale, *_room(q, v), *grads)
        return (*grads, None)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ, keys up to the query's own) v; (B, S, H, K), (B, S, H, K), (B, S, H, V) → v's shape.

    As in arXiv 2307.08691, only the logarithm of each row's sum is kept for the way back.
    """
    return _Causal.apply(q, k, v, scale)


class _Tally:
    """The gradient of a weight that one graph uses many times, summed in place in each backward pass."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def add(self, like: Tensor, x: Tensor, grad: Tensor, counts: list[int]) -> None:
        """Add x[block e]ᵀ grad[block e] to the sum's matrix e; what nobody fetches goes with the pass."""
        task = torch._C._current_graph_task_id()
        total = self.sums.get(task)
        blocks = zip(x.split(counts), grad.split(counts), strict=True)
        if total is not None:
            for out, (left, right) in zip(total.unbind(), blocks, strict=True):
                out.addmm_(left.t(), right)
            return
        total = self.sums[task] = torch.empty_like(like)
        Variable._execution_engine.queue_callback(lambda: self.sums.pop(task, None))  # type: ignore[arg-type]
        for out, (left, right) in zip(total.unbind(), blocks, strict=True):
            torch.mm(left.t(), right, out=out)


class _Shared(torch.autograd.Function):
    """The weight itself. Its backward runs once, after those of all uses, and hands over what they tallied."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tally: _Tally) -> Tensor:
        ctx.tally = tally
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        total = ctx.tally.sums.pop(torch._C._current_graph_task_id(), None)
        if total is None or grad is None:
            return grad if total is None else total, None
        return total + grad, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, tally: _Tally) -> Tensor:
        offsets = counts.cumsum(0).to(torch.int32)
        ctx.save_for_backward(x, weight, counts, offsets)
        ctx.tally = tally
        return F.grouped_mm(x, weight, offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, counts, offsets = ctx.saved_tensors
        if torch.is_grad_enabled():

            def operators(x: Tensor, weight: Tensor) -> Tensor:
                blocks = zip(x.split(counts.tolist()), weight.unbind(), strict=True)
                return torch.cat([block @ w for block, w in blocks])

            return (*_plainly(operators, (x, weight), (grad,)), None, None)
        grad = grad.contiguous()
        ctx.tally.add(weight, x, grad, counts.tolist())
        dx = F.grouped_mm(grad, weight.transpose(1, 2), offs=offsets) if ctx.needs_input_grad[0] else None
        return dx, None, None, None


# By the weight's id: the weight, what stands for it in a living graph, and its tally. Nothing here keeps them alive.
_uses: dict[int, tuple[Any, TensorWeakRef, _Tally]] = {}


def _stand_in(weight: Tensor) -> tuple[Tensor, _Tally]:
    """What the uses of a weight share as long as a graph with one of them lives."""
    owner, view, tally = _uses.get(id(weight), (None, None, None))
    shared = None if view is None else view()
    if owner is not None and owner() is weight and shared is not None and tally is not None:
        same = shared.data_ptr() == weight.data_ptr() and shared.shape == weight.shape
        if same and shared.requires_grad:
            return shared, tally
    tally = _Tally()
    shared = _Shared.apply(weight, tally)
    key = id(weight)
    _uses[key] = (ref(weight, lambda _: _uses.pop(key, None)), TensorWeakRef(shared), tally)
    return shared, tally


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Row block e of x times weight[e], for a weight that is used in every loop.

    Its gradient is the size of the weight, and each use would make one only to have it added to the last:
    here the matrix products of all uses add to one. Each use's own share cannot be seen by hooks.

    Args:
        x: (N, D), rows sorted by expert.
        weight: (E, D, F), a leaf that needs a gradient.
        counts: (E,) rows of each expert.

    Returns:
        (N, F).
    """
    shared, tally = _stand_in(weight)
    return _Grouped.apply(x, shared, counts, tally)
