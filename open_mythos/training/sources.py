"""From the [data] section to batches: the one stream to train on, and fixed batches to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from open_mythos.config import ConfigError
from open_mythos.tasks import Task
from open_mythos.training.batches import PackedDataset, TaskStream
from open_mythos.training.config import RunConfig
from open_mythos.training.prepare import Prepared, Tell, prepare
from open_mythos.training.shards import Blocks

__all__ = ["checked_task", "evaluation_batches", "train_stream"]


def train_stream(
    config: RunConfig, rank: int = 0, size: int = 1, tell: Tell | None = None
) -> tuple[PackedDataset | TaskStream, dict[str, Any]]:
    """The batches to train on, without end, and a JSON-ready account of the data.

    Text is tokenised first, unless that has been done (:func:`~open_mythos.training.prepare.prepare`). All ranks may
    call this at once.

    Args:
        config: the run; ``train.batch_size`` rows are the batch of all ranks together.
        rank: rank r gets the rows from r·B/size on of each batch. The order of samples is the same for every size.
        size: number of ranks; divides the batch size.
        tell: called with a short phrase now and then while text is tokenised.

    Raises:
        ConfigError: the source is not there, is too small, or does not fit the model; the batch cannot be divided.
    """
    batch, seed = config.train.batch_size, config.train.seed
    if batch % size:
        allowed = f"a multiple of the number of processes, {size}"
        raise ConfigError(f"train.batch_size = {batch} is not allowed: it must be {allowed}")
    if config.data.is_task:
        task = checked_task(config)
        return TaskStream(task, batch, seed=seed, rank=rank, size=size), {"task": repr(task)}
    prepared = prepare(config.data, tell)
    blocks = _blocks(config, prepared, "train")
    ahead = {key: config.data.options[key] for key in ("apart", "prefetch", "workers")}
    stream = PackedDataset(blocks, batch, seed=seed, rank=rank, size=size, **ahead)
    return stream, {**prepared.report(), "train": blocks.report()}


def checked_task(config: RunConfig) -> Task:
    """The task of a config whose source is one.

    Raises:
        ConfigError: its options are not right, or it or a difficulty does not fit the model.
    """
    task, known = config.data.task(), config.model.vocab_size
    if known < task.vocab_size:
        allowed = f"at least {task.vocab_size} for the task"
        raise ConfigError(f"model.vocab_size = {known} is not allowed: it must be {allowed}")
    _check_lengths(config, task)
    return task


def evaluation_batches(
    config: RunConfig, split: str, level: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """The same ``eval.examples`` rows at every call (fewer where a text split has fewer blocks).

    Args:
        config: the run.
        split: "train", "validation" or "test".
        level: difficulty of a task; the one trained on when None.

    Raises:
        ConfigError: the split of this source has nothing to offer.
    """
    left, size = config.eval.examples, config.train.batch_size
    if config.data.is_task:
        task = config.data.task()
        harder = {} if level is None else {task.difficulty: level}
        steps = -(-left // size)
        batches: Iterator[dict[str, Tensor]] = TaskStream(
            task, size, seed=1, split=split, steps=steps, **harder
        )
    else:
        blocks = _blocks(config, prepare(config.data), split)
        batches = PackedDataset(blocks, size, seed=1, epochs=1, apart=config.data.options["apart"])
    for batch in batches:
        yield {key: rows[:left] for key, rows in batch.items()}
        left -= size
        if left <= 0:
            return


def _blocks(config: RunConfig, prepared: Prepared, split: str) -> Blocks:
    """A split, once it is known to fit the model."""
    index, model, options = prepared.index, config.model, config.data.options
    if model.vocab_size < index["vocab_size"]:
        allowed = f"at least {index['vocab_size']} for this text"
        raise ConfigError(f"model.vocab_size = {model.vocab_size} is not allowed: it must be {allowed}")
    if model.eos_token_id != index["eos_id"]:
        allowed = f"{index['eos_id']}, which ends the documents of this text"
        raise ConfigError(f"model.eos_token_id = {model.eos_token_id} is not allowed: it must be {allowed}")
    return Blocks(prepared.folder, index, split, options["seq_len"], options["verify"])


def _check_lengths(config: RunConfig, task: Task) -> None:
    """Refuse now what would end the run after its training: a sweep over sequences too long for the model."""
    own, longest = getattr(task, task.difficulty), config.model.max_seq_len
    hardest = own[1] if isinstance(own, tuple) else own
    levels = [(f"data.{task.difficulty}", hardest, task.train_width)]
    levels += [("eval.levels", level, task.width) for level in config.eval.levels]
    for name, level, width in levels:
        least, most = task.bounds
        if level < least or (most is not None and level > most):
            allowed = f"{least} to {most}" if most is not None else f"at least {least}"
            raise ConfigError(f"{name} = {level} is not allowed: for this task it must be {allowed}")
        if width(level) > longest:
            raise ConfigError(
                f"{name} = {level} is not allowed: it makes sequences of {width(level)} tokens, more than "
                f"model.max_seq_len ({longest})"
            )
