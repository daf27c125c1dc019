"""What went first when a run diverges: measures, each with its usual range, and an ordered account of those
that left it.

Standard library only: numbers come in, sentences go out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from open_mythos.training.logconfig import LogConfig

__all__ = ["Diagnosis"]

# A normal distribution's standard deviation over its median absolute deviation.
_SIGMA = 1.4826
_SPREAD = 6.0
_MOST_NAMED = 8


@dataclass(frozen=True)
class _Rule:
    """When a value is out of its range.

    Attributes:
        rise: above the median by so much (and by six robust deviations).
        factor: above so many times the median (and by six robust deviations).
        both: below the median by that factor as well.
        above: above this, whatever it was before.
        below: below this, whatever it was before.
        enough: values that make a range.
    """

    rise: float | None = None
    factor: float | None = None
    both: bool = False
    above: float | None = None
    below: float | None = None
    enough: int = 20

    def breached(self, value: float, usual: deque[float]) -> bool:
        """Whether ``value`` is out of range after these usual ones; what is not finite always is."""
        if not math.isfinite(value):
            return True
        if (self.above is not None and value > self.above) or (self.below is not None and value < self.below):
            return True
        if len(usual) < self.enough:
            return False
        middle = median(usual)
        spread = _SPREAD * _SIGMA * median(abs(x - middle) for x in usual)
        if self.rise is not None:
            return value > middle + max(self.rise, spread)
        if self.factor is None or abs(value - middle) <= spread:
            return False
        return value > middle * self.factor or (self.both and value < middle / self.factor)


@dataclass
class _Measure:
    """One measure's usual values, and when it was out of range.

    Attributes:
        usual: the last values that were in range.
        first: step of the first value of the present episode out of range.
        last: step of its last one.
        value: the value at ``first``.
        middle: the median at that time.
        row: values out of range in a row, up to now.
        sound: some value was in range.
    """

    usual: deque[float]
    first: int | None = None
    last: int = 0
    value: float = 0.0
    middle: float | None = None
    row: int = 0
    sound: bool = False


@dataclass
class Diagnosis:
    """Keeps watch over the measures of a run. Feed it in the order of steps; ask it after each.

    A value's range comes from the values of the last ``window`` steps that were themselves in range, by
    median and median absolute deviation, so that a spike does not widen it. A measure that stays outside for
    longer than ``window`` + ``patience`` steps gets a new range. Measures are known by name: ``loss``,
    ``gradient norm`` (and ``gradient norm of the core`` ...), ``state norm at loop 8``, ``token correlation at
    loop 8``, ``ρ(A)``, ``expert balance``, ``halting depth``.

    Only the loss stops a run: the others can change for good reasons, so they are witnesses. It is out of its
    range as well, whatever it was before, above 1.5 ``guess`` + ``loss_rise``: a run can diverge before it has
    a usual range.

    Args:
        limits: the [log] section.
        guess: loss of guessing all tokens alike, ln V nats; None when it is not known.
    """

    limits: LogConfig
    guess: float | None = None
    measures: dict[str, _Measure] = field(default_factory=dict, init=False)
    step: int = field(default=0, init=False)

    def observe(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take the measures of a step; returns the names of those that are out of range in it."""
        self.step = step
        return [name for name, value in values.items() if self._take(step, name, float(value))]

    def _take(self, step: int, name: str, value: float) -> bool:
        seen = self.measures.get(name)
        if seen is None:
            seen = self.measures[name] = _Measure(deque(maxlen=self.limits.window))
        if not self._rule(name).breached(value, seen.usual):
            seen.usual.append(value)
            seen.row, seen.sound = 0, True
            return False
        if seen.first is None or step - seen.last > self.limits.window:
            seen.first, seen.value = step, value
            seen.middle = median(seen.usual) if seen.usual else None
        elif step - seen.first > self.limits.window + self.limits.patience and math.isfinite(value):
            seen.usual.clear()
        seen.last = step
        seen.row += 1
        return True

    def _rule(self, name: str) -> _Rule:
        limits = self.limits
        if name == "loss":
            most = None if self.guess is None else 1.5 * self.guess + limits.loss_rise
            return _Rule(rise=limits.loss_rise, above=most)
        if name.startswith("gradient norm"):
            return _Rule(factor=limits.grad_factor)
        if name.startswith("state norm"):
            return _Rule(factor=limits.state_factor, both=True, enough=5)
        if name.startswith("token correlation"):
            return _Rule(above=limits.correlation)
        fixed = {
            "ρ(A)": _Rule(above=limits.rho),
            "expert balance": _Rule(below=limits.balance),
            "halting depth": _Rule(below=limits.halting),
        }
        return fixed.get(name, _Rule())

    def verdict(self) -> str | None:
        """Why the run should stop: the loss was out of its range ``patience`` steps in a row; None: go on."""
        loss = self.measures.get("loss")
        if loss is None or not self.limits.patience or loss.row < self.limits.patience:
            return None
        return f"the loss has been out of its range for {loss.row} steps in a row: {self.account()}"

    def account(self) -> str:
        """What left its range of late, in the order in which it did; "" when nothing has.

        Example: ``state norm at loop 8 left its range at step 410 (1.2e+04, median 31), then gradient norm at
        step 415 (87, median 0.8), loss at step 423 (nan)``.
        """
        gone = [
            (seen.first, name, seen)
            for name, seen in self.measures.items()
            if seen.first is not None and self.step - seen.last <= self.limits.window
        ]
        gone.sort(key=lambda entry: entry[0])  # measures of one step stay in the order they are taken in
        moved = [entry for entry in gone if entry[2].sound]
        always = [name for _, name, seen in gone if not seen.sound]
        parts: list[str] = []
        for at, name, seen in moved[:_MOST_NAMED]:
            usual = "" if seen.middle is None else f", median {seen.middle:.3g}"
            verb = "" if parts else "left its range "
            parts.append(f"{name} {verb}at step {at} ({seen.value:.3g}{usual})")
        text = parts[0] if parts else ""
        text += f", then {', '.join(parts[1:])}" if len(parts) > 1 else ""
        text += f" and {len(moved) - _MOST_NAMED} more" if len(moved) > _MOST_NAMED else ""
        if always:
            text += f"{'; ' if text else ''}out of range from the start: {', '.join(always[:_MOST_NAMED])}"
        return text
