"""How many loops a training step runs, and through how many of the last ones it sends gradients.

A count is drawn for the whole batch, or one for each sequence. Sequences of one batch end together: one with
fewer loops starts later, and until then keeps its initial state.

Shape letters: B batch, T loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.config import ConfigError
from open_mythos.training.checks import number, whole

__all__ = [
    "Fixed",
    "LogNormalPoisson",
    "LoopDistribution",
    "LoopPlan",
    "Progressive",
    "Uniform",
    "loop_distribution",
]


@dataclass(frozen=True)
class LoopPlan:
    """Loops of one forward pass.

    Attributes:
        n_free: loops that run first, without gradient.
        n_grad: loops that follow and are backpropagated through.
        starts: for each sequence the loop at which it begins, 0 … total − 1; None: all begin at loop 0.
    """

    n_free: int
    n_grad: int
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        whole("n_free", self.n_free, 0)
        whole("n_grad", self.n_grad, 1)
        for start in self.starts or ():
            whole("starts", start, 0)
            if start >= self.total:
                raise ConfigError(
                    f"starts = {start!r} is not allowed: it must be below {self.total}, the total"
                )

    @property
    def total(self) -> int:
        """Loops that run: those of the sequence with most."""
        return self.n_free + self.n_grad

    @property
    def mean(self) -> float:
        """Loops of a sequence, on average."""
        return self.total - sum(self.starts) / len(self.starts) if self.starts else float(self.total)

    def rows(self, rank: int, size: int) -> LoopPlan:
        """The plan of rank's share when the batch is cut into ``size`` equal runs of rows.

        Every rank runs the same loops, also those in which none of its own sequences has begun.
        """
        if self.starts is None:
            return self
        share = len(self.starts) // size
        return replace(self, starts=self.starts[rank * share : (rank + 1) * share])

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """What each loop is told of its index, long: (T,), or (T, B), below zero before a sequence begins."""
        loops = torch.arange(self.total, device=device)
        if self.starts is None:
            return loops
        return loops.unsqueeze(1) - torch.tensor(self.starts).to(device, non_blocking=True)


class LoopDistribution(Protocol):
    """Where each step's number of loops comes from."""

    def sample(self, generator: torch.Generator) -> LoopPlan:
        """Draw one plan; every rank that holds the same generator state draws the same."""

    def sample_each(self, generator: torch.Generator, batch: int) -> LoopPlan:
        """Draw one plan for ``batch`` sequences, each with a count of its own."""

    @property
    def mean(self) -> float:
        """Expected number of loops, with and without gradient."""


@dataclass(frozen=True)
class Fixed:
    """Always ``loops`` loops, the last ``backprop`` of them with gradient (all when None)."""

    loops: int
    backprop: int | None = None

    def __post_init__(self) -> None:
        whole("loops", self.loops, 1)
        if self.backprop is not None:
            whole("backprop", self.backprop, 1)

    @property
    def mean(self) -> float:
        """``loops``."""
        return float(self.loops)

    def sample(self, generator: torch.Generator) -> LoopPlan:
        """The one plan; draws nothing."""
        return _truncated(self.loops, self.backprop)

    def sample_each(self, generator: torch.Generator, batch: int) -> LoopPlan:
        """The same for every sequence."""
        return _together(torch.full((batch,), self.loops), self.backprop)


@dataclass(frozen=True)
class Uniform:
    """p ~ U{low … high} loops, the last ``backprop`` of them with gradient (all when None)."""

    low: int
    high: int
    backprop: int | None = None

    def __post_init__(self) -> None:
        whole("low", self.low, 1)
        whole("high", self.high, self.low)
        if self.backprop is not None:
            whole("backprop", self.backprop, 1)

    @property
    def mean(self) -> float:
        """Midway between low and high."""
        return (self.low + self.high) / 2

    def sample(self, generator: torch.Generator) -> LoopPlan:
        """Draw one plan."""
        return _truncated(_draw(self.low, self.high, generator), self.backprop)

    def sample_each(self, generator: torch.Generator, batch: int) -> LoopPlan:
        """Draw p for each sequence."""
        return _together(torch.randint(self.low, self.high + 1, (batch,), generator=generator), self.backprop)


@dataclass(frozen=True)
class LogNormalPoisson:
    """A heavy-tailed number of loops, backpropagated through the last few (arXiv 2502.05171, section 3.3):

        τ ~ LogNormal(ln r − σ²/2, σ),   p = Poisson(τ) + 1,   n_free = max(p − k, 0),   n_grad = min(p, k)

    Attributes:
        rate: r, the mean of τ.
        sigma: σ.
        backprop: k.
    """

    rate: float
    sigma: float = 0.5
    backprop: int = 8

    def __post_init__(self) -> None:
        number("rate", self.rate, 0, above=True)
        number("sigma", self.sigma, 0, above=True)
        whole("backprop", self.backprop, 1)

    @property
    def mean(self) -> float:
        """The rate plus one, because E[τ] = r."""
        return self.rate + 1.0

    def sample(self, generator: torch.Generator) -> LoopPlan:
        """Draw one plan."""
        return _truncated(int(self._draw((), generator)), self.backprop)

    def sample_each(self, generator: torch.Generator, batch: int) -> LoopPlan:
        """Draw τ and p for each sequence."""
        return _together(self._draw((batch,), generator), self.backprop)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        tau = torch.exp(math.log(self.rate) - self.sigma**2 / 2 + self.sigma * normal)
        return torch.poisson(tau, generator=generator).long() + 1


@dataclass(frozen=True)
class Progressive:
    """n_free ~ U{0 … free}, then n_grad ~ U{1 … grad}: go on from wherever n_free loops led
    (Bansal et al. 2022, arXiv 2202.05826, with the number of loops drawn at each step).

    Attributes:
        free: most loops without gradient.
        grad: most loops with gradient.
    """

    free: int
    grad: int

    def __post_init__(self) -> None:
        whole("free", self.free, 0)
        whole("grad", self.grad, 1)

    @property
    def mean(self) -> float:
        """Half of ``free`` plus half of ``grad + 1``."""
        return self.free / 2 + (1 + self.grad) / 2

    def sample(self, generator: torch.Generator) -> LoopPlan:
        """Draw one plan."""
        n_free = _draw(0, self.free, generator)
        return LoopPlan(n_free, _draw(1, self.grad, generator))

    def sample_each(self, generator: torch.Generator, batch: int) -> LoopPlan:
        """Draw n_free for each sequence, and one n_grad for all: they end together."""
        free = torch.randint(0, self.free + 1, (batch,), generator=generator)
        n_grad = _draw(1, self.grad, generator)
        return _together(free + n_grad, n_grad)


_KINDS: dict[str, type[Fixed] | type[Uniform] | type[LogNormalPoisson] | type[Progressive]] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "poisson": LogNormalPoisson,
    "progressive": Progressive,
}


def loop_distribution(kind: str, **fields: float) -> LoopDistribution:
    """The distribution of that name: "fixed", "uniform", "poisson" or "progressive".

    Raises:
        ConfigError: there is no such kind, or a field is out of range.
    """
    if kind not in _KINDS:
        raise ConfigError(f"kind = {kind!r} is not allowed: it must be {' or '.join(map(repr, _KINDS))}")
    return _KINDS[kind](**fields)  # type: ignore[arg-type]


def _truncated(total: int, backprop: int | None) -> LoopPlan:
    n_grad = total if backprop is None else min(total, backprop)
    return LoopPlan(total - n_grad, n_grad)


def _together(totals: Tensor, backprop: int | None) -> LoopPlan:
    """The plan of sequences with so many loops each, (B,)."""
    longest = int(totals.max())
    plan = _truncated(longest, backprop)
    return replace(plan, starts=tuple((longest - totals).tolist()))


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
