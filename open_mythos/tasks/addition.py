"""Addition of two numbers of many digits, the answer written from its last digit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.tasks.base import IGNORE_INDEX, PAD, Batch, Level, Task, check_choice

PLUS, EQ = 1, 2
DIGIT_BASE = 3


LAYOUTS = ("written", "columns")


@dataclass(frozen=True)
class Addition(Task):
    """Sums of two numbers, ``c = a + b``. Both have exactly ``digits`` digits, so leading zeros occur; the answer has
    ``digits + 1``.

    ``layout="written"``: ``a PLUS b EQ c``, a and b as people write them, c in reverse (units first). The reversed
    answer lets each digit depend on the digits already written (Lee et al. 2023, "Teaching Arithmetic to Small
    Transformers"). Targets are next tokens, scored on the answer alone: the first is asked at EQ, and the last
    answer digit is a target but never an input.

    ``layout="columns"``: ``PLUS a1 b1 a2 b2 … EQ``, units first, two digits a column; the target at each second digit
    is the column's digit of c, at EQ the last carry. No answer is in the input: a carry has to be computed column
    after column.

    Attributes:
        digits: digits of each operand, at least 1, or an inclusive range.
        layout: "written" or "columns".
        ripple: share of columns whose digits add up to 9, through which a carry runs on, 0 to 1; the others are
            uniform, and among them a carry seldom runs far.
    """

    digits: Level = 4
    layout: str = "written"
    ripple: float = 0.0
    difficulty = "digits"

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        number = isinstance(self.ripple, (int, float)) and not isinstance(self.ripple, bool)
        if not number or not 0 <= self.ripple <= 1:
            raise ValueError(f"ripple={self.ripple!r}; allowed is a number from 0 to 1")
        super().__post_init__()

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
        return (3 if self.layout == "written" else 2) * level + 2

    def _draw(self, levels: Tensor, width: int, generator: torch.Generator) -> Batch:
        most = (width - 2) // (3 if self.layout == "written" else 2)
        operands = self._operands(levels, most, generator)
        answer = _add(operands[0], operands[1])
        return (self._written if self.layout == "written" else self._columns)(levels, operands, answer)

    def _operands(self, levels: Tensor, most: int, generator: torch.Generator) -> Tensor:
        """(2, B, digits), units first, zero beyond a row's own."""
        size, device = (len(levels), most), levels.device
        operands = torch.randint(0, 10, (2, *size), generator=generator, device=device)
        if self.ripple:
            running = torch.rand(size, generator=generator, device=device) < self.ripple
            operands[1] = torch.where(running, 9 - operands[0], operands[1])
        return operands.masked_fill(torch.arange(most, device=device) >= levels[:, None], 0)

    def _columns(self, levels: Tensor, operands: Tensor, answer: Tensor) -> Batch:
        most = operands.shape[2]
        column = torch.arange(most, device=levels.device)
        beyond = (column >= levels[:, None]).repeat_interleave(2, dim=1)
        pairs = (operands + DIGIT_BASE).permute(1, 2, 0).flatten(1).masked_fill(beyond, PAD)
        ids = torch.nn.functional.pad(pairs, (1, 0), value=PLUS)
        ids = torch.nn.functional.pad(ids, (0, 1), value=PAD).scatter_(1, 2 * levels[:, None] + 1, EQ)
        targets = torch.full_like(ids, IGNORE_INDEX)
        asked = answer[:, :most] + DIGIT_BASE
        targets[:, 2::2] = asked.masked_fill(column >= levels[:, None], IGNORE_INDEX)
        carry = answer.gather(1, levels[:, None]) + DIGIT_BASE
        return Batch(ids, targets.scatter_(1, 2 * levels[:, None] + 1, carry))

    def _written(self, levels: Tensor, operands: Tensor, answer: Tensor) -> Batch:
        rows, most = operands.shape[1:]
        device, width = levels.device, 3 * most + 2
        place = torch.arange(most, device=device)
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
