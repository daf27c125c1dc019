"""Digit chain: the sum of a chain of digits modulo a small number, read at one position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.tasks.base import IGNORE_INDEX, PAD, Batch, Level, Task, check_integer

START, EQ = 1, 2
DIGIT_BASE = 10


@dataclass(frozen=True)
class DigitChain(Task):
    """``START d1 … dn EQ PAD …`` with the target ``DIGIT_BASE + (d1 + … + dn) mod modulus`` at EQ only.

    Token numbers are those of the published article: PAD, START, EQ = 0, 1, 2 and digit d = 10 + d. The
    article trains on chains of 2 to 5 digits and tests on 6 to 8, in sequences padded to 32.

    Attributes:
        length: digits in a chain, from 1 (to ``seq_len - 2``), or an inclusive range.
        modulus: digits are 0 … modulus - 1 and the answer is taken modulo it; at least 2.
        seq_len: S, every sequence is padded to it, or 0: no wider than its batch needs. What is right of EQ
            changes nothing to a causal model, so 0 is the same task in a quarter of the time.
    """

    length: Level = (2, 5)
    modulus: int = 7
    seq_len: int = 32
    difficulty = "length"

    def __post_init__(self) -> None:
        check_integer("modulus", self.modulus, 2)
        if self.seq_len != 0:
            check_integer("seq_len", self.seq_len, 3)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """V: 1 + the greatest token."""
        return DIGIT_BASE + self.modulus

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Smallest and largest ``length``."""
        return 1, self.seq_len - 2 if self.seq_len else None

    def width(self, level: int) -> int:
        """S of a batch whose greatest ``length`` is ``level``."""
        return self.seq_len or level + 2

    def _draw(self, levels: Tensor, width: int, generator: torch.Generator) -> Batch:
        device = levels.device
        digits = torch.randint(0, self.modulus, (len(levels), width - 2), generator=generator, device=device)
        beyond = torch.arange(width - 2, device=device) >= levels[:, None]
        digits = digits.masked_fill(beyond, 0)
        ids = torch.full((len(levels), width), PAD, device=device)
        ids[:, 0] = START
        ids[:, 1:-1] = (digits + DIGIT_BASE).masked_fill(beyond, PAD)
        targets = torch.full_like(ids, IGNORE_INDEX)
        at_eq = levels[:, None] + 1
        ids.scatter_(1, at_eq, EQ)
        targets.scatter_(1, at_eq, digits.sum(dim=1, keepdim=True) % self.modulus + DIGIT_BASE)
        return Batch(ids, targets)
