"""Cumulative parity: after each bit, is the number of ones so far odd?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.tasks.base import IGNORE_INDEX, PAD, Batch, Level, Task

BIT_BASE = 1
BOS = 3


@dataclass(frozen=True)
class Parity(Task):
    """Tokens 1 and 2 stand for bits 0 and 1; the target at each bit is 1 + (sum of the bits up to it) mod 2.

    With ``bos=False`` this is the task of the published tutorial. There the sequences 0…0 and, for attention
    without an absolute position, 1…1 look the same from every position, so no model with relative positions
    can reach 1.0. With ``bos=True`` (default) each sequence starts with token 3, which is not scored.

    Attributes:
        length: bits in a sequence, at least 1, or an inclusive range.
        bos: start with a BOS token; S is then ``length + 1``.
    """

    length: Level = 24
    bos: bool = True
    difficulty = "length"

    @property
    def vocab_size(self) -> int:
        """V: 1 + the greatest token."""
        return 4 if self.bos else 3

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Smallest and largest ``length``."""
        return 1, None

    def width(self, level: int) -> int:
        """S of a batch whose greatest ``length`` is ``level``."""
        return level + int(self.bos)

    def _draw(self, levels: Tensor, width: int, generator: torch.Generator) -> Batch:
        size = (len(levels), width - int(self.bos))
        bits = torch.randint(0, 2, size, generator=generator, device=levels.device)
        beyond = torch.arange(size[1], device=levels.device) >= levels[:, None]
        ids = (bits + BIT_BASE).masked_fill(beyond, PAD)
        targets = (bits.cumsum(dim=1) % 2 + BIT_BASE).masked_fill(beyond, IGNORE_INDEX)
        if self.bos:
            ids = torch.nn.functional.pad(ids, (1, 0), value=BOS)
            targets = torch.nn.functional.pad(targets, (1, 0), value=IGNORE_INDEX)
        return Batch(ids, targets)
