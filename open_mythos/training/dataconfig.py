"""The [data] section of a run config, checked when it is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_mythos.config import ConfigError
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.training.checks import choice, error, known, whole

__all__ = ["FREE", "TASK_NAMES", "DataConfig"]

# The names of open_mythos.tasks.TASKS, without its torch; a test keeps the two equal.
TASK_NAMES = ("addition", "digit_chain", "khop", "parity")

# What may differ when a run goes on: none of it decides what the next batch holds.
FREE = ("cache", "on_bad", "prefetch", "verify", "workers")

TEXT_FIELDS: dict[str, Any] = {"seq_len": 256, "bos": False, "text_field": "text"}


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from.

    Attributes:
        source: "python" (help topics and standard library of this Python), a file or directory of text, or a
            task: "addition", "digit_chain", "khop", "parity". A path of such a name is written "./parity".
        options: for text ``seq_len`` (S), ``bos`` and ``text_field``; for a task the fields of its dataclass.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise error("data.source", self.source, "'python', a path, or a task: " + ", ".join(TASK_NAMES))
        if self.is_task:
            return
        for name in self.options:
            known(f"data.{name}", name, TEXT_FIELDS, "text")
        options = {**TEXT_FIELDS, **self.options}
        whole("data.seq_len", options["seq_len"], 1)
        choice("data.bos", options["bos"], (True, False))
        if not isinstance(options["text_field"], str):
            raise error("data.text_field", options["text_field"], "a string")
        object.__setattr__(self, "options", options)

    @property
    def is_task(self) -> bool:
        """The source is a reasoning task, not text."""
        return self.source in TASK_NAMES

    @property
    def is_bytes(self) -> bool:
        """The source is text, and a token is a byte."""
        return not self.is_task

    def task(self) -> Any:
        """The task (imports torch).

        Raises:
            ConfigError: the source is text, or an option does not fit the task.
        """
        if not self.is_task:
            raise ConfigError(f"data.source = {self.source!r} is text, not a task")
        from open_mythos.tasks import get_task

        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}
        try:
            return get_task(self.source, **options)
        except ValueError as problem:
            raise ConfigError(f"data: {problem}") from problem

    def tokens(self, given: Container[str] = ()) -> dict[str, int | None]:
        """Model fields that the data decides: vocab_size and the special ids.

        The model is told of a BOS only when documents begin with one: it would never have learnt it.

        Args:
            given: fields that the config names itself. What it takes work to find out is left out then.
        """
        if self.is_task:
            none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            return dict(none) if "vocab_size" in given else {"vocab_size": self.task().vocab_size, **none}
        byte = ByteTokenizer
        return {
            "vocab_size": byte.vocab_size,
            "bos_token_id": byte.bos_id if self.options["bos"] else None,
            "eos_token_id": byte.eos_id,
            "pad_token_id": byte.pad_id,
        }
