"""Which documents are alike: equal, near-duplicates (MinHash), or sharing passages; and the splits without them."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CONTAINED",
    "PASSAGE",
    "SHINGLE",
    "SIMILAR",
    "SPLITS",
    "Document",
    "contained",
    "deal",
    "distinct",
    "document",
]

SPLITS = ("train", "validation", "test")
SHARES = (0.93, 0.02)  # of train and validation; the rest is test

# Near-duplicates: the estimated Jaccard similarity of their sets of SHINGLE words in a row reaches SIMILAR.
SHINGLE, BINS, ROWS, SIMILAR = 5, 64, 4, 0.7
# An evaluation document also goes if this share of its passages (so many words in a row) is in another split.
PASSAGE, CONTAINED, SAMPLED = 32, 0.1, 4

Array = NDArray[np.uint64]


@dataclass
class Document:
    """One document and what finds its like.

    Attributes:
        source: package it came in.
        name: path inside the package.
        kind: "prose" or "code".
        text: the text.
        sketch: (BINS,), the least hash of a shingle in each bin; equal share = similarity.
        passages: sampled hashes of PASSAGE words in a row.
    """

    source: str
    name: str
    kind: str
    text: str
    sketch: Array
    passages: Array


_HASHES: dict[str, int] = {}


def word_hashes(text: str) -> Array:
    """A 64-bit hash of each word, letter case and everything between words left out."""
    words = re.findall(r"\w+", text.lower())
    for word in set(words):
        if word not in _HASHES:
            data = word.encode("utf-8", "replace")
            _HASHES[word] = zlib.crc32(data) << 32 | zlib.adler32(data)
    return _mixed(np.array([_HASHES[word] for word in words], dtype=np.uint64))


def _mixed(x: Array) -> Array:
    """A bijection that spreads bits (the finaliser of MurmurHash3)."""
    for _ in range(2):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return x ^ (x >> np.uint64(33))


def runs(hashes: Array, length: int) -> Array:
    """A hash of every ``length`` words in a row; of all words, if they are fewer."""
    if len(hashes) < length:
        length = max(1, len(hashes))
    total, factor = np.zeros(max(0, len(hashes) - length + 1), dtype=np.uint64), 1
    for start in range(length):
        total += hashes[start : start + len(total)] * np.uint64(factor)
        factor = factor * 0x9E3779B97F4A7C15 % 2**64
    return _mixed(total)


def sketch(hashes: Array) -> Array:
    """One-permutation MinHash (Li, Owen, Zhang 2012): (BINS,); an empty bin takes the next filled one's."""
    shingles = runs(hashes, SHINGLE)
    least = np.full(BINS, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, (shingles % np.uint64(BINS)).astype(np.int64), shingles // np.uint64(BINS))
    filled = np.flatnonzero(least != np.iinfo(np.uint64).max)
    if len(filled):
        least = least[filled[np.searchsorted(filled, np.arange(BINS)) % len(filled)]]
    return least


def document(source: str, name: str, kind: str, text: str) -> Document:
    """A document with its sketch and passages."""
    hashes = word_hashes(text)
    passages = runs(hashes, PASSAGE)
    return Document(source, name, kind, text, sketch(hashes), passages[passages % np.uint64(SAMPLED) == 0])


def distinct(documents: Iterable[Document], dropped: Counter[str]) -> list[Document]:
    """Without those equal or near to an earlier one."""
    kept: list[Document] = []
    texts: set[bytes] = set()
    bands: dict[bytes, list[int]] = {}
    for new in documents:
        digest = hashlib.blake2b(" ".join(new.text.split()).encode("utf-8", "replace")).digest()
        if digest in texts:
            dropped["duplicate"] += 1
            continue
        texts.add(digest)
        keys = [bytes([i]) + new.sketch[i : i + ROWS].tobytes() for i in range(0, BINS, ROWS)]
        near = {number for key in keys for number in bands.get(key, ())}
        if any(np.mean(kept[number].sketch == new.sketch) >= SIMILAR for number in near):
            dropped["near-duplicate"] += 1
            continue
        for key in keys:
            bands.setdefault(key, []).append(len(kept))
        kept.append(new)
    return kept


def deal(documents: Iterable[Document], dropped: Counter[str]) -> dict[str, list[Document]]:
    """Whole documents to the splits, by a hash of their text; an evaluation document that shares passages with
    another split is left out.
    """
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for each in documents:
        digest = hashlib.blake2b(each.text.encode("utf-8", "replace"), digest_size=8).digest()
        point = int.from_bytes(digest, "big") / 2**64
        splits[SPLITS[int(point >= SHARES[0]) + int(point >= sum(SHARES))]].append(each)
    for split, others in (("validation", ("train",)), ("test", ("train", "validation"))):
        seen = np.unique(np.concatenate([d.passages for name in others for d in splits[name]] or [_NONE]))
        before = len(splits[split])
        splits[split] = [d for d in splits[split] if contained(d, seen) <= CONTAINED]
        dropped[f"passages of another split in {split}"] += before - len(splits[split])
    return splits


_NONE: Array = np.zeros(0, dtype=np.uint64)


def contained(each: Document, seen: Array) -> float:
    """The share of a document's sampled passages that are among ``seen`` (sorted)."""
    if not len(each.passages) or not len(seen):
        return 0.0
    places = np.searchsorted(seen, each.passages).clip(max=len(seen) - 1)
    return float(np.mean(seen[places] == each.passages))
