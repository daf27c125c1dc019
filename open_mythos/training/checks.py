"""Checks that every section of a run config shares; each raises a ConfigError of one sentence."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from open_mythos.config import ConfigError

__all__ = ["choice", "error", "known", "number", "whole"]


def error(name: str, value: object, allowed: str) -> ConfigError:
    """The error that names field, value and what is allowed."""
    return ConfigError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def known(shown: str, name: str, allowed: Iterable[str], owner: str, what: str = "key") -> None:
    """Refuse a name that ``owner`` does not have, with the nearest one that it has."""
    names = list(allowed)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names)}"
        raise ConfigError(f"{shown} is not allowed: {owner} has no such {what}; {hint}")


def whole(name: str, value: object, low: int) -> None:
    """Refuse all but whole numbers of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise error(name, value, f"a whole number of at least {low}")


def choice(name: str, value: object, options: Iterable[object]) -> None:
    """Refuse all but these values; 1 is not True."""
    if value not in (allowed := list(options)) or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise error(name, value, " or ".join(repr(option) for option in allowed))


def number(
    name: str, value: object, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuse all but numbers from ``low`` to ``high``, the ends left out with ``above`` and ``below``."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if fits:
        fits = low <= value <= high and not (above and value == low) and not (below and value == high)  # type: ignore[operator]
    if not fits:
        upper = "" if math.isinf(high) else f" and {'below' if below else 'at most'} {high:g}"
        raise error(name, value, f"a number {'above' if above else 'of at least'} {low:g}{upper}")
