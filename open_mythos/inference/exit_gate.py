"""A gate that learns, after the model, what further loops would gain each token; and the rule that asks it.

    gain(t) = max over k ≥ 1 of (KL(p_T ‖ p_t) − KL(p_T ‖ p_{t+k})) / k        nats for each further loop

p_t is the coda's prediction after loop t, T the full depth. A token leaves when its expected gain is not worth the
price of a loop. The model is not touched: the gate reads states and gives nothing back.

Shape letters: D model width, T loops, N tokens; B' and S' count the tokens still running.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.inference.checks import check_positive, check_whole
from open_mythos.inference.exit_rules import Rule, Seen
from open_mythos.model import OpenMythos
from open_mythos.model.transformer import evaluating

__all__ = ["Gate", "Learned", "fit"]

_LEAST = 1e-4  # nats: what is less cannot be told from rounding, and its logarithm would rule the fit


class Gate(nn.Module):
    """Expected gain of a further loop: a small network on the state's direction, how far it moved, and the loop.

    Args:
        dim: D.
        depth: T it was fitted for; later loops count as the last.
        hidden: width.
    """

    def __init__(self, dim: int, depth: int, hidden: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(dim + 1, hidden)
        self.loop = nn.Embedding(depth, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.loop.weight)

    def forward(self, state: Tensor, before: Tensor, loop: int) -> Tensor:
        """States after and before a loop (…, D), and its number from 1 → nats for each further loop, (…)."""
        dtype = self.out.weight.dtype
        state, before = state.to(dtype), before.to(dtype)
        size = state.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        moved = ((state - before).norm(dim=-1, keepdim=True) / size).clamp(min=1e-6).log()
        x = torch.cat((state * (state.shape[-1] ** 0.5 / size), moved), -1)
        at = self.loop.weight[min(loop, self.loop.num_embeddings) - 1]
        with torch.autocast(x.device.type, enabled=False):
            return self.out(F.silu(self.inner(x) + at)).squeeze(-1).exp()


@dataclass(frozen=True)
class Learned(Rule):
    """When the gate expects less gain from further loops than they cost.

    Args:
        gate: fitted on this model.
        price: of a loop, in nats, above 0.
    """

    gate: Gate = field(repr=False)
    price: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gate, Gate):
            raise ValueError(
                f"gate = {self.gate!r} is not allowed: it must be a Gate, such as fit(model, ...) gives"
            )
        check_positive("price", self.price)

    def check(self, model: OpenMythos) -> None:
        """Also refuse a gate of another width."""
        super().check(model)
        width = self.gate.inner.in_features - 1
        if width != model.cfg.dim:
            raise ValueError(f"gate was fitted for dim = {width}, but this model has dim = {model.cfg.dim}")

    def leaves(self, seen: Seen) -> Tensor:
        """Those for whom a further loop is not worth its price."""
        return self.gate(seen.state, seen.before, seen.loop) <= self.price


def fit(
    model: OpenMythos,
    batches: Iterable[Mapping[str, Tensor]],
    depth: int,
    *,
    hidden: int = 64,
    steps: int = 2000,
    lr: float = 3e-3,
    seed: int = 0,
) -> Gate:
    """Fit a gate on the model's own predictions; the next tokens of the text are not read.

    The loss μ ↦ gain/μ + ln μ has its minimum at the expected gain, and weighs errors as shares of it.

    Args:
        model: the model; its mode is given back.
        batches: ``ids`` (B, S) and, if they are there, ``document_ids`` (B, S); where the model is. Text that
            the model was trained on will do.
        depth: T, at least 2.
        hidden: width of the gate.
        steps: of AdamW, on up to 4,096 states each.
        lr: of the first step; it falls to zero.
        seed: of the first weights and the draws.

    Raises:
        ValueError: depth is below 2, or there is no batch.
    """
    check_whole("depth", depth, 2)
    with evaluating(model):
        parts = [_trajectory(model, batch, depth) for batch in batches]
    if not parts:
        raise ValueError("batches is empty: a gate needs some text to be fitted on")
    states, gains = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    gate = _fresh(model.cfg.dim, depth, hidden, float(gains.mean()), seed).to(states.device)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(gate.parameters(), lr, weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        t = int(torch.randint(depth - 1, (), generator=draws))
        rows = torch.randint(states.shape[1], (min(4096, states.shape[1]),), generator=draws).to(
            states.device
        )
        expected = gate(states[t + 1, rows], states[t, rows], t + 1)
        loss = (gains[t, rows] / expected + expected.log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gate.requires_grad_(False).eval()


def _fresh(dim: int, depth: int, hidden: int, mean: float, seed: int) -> Gate:
    """First weights from a generator of their own; at first every gain is expected to be the mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(dim, depth, hidden)
    nn.init.zeros_(gate.out.weight)
    nn.init.constant_(gate.out.bias, math.log(mean))
    return gate


@torch.no_grad()
def _trajectory(model: OpenMythos, batch: Mapping[str, Tensor], depth: int) -> tuple[Tensor, Tensor]:
    """States before the first loop and after each, (T + 1, N, D), and the gains after loops 1 … T − 1, (T − 1, N)."""
    ids, documents = batch["ids"], batch.get("document_ids")
    ctx = model.context(ids, None, documents)
    e = model.prelude(ids, ctx)
    states = [model.initial_state(e)]
    for t in range(depth):
        states.append(model.step(states[-1], e, t, ctx))

    def predict(state: Tensor) -> Tensor:
        logits = model.coda(state, ctx)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).flatten(0, 1)

    last = predict(states[-1])
    sure = last.exp()
    left = [(sure * (last - predict(state))).sum(-1) for state in states[1:-1]]
    return torch.stack(states).flatten(1, 2), _gains(torch.stack([*left, torch.zeros_like(left[0])]))


def _gains(left: Tensor) -> Tensor:
    """Divergences from the last prediction after each loop (T, N) → the best gain per further loop, (T − 1, N)."""
    best = [
        torch.stack([(left[t] - left[k]) / (k - t) for k in range(t + 1, len(left))]).amax(0)
        for t in range(len(left) - 1)
    ]
    return torch.stack(best).clamp(min=_LEAST)
