"""Addition of two numbers of many digits, the answer written from its last digit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.tasks.base import IGNORE_INDEX, PAD, Batch, Level, Task

PLUS, EQ = 1, 2
DIGIT_BASE = 3


@dataclass(frozen=True)
class Addition(Task):
    """``a PLUS b EQ c`` with ``c = a + b``; a and b as people write them, c in reverse (units first).

    The reversed answer lets each digit depend on the digits already written (Lee et al. 2023, "Teaching
    Arithmetic to Small Transformers"). Both operands have exactly ``digits`` digits, each uniform in 0 … 9,
    so leading zeros occur; the answer has ``digits + 1``. Targets are next tokens, scored on the answer
    alone: the first is asked at EQ, and the last answer digit is a target but never an input.

    Attributes:
        digits: digits of each operand, at least 1, or an inclusive range.
    """

    digits: Level = 4
    difficulty = "digits"

    @property
    def vocab_size(self) -> int:
        """V: 1 + the greatest token."""
        return DIGIT_BASE + 10

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Smallest and largest ``digits``."""
        return 1, None

    def width(self, level: int) -> int:
        """S of a batch whose greatest ``digits`` is ``level``."""
        return 3 * level + 2

    def _draw(self, levels: Tensor, width: int, generator: torch.Generator) -> Batch:
        rows, device = len(levels), levels.device
        most = (width - 2) // 3
        place = torch.arange(most, device=device)
        operands = torch.randint(0, 10, (2, rows, most), generator=generator, device=device)
        operands = operands.masked_fill(place >= levels[:, None], 0)  # (2, B, digits), units first
        answer = _add(operands[0], operands[1])

        # Built one token longer than S, with a spare column at the end that takes every write past a row's
        # end.
        n = levels[:, None]
        spare = width + 1
        full = torch.full((rows, spare + 1), PAD, device=device)
        for operand, start in ((operands[0], 0 * n), (operands[1], n + 1)):
            column = torch.where(place < n, start + n - 1 - place, spare)
            full.scatter_(1, column, operand + DIGIT_BASE)
        full.scatter_(1, n, PLUS).scatter_(1, 2 * n + 1, EQ)
        digit = torch.arange(most + 1, device=device)
        full.scatter_(1, torch.where(digit <= n, 2 * n + 2 + digit, spare), answer + DIGIT_BASE)

        ids, targets = full[:, :width].clone(), full[:, 1 : width + 1].clone()
        position = torch.arange(width, device=device)
        asked = (position >= 2 * n + 1) & (position <= 3 * n + 1)
        # The last answer digit is only ever a target.
        ids = ids.masked_fill(position >= 3 * n + 2, PAD)
        return Batch(ids, targets.masked_fill(~asked, IGNORE_INDEX))


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Schoolbook addition of (B, n) digits, units first → (B, n + 1). A loop over digits, not rows: int64
    would hold 18 digits only.
    """
    carry = torch.zeros_like(a[:, 0])
    columns = []
    for i in range(a.shape[1]):
        total = a[:, i] + b[:, i] + carry
        columns.append(total % 10)
        carry = total // 10
    return torch.stack([*columns, carry], dim=1)
