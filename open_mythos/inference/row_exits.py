"""Exit rules for rows that are at different loops: those at the same loop under equal rules are asked together.

Shape letters: n rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from open_mythos.inference.exit_cache import Group
from open_mythos.inference.exit_loop import answer_of
from open_mythos.inference.exit_rules import Seen
from open_mythos.inference.pages import on_device
from open_mythos.inference.runner import Runner
from open_mythos.inference.running import Lane, batch_of
from open_mythos.model import OpenMythos

__all__ = ["RowSeen", "answer", "asked_together"]

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


def asked_together(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Those at the same loop under equal rules."""
    groups: dict[tuple[object, int], list[Lane]] = {}
    for lane in lanes:
        groups.setdefault((_key(lane.rule), lane.loops), []).append(lane)
    return list(groups.values())


def answer(model: OpenMythos, runner: Runner, lanes: list[Lane]) -> Tensor | None:
    """Who of these leaves, (n,) bool, or None where nobody may yet.

    Args:
        model: theirs.
        runner: whose rows they are.
        lanes: at the same loop under equal rules.
    """
    rule, loops, state, batch = lanes[0].rule, lanes[0].loops, runner.state, batch_of(lanes)
    assert rule is not None
    rows = on_device(batch.rows, state.h.device)
    memories = [dict(lane.memory) for lane in lanes]
    probed: list[int] = []

    def predict() -> Tensor:
        probed.append(loops - 1)
        return runner.predict(batch)

    seen = RowSeen(loops, state.h[rows], state.before[rows], model, predict, memories)
    found = answer_of(rule, seen)[:, 0]
    for lane, memory in zip(lanes, memories, strict=True):
        lane.memory, lane.probed = memory, probed[-1] if probed else lane.probed
    return found if loops >= min(rule.min_loops, lanes[0].most) else None


def _key(rule: object) -> object:
    """Equal rules are one; those that cannot be compared only if they are the same object."""
    try:
        hash(rule)
    except TypeError:
        return id(rule)
    return rule
