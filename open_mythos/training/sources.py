"""From the [data] section to batches: the one stream to train on, and fixed batches to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from open_mythos.config import ConfigError
from open_mythos.tasks import Task
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.training.batches import PackedDataset, TaskStream
from open_mythos.training.config import RunConfig
from open_mythos.training.data import Document, load_documents, pack_documents, split_documents

__all__ = ["evaluation_batches", "train_stream"]

# Below this, a split by document would leave a part empty or tiny: each document is cut instead.
_FEW_DOCUMENTS = 20
_CUTS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


def train_stream(config: RunConfig) -> tuple[PackedDataset | TaskStream, dict[str, Any]]:
    """The batches to train on, without end, and a JSON-ready account of the data.

    Raises:
        ConfigError: the source is not there, is too small, or does not fit the task.
    """
    size, seed = config.train.batch_size, config.train.seed
    if config.data.is_task:
        task, known = config.data.task(), config.model.vocab_size
        if known < task.vocab_size:
            allowed = f"at least {task.vocab_size} for the task"
            raise ConfigError(f"model.vocab_size = {known} is not allowed: it must be {allowed}")
        _check_lengths(config, task)
        return TaskStream(task, size, seed=seed), {"task": repr(task)}
    documents, report = _documents(config, "train")
    packed = _pack(documents, config, "train")
    return PackedDataset(packed, size, seed=seed), {**report, "train": packed.report()}


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
        documents, _ = _documents(config, split)
        batches = PackedDataset(_pack(documents, config, split), size, seed=1, epochs=1)
    for batch in batches:
        yield {key: rows[:left] for key, rows in batch.items()}
        left -= size
        if left <= 0:
            return


def _check_lengths(config: RunConfig, task: Task) -> None:
    """Refuse now what would end the run after its training: a sweep over sequences too long for the model."""
    own, longest = getattr(task, task.difficulty), config.model.max_seq_len
    hardest = own[1] if isinstance(own, tuple) else own
    levels = [(f"data.{task.difficulty}", hardest), *(("eval.levels", level) for level in config.eval.levels)]
    for name, level in levels:
        least, most = task.bounds
        if level < least or (most is not None and level > most):
            allowed = f"{least} to {most}" if most is not None else f"at least {least}"
            raise ConfigError(f"{name} = {level} is not allowed: for this task it must be {allowed}")
        if task.width(level) > longest:
            raise ConfigError(
                f"{name} = {level} is not allowed: it makes sequences of {task.width(level)} tokens, more than "
                f"model.max_seq_len ({longest})"
            )


def _documents(config: RunConfig, split: str) -> tuple[list[Document], dict[str, Any]]:
    source = config.data.source
    try:
        corpus = load_documents(source, text_field=config.data.options["text_field"])
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    if len(corpus.documents) >= _FEW_DOCUMENTS:
        return split_documents(corpus.documents)[split], corpus.report()
    low, high = _CUTS[split]
    parts = [
        Document(name, text[int(low * len(text)) : int(high * len(text))]) for name, text in corpus.documents
    ]
    return parts, {
        **corpus.report(),
        "split": f"each document cut, for there are fewer than {_FEW_DOCUMENTS}",
    }


def _pack(documents: list[Document], config: RunConfig, split: str) -> Any:
    options = config.data.options
    try:
        return pack_documents(documents, ByteTokenizer(), seq_len=options["seq_len"], bos=options["bos"])
    except ValueError as error:
        raise ConfigError(f"data.source = {config.data.source!r}, {split} split: {error}") from error
