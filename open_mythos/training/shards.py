"""Token shards: documents as runs of token ids on disk, read by memory map.

Letters: S sequence, N blocks, V vocab.

A prepared folder holds, for each split, files ``train-00000.bin``, ... of little-endian uint16 (V <= 65536) or uint32
ids, every document closed by EOS, and ``index.json``: splits, sizes, sha256 of each shard, V and EOS. Blocks of S + 1
ids are cut when a shard is read, so one folder serves every S.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_mythos.config import ConfigError

__all__ = ["FORMAT", "INDEX", "Blocks", "ShardWriter", "read_index", "token_dtype"]

FORMAT = 1
INDEX = "index.json"
# 128 MB of uint16; a document is never divided, so a shard may be longer.
SHARD_TOKENS = 2**26
_CHUNK_BYTES = 2**22


def token_dtype(vocab_size: int) -> str:
    """The type that ids are stored in."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class ShardWriter:
    """Writes the shards of one split.

    Args:
        folder: exists.
        split: name of the split.
        dtype: "uint16" or "uint32".
        shard_tokens: begin a new shard after so many.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._limit = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._hash = hashlib.sha256()
        self._tokens = self._documents = 0

    def write(self, ids: NDArray[Any], documents: int) -> None:
        """Append whole documents, EOS included."""
        if not len(ids):
            return
        if self._file is None:
            name = f"{self._split}-{len(self._shards):05d}.bin"
            self._file = (self._folder / name).open("wb")
            self._hash = hashlib.sha256()
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._file.write(data)
        self._hash.update(data)
        self._tokens += len(ids)
        self._documents += documents
        if self._tokens >= self._limit:
            self._close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # finish was not reached
            self._file.close()

    def finish(self) -> dict[str, Any]:
        """What index.json says of the split."""
        self._close()
        return {
            "documents": sum(shard["documents"] for shard in self._shards),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "shards": self._shards,
        }

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._shards.append(
            {
                "file": Path(self._file.name).name,
                "documents": self._documents,
                "tokens": self._tokens,
                "sha256": self._hash.hexdigest(),
            }
        )
        self._file, self._tokens, self._documents = None, 0, 0


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a prepared folder.

    Raises:
        ConfigError: it is damaged, or of another format.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        valid = index["format"] == FORMAT and all("shards" in split for split in index["splits"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(
            f"{path} is damaged ({type(problem).__name__}): remove its folder, and prepare again"
        ) from problem
    if not valid:
        raise ConfigError(f"{path} has format {index['format']!r}; this version reads {FORMAT}")
    return dict(index)


class Blocks:
    """One split of a prepared folder, cut into N blocks of S + 1 ids.

    Blocks overlap by one id: the last of one is the first of the next, so that each of the N·S places is predicted
    exactly once. The ids at the end of a shard that fill no block are left out.

    Args:
        folder: a prepared folder.
        index: from :func:`read_index`.
        split: "train", "validation" or "test".
        seq_len: S.
        verify: compare the sha256 of each shard as well as its size.

    Attributes:
        eos_id: the id that closes each document.
        fingerprint: hash of the ids and S; kept in resume state so that other data is noticed.
        dropped_tokens: ids left out at the ends of shards.

    Raises:
        ConfigError: a shard is missing, truncated or damaged, or no block can be filled.
    """

    def __init__(
        self, folder: Path, index: Mapping[str, Any], split: str, seq_len: int, verify: bool = True
    ) -> None:
        self.seq_len = seq_len
        self.eos_id = int(index["eos_id"])
        self.documents = int(index["splits"][split]["documents"])
        shards = index["splits"][split]["shards"]
        self._maps = [_open_shard(folder / shard["file"], shard, index["dtype"], verify) for shard in shards]
        counts = [max(0, len(ids) - 1) // seq_len for ids in self._maps]
        self._ends = np.cumsum(counts, dtype=np.int64)
        tokens = sum(len(ids) for ids in self._maps)
        self.dropped_tokens = tokens - sum(count * seq_len + 1 for count in counts if count)
        content = repr((seq_len, index["dtype"], self.eos_id, [shard["sha256"] for shard in shards]))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:32]
        if not len(self):
            raise ConfigError(
                f"data.seq_len = {seq_len} is not allowed: the {split} split holds {tokens} tokens, end marks "
                f"included, and must hold at least data.seq_len + 1 = {seq_len + 1}"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, S + 1) int64: the blocks of these numbers, each in 0 … N - 1."""
        out = np.empty((len(numbers), self.seq_len + 1), dtype=np.int64)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for row, (number, shard) in enumerate(zip(numbers.tolist(), shards.tolist(), strict=True)):
            start = (number - (int(self._ends[shard - 1]) if shard else 0)) * self.seq_len
            out[row] = self._maps[shard][start : start + self.seq_len + 1]
        return out

    def report(self) -> dict[str, Any]:
        """Counts for a log."""
        return {
            "documents": self.documents,
            "blocks": len(self),
            "seq_len": self.seq_len,
            "target_tokens": len(self) * self.seq_len,
            "dropped_tokens": self.dropped_tokens,
            "fingerprint": self.fingerprint,
        }


def _open_shard(path: Path, shard: Mapping[str, Any], dtype: str, verify: bool) -> NDArray[Any]:
    stored = np.dtype(dtype).newbyteorder("<")
    wanted = shard["tokens"] * stored.itemsize
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise _damaged(path, f"{problem.strerror}") from problem
    if size != wanted:
        raise _damaged(path, f"it has {size} bytes, not {wanted}")
    if verify and _sha256(path) != shard["sha256"]:
        raise _damaged(path, "its sha256 is not the one in index.json")
    return np.memmap(path, dtype=stored, mode="r")


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"token shard {path} is damaged: {what}; remove its folder, and prepare again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
