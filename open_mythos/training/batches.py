"""Batches to train on, in a seeded order that resumes exactly: of packed text, or of a reasoning task.

Letters: B batch (of all ranks together), S sequence, N blocks.

A batch is a function of the seed and of its position alone. So the order of samples is the same on every number of
ranks, whatever has been prefetched, and a stream's state is a position.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.tasks.base import (
    IGNORE_INDEX,
    SPLIT_SHARES,
    Level,
    Task,
    check_choice,
    check_integer,
    seeded_generator,
)
from open_mythos.training.shards import Blocks

__all__ = ["PackedDataset", "Permutation", "TaskStream"]

_ROUNDS = 6


class Permutation:
    """A seeded permutation of 0 … n - 1, computed index by index: nothing of size n is stored.

    A Feistel network on the smallest even number of bits that holds n (Luby and Rackoff 1988), walked until the
    result is below n (Black and Rogaway 2002): fewer than four rounds of it on average.

    Args:
        n: at least 1.
        *key: seeds; each gives another permutation.
    """

    def __init__(self, n: int, *key: int) -> None:
        check_integer("n", n, 1)
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of these indices goes; same shape."""
        values = self._cipher(index.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._cipher(values[outside])
        return values.astype(np.int64)

    def _cipher(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & self._mask)
        return (left << self._half) | right


class _Stream(ABC):
    """Batches by position, made ahead by threads if asked.

    Args:
        batch_size: B.
        seed: at least 0.
        rank: which rows of each batch to give: the rank-th of ``size`` equal contiguous parts.
        size: number of ranks; divides B.
        prefetch: batches to make ahead; 0 makes each when it is asked for.
        workers: threads that make them.
    """

    def __init__(
        self, batch_size: int, seed: int, rank: int, size: int, prefetch: int = 0, workers: int = 1
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        check_integer("size", size, 1)
        check_integer("rank", rank, 0, size - 1)
        check_integer("prefetch", prefetch, 0)
        check_integer("workers", workers, 1)
        if batch_size % size:
            raise ValueError(f"batch_size={batch_size}; allowed is a multiple of the number of ranks, {size}")
        self.batch_size, self.seed, self.rank, self.size = batch_size, seed, rank, size
        self._prefetch, self._workers = prefetch, workers
        self._position = 0
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[dict[str, Tensor] | None]] = deque()

    @property
    @abstractmethod
    def stride(self) -> int:
        """How far a batch moves the position."""

    @abstractmethod
    def batch_at(self, position: int) -> dict[str, Tensor] | None:
        """This rank's rows of the batch at a position; None behind the end."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch."""
        batch = self._ahead() if self._prefetch else self.batch_at(self._position)
        if batch is None:
            raise StopIteration
        self._position += self.stride
        return batch

    def close(self) -> None:
        """Drop what is being made ahead. The stream can still be used."""
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _resume(self, state: Mapping[str, Any], position: str) -> None:
        """Take the seed of a state and the position under this name, if both are right."""
        check_integer(position, state[position], 0)
        check_integer("seed", state["seed"], 0)
        self.close()
        self._position, self.seed = state[position], state["seed"]

    def _ahead(self) -> dict[str, Tensor] | None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="batches")
        # One more than is kept ahead: the first of them is handed out now.
        while len(self._pending) <= self._prefetch:
            position = self._position + self.stride * len(self._pending)
            self._pending.append(self._pool.submit(self.batch_at, position))
        try:
            return self._pending.popleft().result()
        except BaseException:
            self.close()  # what was read ahead is no longer the next
            raise


class PackedDataset(_Stream):
    """Batches of packed blocks in a seeded order; an iterator whose state is one position.

    Epoch e visits the blocks in a permutation that depends on (seed, e), each exactly once. A batch that reaches the
    end of an epoch goes on into the next, so all batches have B rows; only with ``epochs`` set can the very last be
    smaller. Each batch is ``{"ids", "targets", "document_ids"}``, all (B / size, S) long; ``document_ids`` count the
    documents of a row from 0. A target that belongs to another document than its input is -100: the loss never asks
    for the start of a document from the end of another. With ``bos`` in preparing, all text tokens are still asked
    for.

    Args:
        blocks: what to read.
        batch_size: B, at least 1. It may differ when training is resumed, and so may rank and size.
        seed: of the permutations, at least 0.
        shuffle: False keeps the order of the corpus.
        epochs: stop after this many; None goes on for ever.
        rank: see below.
        size: rank r of ``size`` gets the rows from r·B/size on.
        prefetch: batches to make ahead, in pinned memory where there is a GPU; no effect on what they hold.
        workers: threads that make them.
        apart: False leaves out ``document_ids``, so that a token sees what stands before its document in the row.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        apart: bool = True,
        epochs: int | None = None,
        rank: int = 0,
        size: int = 1,
        prefetch: int = 0,
        workers: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, rank, size, prefetch, workers)
        if epochs is not None:
            check_integer("epochs", epochs, 1)
        self.blocks = blocks
        self.shuffle = shuffle
        self.apart = apart
        self.epochs = epochs
        self._pin = bool(prefetch) and torch.cuda.is_available()

    @property
    def stride(self) -> int:
        """Samples in a batch of all ranks."""
        return self.batch_size

    def batch_at(self, position: int) -> dict[str, Tensor] | None:
        """This rank's rows of the batch that begins with sample ``position`` of the run."""
        count = self.batch_size
        if self.epochs is not None:
            count = min(count, self.epochs * len(self.blocks) - position)
        if count <= 0:
            return None
        first, last = count * self.rank // self.size, count * (self.rank + 1) // self.size
        ids = self.blocks.rows(self._order(np.arange(position + first, position + last, dtype=np.int64)))
        ends = ids == self.blocks.eos_id
        # The document of a place is the number of ends before it.
        documents = np.cumsum(ends, axis=1) - ends
        targets = np.where(ends[:, :-1], IGNORE_INDEX, ids[:, 1:])
        batch = {"ids": ids[:, :-1].copy(), "targets": targets}
        if self.apart:
            batch["document_ids"] = documents[:, :-1].copy()
        tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
        return {key: value.pin_memory() for key, value in tensors.items()} if self._pin else tensors

    def _order(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block of each sample of the run."""
        epochs, places = np.divmod(samples, len(self.blocks))
        if self.shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                places[chosen] = Permutation(len(self.blocks), self.seed, int(epoch))(places[chosen])
        return places

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as JSON values: samples that all ranks together have taken, seed, and a check of the
        data and order that they refer to. The same on every rank.
        """
        return {
            "samples": self._position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.blocks.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where ``state`` was taken: the next batch is the one that would have come next.

        Raises:
            ValueError: a field is missing or out of range, or the state was taken on other data or in another order.
        """
        _check_fields(state, self.state_dict())
        if state["fingerprint"] != self.blocks.fingerprint:
            raise ValueError(
                f"fingerprint={state['fingerprint']!r} in the state, but this data has "
                f"{self.blocks.fingerprint!r}; "
                "allowed is the same documents, tokenizer and seq_len"
            )
        if state["shuffle"] != self.shuffle:
            raise ValueError(
                f"shuffle={state['shuffle']!r} in the state; allowed is {self.shuffle!r}, as constructed"
            )
        self._resume(state, "samples")


class TaskStream(_Stream):
    """Batches of a reasoning task, with the interface of :class:`PackedDataset`.

    The batch of step i depends on (seed, split, i) and B, not on the batches before it nor on the number of ranks, so a
    resumed run sees the same batches. Each is ``{"ids", "targets"}``, both (B / size, S) long, without
    ``document_ids``: a row is one document.

    Args:
        task: from ``open_mythos.tasks``.
        batch_size: B, at least 1.
        seed: at least 0.
        split: "train", "validation" or "test".
        steps: stop after this many batches; None goes on for ever.
        rank: see below.
        size: rank r of ``size`` gets the rows from r·B/size on.
        **difficulty: passed to ``task.sample``.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int,
        *,
        seed: int = 0,
        split: str = "train",
        steps: int | None = None,
        rank: int = 0,
        size: int = 1,
        **difficulty: Level,
    ) -> None:
        super().__init__(batch_size, seed, rank, size)
        check_choice("split", split, SPLIT_SHARES)
        if steps is not None:
            check_integer("steps", steps, 1)
        # Wrong difficulties are told here, not at the first step of a run.
        task.sample(1, generator=seeded_generator(0), split=split, **difficulty)
        self.task = task
        self.split = split
        self.steps = steps
        self.difficulty = difficulty

    @property
    def stride(self) -> int:
        """One step."""
        return 1

    def batch_at(self, position: int) -> dict[str, Tensor] | None:
        """This rank's rows of the batch of a step. All rows are drawn, for each depends on those before it."""
        if self.steps is not None and position >= self.steps:
            return None
        generator = seeded_generator("task", self.seed, self.split, position)
        batch = self.task.sample(self.batch_size, generator=generator, split=self.split, **self.difficulty)
        share = self.batch_size // self.size
        own = slice(self.rank * share, (self.rank + 1) * share)
        return {"ids": batch.ids[own], "targets": batch.targets[own]}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as JSON values: step, seed, and the task and split that they refer to. The same on every
        rank.
        """
        return {
            "step": self._position,
            "seed": self.seed,
            "split": self.split,
            "task": f"{self.task!r} {sorted(self.difficulty.items())}",
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where ``state`` was taken.

        Raises:
            ValueError: a field is missing or out of range, or the state belongs to another task or split.
        """
        own = self.state_dict()
        _check_fields(state, own)
        for name in ("split", "task"):
            if state[name] != own[name]:
                raise ValueError(
                    f"{name}={state[name]!r} in the state; allowed is {own[name]!r}, as constructed"
                )
        self._resume(state, "step")


def _check_fields(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if set(state) != set(own):
        raise ValueError(f"state has the fields {sorted(state)}; allowed are exactly {sorted(own)}")
