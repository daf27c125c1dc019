"""What training descends: the loss over the loops that a plan asks for.

Shape letters: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.model import OpenMythos
from open_mythos.tasks.base import IGNORE_INDEX
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
    "Progressive",
    "Uniform",
    "logits",
    "loop_distribution",
    "loss",
]


def logits(model: OpenMythos, batch: Mapping[str, Tensor], plan: LoopPlan) -> Tensor:
    """Run the model as the plan says, gradients through its last ``n_grad`` loops only.

    Prelude and coda carry gradients as well; the injected input does so through the last loops. In training
    mode the router's balancing bias is updated first, as :meth:`OpenMythos.forward` does.

    Args:
        model: the model.
        batch: ``ids`` (B, S) and, for packed documents, ``document_ids`` (B, S).
        plan: loops without and with gradient.

    Returns:
        (B, S, V).
    """
    ctx = model.context(batch["ids"], document_ids=batch.get("document_ids"))
    if model.training and torch.is_grad_enabled():
        model.update_router_bias()
    e = model.prelude(batch["ids"], ctx)
    h = model.initial_state(e)
    with torch.no_grad():
        for t in range(plan.n_free):
            h = model.step(h, e, t, ctx)
    h = model.think(h, e, ctx, range(plan.n_free, plan.total))
    return model.coda(h, ctx)


def loss(model: OpenMythos, batch: Mapping[str, Tensor], plan: LoopPlan) -> Tensor:
    """Mean cross entropy in nats over the targets that are not -100, at the plan's last loop.

    Args:
        model: the model.
        batch: as for :func:`logits`, and ``targets`` (B, S): ids, or -100 where nothing is scored.
        plan: loops without and with gradient.

    Returns:
        A scalar, float32 or wider.
    """
    scores = logits(model, batch, plan)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE_INDEX)
