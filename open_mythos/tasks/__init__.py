"""Reasoning tasks with known answers, exact splits and one difficulty each."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from open_mythos.tasks.addition import Addition
from open_mythos.tasks.base import (
    IGNORE_INDEX,
    PAD,
    SPLIT_SHARES,
    Batch,
    Level,
    Task,
    check_choice,
    seeded_generator,
    split_of,
)
from open_mythos.tasks.digit_chain import DigitChain
from open_mythos.tasks.khop import KHop
from open_mythos.tasks.parity import Parity

TASKS: dict[str, type[Task]] = {
    "parity": Parity,
    "digit_chain": DigitChain,
    "khop": KHop,
    "addition": Addition,
}


def get_task(name: str, **kwargs: Any) -> Task:
    """Build a task by name.

    Args:
        name: a key of ``TASKS``: "parity", "digit_chain", "khop" or "addition".
        **kwargs: fields of its dataclass, for example ``get_task("parity", length=32, bos=True)``.

    Raises:
        ValueError: unknown task, unknown field, or a field out of range.
    """
    check_choice("task", name, TASKS)
    known = [f.name for f in fields(TASKS[name])]
    for field in kwargs:
        check_choice(f"field of task {name!r}", field, known)
    return TASKS[name](**kwargs)


__all__ = [
    "IGNORE_INDEX",
    "PAD",
    "SPLIT_SHARES",
    "TASKS",
    "Addition",
    "Batch",
    "DigitChain",
    "KHop",
    "Level",
    "Parity",
    "Task",
    "get_task",
    "seeded_generator",
    "split_of",
]
