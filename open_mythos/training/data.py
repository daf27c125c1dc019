"""Training text: documents → splits → packed blocks; :mod:`open_mythos.training.batches` goes on from there.

Letters: B batch, S sequence, N blocks, L tokens in a corpus, V vocab.

    corpus  = load_documents("python")                    # documents and what was left out, with reasons
    splits  = split_documents(corpus.documents)           # whole documents, by a hash of their names
    packed  = pack_documents(splits["train"], tokenizer, seq_len=256)
    batches = PackedDataset(packed, batch_size=8, seed=0) # dict(ids, targets, document_ids), each (B, S)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sysconfig
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from open_mythos.tasks.base import SPLIT_SHARES, check_integer

TEXT_SUFFIXES = (".md", ".py", ".txt")
SUFFIXES = (".jsonl", *TEXT_SUFFIXES)

# Left out of "python": tests, packages that are not the standard library, two that many distributions leave
# out, and the prose that is loaded by other means.
_STDLIB_SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
)


class Document(NamedTuple):
    """A text and a name for it that is the same on every machine (never an absolute path)."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and everything that was met and left out.

    Attributes:
        documents: sorted by origin, names unique.
        skipped: name of a file, line or directory → why it was left out. A directory counts once.
    """

    documents: tuple[Document, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Counts for a log: documents, characters, and the number left out for each reason."""
        return {
            "documents": len(self.documents),
            "characters": sum(len(d.text) for d in self.documents),
            "skipped": dict(sorted(Counter(self.skipped.values()).items())),
        }


def load_documents(source: str | os.PathLike[str], *, text_field: str = "text") -> Corpus:
    """Read a corpus.

    Args:
        source: "python" (see :func:`python_corpus`), a .txt, .md, .py or .jsonl file, or a directory, which
            is read with everything below it in sorted order. A .jsonl file holds one document a line, a JSON
            object with the text in ``text_field``. Use "./python" for a path of that name.
        text_field: field of a .jsonl record that holds the text.

    Returns:
        The documents, named by their path relative to ``source`` (and the line, for .jsonl), and what was
        skipped: other suffixes, hidden entries, empty documents, files that are not UTF-8.

    Raises:
        ValueError: there is no such source, its suffix is not one of the four, a .jsonl line is not an object
            with ``text_field``, or no document is left.
    """
    if source == "python":
        return python_corpus()
    path = Path(source)
    if path.is_dir():
        files, skipped = _walk(path, skipped_names=frozenset(), suffixes=SUFFIXES)
        found = [(file.relative_to(path).as_posix(), file) for file in files]
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"source={str(source)!r} has suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}"
            )
        found, skipped = [(path.name, path)], {}
    else:
        raise ValueError(f"source={str(source)!r}; allowed is 'python', or a file or directory that exists")
    documents = _read_files(found, skipped, text_field)
    if not documents:
        raise ValueError(
            f"source={str(source)!r} holds no document; left out there: {dict(Counter(skipped.values()))}; "
            f"allowed are non-empty UTF-8 files with suffix {', '.join(SUFFIXES)}"
        )
    return Corpus(tuple(documents), skipped)


def python_corpus() -> Corpus:
    """The text that comes with every Python: its help topics (English, about 0.5 MB) and the sources of its
    standard library (about 12 MB), without tests, idlelib, lib2to3 and site-packages.

    Names begin with "topics/" or "stdlib/". The content depends on the Python version; note it with results.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files, skipped = _walk(root, skipped_names=_STDLIB_SKIPPED, suffixes=(".py",))
    # Build-time settings of this machine, which differ between installations of one version.
    local = [file for file in files if file.name.startswith("_sysconfigdata")]
    skipped.update({file.relative_to(root).as_posix(): "settings of this machine" for file in local})
    found = [(file.relative_to(root).as_posix(), file) for file in files if file not in local]
    sources = [Document(f"stdlib/{d.name}", d.text) for d in _read_files(found, skipped, "text")]
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        topics = {}
        skipped["topics"] = "pydoc_data is not installed"
    prose = [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]
    return Corpus((*prose, *sources), skipped)


def _walk(
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
            else:
                files.append(base / name)
    return sorted(files), skipped


def _why_not_folder(folder: Path, skipped_names: frozenset[str]) -> str | None:
    if folder.name in skipped_names:
        return "excluded directory"
    if folder.name.startswith("."):
        return "hidden"
    return "link to a directory" if folder.is_symlink() else None


def _read_files(
    found: Sequence[tuple[str, Path]], skipped: dict[str, str], text_field: str
) -> list[Document]:
    """Documents of the named files; adds to ``skipped`` what cannot be read as text or holds none."""
    documents: list[Document] = []
    for name, path in found:
        try:
            # Line ends stay as they are: a byte-level model must see what is in the file.
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped[name] = "not UTF-8"
            continue
        entries = (
            _jsonl_entries(name, text, text_field) if path.suffix == ".jsonl" else [Document(name, text)]
        )
        for entry in entries:
            if entry.text:
                documents.append(entry)
            else:
                skipped[entry.name] = "empty"
    return documents


def _jsonl_entries(name: str, content: str, text_field: str) -> list[Document]:
    """One document a line, named "file.jsonl:12"; a blank line gives an empty one."""
    entries = []
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(content.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            entries.append(Document(f"{name}:{number}", ""))
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: not JSON ({error.msg}); allowed is one object a line"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            raise ValueError(
                f"{name}, line {number}: allowed is an object with a string in field {text_field!r}"
            )
        entries.append(Document(f"{name}:{number}", record[text_field]))
    return entries


def split_documents(
    documents: Sequence[Document], shares: tuple[float, float, float] = (0.9, 0.05, 0.05)
) -> dict[str, list[Document]]:
    """Divide whole documents into train, validation and test by a hash of the name of each.

    A document stays in its split when others come or go. Shares hold for many documents, not for few: a
    single document falls into one split, and a split may be empty.

    Args:
        documents: in any order, which is kept within each split.
        shares: of train, validation and test; not negative, with sum 1.

    Raises:
        ValueError: ``shares`` is something else, or two documents have one name.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares={shares!r}; allowed are three numbers >= 0 with sum 1")
    repeated = [name for name, count in Counter(d.name for d in documents).items() if count > 1]
    if repeated:
        raise ValueError(f"documents has the name {repeated[0]!r} more than once; allowed are unique names")
    splits: dict[str, list[Document]] = {name: [] for name in SPLIT_SHARES}
    for document in documents:
        digest = hashlib.blake2b(document.name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        point = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1), without rounding up to 1
        index = int(point >= shares[0]) + int(point >= shares[0] + shares[1])
        splits[list(SPLIT_SHARES)[index]].append(document)
    return splits


class Encoder(Protocol):
    """What packing asks of a tokenizer; ``ByteTokenizer`` and ``MythosTokenizer`` are two."""

    @property
    def vocab_size(self) -> int:
        """V, one more than the greatest id."""

    @property
    def bos_id(self) -> int | None:
        """Id that begins a document, if any."""

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, if any."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without special tokens."""


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """A corpus as one run of tokens, cut into blocks.

    Blocks overlap by one token: the last of one block is the first of the next. So each of the N·S places is
    predicted exactly once.

    Attributes:
        tokens: (N, S + 1) uint16 if V <= 65536, otherwise int32; a view of the run.
        document_ids: (N, S + 1) int32, the index into ``names`` of each token's document; a view.
        names: name of each document.
        dropped_tokens: tokens at the end that do not fill a block; fewer than S.
        fingerprint: hash of the run and S, kept in resume state so that other data is noticed.
    """

    tokens: Tensor
    document_ids: Tensor
    names: tuple[str, ...]
    dropped_tokens: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        """S."""
        return self.tokens.shape[1] - 1

    def report(self) -> dict[str, Any]:
        """Counts for a log."""
        return {
            "documents": len(self.names),
            "blocks": len(self),
            "seq_len": self.seq_len,
            "target_tokens": len(self) * self.seq_len,
            "dropped_tokens": self.dropped_tokens,
            "fingerprint": self.fingerprint,
        }


def pack_documents(
    documents: Sequence[Document], tokenizer: Encoder, *, seq_len: int, bos: bool = False
) -> PackedTokens:
    """Tokenise documents, end each with EOS, and cut the run into blocks of ``seq_len + 1`` tokens.

    Args:
        documents: in the order in which they are laid end to end.
        tokenizer: see :class:`Encoder`.
        seq_len: S, at least 1.
        bos: begin each document with BOS as well.

    Raises:
        ValueError: the tokenizer lacks a token that is needed or gives an id outside 0 … V-1, or the
            documents do not fill one block.
    """
    check_integer("seq_len", seq_len, 1)
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer.eos_id is None; allowed is a tokenizer with a token between documents")
    if bos and tokenizer.bos_id is None:
        raise ValueError(
            "bos=True with tokenizer.bos_id None; allowed is bos=False, or a tokenizer with a BOS token"
        )
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.int32
    hasher = hashlib.blake2b(repr((seq_len, str(dtype))).encode(), digest_size=16)
    runs: list[Tensor] = []
    first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    for document in documents:
        ids = [*first, *tokenizer.encode(document.text), tokenizer.eos_id]
        if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
            raise ValueError(
                f"document {document.name!r} has token ids {min(ids)} … {max(ids)}; "
                f"allowed is 0 <= id < vocab_size={tokenizer.vocab_size}"
            )
        packed_ids = array("i", ids)
        hasher.update(packed_ids.tobytes())
        runs.append(torch.frombuffer(packed_ids, dtype=torch.int32).to(dtype))
    total = sum(len(run) for run in runs)
    if total < seq_len + 1:
        raise ValueError(
            f"documents hold {total} tokens, end marks included; allowed is at least seq_len + 1 = "
            f"{seq_len + 1} (a split of a corpus with few documents may be empty)"
        )
    lengths = torch.tensor([len(run) for run in runs])
    document_ids = torch.repeat_interleave(torch.arange(len(runs), dtype=torch.int32), lengths)
    blocks = torch.cat(runs).unfold(0, seq_len + 1, seq_len)
    return PackedTokens(
        tokens=blocks,
        document_ids=document_ids.unfold(0, seq_len + 1, seq_len),
        names=tuple(d.name for d in documents),
        dropped_tokens=total - (len(blocks) * seq_len + 1),
        fingerprint=hasher.hexdigest(),
    )
