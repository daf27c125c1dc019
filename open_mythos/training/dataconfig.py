"""The [data] section of a run config, checked when it is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_mythos.config import ConfigError
from open_mythos.tokenizer import ByteTokenizer, Ids, MythosTokenizer, tokenizer_of
from open_mythos.training.checks import choice, error, known, whole

__all__ = ["FREE", "TASK_NAMES", "DataConfig"]

# The names of open_mythos.tasks.TASKS, without its torch; a test keeps the two equal.
TASK_NAMES = ("addition", "digit_chain", "khop", "parity")

# What may differ when a run goes on: none of it decides what the next batch holds.
FREE = ("cache", "on_bad", "prefetch", "verify", "workers")

# None: not set.
TEXT_FIELDS: dict[str, Any] = {
    "name": None,
    "split": "train",
    "revision": None,
    "streaming": True,
    "text_field": "text",
    "tokenizer": "bytes",
    "eos_token": None,
    "token_dtype": None,
    "vocab_size": None,
    "eos_id": None,
    "seq_len": 256,
    "bos": False,
    "apart": True,
    "max_document_chars": 100_000_000,
    "max_tokens": 0,
    "on_bad": "skip",
    "cache": None,
    "prefetch": 2,
    "workers": 1,
    "verify": True,
}
HUB = "hf:"


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from.

    Attributes:
        source: "python" (help topics and standard library of this Python); a file, directory or glob of text
            (.txt, .md, .py), .jsonl (also .gz and .zst), .parquet or token files; "hf:OWNER/NAME", a data set
            of the Hugging Face Hub (or "hf:" and a local data set folder); a folder that ``mythos prepare``
            made; or a task: "addition", "digit_chain", "khop", "parity". A path of such a name is written
            "./parity".
        options: for a task the fields of its dataclass. For text:

            seq_len: S. bos: begin documents with BOS.
            apart: attention stays inside a document. False lets a token see what stands before its document in the
                row, as is often done: attention is then plainly causal, which is faster on GPUs.
            text_field: column or field that holds the text.
            name, split, revision, streaming: of a Hub data set, as in ``datasets.load_dataset``.
            tokenizer: "bytes", a ``tokenizer.json`` file, or the name of a Hugging Face tokenizer.
            eos_token: the end mark in a ``tokenizer.json`` that has none of the usual ones.
            token_dtype: the source is token files, .npy or .bin of this type: "uint16" or "uint32". Then
                vocab_size and eos_id say what is in them, unless ``tokenizer`` does.
            max_document_chars: a longer document (in tokens, for token files) is a bad record.
            max_tokens: stop preparing after so many tokens, all splits together; 0 takes everything.
            on_bad: "skip" counts and locates bad records and leaves them out, "error" stops at the first.
            cache: folder of prepared tokens; $OPEN_MYTHOS_DATA, else the user's cache folder, when not set.
            prefetch, workers: batches made ahead, and the threads that make them. No effect on what they hold.
            verify: compare the sha256 of every shard before it is used.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source or self.source == HUB:
            allowed = "'python', a path, 'hf:OWNER/NAME', or a task: " + ", ".join(TASK_NAMES)
            raise error("data.source", self.source, allowed)
        if self.is_task:
            return
        for name in self.options:
            known(f"data.{name}", name, TEXT_FIELDS, "text")
        options = {**TEXT_FIELDS, **self.options}
        for name in ("seq_len", "max_document_chars", "workers"):
            whole(f"data.{name}", options[name], 1)
        for name in ("max_tokens", "prefetch"):
            whole(f"data.{name}", options[name], 0)
        for name in ("apart", "bos", "streaming", "verify"):
            choice(f"data.{name}", options[name], (True, False))
        choice("data.on_bad", options["on_bad"], ("skip", "error"))
        for name in ("text_field", "split", "tokenizer"):
            _text(name, options[name])
        for name in ("name", "revision", "eos_token", "cache"):
            if options[name] is not None:
                _text(name, options[name])
        _check_tokens(options)
        object.__setattr__(self, "options", options)

    @property
    def is_task(self) -> bool:
        """The source is a reasoning task, not text."""
        return self.source in TASK_NAMES

    @property
    def is_bytes(self) -> bool:
        """The source is text, and a token is a byte."""
        return (
            not self.is_task and self.options["tokenizer"] == "bytes" and self.options["vocab_size"] is None
        )

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

    def tokenizer(self) -> MythosTokenizer | Ids:
        """What turns documents into ids, or says which ids token files may hold.

        Raises:
            ConfigError: it cannot be had, or it has no end mark to put between documents.
        """
        options = self.options
        name = options["tokenizer"]
        try:
            tokenizer = tokenizer_of(options)
        except (OSError, ValueError) as problem:
            reason = " ".join(str(problem).split())
            raise ConfigError(f"data.tokenizer = {name!r} cannot be loaded: {reason}") from problem
        if tokenizer is None:
            return Ids(options["vocab_size"], options["eos_id"])
        for wanted, value in (("eos", tokenizer.eos_id), ("bos", tokenizer.bos_id)):
            if value is None and (wanted == "eos" or options["bos"]):
                raise ConfigError(
                    f"data.tokenizer = {name!r} is not allowed: it must have an {wanted.upper()} token "
                    + ("(data.eos_token names one)" if wanted == "eos" else "for data.bos = true")
                )
        return tokenizer

    def byte_lengths(self) -> list[int] | None:
        """How many bytes of text each id stands for; None if that cannot be said.

        Raises:
            ConfigError: the tokenizer cannot be had.
        """
        tokenizer = self.tokenizer()
        return None if isinstance(tokenizer, Ids) else tokenizer.byte_lengths()

    def tokens(self, given: Container[str] = ()) -> dict[str, int | None]:
        """Model fields that the data decides: vocab_size and the special ids.

        The model is told of a BOS only when documents begin with one: it would never have learnt it.

        Args:
            given: fields that the config names itself. What it takes work to find out is left out then: a
                task's vocab_size (imports torch), and all of a Hugging Face tokenizer (may use the network)
                once vocab_size and eos_token_id are given.
        """
        if self.is_task:
            none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            return dict(none) if "vocab_size" in given else {"vocab_size": self.task().vocab_size, **none}
        bos = self.options["bos"]
        needed = {"vocab_size", "eos_token_id"} | ({"bos_token_id"} if bos else set())
        if not self.is_bytes and all(name in given for name in needed):
            return {"bos_token_id": None, "pad_token_id": None}
        tokenizer = ByteTokenizer if self.is_bytes else self.tokenizer()
        return {
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_id if bos else None,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise error(f"data.{name}", value, "a string")


def _check_tokens(options: Mapping[str, Any]) -> None:
    """The keys of pre-tokenised input go together."""
    if options["token_dtype"] is not None:
        choice("data.token_dtype", options["token_dtype"], ("uint16", "uint32"))
    if options["vocab_size"] is None and options["eos_id"] is None:
        return
    for name, low in (("vocab_size", 1), ("eos_id", 0)):
        whole(f"data.{name}", options[name], low)
    if options["eos_id"] >= options["vocab_size"]:
        raise error("data.eos_id", options["eos_id"], f"below data.vocab_size ({options['vocab_size']})")
    if options["token_dtype"] is None:
        raise ConfigError("data.vocab_size is for token files: data.token_dtype must say how they are stored")
    if options["bos"]:
        raise error("data.bos", True, "false with data.vocab_size: token files are taken as they are")
