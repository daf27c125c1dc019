"""What every reasoning task shares: batches, splits without overlap, metrics.

Letters: B batch, S sequence, V vocab. All tasks use token 0 for padding and pad on the right, which a causal
model never sees from an earlier position.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

IGNORE_INDEX = -100
PAD = 0

# Share of the instance space in each split, in hundredths.
SPLIT_SHARES: dict[str, int] = {"train": 80, "validation": 10, "test": 10}

Level = int | tuple[int, int]
"""A difficulty: one number, or an inclusive (low, high) range drawn uniformly for each row."""

_PRIME = 2**31 - 1
_MAX_ROUNDS = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and labels, aligned: ``logits[b, s]`` is scored against ``targets[b, s]``.

    Attributes:
        ids: (B, S) long, input tokens.
        targets: (B, S) long, the token wanted at each position, ``IGNORE_INDEX`` (-100) where none is scored.
    """

    ids: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Task(ABC):
    """A generator of labelled sequences whose difficulty is one named number.

    A subclass is a frozen dataclass. It names its difficulty in ``difficulty``, has a field of that name for
    the default, and implements ``vocab_size``, ``bounds``, ``width`` and ``_draw``.

    Splits are made by construction: a stable hash of the tokens of an instance (of those that :meth:`identity`
    names) assigns it to train (80 %), validation (10 %) or test (10 %), so an instance can never be in two of
    them, whatever the seeds and ranges and however small the instance space. Padding does not enter the hash.

    Attributes:
        per: "sequence" draws a difficulty for each row of a range, "batch" one for all rows of a training batch,
            which is then no wider than it has to be. Held-out batches always draw one for each row.
    """

    difficulty: ClassVar[str]
    per: str = field(default="sequence", kw_only=True)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: every token, in inputs and targets, is below this number."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[int, int | None]:
        """Smallest and largest difficulty that the task accepts (None: no largest)."""

    @abstractmethod
    def width(self, level: int) -> int:
        """S of a batch whose greatest difficulty is ``level``."""

    def train_width(self, level: int) -> int:
        """S of a training batch whose greatest difficulty is ``level``; held-out ones are ``width`` wide."""
        return self.width(level)

    @abstractmethod
    def _draw(self, levels: Tensor, width: int, generator: torch.Generator) -> Batch:
        """One instance for each entry of ``levels`` (B,), padded to ``width``; splits are not its concern."""

    def identity(self, ids: Tensor) -> Tensor:
        """What makes two rows (B, S) the same instance to the splits, (B, S'): all their tokens."""
        return ids

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("sequence", "batch"))
        self._check_level(getattr(self, self.difficulty))

    def sample(
        self, batch_size: int, *, generator: torch.Generator, split: str = "train", **difficulty: Level
    ) -> Batch:
        """Draw instances of one split.

        Args:
            batch_size: B, at least 1.
            generator: source of all randomness; the batch lives on its device.
            split: "train", "validation" or "test".
            **difficulty: the task's own difficulty by name (``length=48``, ``hops=(1, 4)``); its field if
                left out. With a range every row is padded to the width of the upper end, so shapes stay the
                same, unless ``per`` is "batch".

        Returns:
            A batch of shape (B, S).

        Raises:
            ValueError: an argument is out of range, or the split has no instance at this difficulty.
        """
        check_integer("batch_size", batch_size, 1)
        check_choice("split", split, SPLIT_SHARES)
        low, high = self._level_of(difficulty)
        if self.per == "batch" and split == "train":
            low = high = int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))
        oversample = int(batch_size * 115 / SPLIT_SHARES[split]) + 16
        kept: list[Batch] = []
        missing = batch_size
        for _ in range(_MAX_ROUNDS):
            levels = torch.randint(low, high + 1, (oversample,), generator=generator, device=generator.device)
            drawn = self._draw(levels, self.width(high), generator)
            own = split_of(self.identity(drawn.ids)) == list(SPLIT_SHARES).index(split)
            rows = own.nonzero()[:missing, 0]
            kept.append(Batch(drawn.ids[rows], drawn.targets[rows]))
            missing -= len(rows)
            if missing == 0:
                return Batch(torch.cat([b.ids for b in kept]), torch.cat([b.targets for b in kept]))
        raise ValueError(
            f"split={split!r} has too few instances at {self.difficulty}={(low, high)}: the instance space "
            f"of {type(self).__name__} is too small there; choose a greater {self.difficulty}"
        )

    def accuracy(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Share of right answers by argmax.

        Args:
            logits: (B, S, V') with V' >= ``vocab_size``; a model may have unused tokens.
            batch: the batch they were computed from.

        Returns:
            ``token_accuracy`` over scored positions, ``sequence_accuracy`` over rows with every scored
            position right, ``last_token_accuracy`` over the last scored position of each row (for a
            cumulative task the one that needs the most steps). Sequence accuracy under teacher forcing equals
            the share of rows that greedy decoding gets entirely right, because decoding departs from the
            answer only at a first error.

        Raises:
            ValueError: shapes do not fit, or the batch has a row with nothing scored.
        """
        if logits.dim() != 3 or logits.shape[:2] != batch.targets.shape or logits.shape[2] < self.vocab_size:
            b, s = batch.targets.shape
            raise ValueError(
                f"logits has shape {tuple(logits.shape)}; "
                f"allowed is ({b}, {s}, V) with V >= {self.vocab_size}"
            )
        scored = batch.targets != IGNORE_INDEX
        if not bool(scored.any(dim=1).all()):
            raise ValueError("batch.targets has a row with nothing scored; allowed are rows with an answer")
        right = (logits.argmax(-1) == batch.targets) & scored
        positions = torch.arange(scored.shape[1], device=scored.device)
        last = torch.where(scored, positions, -1).amax(dim=1, keepdim=True)
        return {
            "token_accuracy": right.sum().item() / scored.sum().item(),
            "sequence_accuracy": (right | ~scored).all(dim=1).double().mean().item(),
            "last_token_accuracy": right.gather(1, last).double().mean().item(),
        }

    def _level_of(self, difficulty: dict[str, Level]) -> tuple[int, int]:
        unknown = sorted(set(difficulty) - {self.difficulty})
        if unknown:
            raise ValueError(
                f"difficulty {unknown[0]!r} is unknown; {type(self).__name__} has {self.difficulty!r}"
            )
        return self._check_level(difficulty.get(self.difficulty, getattr(self, self.difficulty)))

    def _check_level(self, level: Level) -> tuple[int, int]:
        # A list is what a pair becomes in a JSON or YAML file.
        pair = level if isinstance(level, (tuple, list)) else (level, level)
        least, most = self.bounds
        whole = len(pair) == 2 and all(is_integer(n) for n in pair)
        if not whole or not least <= pair[0] <= pair[1] or (most is not None and pair[1] > most):
            upto = "" if most is None else f" and <= {most}"
            raise ValueError(
                f"{self.difficulty}={level!r}; allowed is an integer >= {least}{upto}, "
                "or an ascending pair (low, high) of such integers"
            )
        return pair[0], pair[1]


def split_of(ids: Tensor) -> Tensor:
    """Which split each row belongs to, by a hash of its tokens.

    The hash is a polynomial in a fixed base modulo 2^31 - 1, followed by a nonlinear mix, so that the split
    is not a linear function of the tokens. All products stay below 2^63. Padding is token 0 and adds nothing.

    Args:
        ids: (B, S) long, tokens below 2^31, S below 2^31 / V.

    Returns:
        (B,) long: 0 train, 1 validation, 2 test.
    """
    h = (ids * _powers(ids.shape[1]).to(ids.device)).sum(dim=1) % _PRIME
    for multiplier in (1_103_515_245, 1_566_083_941):
        h = (h ^ (h >> 15)) * multiplier % _PRIME
    bucket = (h ^ (h >> 13)) % 100
    train, validation = SPLIT_SHARES["train"], SPLIT_SHARES["validation"]
    return (bucket >= train).long() + (bucket >= train + validation).long()


@lru_cache(maxsize=64)
def _powers(length: int) -> Tensor:
    return torch.tensor([pow(48_271, i + 1, _PRIME) for i in range(length)], dtype=torch.long)


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose seed is a hash of ``parts``: the same parts give the same stream on every
    machine, and (seed, step) pairs do not collide the way that seed + step does.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def is_integer(value: object) -> TypeGuard[int]:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(field: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse ``value`` unless it is an integer in [least, most]."""
    if not is_integer(value) or value < least or (most is not None and value > most):
        upto = "" if most is None else f" and <= {most}"
        raise ValueError(f"{field}={value!r}; allowed is an integer >= {least}{upto}")


def check_choice(field: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse ``value`` unless it is one of the names in ``allowed``."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{field}={value!r}; allowed: {', '.join(map(repr, names))}")
