"""Rows that go on by themselves: what a device keeps of each, and who computes next.

A cycle decodes who rests, draws and begins its next token, and runs some loops of the others. Nothing of that needs the
host: who rests, and where each row is, stands in memory.

Shape letters: X persistent rows, N entries, W columns of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.rows.plain import Asks, Entries

__all__ = ["NONE", "UNFIT", "PlainTurns", "TritonTurns", "Turns"]

NONE, UNFIT = -1, -2
"""Instead of a token: nothing was drawn; the logits were not finite."""

_LEFT, _POS, _DONE, _REST, _MOST, _RULED, _FIRST, _UNTIL, _EOS = range(9)
FIELDS = 9


@dataclass(frozen=True)
class Turns:
    """Where rows are, on the device.

    Attributes:
        numbers: (9, X) int32, of each row

            - new tokens that are still to come, the one that is computed among them; 0: it does nothing,
            - position of the token that is computed,
            - loops it has done,
            - whether its loops are done,
            - its most loops,
            - whether the model's own halting is not asked,
            - loops before which its rule lets nobody leave,
            - loops after which the rule is not asked; 0: there is none,
            - token after which nothing follows, or below zero.
        tolerance: (X,) of its rule.
        told: (2, X) int32, tokens drawn in the last cycle or :data:`NONE` or :data:`UNFIT`, and loops before each.
    """

    numbers: Tensor
    tolerance: Tensor
    told: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> Turns:
        """Nobody is there."""
        numbers, told = (torch.zeros(n, rows, dtype=torch.int32, device=device) for n in (FIELDS, 2))
        return cls(numbers, torch.zeros(rows, dtype=dtype, device=device), told)


class PlainTurns:
    """The meaning of the kernels."""

    def ends(self, turns: Turns, entries: Entries) -> None:
        """Forget what was told; the entries become rows whose loops are done, in rising order.

        Args:
            turns: X.
            entries: N, at least as many as there are such rows; written.
        """
        left, pos, done, rest, _, ruled, *_ = turns.numbers
        turns.told[0] = NONE
        found = ((left > 0) & (rest != 0)).nonzero().flatten()
        n = len(found)
        entries.rows.fill_(-1)
        entries.rows[:n] = found.to(torch.int32)
        entries.pos[:n], entries.loop[:n], entries.ruled[:n] = pos[found], done[found], ruled[found]

    def pick(self, turns: Turns, entries: Entries, logits: Tensor, ids: Tensor) -> None:
        """The likeliest token after each entry is told, and fed. The entries become those who go on.

        Args:
            turns: X, written.
            entries: N, of :meth:`ends`; written.
            logits: (N, V).
            ids: (X,) int64, written.
        """
        left, pos, done, rest, *_, eos = turns.numbers
        at = (entries.rows >= 0).nonzero().flatten()
        rows = entries.rows[at].long()
        tokens = logits[at].argmax(-1).to(torch.int32)
        fit = logits[at].isfinite().all(-1)
        turns.told[0, rows] = torch.where(fit, tokens, UNFIT)
        turns.told[1, rows] = done[rows]
        ids[rows] = torch.where(fit, tokens.long(), 0)
        left[rows] = torch.where(fit & (tokens != eos[rows]), left[rows] - 1, 0)
        pos[rows], done[rows], rest[rows] = pos[rows] + 1, 0, 0
        entries.pos[at] = pos[rows]
        entries.rows[at] = torch.where(left[rows] > 0, entries.rows[at], -1)

    def begins(self, turns: Turns, table: Tensor, loops: int, width: int, count: int, asks: Asks) -> None:
        """Who loops, in a block of columns for each of so many loops, and in one more for those who leave.

        Args:
            turns: X, written as if nobody left before their last loop.
            table: (4, (loops + 1) · W) int32, entries of each block as in :class:`Entries`; the last block has no rows.
                Written.
            loops: of this cycle.
            width: W.
            count: N of the columns of each block; at least as many as rows that loop.
            asks: of each of the N entries; written.
        """
        left, pos, done, rest, most, ruled, first, until, _ = turns.numbers
        found = ((left > 0) & (rest == 0)).nonzero().flatten()
        n, begun = len(found), done[found]
        for i in range(loops + 1):
            block = table[:, i * width : i * width + count]
            block[0] = -1
            if i < loops:
                block[0, :n] = torch.where(begun + i < most[found], found.to(torch.int32), -1)
            block[1, :n], block[2, :n], block[3, :n] = pos[found], begun + i, ruled[found]
        asks.tolerance[:n], asks.first[:n] = turns.tolerance[found], first[found]
        asks.until[:n] = until[found]
        done[found] = torch.minimum(begun + loops, most[found])
        rest[found] = (done[found] == most[found]).to(torch.int32)

    def leaves(self, turns: Turns, gone: Entries) -> None:
        """Rows of these entries rest, after so many loops as the entries say.

        Args:
            turns: X, written.
            gone: N.
        """
        at = (gone.rows >= 0).nonzero().flatten()
        rows = gone.rows[at].long()
        turns.numbers[_DONE, rows], turns.numbers[_REST, rows] = gone.loop[at], 1


class TritonTurns:
    """As :class:`PlainTurns`, in kernels. Needs Triton."""

    def __init__(self) -> None:
        from open_mythos.rows import turn_kernels

        self._k: Any = turn_kernels

    def ends(self, turns: Turns, entries: Entries) -> None:
        """As :meth:`PlainTurns.ends`."""
        rows, count = turns.numbers.shape[1], len(entries.rows)
        self._k.ends[(1,)](
            turns.numbers, turns.told, entries.rows, entries.pos, entries.loop, entries.ruled, rows, count,
            BLOCK=_up(rows), BLOCK_N=_up(count),
        )  # fmt: skip

    def pick(self, turns: Turns, entries: Entries, logits: Tensor, ids: Tensor) -> None:
        """As :meth:`PlainTurns.pick`."""
        vocabulary = logits.shape[1]
        self._k.pick[(len(entries.rows),)](
            logits, ids, turns.numbers, turns.told, entries.rows, entries.pos, vocabulary, turns.numbers.shape[1],
            BLOCK=min(4096, _up(vocabulary)), num_warps=8,
        )  # fmt: skip

    def begins(self, turns: Turns, table: Tensor, loops: int, width: int, count: int, asks: Asks) -> None:
        """As :meth:`PlainTurns.begins`."""
        rows = turns.numbers.shape[1]
        self._k.begins[(1,)](
            turns.numbers, turns.tolerance, table, asks.tolerance, asks.first, asks.until, rows, count, loops, width,
            table.stride(0), BLOCK=_up(rows), BLOCK_N=_up(count),
        )  # fmt: skip

    def leaves(self, turns: Turns, gone: Entries) -> None:
        """As :meth:`PlainTurns.leaves`."""
        count = len(gone.rows)
        self._k.leaves[(1,)](
            turns.numbers, gone.rows, gone.loop, turns.numbers.shape[1], count, BLOCK_N=_up(count)
        )


def _up(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
