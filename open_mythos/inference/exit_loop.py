"""The loop with exits, which may pause between two loops: what a call's tokens have reached, and who still runs.

Shape letters: B batch, S new tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.inference.exit_cache import ExitCache, Group
from open_mythos.inference.exit_rules import Rule, Seen
from open_mythos.model import OpenMythos
from open_mythos.model.attention import SequenceContext
from open_mythos.model.cache import CacheError, Entry

__all__ = ["Thinking", "answer_of"]


class Thinking:
    """The tokens of a call on their way through the loop, under an exit rule.

    Args:
        model: in eval mode.
        e: (B, S, D), what the prelude gave.
        ctx: its context, whose cache is an :class:`ExitCache`.
        rule: asked after each loop but the last.
        n_loops: the most loops.
        idle: (B, S) bool, tokens that leave at the first opportunity.
        dense: compute all tokens until the last one leaves.

    Attributes:
        state: (B, S, D) with which each token left, or which it has reached.
        loops: (B, S) int64, loops that each has run.
        running: (B, S) bool, who goes on.
        done: loops that this call has run.

    Raises:
        ValueError: the context has no ExitCache.
    """

    def __init__(
        self,
        model: OpenMythos,
        e: Tensor,
        ctx: SequenceContext,
        rule: Rule,
        n_loops: int,
        *,
        idle: Tensor | None = None,
        dense: bool = False,
    ) -> None:
        if not isinstance(ctx.cache, ExitCache):
            raise CacheError(f"the context's cache must be an ExitCache, got {type(ctx.cache).__name__}")
        self._model, self._e, self._ctx, self._cache = model, e, ctx, ctx.cache
        self._rule, self._most, self._idle, self._dense = rule, rule.limit(n_loops), idle, dense
        self.state, self.done = model.initial_state(e), 0
        self.loops = torch.zeros(e.shape[:2], dtype=torch.int64, device=e.device)
        self.running = torch.ones_like(self.loops, dtype=torch.bool)
        self._ended = False
        self._memory: dict[str, Tensor] = {}  # what the rule keeps
        self._left: Entry = {}  # what those who left show in deeper loops
        self._asked: int | None = None  # the loop in which the coda was last asked
        self._before: Tensor = self.state  # of those who run, before their next loop
        self._drive: Tensor = e
        self._gather(Group.whole(e))

    @classmethod
    def joined(cls, parts: Sequence[Thinking], ctx: SequenceContext) -> Thinking:
        """All tokens of calls that paused after equally many loops, one call after the other.

        Calls that have ended since everybody had left, or since the rule allows no more loops, are part of it.

        Args:
            parts: with the same rule; none with idle tokens.
            ctx: the context of all tokens.
        """
        first = parts[0]
        e = torch.cat([part._e for part in parts], 1)
        whole = cls(first._model, e, ctx, first._rule, first._most, dense=first._dense)
        for name in ("state", "loops", "running"):
            setattr(whole, name, torch.cat([getattr(part, name) for part in parts], 1))
        whole.done = max(part.done for part in parts)
        whole._ended = all(part._ended for part in parts)
        asked = [part._asked for part in parts if part._asked is not None]
        whole._asked = max(asked, default=None)
        sizes = [part._e.shape[1] for part in parts]
        whole._memory = _side_by_side([part._memory for part in parts], sizes)
        whole._left = _side_by_side([part._left for part in parts], sizes)
        if not whole._ended:
            everyone = bool(whole.running.all())
            whole._gather(Group.whole(e) if everyone else Group.of(whole.running, whole._dense))
        return whole

    def run(self, until: int | None = None) -> None:
        """Loops up to number ``until``, or to the end.

        Raises:
            ValueError: the rule's answer has another shape than it was asked for.
        """
        stop = self._most if until is None else min(until, self._most)
        self._cache.go_on(self._left)
        while not self._ended and self.done < stop:
            self._loop()
        self._left = self._cache.pause()

    def _loop(self) -> None:
        """One loop of those who run, and the question who leaves."""
        t, group, cache = self.done, self._group, self._cache
        with cache.running(group, t, t - 1 if t else None):
            state = self._model.step(self._before, self._drive, t, self._view)
        self.loops += group.running
        self.done = t + 1
        if self.done == self._most:
            self.state = group.put(self.state, state)
            self._end(None)
            return
        seen = Seen(
            self.done, state, self._before, group, self._model, lambda: self._predict(state), self._memory
        )
        answer = answer_of(self._rule, seen)
        self.state = group.put(self.state, state)
        self._before = state if group.rows is not None or group.everyone else self.state
        if self.done < min(self._rule.min_loops, self._most):
            return
        gone = group.put(torch.zeros_like(group.running), answer)
        gone = group.running & (gone if self._idle is None else gone | self._idle)
        if bool(gone.any()):
            self._leave(gone)

    def _leave(self, gone: Tensor) -> None:
        """Keep what the next loop would show of these tokens (deeper loops read that of them); go on without."""
        group = Group.of(gone)
        with self._cache.leaving(group):
            self._model.step(group.take(self.state), group.take(self._e), self.done, group.context(self._ctx))
        self.running = self.running & ~gone
        if bool(self.running.any()):
            self._gather(Group.of(self.running, self._dense))
        else:
            self._end(self.done)

    def _predict(self, state: Tensor) -> Tensor:
        """Logits of those who run, if the loop ended here."""
        t = self.done - 1
        with self._cache.running(self._group, t, self._asked):
            logits = self._model.coda(state, self._view)
        self._asked = t
        return logits

    def _gather(self, group: Group) -> None:
        self._group, self._view = group, group.context(self._ctx)
        self._before, self._drive = group.take(self.state), group.take(self._e)

    def _end(self, loop: int | None) -> None:
        self._cache.end(loop)
        self._ended = True
        self.running = torch.zeros_like(self.running)


def answer_of(rule: Rule, seen: Seen) -> Tensor:
    """What the rule answers, refused unless it is bool of the shape of the tokens that were asked for."""
    answer: object = rule.leaves(seen)
    shape = tuple(seen.state.shape[:2])
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != shape:
        got = f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else repr(answer)
        raise ValueError(f"{type(rule).__name__}.leaves must return bool of shape {shape}, got {got}")
    return answer


def _side_by_side(parts: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Tensors (B, S, …) of all parts along S; zeros where a part of so many tokens has none."""
    whole: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        like = next(part[name] for part in parts if name in part)
        shapes = [(like.shape[0], size, *like.shape[2:]) for size in sizes]
        filled = [part.get(name, like.new_zeros(shape)) for part, shape in zip(parts, shapes, strict=True)]
        whole[name] = torch.cat(filled, 1)
    return whole
