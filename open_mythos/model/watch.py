"""Whether a model still is what it was when something was read from it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

from torch import nn

__all__ = ["Watch"]


class Watch:
    """A model's modules, attributes, hooks and where its weights lie. It does not keep the model alive.

    Args:
        model: any model.
        reads: which of its tensors' addresses matter.

    Attributes:
        hooked: whether somebody listened to a module.
    """

    def __init__(self, model: nn.Module, reads: Callable[[Any], bool]) -> None:
        own = [vars(module) for module in model.modules()]
        held = [attributes[name] for attributes in own for name in ("_parameters", "_buffers", "_modules")]
        self._attributes = own + held
        self._hooks = [
            attributes[name] for attributes in own for name in ("_forward_hooks", "_forward_pre_hooks")
        ]
        self._tensors = [tensor for each in held for tensor in each.values() if reads(tensor)]
        self._seen = self._now()
        self.hooked = self._seen[0]

    def _now(self) -> tuple[bool, list[Any], list[Any]]:
        """Whether there are hooks, all attributes, and where and how each weight lies in memory."""
        memory = [(t.data_ptr(), t.dtype, t.shape, t.is_contiguous()) for t in self._tensors]
        return any(self._hooks), list(chain.from_iterable(map(dict.values, self._attributes))), memory

    def holds(self) -> bool:
        """Whether everything still is what it was."""
        (hooked, attributes, memory), (was_hooked, seen, seen_memory) = self._now(), self._seen
        same = len(attributes) == len(seen) and all(map(is_, attributes, seen))
        return same and hooked == was_hooked and memory == seen_memory
