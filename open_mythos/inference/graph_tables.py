"""What the graphs of a decode step read from memory: rows, positions and loop indices, and what exit rules ask.

Shape letters: N entries of a graph, n rows of a batch, W columns of a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.inference.runner import Batch
from open_mythos.rows.plain import Asks, Entries

__all__ = ["Asking", "entries_of", "round_of", "several_of", "table_of", "width_of"]


def entries_of(columns: Tensor, thin: bool = False) -> Entries:
    """Entries that columns (4, N) of a table on the device are."""
    rows, pos, loop, ruled = columns.unbind()
    return Entries(rows, pos, loop, ruled, thin)


def table_of(batch: Batch, loops: Sequence[int] | None = None) -> Tensor:
    """What entries are made of, (4, n) on the host."""
    loops = batch.loops if loops is None else loops
    return torch.tensor([batch.rows, batch.positions, loops, batch.ruled], dtype=torch.int32)


def width_of(bucket: int) -> int:
    """Columns of a block: 16 bytes at least, as a kernel is compiled once more for addresses that are not aligned."""
    return max(bucket, 4)


def several_of(batch: Batch, times: Sequence[int], width: int, gone: bool = False) -> Tensor:
    """A block of columns for each of several loops, (4, max(times) · W) on the host.

    Who has done theirs is not among the entries of the later ones. ``gone`` adds a block for those who leave, without
    their rows and loops.
    """
    # Lists and an array: for a few rows they take less time than small tensors do, and the device may wait for it.
    most, fill = max(times), [-1] * (width - len(times))
    rows: list[int] = []
    loops: list[int] = []
    for i in range(most + gone):
        here = [i < count for count in times]
        rows += [row if at else -1 for row, at in zip(batch.rows, here, strict=True)] + fill
        loops += [done + i if at else -1 for done, at in zip(batch.loops, here, strict=True)] + fill
    positions, ruled = ([*values, *fill] * (most + gone) for values in (batch.positions, batch.ruled))
    numbers = array("i", [*rows, *positions, *loops, *ruled])
    return torch.frombuffer(numbers, dtype=torch.int32).view(4, -1)


def round_of(batch: Batch, drafts: int, loops: int, width: int, each: int) -> Tensor:
    """Columns of a check after ``loops`` loops, then those of each draft, (4, width + (drafts + 1) · each)."""
    count, wanted = len(batch.rows) // (drafts + 1), []
    checked = (loops,) * len(batch.rows)
    for values, check in (
        (batch.rows, batch.rows),
        (batch.positions, batch.positions),
        (batch.loops, checked),
        (batch.ruled, batch.ruled),
    ):
        row = [*check, *[-1] * (width - len(check))]
        for i in range(drafts + 1):
            row += [*values[i * count : (i + 1) * count], *[-1] * (each - count)]
        wanted.append([int(value) for value in row])
    return torch.tensor(wanted, dtype=torch.int32)


class Asking:
    """What is asked of each entry, on the device. The memory never moves, and is copied to only where it changes.

    Args:
        most: entries of the largest batch.
        dtype: of tolerances.
        device: where.
    """

    def __init__(self, most: int, dtype: torch.dtype, device: torch.device) -> None:
        width = width_of(most)
        self._tolerance = torch.zeros(width, dtype=dtype, device=device)
        self._numbers = torch.zeros(2, width, dtype=torch.int32, device=device)
        self._shown: tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]] = (), (), ()

    def of(self, count: int) -> Asks:
        """For so many entries."""
        return Asks(self._tolerance[:count], *self._numbers[:, :count].unbind())

    def show(self, tolerance: Sequence[float], first: Sequence[int], until: Sequence[int]) -> None:
        """One number for each of n entries; the others are asked nothing.

        Args:
            tolerance: of the change of a state that lets it leave.
            first: loops before which nobody leaves.
            until: loops after which nobody is asked, since there are no deeper ones; 0: never.
        """
        known, n = self._shown, len(until)
        wanted = tuple(tolerance), tuple(first), tuple(until)
        if wanted[0] != known[0]:
            self._tolerance[:n].copy_(torch.tensor(wanted[0], dtype=self._tolerance.dtype), non_blocking=True)
        if wanted[1:] != known[1:]:
            numbers = torch.zeros(self._numbers.shape, dtype=torch.int32)
            numbers[:, :n] = torch.tensor(wanted[1:], dtype=torch.int32)
            self._numbers.copy_(numbers, non_blocking=True)
        self._shown = wanted
