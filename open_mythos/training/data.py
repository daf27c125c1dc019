"""Reading: from files to records, each a document or a reason why there is none.

    for record in open_source(config.data).records:      # in a fixed order, one at a time, nothing held
        record.where, record.text, record.reason         # "notes.jsonl:12", the text or None, "" or why

Rows of tables are read by :mod:`open_mythos.training.tables`, token files by :mod:`open_mythos.training.tokenfiles`.
"""

from __future__ import annotations

import glob
import importlib
import io
import json
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from open_mythos.config import ConfigError
from open_mythos.training.checks import error
from open_mythos.training.dataconfig import HUB, DataConfig

__all__ = ["SPLITS", "Record", "Source", "open_source", "python_corpus", "split_named"]

SPLITS = ("train", "validation", "test")
TEXT_SUFFIXES = (".md", ".py", ".txt")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SUFFIXES = (*JSONL_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
TOKEN_SUFFIXES = (".bin", ".npy")

# Left out of "python": tests, packages that are not the standard library, two that many distributions leave
# out, and the prose that is loaded by other means.
_STDLIB_SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
)
_CHUNK = 2**20
_PIECE = 2**10


class Record(NamedTuple):
    """A document, or what stands in the place of one.

    Attributes:
        where: a name that is unique in the source and the same on every machine: a relative path, with ":12" for
            line 12 (the first is 1) of a .jsonl file, row 12 (the first is 0) of a table, or id 12 of a token file.
        text: bytes that should be UTF-8, a str, a 1-D array of ids; None when there is none.
        reason: why it cannot be used, in a word or two; empty while nothing is known against it.
        detail: more about the reason.
        many: how many records this one stands for.
    """

    where: str
    text: Any
    reason: str = ""
    detail: str = ""
    many: int = 1


@dataclass(frozen=True)
class Source:
    """Records in a fixed order, and what decides them.

    Attributes:
        records: can be walked once.
        identity: JSON-ready; the same as long as the records are. Local files count by name, path, size and time.
        skipped: name of a file or directory that holds no records → why. A directory counts once.
        dealt: the files are named by their splits, all three; see :func:`split_named`.
    """

    records: Iterator[Record]
    identity: Any
    skipped: Mapping[str, str] = field(default_factory=dict)
    dealt: bool = False


def split_named(where: str) -> str:
    """What stands before the first dot or slash: "test" of "test.jsonl.xz:12" and of "test/000.parquet:3"."""
    return re.split(r"[./]", where, maxsplit=1)[0]


def open_source(data: DataConfig) -> Source:
    """The records of a text source. Nothing is read before they are walked.

    Raises:
        ConfigError: there is no such source, or its suffix is not one of those that can be read.
    """
    if data.source == "python":
        return python_corpus()
    if data.source.startswith(HUB):
        from open_mythos.training.tables import hub_records

        return hub_records(data)
    suffixes = SUFFIXES if data.options["token_dtype"] is None else TOKEN_SUFFIXES
    found, skipped = _find(data.source, suffixes)
    if not found:
        raise ConfigError(
            f"data.source = {data.source!r} is not allowed: it holds no file with suffix {', '.join(suffixes)}"
        )
    dealt = {split_named(name) for name, _ in found} == set(SPLITS)
    identity = ["dealt", *stamps(found)] if dealt else stamps(found)
    return Source(_file_records(found, data), identity, skipped, dealt)


def stamps(found: list[tuple[str, Path]]) -> list[list[Any]]:
    """Name, path, size and time of each file."""
    stats = [(name, path, path.stat()) for name, path in found]
    return [[name, str(path.resolve()), stat.st_size, stat.st_mtime_ns] for name, path, stat in stats]


def python_corpus() -> Source:
    """The text that comes with every Python: its help topics (English, about 0.5 MB) and the sources of its
    standard library (about 12 MB), without tests, idlelib, lib2to3 and site-packages.

    Names begin with "topics/" or "stdlib/". The content depends on the Python version; note it with results.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files, skipped = walk(root, _STDLIB_SKIPPED, (".py",))
    # Build-time settings of this machine, which differ between installations of one version.
    local = [file for file in files if file.name.startswith("_sysconfigdata")]
    skipped.update({file.relative_to(root).as_posix(): "settings of this machine" for file in local})
    found = [(f"stdlib/{file.relative_to(root).as_posix()}", file) for file in files if file not in local]
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        topics = {}
        skipped["topics"] = "pydoc_data is not installed"

    def records() -> Iterator[Record]:
        for name, text in sorted(topics.items()):
            yield Record(f"topics/{name}", text)
        for name, path in found:
            yield Record(name, path.read_bytes())

    return Source(records(), [platform.python_version(), len(topics), stamps(found)], skipped)


def walk(
    root: Path, skipped_names: frozenset[str], suffixes: tuple[str, ...]
) -> tuple[list[Path], dict[str, str]]:
    """Files below ``root`` in sorted order, and what was passed by. Symbolic links to directories are not
    followed, so that a loop of links ends.
    """
    files: list[Path] = []
    skipped: dict[str, str] = {}
    for folder, subfolders, names in os.walk(root):
        base = Path(folder)
        for name in list(subfolders):
            reason = _why_not_folder(base / name, skipped_names)
            if reason:
                subfolders.remove(name)
                skipped[(base / name).relative_to(root).as_posix() + "/"] = reason
        for name in names:
            if name.startswith("."):
                skipped[(base / name).relative_to(root).as_posix()] = "hidden"
            elif not name.endswith(suffixes):
                skipped[(base / name).relative_to(root).as_posix()] = "other suffix"
            elif not (base / name).is_file():  # a link to nothing, or a pipe, which reading would wait for
                skipped[(base / name).relative_to(root).as_posix()] = "not a file"
            else:
                files.append(base / name)
    return sorted(files), skipped


def _why_not_folder(folder: Path, skipped_names: frozenset[str]) -> str | None:
    if folder.name in skipped_names:
        return "excluded directory"
    if folder.name.startswith("."):
        return "hidden"
    return "link to a directory" if folder.is_symlink() else None


def _find(source: str, suffixes: tuple[str, ...]) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """Named files of a path or glob, in sorted order, and what was passed by."""
    path = Path(source)
    if path.is_dir():
        files, skipped = walk(path, frozenset(), suffixes)
        return [(file.relative_to(path).as_posix(), file) for file in files], skipped
    if path.is_file():
        if not path.name.endswith(suffixes):
            hint = "; data.token_dtype says that a file holds ids" if path.suffix in TOKEN_SUFFIXES else ""
            raise error("data.source", source, f"a file with suffix {', '.join(suffixes)}{hint}")
        return [(path.name, path)], {}
    matches = sorted(Path(match) for match in glob.glob(source, recursive=True) if Path(match).is_file())
    if not matches:
        raise error(
            "data.source", source, "'python', 'hf:OWNER/NAME', or a file, directory or glob that exists"
        )
    base = Path(os.path.commonpath([match.parent for match in matches]))
    named = [(match.relative_to(base).as_posix(), match) for match in matches]
    skipped = {name: "other suffix" for name, _ in named if not name.endswith(suffixes)}
    return [(name, match) for name, match in named if name not in skipped], skipped


def _file_records(found: list[tuple[str, Path]], data: DataConfig) -> Iterator[Record]:
    for name, path in found:
        yield from _reader(path)(name, path, data)


def _reader(path: Path) -> Callable[[str, Path, DataConfig], Iterator[Record]]:
    if path.name.endswith(JSONL_SUFFIXES):
        return _jsonl
    if path.suffix == ".parquet":
        from open_mythos.training.tables import parquet_records

        return parquet_records
    if path.suffix in TOKEN_SUFFIXES:
        from open_mythos.training.tokenfiles import token_records

        return token_records
    return _text


def _text(name: str, path: Path, data: DataConfig) -> Iterator[Record]:
    """One document. Line ends stay as they are: a byte-level model must see what is in the file."""
    most, size = data.options["max_document_chars"], path.stat().st_size
    if size > 4 * most:  # no character has more than four bytes
        yield Record(name, None, "too long", f"{size} bytes")
    else:
        yield Record(name, path.read_bytes())


def _jsonl(name: str, path: Path, data: DataConfig) -> Iterator[Record]:
    """One document a line. Of a compressed file that was cut the whole lines count; one that was damaged might give
    wrong text before anyone notices, so it is read to its end, where its checksum is, before any line counts.
    """
    fault = _fault(path)
    if fault is not None and fault.reason == "damaged":
        yield fault._replace(where=name)
        return
    key, number = data.options["text_field"], 0
    # An escape takes six characters, and other fields of a record some more.
    limit = 6 * data.options["max_document_chars"] + _CHUNK
    try:
        # What a read had in hand when it met the cut is lost, so near one they are small.
        piece = _CHUNK if fault is None else _PIECE
        for number, line in enumerate(_lines(path, limit, piece), start=1):
            yield _json_record(f"{name}:{number}", line, key)
    except (EOFError, OSError):
        if fault is None:
            raise
        yield fault._replace(where=f"{name}:{number + 1}")


def _fault(path: Path) -> Record | None:
    """What is wrong with a compressed file."""
    if path.suffix not in (".gz", ".xz", ".zst"):
        return None
    try:
        with _opened(path) as file:
            while file.read(_CHUNK):
                pass
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as problem:
        detail = " ".join(str(problem).split())
        cut = isinstance(problem, EOFError) or detail.startswith("Truncated")
        return Record("", None, "truncated" if cut else "damaged", detail)
    return None


def _json_record(where: str, line: bytes | None, key: str) -> Record:
    if line is None:
        return Record(where, None, "too long", "line")
    if not line.strip():
        return Record(where, b"")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        return Record(where, None, "not UTF-8", f"byte {problem.start} of the line")
    except (ValueError, RecursionError) as problem:  # endless digits are a plain ValueError
        return Record(where, None, "not JSON", str(getattr(problem, "msg", problem)))
    if not isinstance(record, dict) or key not in record:
        return Record(where, None, "missing field", key)
    text = record[key]
    if text is None:
        return Record(where, None, "null", key)
    return Record(where, text) if isinstance(text, str) else Record(where, None, "not text", key)


def _lines(path: Path, limit: int, piece: int) -> Iterator[bytes | None]:
    """Lines without their end, from reads of ``piece`` bytes; None for one longer than ``limit``. Only LF ends a line:
    JSON strings may hold U+2028 and its like unescaped.
    """
    held: list[bytes] = []
    size = 0
    with _opened(path) as file:
        while chunk := file.read1(piece):
            head, *lines = chunk.split(b"\n")
            size += len(head)
            held.append(head)
            if size > limit:
                held = []  # keep counting, hold nothing
            for line in lines:
                yield None if size > limit else b"".join(held)
                held, size = [line], len(line)
    if size:
        yield None if size > limit else b"".join(held)


def _opened(path: Path) -> Any:
    """The file, decompressed."""
    if path.suffix == ".gz":
        import gzip

        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        from open_mythos.training.tables import zstd_stream

        return zstd_stream(path)
    return io.BufferedReader(io.FileIO(path))
