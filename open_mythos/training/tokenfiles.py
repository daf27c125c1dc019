"""Records out of files of token ids that were made elsewhere: .npy, or .bin of little-endian uint16 or uint32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_mythos.training.data import Record
from open_mythos.training.dataconfig import DataConfig

__all__ = ["token_records"]

_WINDOW = 2**20


def token_records(name: str, path: Path, data: DataConfig) -> Iterator[Record]:
    """One document between two separators, named by the number of its first id; the separators are left out.

    The last document may lack its separator, unless the file ends within an id: then it was cut, and so was the
    document.
    """
    eos = data.options["eos_id"] if data.options["vocab_size"] is not None else data.tokenizer().eos_id
    try:
        ids, rest = _mapped(path, data.options["token_dtype"])
    except Exception as problem:  # a damaged header makes numpy raise errors of many kinds
        detail = " ".join(str(problem).split())[:200]
        cut = isinstance(problem, EOFError) or "mmap length" in detail
        yield Record(name, None, "truncated" if cut else "damaged", detail)
        return
    limit = data.options["max_document_chars"]
    start, held = 0, 0  # the current document, and how much of the file has been searched
    while held < len(ids):
        window = ids[held : held + _WINDOW]
        for end in (np.flatnonzero(window == eos) + held).tolist():
            yield _document(name, ids, start, end, limit)
            start = end + 1
        held += len(window)
    if rest:
        yield Record(f"{name}:{start}", None, "truncated", f"{len(ids) - start} ids and {rest} bytes")
    elif start < len(ids):
        yield _document(name, ids, start, len(ids), limit)


def _document(name: str, ids: NDArray[Any], start: int, end: int, limit: int) -> Record:
    where = f"{name}:{start}"
    if end - start > limit:
        return Record(where, None, "too long", f"{end - start} ids")
    return Record(where, np.asarray(ids[start:end], dtype=np.int64))


def _mapped(path: Path, dtype: str) -> tuple[NDArray[Any], int]:
    """The ids of a file, mapped, and the bytes at its end that are no whole id."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "ui":
            raise ValueError(f"{array.dtype} of shape {array.shape}, not a row of whole numbers")
        return array, 0
    kind = np.dtype(dtype).newbyteorder("<")
    count, rest = divmod(path.stat().st_size, kind.itemsize)
    if not count:
        return np.empty(0, dtype=kind), rest
    return np.memmap(path, dtype=kind, mode="r", shape=(count,)), rest
