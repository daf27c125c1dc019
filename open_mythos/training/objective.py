"""What training descends: the loss over the loops that a plan asks for.

    e = prelude(ids),  h = step(... step(initial_state(e)))      the first n_free loops without gradient
    loss = Σ −log softmax(head(features(h)))[target] / targets

Shape letters: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from open_mythos.model import OpenMythos
from open_mythos.model.attention import SequenceContext
from open_mythos.tasks.base import IGNORE_INDEX
from open_mythos.training.cross_entropy import Rows, linear_cross_entropy
from open_mythos.training.loops import (
    Fixed,
    LogNormalPoisson,
    LoopDistribution,
    LoopPlan,
    Progressive,
    Uniform,
    loop_distribution,
)

__all__ = [
    "Fixed",
    "LogNormalPoisson",
    "LoopDistribution",
    "LoopPlan",
    "Objective",
    "Progressive",
    "Uniform",
    "logits",
    "loop_distribution",
    "loss",
]


class Objective(nn.Module):
    """The mean cross entropy of a model under a plan, as one module: what is compiled, sharded and descended.

    Prelude and coda carry gradients, the looped block through the plan's last ``n_grad`` loops only, and so
    does the injected input. In training mode the router's balancing bias is updated first, as
    :meth:`OpenMythos.forward` does.

    Args:
        model: the model.
    """

    def __init__(self, model: OpenMythos) -> None:
        super().__init__()
        self.model = model
        self.rows: Rows | None = None  # a compiled softmax_gradient, set by training/acceleration.py

    def forward(
        self, batch: Mapping[str, Tensor], plan: LoopPlan, targets: float | Tensor | None = None
    ) -> Tensor:
        """Cross entropy in nats, summed over the targets that are not -100, over a number of targets.

        Args:
            batch: ``ids`` (B, S), ``targets`` (B, S): ids, or -100 where nothing is scored; and, for packed
                documents, ``document_ids`` (B, S).
            plan: loops without and with gradient.
            targets: what to divide by; the batch's own count when None. Ranks whose gradients are averaged
                divide by the global count over the number of ranks.

        Returns:
            A scalar, float32 or wider.
        """
        ctx, e, h = self.begin(batch)
        indices = list(plan.indices(e.device).unbind())
        h = self.settle(ctx, e, h, indices[: plan.n_free])
        return self.finish(batch, ctx, e, h, indices[plan.n_free :], targets)

    def logits(self, batch: Mapping[str, Tensor], plan: LoopPlan) -> Tensor:
        """What the loss scores, written out: (B, S, V)."""
        ctx, e, h = self.begin(batch)
        indices = list(plan.indices(e.device).unbind())
        h = self.settle(ctx, e, h, indices[: plan.n_free])
        return self.model.coda(self._think(ctx, e, h, indices[plan.n_free :]), ctx)

    # The parts of a forward, in their order.

    def begin(
        self, batch: Mapping[str, Tensor], state: Tensor | None = None
    ) -> tuple[SequenceContext, Tensor, Tensor]:
        """Context, injected input (B, S, D) and the state to go on from (B, S, D).

        Given a ``state``, to which loops have led already, nothing is drawn and the router's bias stays.
        """
        model = self.model
        ctx = model.context(batch["ids"], document_ids=batch.get("document_ids"))
        if state is None and model.training and torch.is_grad_enabled():
            model.update_router_bias()
        e = model.prelude(batch["ids"], ctx)
        return ctx, e, model.initial_state(e) if state is None else state

    @torch.no_grad()
    def settle(self, ctx: SequenceContext, e: Tensor, h: Tensor, indices: Sequence[Tensor]) -> Tensor:
        """The loops without gradient, (B, S, D) → (B, S, D)."""
        for t in indices:
            h = self.model.step(h, e, t, ctx)
        return h

    def finish(
        self,
        batch: Mapping[str, Tensor],
        ctx: SequenceContext,
        e: Tensor,
        h: Tensor,
        indices: Sequence[Tensor],
        targets: float | Tensor | None,
    ) -> Tensor:
        """The loops with gradient, and the loss."""
        model = self.model
        x = model.features(self._think(ctx, e, h, indices), ctx).flatten(0, 1)
        wanted = batch["targets"].flatten()
        if targets is None:
            targets = (wanted != IGNORE_INDEX).sum()
        divisor = torch.as_tensor(targets, device=x.device)
        return linear_cross_entropy(x, model.head.weight, wanted, divisor, IGNORE_INDEX, self.rows)

    def _think(self, ctx: SequenceContext, e: Tensor, h: Tensor, indices: Sequence[Tensor]) -> Tensor:
        if self.model.cfg.initial_state == "prelude" and indices[0].dim():
            # The state of a sequence that has not begun is e, which carries a gradient.
            h = torch.where((indices[0] <= 0).view(-1, 1, 1), e, h)
        if torch.is_grad_enabled() and not h.requires_grad:
            # So that to a compiler the first of these loops is like the others.
            h = h.detach().requires_grad_()
        return self.model.think(h, e, ctx, indices)


def logits(model: OpenMythos, batch: Mapping[str, Tensor], plan: LoopPlan) -> Tensor:
    """Logits of the plan's last loop, (B, S, V); see :class:`Objective`."""
    return Objective(model).logits(batch, plan)


def loss(model: OpenMythos, batch: Mapping[str, Tensor], plan: LoopPlan) -> Tensor:
    """Mean cross entropy in nats over the targets that are not -100; see :class:`Objective`.

    Args:
        model: the model.
        batch: ``ids``, ``targets`` and perhaps ``document_ids``, each (B, S).
        plan: loops without and with gradient.

    Returns:
        A scalar, float32 or wider.
    """
    return Objective(model)(batch, plan)
