"""Keys and values by (layer, loop): write, trim, snapshot, select, bytes; and what each loop may share.

Shape letters: B batch, S new tokens, C context tokens (cached and new).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CacheError", "EveryLoop", "KVCache", "LastLoop", "LoopPolicy", "Snapshot"]

Entry = dict[str, Tensor]


class CacheError(ValueError):
    """A cache that does not fit the call. The message says what the cache holds and what was asked."""


class LoopPolicy(Protocol):
    """Which slot the looped block reads and writes in loop t."""

    def slot(self, loop: int) -> str:
        """Name of the slot."""
        ...


@dataclass(frozen=True)
class EveryLoop:
    """One slot per loop: exact. A token read at loop t was written at loop t.

    Running fewer loops than before is right: the new token attends, at each of its loops, to the others as
    they were at that loop. Running more is refused, because earlier tokens were never computed that deep.
    """

    def slot(self, loop: int) -> str:
        """``recurrent_loop_0``, ``recurrent_loop_1``, …"""
        return f"recurrent_loop_{loop}"


@dataclass(frozen=True)
class LastLoop:
    """One slot for all loops: cached tokens are read as their last loop left them (Ouro, arXiv 2510.25741).

    T times smaller than :class:`EveryLoop`, for any number of loops at each call. Tokens of one call see each
    other at equal loops; only tokens of earlier calls are read at their last. So a whole sequence in one call
    is exact, and continuing it is an approximation, which is why it is never chosen for you.
    """

    def slot(self, loop: int) -> str:
        """``recurrent``, whatever the loop."""
        return "recurrent"


@dataclass(frozen=True)
class Snapshot:
    """A copy of a cache's contents, for :meth:`KVCache.restore`."""

    entries: dict[str, Entry]
    segments: Tensor | None
    packed: bool
    length: int


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors of one slot share: all but the number of tokens."""
    batch, _, *width = tensor.shape
    return tensor.dtype, batch, width


def _writable(buffer: Tensor, new: Tensor) -> bool:
    """Whether new tokens can go into the buffer; one made under inference_mode cannot be written outside it."""
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    return not frozen and _layout(buffer) == _layout(new)


class KVCache:
    """Keys and values of a batch of sequences, by slot; pass it to the model call after call.

    A slot is a dict of tensors (B, C, width): ``{"k", "v"}`` for GQA, ``{"latent"}`` for MLA, the
    normalised latent and the one shared rope key side by side. Buffers grow by half when full, so that
    appending costs a constant time per token; ``nbytes`` counts what is used, ``allocated_bytes`` what is held.

    Args:
        policy: how loops share slots; :class:`EveryLoop` by default.
        capacity: tokens to make room for at once, per slot.
    """

    plain = True
    """Whether what is kept are the keys and values themselves, which a kernel may read and write in place."""

    def __init__(self, policy: LoopPolicy | None = None, capacity: int = 0) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
            raise CacheError(
                f"capacity = {capacity!r} is not allowed: it must be a whole number of at least 0"
            )
        if policy is not None and (isinstance(policy, type) or not hasattr(policy, "slot")):
            raise CacheError(
                f"policy = {policy!r} is not allowed: it must be EveryLoop(), LastLoop() or None"
            )
        self.policy: LoopPolicy = EveryLoop() if policy is None else policy
        self.entries: dict[str, Entry] = {}
        self.segments: Tensor | None = None
        self.packed = False
        self.length = 0
        self._capacity = capacity
        self._buffers: dict[str, Entry] = {}
        self._exact = False

    @classmethod
    def wrap(cls, entries: dict[str, Entry]) -> KVCache:
        """A cache that lives in a plain dict: its slots appear there and are read from there.

        Such a dict holds no padding or document marks, so a call with those needs a KVCache.

        Raises:
            CacheError: the dict holds something other than slots of (B, C, …) tensors, or slots that disagree.
        """
        cache = cls()
        cache.entries, cache._exact = entries, True
        for slot, entry in entries.items():
            shapes = (
                [t.shape[1] for t in entry.values() if isinstance(t, Tensor) and t.dim() >= 2]
                if (isinstance(entry, dict))
                else []
            )
            if not shapes or len(shapes) != len(entry) or len(set(shapes)) != 1:
                raise CacheError(
                    f"kv_cache[{slot!r}] is not a slot: it must be a dict of (B, C, ...) tensors"
                )
            if next(iter(entry.values())).shape[0] != cache.batch_size:
                raise CacheError(
                    f"kv_cache[{slot!r}] has another batch than the first slot, {cache.batch_size}"
                )
            cache.length = max(cache.length, shapes[0])
        return cache

    @property
    def batch_size(self) -> int | None:
        """B of what is cached, or None while nothing is."""
        for entry in self.entries.values():
            return next(iter(entry.values())).shape[0]
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the cached keys and values."""
        return sum(t.numel() * t.element_size() for entry in self.entries.values() for t in entry.values())

    @property
    def allocated_bytes(self) -> int:
        """Bytes held, room to grow included."""
        held = self._buffers or self.entries
        return sum(t.numel() * t.element_size() for entry in held.values() for t in entry.values())

    def __bool__(self) -> bool:
        """True also while empty, so that ``cache or KVCache()`` keeps the caller's."""
        return True

    def __len__(self) -> int:
        return self.length

    def slot_length(self, slot: str) -> int:
        """Tokens that a slot holds; fewer than :attr:`length` when some ran fewer loops."""
        entry = self.entries.get(slot)
        return 0 if entry is None else next(iter(entry.values())).shape[1]

    def check_loops(self, n_loops: int) -> None:
        """Refuse a call whose loops some cached token never ran.

        Raises:
            CacheError: naming the loops that the cache can serve.
        """
        for loop in range(n_loops):
            held = self.slot_length(self.policy.slot(loop))
            if held < self.length:
                raise CacheError(
                    f"n_loops = {n_loops} is not allowed: the cache holds {self.length} tokens, but loop {loop + 1} "
                    f"of only {held}; run at most {loop} loops, trim the cache to {held}, or use KVCache(LastLoop())"
                )

    def slot(self, loop: int | Tensor) -> str:
        """Where the looped block reads and writes in this loop."""
        return self.policy.slot(int(loop))

    def write(self, slot: str, new: Entry) -> Entry:
        """Put the new tokens' tensors behind the cached ones and return both together.

        Writing the same slot again before :meth:`commit` replaces what the last write put there.

        Args:
            slot: name of the slot.
            new: tensors (B, S, width).

        Returns:
            Tensors (B, C, width). Gradients reach the new part only.
        """
        past, entry = self.length, self.reserve(slot, new)
        for name, tensor in new.items():
            entry[name][:, past:].copy_(tensor.detach())
        if torch.is_grad_enabled():
            return {name: torch.cat((entry[name][:, :past], tensor), 1) for name, tensor in new.items()}
        return entry

    def reserve(self, slot: str, new: Entry) -> Entry:
        """Room for new tokens behind the cached ones; whoever asks has to fill it.

        Args:
            slot: name of the slot.
            new: tensors (B, S, width) like those to come; their values are not read.

        Returns:
            Tensors (B, C, width) of the slot, the last S tokens of them unset.
        """
        past = self.length
        if self.slot_length(slot) < past:
            raise CacheError(
                f"{slot} holds {self.slot_length(slot)} of the {past} cached tokens: it was skipped before"
            )
        self._ensure(slot, new, past)
        entry = {name: self._buffers[slot][name].narrow(1, 0, past + t.shape[1]) for name, t in new.items()}
        self.entries[slot] = entry
        return entry

    def _ensure(self, slot: str, new: Entry, past: int) -> None:
        """Buffers of the slot with room for the new tokens, the cached ones copied in."""
        if past and self.entries[slot].keys() != new.keys():
            held, brought = (" and ".join(names) for names in (self.entries[slot], new))
            raise CacheError(
                f"the cache holds {held} in {slot}, but this model keeps {brought}: not its cache"
            )
        for name, tensor in new.items():
            need = past + tensor.shape[1]
            buffer = self._buffers.get(slot, {}).get(name)  # where there is one, the entry is part of it
            if (
                buffer is not None
                and not self._exact
                and buffer.shape[1] >= need
                and _writable(buffer, tensor)
            ):
                continue
            old = self.entries[slot][name] if past else None
            if old is not None and _layout(old) != _layout(tensor):
                raise CacheError(
                    f"the cache holds {slot}/{name} as {old.dtype} of shape {tuple(old[:, :past].shape)}, but this "
                    f"call brings {tensor.dtype} of {tuple(tensor.shape)}: dtype, batch and widths must be equal"
                )
            room = need if self._exact else max(need, self._capacity, past + past // 2)
            grown = tensor.new_empty((tensor.shape[0], room, *tensor.shape[2:]))
            if old is not None:
                grown[:, :past] = old[:, :past]
            self._buffers.setdefault(slot, {})[name] = grown

    def commit(self, n_tokens: int, segments: Tensor | None, packed: bool = False) -> None:
        """Count the new tokens as cached, once all slots are written.

        Args:
            n_tokens: S.
            segments: (B, C) marks of all columns, or None when there are neither padding nor documents.
            packed: the marks come from documents.
        """
        self.length += n_tokens
        self.segments = segments
        self.packed = self.packed or packed

    def trim(self, length: int) -> None:
        """Forget every token from column ``length`` on.

        Raises:
            CacheError: ``length`` is not within 0 … the cached length.
        """
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= self.length:
            raise CacheError(
                f"length = {length!r} is not allowed: it must be 0 to {self.length}, the cached tokens"
            )
        for slot in list(self.entries):
            entry = {name: tensor[:, :length] for name, tensor in self.entries[slot].items()}
            if length == 0:
                del self.entries[slot]
            else:
                self.entries[slot] = entry
        if length == 0:
            self._buffers.clear()
            self.packed = False
        self.segments = None if self.segments is None or length == 0 else self.segments[:, :length]
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences: row i becomes what row ``rows[i]`` was.

        Args:
            rows: (B',) int64 row indices.

        Raises:
            CacheError: ``rows`` is something else, or (read only on the CPU) names a row that is not there.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise CacheError(f"rows = {rows!r} is not allowed: it must be a 1-D tensor of row numbers")
        batch = self.batch_size or 0
        if rows.device.type == "cpu" and not bool(((rows >= 0) & (rows < batch)).all()):
            raise CacheError(f"rows = {rows.tolist()} is not allowed: each must be 0 to {batch - 1}")
        for slot, entry in self.entries.items():
            self.entries[slot] = {name: tensor.index_select(0, rows) for name, tensor in entry.items()}
        self._buffers.clear()
        if self.segments is not None:
            self.segments = self.segments.index_select(0, rows)

    def snapshot(self) -> Snapshot:
        """A copy of the contents that later calls leave as it is."""
        entries = {s: {name: tensor.clone() for name, tensor in e.items()} for s, e in self.entries.items()}
        segments = None if self.segments is None else self.segments.clone()
        return Snapshot(entries, segments, self.packed, self.length)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, which can be restored again."""
        if not isinstance(snapshot, Snapshot):
            raise CacheError(f"snapshot must be what snapshot() returned, got {type(snapshot).__name__}")
        self._buffers.clear()
        self.entries.clear()
        for slot, entry in snapshot.entries.items():
            self.entries[slot] = {name: tensor.clone() for name, tensor in entry.items()}
        self.segments = None if snapshot.segments is None else snapshot.segments.clone()
        self.packed, self.length = snapshot.packed, snapshot.length
