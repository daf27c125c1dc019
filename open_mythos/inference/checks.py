"""What callers give, refused where it does not fit, in one sentence: the field, its value, what is allowed.

Shape letters: S prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from open_mythos.model.inputs import TOKEN_DTYPES, check_range

__all__ = ["check_positive", "check_prompt", "check_range", "check_sampling", "check_whole"]


def check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is not a whole number from ``low`` to ``high``; NumPy's are as good as Python's."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and int(value) > high):  # type: ignore[call-overload, operator]
        allowed = f"a whole number of at least {low}" if high is None else f"a whole number, {low} to {high}"
        raise ValueError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def check_positive(name: str, value: object, high: float = math.inf) -> None:
    """Refuse what is not a finite number above zero and at most ``high``."""
    if not _number(value) or not 0 < value <= high or value == math.inf:  # type: ignore[operator]
        most = "a finite number" if high == math.inf else f"at most {high:g}"
        raise ValueError(f"{name} = {value!r} is not allowed: it must be above 0 and {most}")


def check_sampling(temperature: object, top_k: object, top_p: object, seed: object) -> None:
    """Refuse what :func:`~open_mythos.inference.sampling.sample` cannot draw by."""
    if not _number(temperature) or not 0 <= temperature < math.inf:  # type: ignore[operator]
        raise ValueError(
            f"temperature = {temperature!r} is not allowed: it must be a finite number of at least 0"
        )
    if top_k is not None:
        check_whole("top_k", top_k, 0)
    if top_p is not None and (not _number(top_p) or not 0 < top_p <= 1):  # type: ignore[operator]
        raise ValueError(f"top_p = {top_p!r} is not allowed: it must be above 0 and at most 1, or None")
    if seed is not None:
        check_whole("seed", seed, 0, 2**63 - 1)


def check_prompt(name: str, prompt: object, vocab_size: int) -> Sequence[int] | Tensor:
    """The prompt: S ids as a list, a tuple or a 1-D tensor of int64 or int32, at least one, each of the vocabulary."""
    if isinstance(prompt, Tensor):
        fits = prompt.dim() == 1 and prompt.dtype in TOKEN_DTYPES
    else:
        fits = isinstance(prompt, (list, tuple)) and all(type(token) is int for token in prompt)
    if not fits:
        raise ValueError(f"{name} = {prompt!r} is not allowed: it must be a list of ids or a 1-D tensor")
    ids: Any = prompt
    if len(ids) == 0:
        raise ValueError(f"{name} is empty: it must hold at least one token")
    check_range(name, ids, vocab_size)
    return ids


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
