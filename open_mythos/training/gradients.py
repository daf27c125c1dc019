"""Loss and gradients of a batch, forward and backward in one call; on a GPU as CUDA graphs.

A step of a looped model is a thousand small kernels; started one by one from Python they cost more time than
they run. As a graph they start at once. What repeats is captured: one loop without gradient, for any number of
them, and the rest once for each number of loops with gradient.

Shape letters: B batch, S sequence, D model width, T loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.capture import capturing
from open_mythos.training.acceleration import lowered
from open_mythos.training.loops import LoopPlan
from open_mythos.training.objective import Objective

__all__ = ["Gradients"]

# Graphs kept at most: loop counts times batch shapes. Further ones run uncaptured.
_MOST = 64

Key = tuple[Any, ...]


@dataclass
class _Captured:
    """A graph and what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    loss: Tensor | None = None
    held: tuple[Any, ...] = ()


class Gradients:
    """Adds the gradient of a batch to ``.grad`` of every trained parameter, as a backward does.

    Captured, a parameter that the loss does not reach gets a gradient of zeros.

    Args:
        objective: what is descended.
        dtype: that of the matrices inside; see :func:`~open_mythos.training.acceleration.lowered`.
        capture: use CUDA graphs. A graph keeps the shapes it was captured with and the parameters' places:
            other shapes are captured anew, and moved parameters discard all graphs.
        sharded: the objective is sharded over processes. Then the collectives are part of the graphs, one for
            each plan; a plan that starts sequences at different loops runs uncaptured.
    """

    def __init__(
        self,
        objective: Objective,
        dtype: torch.dtype | None = None,
        capture: bool = False,
        sharded: bool = False,
    ) -> None:
        self.objective, self.dtype, self.capture, self.sharded = objective, dtype, capture, sharded
        self._graphs: dict[Key, _Captured] = {}
        self._inputs: dict[Key, dict[str, Tensor]] = {}
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._places: list[int] = []
        self._pool: Any = None

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        plan: LoopPlan,
        targets: float | Tensor | None = None,
        *,
        capture: bool = True,
    ) -> Tensor:
        """Forward and backward.

        Args:
            batch: as for :meth:`Objective.forward`, on the model's device.
            plan: loops without and with gradient.
            targets: what to divide the loss by; the batch's own count when None.
            capture: False runs this call uncaptured, so that hooks on the model are called.

        Returns:
            The loss, without gradient.
        """
        if targets is None:
            targets = (batch["targets"] != -100).sum()
        captured = capture and self._captures(batch)
        if not captured or (self.sharded and plan.starts is not None):
            with lowered(self.objective, self.dtype):
                loss = self.objective(batch, plan, targets)
                loss.backward()
            return loss.detach()
        replay = self._replay_whole if self.sharded else self._replay
        return replay(batch, plan, torch.as_tensor(targets, device=batch["ids"].device))

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor], plan: LoopPlan) -> Tensor:
        """The loss alone, uncaptured, with the matrices in the dtype of training."""
        with lowered(self.objective, self.dtype):
            return self.objective(batch, plan)

    def _captures(self, batch: Mapping[str, Tensor]) -> bool:
        return self.capture and batch["ids"].is_cuda

    def _replay(self, batch: Mapping[str, Tensor], plan: LoopPlan, targets: Tensor) -> Tensor:
        self._heed_moves()
        indices = plan.indices(batch["ids"].device)
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()))
        sort: Key = (shape, self.objective.training, tuple(indices.shape[1:]))
        key = (*sort, plan.n_grad, plan.n_free > 0)
        if key not in self._graphs and len(self._graphs) >= _MOST:
            return self(batch, plan, targets, capture=False)
        inputs = self._fill(sort, batch, targets)
        if plan.n_free:
            self._run((*sort, "begin"), inputs, self._begin)
            for t in indices[: plan.n_free]:
                inputs["t"].copy_(t)
                self._run((*sort, "settle"), inputs, self._settle)
        late = inputs.setdefault(f"late {plan.n_grad}", torch.empty_like(indices[plan.n_free :]))
        late.copy_(indices[plan.n_free :])
        for parameter, grad in self._grads.items():  # a sum over batches must not be written over
            if parameter.grad is grad:
                parameter.grad = grad.clone()
        captured = self._run(key, inputs, lambda i: self._descend(i, late, plan.n_free > 0))
        for parameter, grad in self._grads.items():
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return captured.loss.clone() if captured.loss is not None else torch.zeros(())

    def _replay_whole(self, batch: Mapping[str, Tensor], plan: LoopPlan, targets: Tensor) -> Tensor:
        """Everything from the batch to sharded gradients in one graph, its collectives between the kernels."""
        self._heed_moves()
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()))
        sort: Key = (shape, self.objective.training, ())
        key = (*sort, plan.n_free, plan.n_grad)
        if key not in self._graphs and len(self._graphs) >= _MOST:
            return self(batch, plan, targets, capture=False)
        inputs = self._fill(sort, batch, targets)
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        # Cloned, for what is there may be the graph's own of the batch before.
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        captured = self._run(key, inputs, lambda i: self._whole(i, plan, parameters))
        loss, grads = captured.held
        for p, old, grad in zip(parameters, before, grads, strict=True):
            p.grad = grad if old is None else old if grad is None else old.add_(grad)
        return loss.clone()

    def _whole(
        self, inputs: dict[str, Tensor], plan: LoopPlan, parameters: list[nn.Parameter]
    ) -> tuple[Any, ...]:
        batch = {name: inputs[name] for name in ("ids", "targets", "document_ids") if name in inputs}
        loss = self.objective(batch, plan, inputs["divisor"])
        loss.backward()
        grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return loss.detach(), grads

    def _heed_moves(self) -> None:
        places = [getattr(p, "_local_tensor", p).data_ptr() for p in self.objective.parameters()]
        if places != self._places:
            self._graphs.clear()
            self._inputs.clear()
            self._grads.clear()
            self._places = places

    def _fill(self, sort: Key, batch: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Put the batch where the graphs of its shape read."""
        inputs = self._inputs.get(sort)
        if inputs is None:
            ids = batch["ids"]
            model = self.objective.model
            dtype = model.embed.weight.dtype if self.dtype is None else self.dtype
            state = torch.zeros((*ids.shape, model.cfg.dim), dtype=dtype, device=ids.device)
            inputs = {name: torch.empty_like(value) for name, value in batch.items()}
            inputs |= {"h": state, "e": state.clone()}
            inputs["divisor"] = torch.empty_like(targets, dtype=torch.float64)  # counts and shares of counts
            inputs["t"] = torch.zeros(sort[-1], dtype=torch.int64, device=ids.device)
            self._inputs[sort] = inputs
        for name, value in batch.items():
            inputs[name].copy_(value, non_blocking=True)
        inputs["divisor"].copy_(targets)
        return inputs

    # What is captured. Each reads and writes the inputs in place, and returns what must stay alive.

    def _begin(self, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        if self.objective.model.training:
            self.objective.model.update_router_bias()
        with torch.no_grad(), lowered(self.objective, self.dtype):
            ctx, e, h = self.objective.begin(inputs)
        inputs["e"].copy_(e)
        inputs["h"].copy_(h)
        return (ctx,)

    def _settle(self, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        with torch.no_grad(), lowered(self.objective, self.dtype):
            ctx = self.objective.model.context(inputs["ids"], document_ids=inputs.get("document_ids"))
            h = self.objective.settle(ctx, inputs["e"], inputs["h"], [inputs["t"]])
        inputs["h"].copy_(h)
        return (ctx,)

    def _descend(self, inputs: dict[str, Tensor], late: Tensor, begun: bool) -> tuple[Any, ...]:
        objective = self.objective
        parameters = [p for p in objective.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
            if p not in self._grads:
                self._grads[p] = torch.zeros_like(p)
        with lowered(objective, self.dtype, into=self._grads) as copies:
            ctx, e, start = objective.begin(inputs, inputs["h"] if begun else None)
            loss = objective.finish(inputs, ctx, e, start, list(late.unbind()), inputs["divisor"])
            loss.backward()
        left = {p: p.grad for p in parameters if p.grad is not None}
        torch._foreach_copy_([self._grads[p] for p in left], list(left.values()))
        # What this loss does not reach may hold what another graph wrote, or what clipping made of a NaN.
        unreached = [self._grads[p] for p in parameters if copies.get(p, p).grad is None]
        if unreached:
            torch._foreach_zero_(unreached)
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad
        return loss.detach(), ctx

    # How it is captured.

    def _run(
        self, key: Key, inputs: dict[str, Tensor], work: Callable[[dict[str, Tensor]], tuple[Any, ...]]
    ) -> _Captured:
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._record(inputs, work)
        captured.graph.replay()
        return captured

    def _record(
        self, inputs: dict[str, Tensor], work: Callable[[dict[str, Tensor]], tuple[Any, ...]]
    ) -> _Captured:
        """Run once to compile, choose and allocate, put everything back, and capture."""
        device = inputs["ids"].device
        buffers = [*self.objective.buffers(), *inputs.values()]
        before, noise = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                work(inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        torch._foreach_copy_(buffers, before)
        torch.cuda.set_rng_state(noise, device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):  # NCCL's watchdog may ask the device something meanwhile
            held = work(inputs)
        return _Captured(graph, held[0] if isinstance(held[0], Tensor) else None, held)
