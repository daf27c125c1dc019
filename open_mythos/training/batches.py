"""Batches to train on, in a seeded order that resumes exactly: of packed text, or of a reasoning task.

Letters: B batch, S sequence, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
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
from open_mythos.training.data import PackedTokens

__all__ = ["PackedDataset", "TaskStream"]


class PackedDataset:
    """Batches of packed blocks in a seeded order; an iterator whose state is three numbers.

    Epoch e visits the blocks in a permutation drawn from (seed, e), each exactly once. A batch that reaches
    the end of an epoch goes on into the next, so all batches have B rows; only with ``epochs`` set can the
    very last be smaller. Each batch is ``{"ids", "targets", "document_ids"}``, all (B, S) long. A target that
    belongs to another document than its input is -100: the loss never asks for the start of a document from
    the end of another. With ``bos=True`` in packing all text tokens are still asked for.

    Args:
        packed: from :func:`~open_mythos.training.data.pack_documents`.
        batch_size: B, at least 1. It may differ when training is resumed.
        seed: of the permutations, at least 0.
        shuffle: False keeps the order of the corpus, for evaluation.
        epochs: stop after this many; None goes on for ever.
    """

    def __init__(
        self,
        packed: PackedTokens,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        if epochs is not None:
            check_integer("epochs", epochs, 1)
        self.packed = packed
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self.epoch = 0
        self.position = 0
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch; see the class."""
        chosen: list[Tensor] = []
        wanted = self.batch_size
        while wanted and (self.epochs is None or self.epoch < self.epochs):
            rows = self._permutation()[self.position : self.position + wanted]
            chosen.append(rows)
            wanted -= len(rows)
            self.position += len(rows)
            if self.position == len(self.packed):
                self.epoch, self.position = self.epoch + 1, 0
        if not chosen:
            raise StopIteration
        return self._batch(torch.cat(chosen))

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as JSON values: epoch, position (blocks into the epoch), seed, and a check of
        the data and order that they refer to.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.packed.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where ``state`` was taken: the next batch is the one that would have come next.

        Raises:
            ValueError: a field is missing or out of range, or the state was taken on other data or in another
                order.
        """
        _check_fields(state, self.state_dict())
        if state["fingerprint"] != self.packed.fingerprint:
            raise ValueError(
                f"fingerprint={state['fingerprint']!r} in the state, but this data has "
                f"{self.packed.fingerprint!r}; "
                "allowed is the same documents, tokenizer and seq_len"
            )
        if state["shuffle"] != self.shuffle:
            raise ValueError(
                f"shuffle={state['shuffle']!r} in the state; allowed is {self.shuffle!r}, as constructed"
            )
        check_integer("epoch", state["epoch"], 0)
        check_integer("position", state["position"], 0, len(self.packed) - 1)
        check_integer("seed", state["seed"], 0)
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]

    def _permutation(self) -> Tensor:
        """(N,) long, the order of the current epoch."""
        if not self.shuffle:
            return torch.arange(len(self.packed))
        key = (self.seed, self.epoch)
        if self._order is None or self._order[0] != key:
            generator = seeded_generator("packed", *key)
            self._order = (key, torch.randperm(len(self.packed), generator=generator))
        return self._order[1]

    def _batch(self, rows: Tensor) -> dict[str, Tensor]:
        tokens = self.packed.tokens[rows].long()
        documents = self.packed.document_ids[rows].long()
        crossing = documents[:, 1:] != documents[:, :-1]
        return {
            "ids": tokens[:, :-1].contiguous(),
            "targets": tokens[:, 1:].masked_fill(crossing, IGNORE_INDEX),
            "document_ids": documents[:, :-1].contiguous(),
        }


class TaskStream:
    """Batches of a reasoning task, with the interface of :class:`PackedDataset`.

    The batch of step i depends on (seed, split, i) and B, not on the batches before it, so a resumed run sees
    the same batches. Each is ``{"ids", "targets"}``, both (B, S) long, without ``document_ids``: a row is one
    document.

    Args:
        task: from ``open_mythos.tasks``.
        batch_size: B, at least 1.
        seed: at least 0.
        split: "train", "validation" or "test".
        steps: stop after this many batches; None goes on for ever.
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
        **difficulty: Level,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        check_choice("split", split, SPLIT_SHARES)
        if steps is not None:
            check_integer("steps", steps, 1)
        # Wrong difficulties are told here, not at the first step of a run.
        task.sample(1, generator=seeded_generator(0), split=split, **difficulty)
        self.task = task
        self.batch_size = batch_size
        self.seed = seed
        self.split = split
        self.steps = steps
        self.difficulty = difficulty
        self.step = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The batch of the current step; see the class."""
        if self.steps is not None and self.step >= self.steps:
            raise StopIteration
        generator = seeded_generator("task", self.seed, self.split, self.step)
        batch = self.task.sample(self.batch_size, generator=generator, split=self.split, **self.difficulty)
        self.step += 1
        return {"ids": batch.ids, "targets": batch.targets}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as JSON values: step, seed, and the task and split that they refer to."""
        return {
            "step": self.step,
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
        check_integer("step", state["step"], 0)
        check_integer("seed", state["seed"], 0)
        self.step, self.seed = state["step"], state["seed"]


def _check_fields(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if set(state) != set(own):
        raise ValueError(f"state has the fields {sorted(state)}; allowed are exactly {sorted(own)}")
