"""AdamW with decay where decay belongs, the learning rate of each step, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.model import OpenMythos
from open_mythos.training.config import OptimConfig

__all__ = ["Schedule", "adamw", "clip_gradients", "parameter_groups", "set_lr"]


def parameter_groups(model: OpenMythos, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and everything else, which does not.

    Not decayed: vectors, which are norms, biases and the injection's A, Δ and B (arXiv 2604.12946 trains them
    so; decay would pull the spectral radius towards exp(-1)), the embedding and with it a tied head, and the
    per-loop LoRA scale, which starts at one and not at zero.

    Args:
        model: the model.
        weight_decay: of the first group.

    Returns:
        Groups for a torch optimiser; each parameter is in exactly one.
    """
    # nn.Embedding is the token table (and a head tied to it) and the per-loop LoRA scale.
    tables = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        (plain if parameter.dim() < 2 or id(parameter) in tables else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(model: OpenMythos, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over :func:`parameter_groups`, as one fused pass over the parameters."""
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step: a linear warmup, then what ``cfg.schedule`` names; without state.

    Attributes:
        cfg: lr, schedule, warmup, decay, floor.
        steps: T, all steps of the run.
    """

    cfg: OptimConfig
    steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of step 0 … T − 1.

        Warmup reaches lr at its last step. "cosine" reaches the floor at the last step; "wsd" (arXiv
        2404.06395) holds lr and falls linearly to the floor over the last ``decay · T`` steps.
        """
        cfg = self.cfg
        if step < cfg.warmup:
            return cfg.lr * (step + 1) / cfg.warmup
        if cfg.schedule == "cosine":
            share = (step + 1 - cfg.warmup) / max(1, self.steps - cfg.warmup)
            factor = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        elif cfg.schedule == "wsd":
            length = max(1, round(cfg.decay * self.steps))
            factor = 1.0 if cfg.decay == 0 else min(1.0, max(0, self.steps - 1 - step) / length)
        else:
            factor = 1.0
        return cfg.lr * (cfg.floor + (1 - cfg.floor) * factor)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate in every group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients so that their global L2 norm is at most ``limit`` (0: leave them).

    Returns:
        The norm before; not finite when some gradient is not.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
    return float(norm)
