"""Exit rules for rows that are at different loops: those at the same loop under equal rules are asked together.

Shape letters: n rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from open_mythos.inference.exit_cache import Group
from open_mythos.inference.exit_loop import answer_of
from open_mythos.inference.exit_rules import Rule, Seen
from open_mythos.model import OpenMythos

__all__ = ["RowSeen", "leaving"]

Memory = dict[str, Tensor]


class RowSeen(Seen):
    """What a rule may ask of one token in each of n rows, each with a memory of its own.

    Args:
        loop: loops done, from 1.
        state: (n, D) after this loop.
        before: (n, D) before it.
        model: whose they are.
        predict: gives logits (n, V).
        memories: what was kept of each row's token.
    """

    def __init__(
        self,
        loop: int,
        state: Tensor,
        before: Tensor,
        model: OpenMythos,
        predict: Callable[[], Tensor],
        memories: list[Memory],
    ) -> None:
        state, before = state.unsqueeze(1), before.unsqueeze(1)
        group = Group.whole(state)
        super().__init__(loop, state, before, group, model, lambda: predict().unsqueeze(1), {})
        self._memories = memories

    def recall(self, name: str) -> Tensor | None:
        """What was kept of these tokens under this name, (n, 1, …), or None."""
        kept = [memory.get(name) for memory in self._memories]
        if any(each is None for each in kept):
            return None
        return torch.stack(kept)  # type: ignore[arg-type]

    def keep(self, name: str, value: Tensor) -> None:
        """Remember (n, 1, …) of these tokens for later loops of the same token."""
        for memory, own in zip(self._memories, value.unbind(), strict=True):
            memory[name] = own


def leaving(rule: Rule, seen: RowSeen) -> Tensor:
    """Who leaves, (n,) bool."""
    return answer_of(rule, seen)[:, 0]
