"""A cache whose tokens stopped at different loops, and the group of a call's tokens that still run.

One sentence rules: a token that leaves shows, in every deeper loop, what it would have shown in the next one. See
docs/exits.md.

Shape letters: B batch, S new tokens, C context tokens (cached and new); B' and S' count what a group computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from open_mythos.model.attention import SequenceContext
from open_mythos.model.cache import CacheError, Entry, KVCache, LoopPolicy

__all__ = ["ExitCache", "Group"]


@dataclass(frozen=True)
class Group:
    """The tokens of a call that a loop computes.

    Attributes:
        running: (B, S) bool, the tokens that have not left.
        valid: (B', S') bool, where a computed token is one of those, row by row in the same order.
        rows: (B',) row of each computed one; None when all (B, S) are computed, in their places.
        columns: (B', S') column of each; 0 where not valid.
        everyone: nobody has left.
    """

    running: Tensor
    valid: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    everyone: bool = False

    @classmethod
    def whole(cls, like: Tensor) -> Group:
        """All tokens of (B, S, …)."""
        running = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        return cls(running, running, everyone=True)

    @classmethod
    def of(cls, running: Tensor, dense: bool = False) -> Group:
        """The running ones moved together, or all of them in their places when ``dense``."""
        if dense:
            return cls(running, running)
        rows = running.any(1).nonzero().flatten()
        kept = running.index_select(0, rows)
        counts = kept.sum(1, keepdim=True)
        width = int(counts.max())
        # A stable sort brings the running columns to the front and leaves them in order.
        columns = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        valid = torch.arange(width, device=running.device) < counts
        return cls(running, valid, rows, columns.masked_fill(~valid, 0))

    def take(self, x: Tensor) -> Tensor:
        """(B, S, …) → (B', S', …)."""
        return x if self.rows is None or self.columns is None else x[self.rows[:, None], self.columns]

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        """(B, S, …) with the value (B', S', …) where tokens run; x may be written where values were gathered."""
        if self.everyone:
            return value
        if self.rows is None:
            return torch.where(self.running.view(*self.running.shape, *[1] * (x.dim() - 2)), value, x)
        x[self.running] = value[self.valid].to(x.dtype)
        return x

    def context(self, ctx: SequenceContext) -> SequenceContext:
        """The context of the computed tokens, out of that of all."""
        if self.rows is None or self.columns is None:
            return ctx
        (batch, new), mask = self.running.shape, ctx.mask
        if mask is None and new > 1:  # a whole sequence, where causality alone decided
            mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=self.running.device).tril()
        if mask is not None:
            mask = mask.expand(batch, 1, new, -1)[self.rows[:, None], 0, self.columns].unsqueeze(1)
        places = self.rows[:, None], self.columns
        rope, penalty = ctx.rope.expand(-1, batch, -1, -1, -1)[:, places[0], places[1]], ctx.penalty
        if penalty is not None:
            penalty = penalty.expand(batch, -1, -1, -1).transpose(1, 2)[places].transpose(1, 2)
        return replace(ctx, rope=rope, mask=mask, penalty=penalty, memo={})


class _Shown(Exception):  # noqa: N818 (no error: it ends a step that has shown enough)
    """The entry that a leaving token would have shown is known; the rest of the step is not wanted."""


class ExitCache(KVCache):
    """A :class:`KVCache` whose tokens stopped at different loops.

    A token that left has, in every deeper loop, the entry (keys and values, or latent) of the state with which
    it left: the one that it would have shown in its next loop. Entries of deeper loops are filled in when a
    later token gets there, so what nobody reads costs nothing. A plain call of the model may also run more loops
    than the cached tokens did, which a KVCache refuses; it reads of tokens that ran all loops of their call the
    entry of the last.

    Args:
        policy: how loops share slots; :class:`EveryLoop` by default.
        capacity: tokens to make room for at once, per slot.
    """

    def __init__(self, policy: LoopPolicy | None = None, capacity: int = 0) -> None:
        super().__init__(policy, capacity)
        self._group: Group | None = None
        self._leaving = False
        self._left: Entry = {}
        self._loop = ""
        self._below: str | None = None

    def check_loops(self, n_loops: int) -> None:
        """Complete the slots of these loops; none is refused."""
        for loop in range(1, n_loops):
            self._complete(self.policy.slot(loop), self.policy.slot(loop - 1))

    @contextmanager
    def running(self, group: Group, loop: int, below: int | None) -> Iterator[None]:
        """Inside, only these tokens write; the others keep what they left.

        The block's slot is the policy's for this loop. Other layers (the coda, when a rule asks for a
        prediction) get slots of their own in each loop, ``coda_0@recurrent_loop_3``, where a token that has left
        keeps what it showed when the rule let it go.

        Args:
            group: the tokens that are computed.
            loop: its index, from 0.
            below: the loop before it that wrote the same layers, or None.
        """
        self._group, self._loop = group, self.policy.slot(loop)
        self._below = None if below is None else self.policy.slot(below)
        try:
            yield
        finally:
            self._group = None

    @contextmanager
    def leaving(self, group: Group) -> Iterator[None]:
        """Inside, a step of these tokens ends once it has shown their entries, which are kept for deeper loops.

        So the model has one loop body, and the entry is what that computes.
        """
        self._group, self._leaving = group, True
        try:
            yield
        except _Shown:
            pass
        finally:
            self._group, self._leaving = None, False

    def go_on(self, left: Entry) -> None:
        """Before the loops of a call, or those after a pause. ``left``: what :meth:`pause` gave, of all its tokens."""
        self._left = left

    def pause(self) -> Entry:
        """After the loops of a call, or between two: what those who left show in deeper loops, (B, S, …)."""
        left, self._left = self._left, {}
        return left

    def end(self, loop: int | None) -> None:
        """After the loops of a call. ``loop``: the first that nobody ran, as all had left; None: they ran all."""
        if loop is not None:
            slot = self.policy.slot(loop)
            self._complete(slot, self.policy.slot(loop - 1))
            entry = self.reserve(slot, self._left)
            for name, tensor in self._left.items():
                entry[name][:, self.length :].copy_(tensor)

    def write(self, slot: str, new: Entry) -> Entry:
        """As :meth:`KVCache.write`; inside :meth:`running` the new tensors are (B', S', width), and the result
        is (B', C, width).
        """
        group = self._group
        if group is None:
            return super().write(slot, new)
        if self._leaving:
            self._leave(group, new)
            raise _Shown
        block, below = slot == self._loop, self._below
        if not block:
            slot, below = f"{slot}@{self._loop}", below and f"{slot}@{below}"
        self._complete(slot, below)
        if group.everyone:
            return super().write(slot, new)
        past = self.length
        entry = self.reserve(slot, _room(group, new))
        for name, tensor in new.items():
            tail = entry[name][:, past:]
            if block:
                tail.copy_(self._left[name])
            elif below is None:
                tail.zero_()  # only tokens that nobody looks at leave before the first time
            elif below != slot:
                tail.copy_(self.entries[below][name][:, past:])
            tail[group.running] = tensor[group.valid]
        if group.rows is None:
            return entry
        return {name: tensor.index_select(0, group.rows) for name, tensor in entry.items()}

    def _leave(self, group: Group, new: Entry) -> None:
        if not self._left:
            room = _room(group, new)
            self._left = {name: tensor.contiguous().zero_() for name, tensor in room.items()}
        for name, tensor in new.items():
            self._left[name][group.running] = tensor[group.valid]

    def _complete(self, slot: str, below: str | None) -> None:
        """Fill what the slot lacks of the cached tokens with what they left in the slot below."""
        held, past = self.slot_length(slot), self.length
        if held >= past or slot == below:
            return
        if below is None or self.slot_length(below) < past:
            raise CacheError(
                f"{slot} holds {held} of the {past} cached tokens: they ran under another exit rule; "
                "go on with the same, or trim the cache"
            )
        missing = {name: tensor[:, held:past] for name, tensor in self.entries[below].items()}
        self._ensure(slot, missing, held)
        for name, tensor in missing.items():
            self._buffers[slot][name][:, held:past].copy_(tensor)
        self.entries[slot] = {name: self._buffers[slot][name].narrow(1, 0, past) for name in missing}


def _room(group: Group, new: Entry) -> Entry:
    """Tensors like the new ones, for all tokens of the call; their values are not there."""
    shape = group.running.shape
    return {name: tensor.new_empty(()).expand(*shape, *tensor.shape[2:]) for name, tensor in new.items()}
