"""Speed from outside the model: compiled parts, activations that are recomputed, matrices cast once a step.

The model's code knows nothing of these. The order is: recompute, then compile, then shard
(:mod:`open_mythos.training.parallel`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.config import ConfigError
from open_mythos.training.cross_entropy import softmax_gradient
from open_mythos.training.objective import Objective

__all__ = ["RECOMPUTE", "accelerate", "lowered"]

RECOMPUTE = ("none", "selective", "loop")

# Share of a compiled loop's activations that "selective" keeps; the compiler drops what is cheapest to redo.
_BUDGET = 0.5


def accelerate(objective: Objective, *, compile: bool = False, recompute: str = "none") -> None:
    """Compile the parts of a training step, and choose what its backward computes again; in place.

    The looped block is compiled once with and once without gradients, whatever the number of loops: the loop
    index is data. Each layer around it is compiled like it, and so is the softmax of the loss.

    Args:
        objective: holds the model.
        compile: use ``torch.compile``.
        recompute: "none" keeps every activation; "loop" keeps each loop's state only and runs the loop again
            in the backward; "selective" lets the compiler drop about half of a loop's activations, the
            cheapest to make again, and without ``compile`` is refused.

    Raises:
        ConfigError: an argument is not allowed.
    """
    if recompute not in RECOMPUTE:
        allowed = " or ".join(map(repr, RECOMPUTE))
        raise ConfigError(f"recompute = {recompute!r} is not allowed: it must be {allowed}")
    if recompute == "selective" and not compile:
        raise ConfigError(
            "recompute = 'selective' is not allowed: it needs compile = true; without it use 'loop'"
        )
    model: Any = objective.model
    if compile:
        budget = _BUDGET if recompute == "selective" else 1.0
        model.recurrent.forward = _compiled(model.recurrent.forward, budget)
        model.recurrent.halting_loss = _compiled(model.recurrent.halting_loss)
        for layer in (*model.prelude_layers, *model.coda_layers):
            layer.forward = _compiled(layer.forward)
        objective.rows = _compiled(softmax_gradient)
    if recompute == "loop":
        model.recurrent.forward = _recomputed(model.recurrent.forward)


def _compiled(function: Callable[..., Any], budget: float = 1.0) -> Callable[..., Any]:
    """Compiled as one graph, for the shapes it is called with."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    if budget == 1.0:
        return compiled

    @functools.wraps(function)
    def within_budget(*args: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compiled(*args)

    return within_budget


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def again(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    return again


@contextmanager
def lowered(
    module: nn.Module, dtype: torch.dtype | None, into: Mapping[nn.Parameter, Tensor] | None = None
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Inside, every matrix of the module is its copy in ``dtype``, cast once; at the end its gradient is, too.

    Cast once a step and not once a loop, and without autocast's choice at every operator. Vectors (norms,
    biases, the injection's A, Δ and B) and buffers (router bias and counts) stay as they are. The backward has
    to run inside; its gradients are added to those of the originals on leaving.

    Args:
        module: what is trained.
        dtype: such as ``torch.bfloat16``; None changes nothing.
        into: where to write the gradients of the matrices instead of adding them to ``.grad``.

    Yields:
        The copies, by what they stand for.
    """
    held = [] if dtype is None else [p for p in module.parameters() if p.dim() >= 2]
    copies: dict[nn.Parameter, Tensor] = {}
    if dtype is not None and held:
        copies = dict(zip(held, _cast([p.detach() for p in held], [dtype] * len(held)), strict=True))
    for p, copy in copies.items():
        copy.requires_grad_(p.requires_grad)
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None and p in copies
    ]
    try:
        for owner, name, p in places:
            owner._parameters[name] = copies[p]  # type: ignore[assignment]
        yield copies
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p
    grads = {p: copy.grad for p, copy in copies.items() if copy.grad is not None}
    if not grads:
        return
    if into is not None:
        torch._foreach_copy_([into[p] for p in grads], list(grads.values()))
        return
    wide = _cast(list(grads.values()), [p.dtype for p in grads])
    for p, grad in zip(grads, wide, strict=True):
        p.grad = grad if p.grad is None else p.grad.add_(grad)


def _cast(tensors: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    out = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(out, tensors)
    return out
