"""Preparing: records → documents or bad records → splits → ids → token shards in a cache.

    prepared = prepare(config.data)          # a folder; at once if it is there already
    blocks = Blocks(prepared.folder, prepared.index, "train", seq_len=1024)

A folder appears under its final name when it is complete, so a prepare that is killed leaves no half of one. Its name
is a hash of everything that decides its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_mythos.config import ConfigError
from open_mythos.tokenizer import Ids, MythosTokenizer
from open_mythos.training.data import SPLITS, Record, Source, open_source, split_named
from open_mythos.training.dataconfig import DataConfig
from open_mythos.training.shards import FORMAT, INDEX, ShardWriter, read_index, token_dtype

__all__ = ["REPORT", "Prepared", "prepare", "split_of_name"]

REPORT = "data_report.json"
SHARES = (0.9, 0.05, 0.05)
# Below this, a split by document would leave a part empty or tiny: each document is cut instead.
FEW_DOCUMENTS = 20
# Bad records that are located one by one; all are counted.
LOCATED = 1000
_BATCH_BYTES = 2**22
_BATCH_DOCUMENTS = 4096
_TELL_EVERY_S = 5.0

Tell = Callable[[str], None]


class _Document(NamedTuple):
    """A good document, or its part for one split. The text is bytes of UTF-8, or an array of ids."""

    split: int
    text: Any


@dataclass(frozen=True)
class Prepared:
    """A prepared folder.

    Attributes:
        folder: where it is.
        index: splits, shards, and what was left out; see :mod:`open_mythos.training.shards`.
    """

    folder: Path
    index: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """What a log should hold, JSON-ready, without paths of this machine: documents, tokens, the number of
        bad records by reason, and the first of them.
        """
        index, located = self.index, self.located()
        splits = {
            name: {"documents": split["documents"], "tokens": split["tokens"]}
            for name, split in index["splits"].items()
        }
        return {
            "documents": index["documents"],
            "tokens": sum(split["tokens"] for split in splits.values()),
            "splits": splits,
            "split": index["split"],
            "skipped": index["skipped"],
            "bad": index["bad"],
            "bad_first": located[:10],
            "prepared": self.folder.name,
        }

    def blocks(self, split: str, seq_len: int) -> int:
        """How many blocks of ``seq_len`` places a split gives."""
        shards = self.index["splits"][split]["shards"]
        return sum(max(0, shard["tokens"] - 1) // seq_len for shard in shards)

    def located(self) -> list[dict[str, Any]]:
        """The first bad records: where, reason, detail."""
        try:
            found = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))["located"]
        except (OSError, ValueError, KeyError) as problem:
            raise ConfigError(
                f"{self.folder / REPORT} is damaged: remove its folder, and prepare again"
            ) from problem
        return list(found)


def prepare(data: DataConfig, tell: Tell | None = None) -> Prepared:
    """The token shards of a text source, made if they are not there yet.

    Several processes may call this at once: one works, the others wait.

    Args:
        data: the [data] section.
        tell: called with a short phrase every few seconds of work.

    Raises:
        ConfigError: the source or the tokenizer cannot be had, no document is left, or there is a bad record and
            ``on_bad`` is "error".
    """
    tokenizer = data.tokenizer()
    folder = Path(data.source)
    if (folder / INDEX).is_file():
        prepared = Prepared(folder, _fitting(folder, data, tokenizer))
    else:
        source = open_source(data)
        if source.dealt and (most := data.options["max_tokens"]):
            raise ConfigError(
                f"data.max_tokens = {most!r} is not allowed with files named by their splits, of which the first "
                "would take it all: it must be 0"
            )
        cache = cache_folder(data)
        folder = cache / _key(data, source, tokenizer)
        cache.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX).is_file():
            with _lock(cache / f"{folder.name}.lock") as alone:
                if not (folder / INDEX).is_file():
                    _make(folder, data, source, tokenizer, tell, alone)
        prepared = Prepared(folder, read_index(folder))
    if data.options["on_bad"] == "error" and prepared.index["bad"]:
        raise _refused(prepared.located()[0])
    return prepared


def cache_folder(data: DataConfig) -> Path:
    """Where prepared tokens go: data.cache, $OPEN_MYTHOS_DATA, or the user's cache folder."""
    named = data.options["cache"] or os.environ.get("OPEN_MYTHOS_DATA")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_mythos" / "data"


def split_of_name(name: str) -> int:
    """0 train, 1 validation, 2 test: by a hash of the name, so that a document stays in its split when others come or
    go.
    """
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    point = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1), without rounding up to 1
    return int(point >= SHARES[0]) + int(point >= SHARES[0] + SHARES[1])


def _fitting(folder: Path, data: DataConfig, tokenizer: MythosTokenizer | Ids) -> dict[str, Any]:
    """The index of a folder that was prepared elsewhere."""
    index = read_index(folder)
    for key, own in (("tokenizer", tokenizer.fingerprint), ("bos", data.options["bos"])):
        if index[key] != own:
            raise ConfigError(
                f"data.source = {data.source!r} was prepared with {key} {index[key]!r}, and this run has {own!r}"
            )
    return index


def _key(data: DataConfig, source: Source, tokenizer: MythosTokenizer | Ids) -> str:
    names = ("text_field", "token_dtype", "bos", "max_document_chars", "max_tokens")
    decided = [FORMAT, source.identity, tokenizer.fingerprint, *(data.options[name] for name in names)]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:24]


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Held by one process at a time; the system frees it when that process dies. Gives whether there is such a lock:
    without one, processes may do the same work twice, and the first to finish wins.
    """
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):  # another system, or a file system without locks
            alone = False
        yield alone


def _make(
    folder: Path,
    data: DataConfig,
    source: Source,
    tokenizer: MythosTokenizer | Ids,
    tell: Tell | None,
    alone: bool,
) -> None:
    if alone:
        for stale in folder.parent.glob(f"{folder.name}.part-*"):  # of a prepare that was killed
            shutil.rmtree(stale, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.part-{secrets.token_hex(8)}")
    part.mkdir()
    try:
        _Builder(part, data, tokenizer, tell).build(source)
        try:
            part.rename(folder)
        except OSError:
            if not (folder / INDEX).is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refused(bad: Mapping[str, Any]) -> ConfigError:
    detail = f" ({bad['detail']})" if bad["detail"] else ""
    return ConfigError(
        f"data: {bad['where']}: {bad['reason']}{detail}; data.on_bad = 'skip' leaves such records out and counts them"
    )


class _Builder:
    """One pass over a source."""

    def __init__(
        self, folder: Path, data: DataConfig, tokenizer: MythosTokenizer | Ids, tell: Tell | None
    ) -> None:
        self.folder, self.data, self.tokenizer, self.tell = folder, data, tokenizer, tell
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.eos = tokenizer.eos_id
        self.first = [tokenizer.bos_id] if data.options["bos"] else []
        self.writers: list[ShardWriter] = []
        self.bad: Counter[str] = Counter()
        self.located: list[dict[str, Any]] = []
        self.documents = self.tokens = 0
        self.cut = False
        self._told = time.monotonic()

    def build(self, source: Source) -> None:
        """Write shards, report and index."""
        with ExitStack() as stack:
            writers = [ShardWriter(self.folder, split, self.dtype) for split in SPLITS]
            self.writers = [stack.enter_context(writer) for writer in writers]
            good = self._good(source.records)
            for batch in _batches(self._dealt(good) if source.dealt else self._divided(good)):
                if self._write(batch):
                    break
            splits = {split: writer.finish() for split, writer in zip(SPLITS, self.writers, strict=True)}
        if not self.documents:
            left = dict(sorted((self.bad + Counter(source.skipped.values())).items()))
            raise ConfigError(f"data.source = {self.data.source!r} holds no document; left out there: {left}")
        skipped = dict(sorted(Counter(source.skipped.values()).items()))
        report = {
            "documents": self.documents,
            "bad": dict(sorted(self.bad.items())),
            "located": self.located,
            "located_limit": LOCATED,
            "skipped": dict(source.skipped),
        }
        index = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.eos,
            "bos": self.data.options["bos"],
            "dtype": self.dtype,
            "documents": self.documents,
            "bad": report["bad"],
            "skipped": skipped,
            "split": self._division(source),
            "splits": splits,
        }
        for name, value in ((REPORT, report), (INDEX, index)):
            (self.folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _division(self, source: Source) -> str:
        if source.dealt:
            return "by the names of the files"
        return (
            f"each document cut, for there are fewer than {FEW_DOCUMENTS}" if self.cut else "whole documents"
        )

    def _good(self, records: Iterable[Record]) -> Iterator[Record]:
        """Records with nothing wrong, the text of each as UTF-8 or ids; the others are counted and located."""
        limit, vocab_size = self.data.options["max_document_chars"], self.tokenizer.vocab_size
        for record in records:
            judged = record if record.reason else _judge(record, limit, vocab_size)
            if not judged.reason:
                yield judged
                continue
            self.bad[judged.reason] += judged.many
            found = {"where": judged.where, "reason": judged.reason, "detail": judged.detail}
            if self.data.options["on_bad"] == "error":
                raise _refused(found)
            if len(self.located) < LOCATED:
                self.located.append(found)

    def _dealt(self, records: Iterator[Record]) -> Iterator[_Document]:
        """Documents with the splits that their files are named by."""
        for record in records:
            yield _Document(SPLITS.index(split_named(record.where)), record.text)

    def _divided(self, records: Iterator[Record]) -> Iterator[_Document]:
        """Documents with their splits: whole ones by their names, or, where there are few, each cut in three."""
        held: list[Record] | None = []
        for record in records:
            if held is None:
                yield _Document(split_of_name(record.where), record.text)
                continue
            held.append(record)
            if len(held) == FEW_DOCUMENTS:
                yield from (_Document(split_of_name(early.where), early.text) for early in held)
                held = None
        if held is not None:
            self.cut, self.documents = True, len(held)
            for record in held:
                yield from _cut(record.text)

    def _write(self, batch: list[_Document]) -> bool:
        """Encode and write; whether ``max_tokens`` has been reached."""
        ids, lengths = self._encode([document.text for document in batch])
        ends, most = np.cumsum(lengths), self.data.options["max_tokens"]
        full = bool(most) and self.tokens + int(ends[-1]) >= most
        if full:
            kept = int(np.searchsorted(ends, most - self.tokens)) + 1
            batch, lengths, ids = batch[:kept], lengths[:kept], ids[: int(ends[kept - 1])]
        self.tokens += len(ids)
        self.documents += 0 if self.cut else len(batch)
        splits = np.array([document.split for document in batch])
        owner = np.repeat(splits, lengths)
        for number, writer in enumerate(self.writers):
            writer.write(ids[owner == number], int((splits == number).sum()))
        if self.tell is not None and time.monotonic() - self._told >= _TELL_EVERY_S:
            self._told = time.monotonic()
            self.tell(
                f"{self.documents:,} documents, {self.tokens:,} tokens, {sum(self.bad.values()):,} bad records"
            )
        return full

    def _encode(self, texts: list[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """All ids end to end, marks included, and the length of each document."""
        rows: Sequence[Any] = texts
        if isinstance(texts[0], bytes) and isinstance(self.tokenizer, MythosTokenizer):
            if self.data.is_bytes:
                return self._encode_bytes(texts)
            rows = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        lengths = np.array([len(self.first) + len(row) + 1 for row in rows], dtype=np.int64)
        out = np.empty(int(lengths.sum()), dtype=self.dtype)
        place = 0
        for row, length in zip(rows, lengths.tolist(), strict=True):
            out[place : place + len(self.first)] = self.first
            out[place + len(self.first) : place + length - 1] = row
            place += length
        out[np.cumsum(lengths) - 1] = self.eos
        return out, lengths

    def _encode_bytes(self, texts: list[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The same for bytes, without a step per byte: zeros are put where the marks go."""
        before = b"\0" * len(self.first)
        out = np.frombuffer(before + (b"\0" + before).join(texts) + b"\0", dtype=np.uint8).astype(self.dtype)
        lengths = np.array([len(text) + len(before) + 1 for text in texts], dtype=np.int64)
        ends = np.cumsum(lengths)
        out[ends - 1] = self.eos
        if self.first:
            out[ends - lengths] = self.first[0]
        return out, lengths


def _judge(record: Record, limit: int, vocab_size: int) -> Record:
    """The record with its text as UTF-8 or ids, or with the reason why it cannot be used."""
    text, where = record.text, record.where
    if isinstance(text, np.ndarray):
        if not len(text):
            return Record(where, None, "empty")
        wrong = np.flatnonzero((text < 0) | (text >= vocab_size))
        if len(wrong):
            first = int(wrong[0])
            detail = f"id {int(text[first])} at {first}, V is {vocab_size}"
            return Record(where, None, "out of vocabulary", detail)
        return record
    try:
        characters = text if isinstance(text, str) else text.decode("utf-8")
        data = text.encode("utf-8") if isinstance(text, str) else text
    except UnicodeDecodeError as problem:
        return Record(where, None, "not UTF-8", f"byte {problem.start}")
    except UnicodeEncodeError as problem:
        return Record(where, None, "not UTF-8", f"lone surrogate at character {problem.start}")
    if not characters or characters.isspace():
        return Record(where, None, "empty")
    if len(characters) > limit:
        return Record(where, None, "too long", f"{len(characters)} characters")
    return Record(where, data)


def _cut(text: Any) -> Iterator[_Document]:
    """The parts of a document for the three splits, divided between characters; none that is empty."""
    whole = text.decode("utf-8") if isinstance(text, bytes) else text
    low, high = int(SHARES[0] * len(whole)), int((SHARES[0] + SHARES[1]) * len(whole))
    for split, piece in enumerate((whole[:low], whole[low:high], whole[high:])):
        if len(piece):
            yield _Document(split, piece.encode("utf-8") if isinstance(piece, str) else piece)


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    """Enough documents at a time to keep the work per document small."""
    batch: list[_Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
