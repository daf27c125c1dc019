"""AdamW and Muon with decay where decay belongs, the learning rate of each step, and clipping.

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from open_mythos.model import OpenMythos
from open_mythos.training.config import OptimConfig

__all__ = [
    "MuonAdamW",
    "Schedule",
    "balance_pace",
    "build_optimizer",
    "clip_gradients",
    "orthogonalized",
    "parameter_groups",
    "router_pace",
    "set_lr",
    "skip_when",
]


def parameter_groups(model: OpenMythos, weight_decay: float, muon: bool = False) -> list[dict[str, Any]]:
    """Matrices, which decay, and everything else, which does not; with ``muon`` first the matrices of Muon.

    Not decayed: vectors, which are norms, biases and the injection's A, Δ and B (arXiv 2604.12946 trains them
    so; decay would pull the spectral radius towards exp(-1)), the embedding and with it a tied head, and the
    per-loop LoRA scale, which starts at one and not at zero.

    Muon's are the matrices of the blocks, stacked experts among them. AdamW keeps embedding, head, routers and
    the per-loop LoRA: a row of theirs belongs to one token, expert or rank, and is no map between features.

    Args:
        model: the model; parameters that carry no gradient are left out.
        weight_decay: of all groups but the last.
        muon: make a first group, with ``muon`` set, for :class:`MuonAdamW`.

    Returns:
        Groups for a torch optimiser; each parameter is in exactly one.
    """
    # nn.Embedding is the token table (and a head tied to it) and the per-loop LoRA scale.
    tables = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    hidden = {id(p) for p in _block_matrices(model)} if muon else set()
    turned: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        light = parameter.dim() < 2 or id(parameter) in tables
        (turned if id(parameter) in hidden else plain if light else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if muon:
        groups.insert(0, {"params": turned, "weight_decay": weight_decay, "muon": True})
    return groups


def _block_matrices(model: OpenMythos) -> Iterable[nn.Parameter]:
    for block in (*model.prelude_layers, model.recurrent.block, *model.coda_layers):
        for name, parameter in block.named_parameters():
            if parameter.dim() >= 2 and not name.endswith("router.weight"):
                yield parameter


def build_optimizer(model: OpenMythos, cfg: OptimConfig) -> torch.optim.AdamW:
    """The optimiser that ``cfg.kind`` names, over :func:`parameter_groups`.

    "adamw" is torch's (arXiv 1711.05101), as one fused pass over the parameters. "muon" is
    :class:`MuonAdamW`, whose first group follows ``cfg.muon_lr``.
    """
    settings: dict[str, Any] = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "fused": True}
    groups = parameter_groups(model, cfg.weight_decay, muon=cfg.kind == "muon")
    if cfg.injection_scale != 1:
        _set_injection_apart(model, groups, cfg.injection_scale)
    if cfg.kind == "adamw":
        return torch.optim.AdamW(groups, **settings)
    groups[0] |= {"lr": cfg.muon_lr, "lr_scale": cfg.muon_lr / cfg.lr, "momentum": cfg.muon_momentum}
    return MuonAdamW(groups, **settings)


def _set_injection_apart(model: OpenMythos, groups: list[dict[str, Any]], scale: float) -> None:
    """A last group for A, Δ and B, taken from the one that does not decay."""
    own = {id(p) for p in model.recurrent.injection.parameters()}
    plain = groups[-1]["params"]
    if apart := [p for p in plain if id(p) in own]:
        groups[-1]["params"] = [p for p in plain if id(p) not in own]
        groups.append({"params": apart, "weight_decay": 0.0, "lr_scale": scale})


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the groups that have ``muon`` set, as one optimiser with one state dict.

    Muon is ``torch.optim.Muon`` with Nesterov momentum and its "original" scale (Jordan 2024,
    kellerjordan.github.io/posts/muon), but for three things. Stacked experts (E, D, F) are E matrices, turned
    in one batched product, where torch's takes 2-D parameters only. A sharded matrix is gathered first;
    experts that are sharded whole are turned where they are. And ``found_inf`` is heeded, as fused AdamW does.

    The state of a parameter of Muon is ``momentum_buffer``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    self._turn(parameter, parameter.grad, group)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As AdamW's, which would look for its own step count in the state of every parameter."""
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": [group for group in groups if not group.get("muon")]})
        self.param_groups = groups

    def _turn(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        momentum = buffer.lerp(gradient, 1 - group["momentum"])
        update = orthogonalized(gradient.lerp(momentum, group["momentum"]))
        stacked = parameter.dim() == 3  # (in, out), where a linear layer's weight is (out, in)
        rows, columns = parameter.shape[-2:] if not stacked else parameter.shape[:-3:-1]
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        moved = (parameter * (1 - group["lr"] * group["weight_decay"])).sub_(
            update.to(parameter.dtype), alpha=rate
        )
        skip = getattr(self, "found_inf", None)
        for old, new in ((buffer, momentum), (parameter, moved)):
            old.copy_(new if skip is None else torch.where(skip.bool(), old, new))


# Quintic Newton-Schulz coefficients, as in torch.optim.Muon: steep at zero, singular values end in 0.7 … 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ, by Newton-Schulz iterations in bfloat16.

    Args:
        matrices: (rows, columns) or (E, rows, columns), sharded or not.
        steps: iterations.

    Returns:
        The same shape and sharding, bfloat16.
    """
    if isinstance(matrices, DTensor):
        whole = [
            place if matrices.dim() == 3 and place == Shard(0) else Replicate()
            for place in matrices.placements
        ]
        local = orthogonalized(matrices.redistribute(placements=whole).to_local(), steps)
        turned = DTensor.from_local(
            local, matrices.device_mesh, whole, shape=matrices.shape, stride=matrices.stride()
        )
        return turned.redistribute(placements=matrices.placements)
    x = matrices.bfloat16()
    x = x.unsqueeze(0) if matrices.dim() == 2 else x
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def skip_when(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Leave the next update out if ``bad``, a scalar on the device; the host does not wait to know.

    Neither parameters nor moments nor step counts change then.
    """
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # what fused AdamW reads


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


def router_pace(step: int, steps: int) -> float:
    """What the router bias's rate is multiplied by at step 0 … T − 1: 1, falling linearly over the last tenth to 1/20.

    At its full rate the bias keeps up with a router that learns, and never comes to rest: experts that many alike
    tokens choose are taken by all of them or by none. At the end the router hardly moves, and neither must the bias.
    """
    return max(0.05, min(1.0, 10 * (steps - step) / steps))


def balance_pace(batch: int, batches: int) -> float:
    """The same at batch 0 … N − 1 that the bias is fitted to alone: from 1 to 1/30, each time by the same factor."""
    return 30.0 ** (-batch / max(1, batches - 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from the next step on; a group with an ``lr_scale`` takes so many times it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(parameters: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale all gradients so that their global L2 norm is at most ``limit``; 0 leaves them.

    Args:
        parameters: whose gradients; sharded or not.
        limit: the largest norm.
        norm: the norm that they have together, over all shards; a scalar on the device.
    """
    if limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
