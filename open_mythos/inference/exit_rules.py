"""Exit rules: objects asked after each loop which tokens leave it. They are settings; what they remember of a call
is kept for them in :class:`Seen`.

Shape letters: D model width, V vocabulary; B' and S' count the tokens still running.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from open_mythos.inference.checks import check_positive, check_whole
from open_mythos.inference.exit_cache import Group
from open_mythos.model import OpenMythos

__all__ = [
    "ACT",
    "Confidence",
    "Fixed",
    "Never",
    "Predicting",
    "PredictionChange",
    "Rule",
    "SamePrediction",
    "Seen",
    "StateChange",
]

Reads = Literal["coda", "head"]


@dataclass
class Seen:
    """What a rule may ask after a loop, about the tokens that still run, (B', S').

    Attributes:
        loop: loops done, from 1.
        state: (B', S', D) after this loop.
        before: (B', S', D) before it.
    """

    loop: int
    state: Tensor
    before: Tensor
    _group: Group
    _model: OpenMythos
    _predict: Callable[[], Tensor]
    _memory: dict[str, Tensor]

    def nobody(self) -> Tensor:
        """(B', S') bool, all False."""
        return torch.zeros(self.state.shape[:2], dtype=torch.bool, device=self.state.device)

    def halting(self) -> Tensor:
        """The halting head's probability of stopping after this loop, (B', S')."""
        return _wide(self._model.recurrent.act(self.state))

    def prediction(self, reads: Reads = "coda") -> Tensor:
        """Log-probabilities of the next token if the loop ended here, (B', S', V), float32 or wider.

        Args:
            reads: the whole coda, where a token sees the earlier ones as they were after this same loop or
                as they left; or only its last norm and head, which skips the coda's layers.
        """
        if reads == "head":
            logits: Tensor = self._model.head(self._model.norm(self.state))
        else:
            logits = self._predict()
        return _wide(logits).log_softmax(-1)

    def recall(self, name: str) -> Tensor | None:
        """What was kept of these tokens under this name, (B', S', …), or None."""
        kept = self._memory.get(name)
        return None if kept is None else self._group.take(kept)

    def keep(self, name: str, value: Tensor) -> None:
        """Remember (B', S', …) of these tokens for later loops of this call."""
        if name not in self._memory and not self._group.everyone:
            shape = (*self._group.running.shape, *value.shape[2:])
            self._memory[name] = value.new_zeros(shape)
        self._memory[name] = self._group.put(self._memory.get(name, value), value)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a token leaves the loop. Rules are settings only: what they remember is in :class:`Seen`.

    Args:
        min_loops: nobody leaves before.
        max_loops: everybody leaves then; None: the call's n_loops. Of the two the lower holds.
    """

    min_loops: int = 1
    max_loops: int | None = None

    def __post_init__(self) -> None:
        check_whole("min_loops", self.min_loops, 1)
        if self.max_loops is not None:
            check_whole("max_loops", self.max_loops, 1)
            if self.max_loops < self.min_loops:
                raise ValueError(
                    f"max_loops = {self.max_loops!r} is not allowed: it must be at least min_loops ({self.min_loops})"
                )

    def check(self, model: OpenMythos) -> None:
        """Refuse a model that lacks what the rule asks for.

        Raises:
            ValueError: naming what is missing.
        """
        if model.cfg.halting not in ("select", "off"):
            raise ValueError(
                f"halting = {model.cfg.halting!r} is not allowed with an exit rule: its coda was trained on "
                "a mix of states; it must be 'select' or 'off'"
            )

    def limit(self, n_loops: int) -> int:
        """The most loops of a call that allows n_loops."""
        return n_loops if self.max_loops is None else min(n_loops, self.max_loops)

    def leaves(self, seen: Seen) -> Tensor:
        """Asked after each loop but the last: (B', S') bool, who leaves now."""
        raise NotImplementedError


@dataclass(frozen=True)
class Never(Rule):
    """All loops, and the last state."""

    def leaves(self, seen: Seen) -> Tensor:
        """Nobody."""
        return seen.nobody()


@dataclass(frozen=True)
class Fixed(Rule):
    """Every token after so many loops.

    Args:
        loops: how many, at least 1.
    """

    loops: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("loops", self.loops, 1)

    def limit(self, n_loops: int) -> int:
        """As many, or fewer where the call allows no more."""
        return min(super().limit(n_loops), self.loops)

    def leaves(self, seen: Seen) -> Tensor:
        """Nobody before."""
        return seen.nobody()


@dataclass(frozen=True)
class ACT(Rule):
    """When the halting head's cumulative probability 1 − Π(1 − p) reaches a threshold (arXiv 1603.08983).

    It counts from the first loop on, also before ``min_loops``.

    Args:
        threshold: above 0, below or at 1.
    """

    threshold: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("threshold", self.threshold, 1)

    def check(self, model: OpenMythos) -> None:
        """Also refuse a model whose halting head was never trained."""
        super().check(model)
        if model.cfg.halting == "off":
            raise ValueError(
                "ACT is not allowed with halting = 'off': this model's halting head never learned"
            )

    def leaves(self, seen: Seen) -> Tensor:
        """Those whose mass has reached the threshold."""
        p, kept = seen.halting(), seen.recall("survival")
        survival = 1 - p if kept is None else kept * (1 - p)
        seen.keep("survival", survival)
        return survival <= 1 - self.threshold


@dataclass(frozen=True)
class StateChange(Rule):
    """When the loop moved the state little: ‖h_t − h_{t−1}‖ ≤ tolerance · ‖h_t‖ (arXiv 2502.05171).

    Args:
        tolerance: above 0.
    """

    tolerance: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)

    def leaves(self, seen: Seen) -> Tensor:
        """Those that moved no more than the tolerance."""
        now = _wide(seen.state)
        return (now - _wide(seen.before)).norm(dim=-1) <= self.tolerance * now.norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Predicting(Rule):
    """A rule that decodes the state to decide, which costs a coda and a head each time.

    Args:
        reads: ``"coda"``, or ``"head"`` for the last norm and head alone.
        every: ask in every so many loops only.
    """

    reads: Reads = "coda"
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("every", self.every, 1)
        if self.reads not in ("coda", "head"):
            raise ValueError(f"reads = {self.reads!r} is not allowed: it must be 'coda' or 'head'")

    @property
    def ahead(self) -> int:
        """Askings that an answer compares with, so that they come before min_loops."""
        return 0

    def asks(self, loop: int) -> bool:
        """Whether the state is decoded after this loop."""
        return loop % self.every == 0 and loop >= self.min_loops - self.ahead * self.every


@dataclass(frozen=True)
class PredictionChange(Predicting):
    """When the prediction hardly changed since it was last asked for: KL(last ‖ this) ≤ tolerance.

    Args:
        tolerance: nats, above 0.
    """

    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)

    @property
    def ahead(self) -> int:
        """One."""
        return 1

    def leaves(self, seen: Seen) -> Tensor:
        """Those whose divergence is within the tolerance."""
        if not self.asks(seen.loop):
            return seen.nobody()
        now, last = seen.prediction(self.reads), seen.recall("prediction")
        seen.keep("prediction", now)
        if last is None:
            return seen.nobody()
        return (last.exp() * (last - now)).sum(-1) <= self.tolerance


@dataclass(frozen=True)
class SamePrediction(Predicting):
    """When the likeliest token has stayed the same so many askings in a row: one number a token to remember.

    Args:
        patience: askings without a change, at least 1.
    """

    patience: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("patience", self.patience, 1)

    @property
    def ahead(self) -> int:
        """As many as the patience."""
        return self.patience

    def leaves(self, seen: Seen) -> Tensor:
        """Those whose likeliest token has lasted."""
        if not self.asks(seen.loop):
            return seen.nobody()
        now, last, lasted = (
            seen.prediction(self.reads).argmax(-1),
            seen.recall("token"),
            seen.recall("lasted"),
        )
        seen.keep("token", now)
        if last is None or lasted is None:
            seen.keep("lasted", torch.zeros_like(now))
            return seen.nobody()
        lasted = torch.where(now == last, lasted + 1, 0)
        seen.keep("lasted", lasted)
        return lasted >= self.patience


@dataclass(frozen=True)
class Confidence(Predicting):
    """When the prediction is sure.

    Args:
        threshold: for ``"top"`` the least probability of the likeliest token, for ``"margin"`` the least
            distance to that of the second (both above 0, at most 1), for ``"entropy"`` the most nats.
        measure: which of the three.
    """

    threshold: float = 0.9
    measure: Literal["top", "margin", "entropy"] = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in ("top", "margin", "entropy"):
            raise ValueError(
                f"measure = {self.measure!r} is not allowed: it must be 'top', 'margin' or 'entropy'"
            )
        check_positive("threshold", self.threshold, math.inf if self.measure == "entropy" else 1)

    def leaves(self, seen: Seen) -> Tensor:
        """Those that are sure enough."""
        if not self.asks(seen.loop):
            return seen.nobody()
        logs = seen.prediction(self.reads)
        if self.measure == "entropy":
            return -(logs.exp() * logs).sum(-1) <= self.threshold
        if self.measure == "top":
            return logs.amax(-1) >= math.log(self.threshold)
        first, second = logs.topk(min(2, logs.shape[-1])).values.exp().unbind(-1)
        return first - second >= self.threshold


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
