"""Digit chain: the sum of a chain of digits modulo a small number, read at one position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.tasks.base import (
    IGNORE_INDEX,
    PAD,
    Batch,
    Level,
    Task,
    check_integer,
    split_of,
)

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
        running: while training also ask for the sum so far at every digit that ends a chain of the training split,
            of the trained lengths. The rows stay the same, and held-out rows are asked at EQ alone. There are only
            784 multisets of 2 to 5 digits below 7: asked at EQ alone, a model may learn them by heart, which leads to
            no longer chain; sums so far show it the way digit by digit.
    """

    length: Level = (2, 5)
    modulus: int = 7
    seq_len: int = 32
    running: bool = False
    difficulty = "length"

    def __post_init__(self) -> None:
        check_integer("modulus", self.modulus, 2)
        if self.seq_len != 0:
            check_integer("seq_len", self.seq_len, 3)
        if not isinstance(self.running, bool):
            raise ValueError(f"running={self.running!r}; allowed is True or False")
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

    def sample(
        self, batch_size: int, *, generator: torch.Generator, split: str = "train", **difficulty: Level
    ) -> Batch:
        """As every task; see :meth:`Task.sample`."""
        batch = super().sample(batch_size, generator=generator, split=split, **difficulty)
        if not self.running or split != "train":
            return batch
        return self._with_sums(batch, *self._level_of(difficulty))

    def _with_sums(self, batch: Batch, low: int, high: int) -> Batch:
        """The same rows, asked for the sum of their first n digits too, where that chain is one to train on."""
        ids, targets = batch.ids, batch.targets.clone()
        digits = (ids - DIGIT_BASE).masked_fill(ids < DIGIT_BASE, 0)
        sums = digits.cumsum(dim=1) % self.modulus + DIGIT_BASE
        for n in range(low, min(high, ids.shape[1] - 2) + 1):
            chain = torch.nn.functional.pad(ids[:, : n + 1], (0, 1), value=EQ)
            asked = (ids[:, n] >= DIGIT_BASE) & (split_of(self.identity(chain)) == 0)
            targets[:, n] = torch.where(asked, sums[:, n], targets[:, n])
        return Batch(ids, targets)

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
