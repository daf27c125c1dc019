"""What layers see of the page pool: some rows, each with its own past, some new tokens a row.

Shape letters: B rows, S new tokens, C context tokens (cached and new), T loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from open_mythos.inference.exit_cache import ExitCache
from open_mythos.inference.pages import PagePool, on_device
from open_mythos.model import KVCache, LoopPolicy, OpenMythos
from open_mythos.model.attention import SequenceContext, distance_penalty
from open_mythos.model.cache import Entry
from open_mythos.model.layers import rope_table

__all__ = ["PagedView", "PromptCache", "context"]


class _Shown(Exception):  # noqa: N818 (no error: it ends a step that has shown enough)
    """The entry that a leaving token shows is written; the rest of the step is not wanted."""


class PagedView(KVCache):
    """Rows of a pool, as the cache of one call: B rows with S new tokens each, every row at its own position.

    New tokens are written before anybody reads. Columns go up to the longest row's last token, and the mask of
    :func:`context` hides from each token what is behind it. Rows may show the same pages.

    Args:
        pool: the pages.
        rows: row of the pool's table of each row here.
        starts: cached tokens of each.
        new: S.
        counts: new tokens of each row, S at most; those after them are padding, which nobody sees. None: all S.
    """

    def __init__(
        self,
        pool: PagePool,
        rows: Sequence[int],
        starts: Sequence[int],
        new: int,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._pool, self._layers, device = pool, pool.layers, pool.table.device
        self.length = max(starts)
        self.even = min(starts) == self.length
        self._index, first = on_device(rows, device), on_device(starts, device).unsqueeze(1)
        self.positions = first + torch.arange(new, device=device)
        # Padding may go past the last page.
        self.columns = min(self.length + new, pool.blocks * pool.page_size)
        self._blocks = -(-self.columns // pool.page_size)
        self._block = self.positions // pool.page_size
        self._padding: Tensor | None = None
        if counts is not None and min(counts) < new:
            ends = on_device(counts, device).unsqueeze(1)
            self._padding = torch.arange(new, device=device) >= ends
            self._block = self._block.masked_fill(self._padding, 0)
        self._offset = self.positions % pool.page_size
        self._loop: int | Tensor = 0
        self._probe: int | Tensor | None = None
        self._leaving: tuple[Tensor, Tensor] | None = None

    def slot(self, loop: int | Tensor) -> str:
        """From here on ``loop`` is the looped block in this loop, or in each row's own, (B,)."""
        self._loop = loop if isinstance(loop, Tensor) and loop.dim() else int(loop)
        return "loop"

    @contextmanager
    def probing(self, loop: int | Tensor) -> Iterator[None]:
        """Inside, the coda's layers are those that a rule asks after this loop, from 0, or each row's own, (B,)."""
        self._probe = loop
        try:
            yield
        finally:
            self._probe = None

    @contextmanager
    def leaving(self, loops: Sequence[int], most: Sequence[int]) -> Iterator[None]:
        """Inside, a step of one token a row ends once it has shown the rows' entries, which all deeper loops get.

        Args:
            loops: loops done by each row.
            most: loops of the deepest reader of each.
        """
        pairs = [(i, t) for i, (n, end) in enumerate(zip(loops, most, strict=True)) for t in range(n, end)]
        index, layers = zip(*((i, self._layers.of_loop(t)) for i, t in pairs), strict=True)
        device = self._index.device
        self._leaving = on_device(index, device), on_device(layers, device)
        try:
            yield
        except _Shown:
            pass
        finally:
            self._leaving = None

    def write(self, slot: str, new: Entry) -> Entry:
        """Put the new tokens (B, S, …) in their pages, and return all up to the longest row's last, (B, C, …)."""
        if self._leaving is not None:
            self._show(new, *self._leaving)
            raise _Shown
        pages = self._pool.table[self._index, self._layer(slot)][:, : self._blocks].long()
        own = pages.gather(1, self._block)
        if self._padding is not None:
            own = own.masked_fill(self._padding, 0)
        self._pool.scatter(own, self._offset, new)
        return {name: tensor[:, : self.columns] for name, tensor in self._pool.gather(pages).items()}

    def _layer(self, slot: str) -> int | Tensor:
        if self._probe is not None and slot.startswith("coda_"):
            return self._layers.of_probe(self._probe, int(slot[len("coda_") :]))  # type: ignore[arg-type]
        return self._layers.of_slot(slot, self._loop)

    def _show(self, new: Entry, index: Tensor, layers: Tensor) -> None:
        pages = self._pool.table[self._index[index], layers].long().gather(1, self._block[index])
        shown = {name: tensor[index] for name, tensor in new.items()}
        self._pool.scatter(pages, self._offset[index], shown)

    def copy_probes(self, rows: Sequence[int], layers: Sequence[int], into: Sequence[int]) -> None:
        """Let each row's token (row i of B, by layer number) show elsewhere what it showed there."""
        device = self._index.device
        index, source, target = (on_device(each, device) for each in (rows, layers, into))
        table, block = self._pool.table, self._block[index]
        pages, others = (
            table[self._index[index], layer].long().gather(1, block) for layer in (source, target)
        )
        self._pool.copy(pages, others, self._offset[index])


def context(model: OpenMythos, view: PagedView) -> SequenceContext:
    """Positions, mask and cache of a call on these rows and tokens."""
    cfg, positions = model.cfg, view.positions
    new, past = positions.shape[1], view.length
    mask = None
    if not view.even or (new > 1 and past):
        columns = torch.arange(view.columns, device=positions.device)
        mask = (columns <= positions.unsqueeze(-1)).unsqueeze(1)
    turned = positions[:1] if view.even else positions
    rope = rope_table(turned, cfg.rope_dim, cfg.rope_theta, model.embed.weight.dtype)
    penalty = None
    if cfg.alibi or cfg.previous_heads:
        slopes = cfg.alibi * 0.5 ** torch.arange(cfg.n_heads - cfg.previous_heads, device=positions.device)
        penalty = distance_penalty(mask, past, new, slopes, cfg.previous_heads)
    return SequenceContext(rope, mask, view, penalty=penalty)


class PromptCache(ExitCache):
    """An :class:`ExitCache` for one chunk of one row's prompt, which reads the chunks before from pages.

    Args:
        pool: the pages.
        row: whose.
        start: cached tokens.
        policy: how loops share slots.
        loops: the most loops of a token.
        probes: loops, from 0, after which the rule decodes.
    """

    def __init__(
        self,
        pool: PagePool,
        row: int,
        start: int,
        policy: LoopPolicy | None,
        loops: int,
        probes: Iterable[int],
    ) -> None:
        super().__init__(policy)
        self._pool, self._row, self.length = pool, row, start
        layers = pool.layers
        codas = range(layers.coda)
        self._loops = [(self.policy.slot(t), layers.of_loop(t)) for t in range(loops)]
        self._probes = [
            [(f"coda_{j}@{self.policy.slot(t)}", layers.of_probe(t, j)) for t in probes] for j in codas
        ]
        outer = [(f"prelude_{i}", layers.of_prelude(i)) for i in range(layers.prelude)]
        self._outer = outer + [(f"coda_{j}", layers.of_coda(j)) for j in codas]
        self._layer = dict([*self._outer, *self._loops, *(each for probe in self._probes for each in probe)])

    def slot_length(self, slot: str) -> int:
        """Tokens that a slot holds, read from its pages when it is first asked for."""
        if self.length and slot not in self.entries:
            pages = self._pool.host[self._row, self._layer[slot], : self._blocks(self.length)].unsqueeze(0)
            held = self._pool.gather(pages.long().to(self._pool.table.device))
            self.entries[slot] = {name: tensor[:, : self.length] for name, tensor in held.items()}
        return super().slot_length(slot)

    def write(self, slot: str, new: Entry) -> Entry:
        """As :meth:`ExitCache.write`; tokens of the chunk see each other as they are kept, too."""
        codec = self._pool.codec
        if codec is not None:
            new = codec.decode(codec.encode(new), self._pool.dtype)
        return super().write(slot, new)

    def store(self, new: int) -> None:
        """Write the new tokens to their pages, in the loops that nobody ran too."""
        for slot, layer in self._outer:
            self._put(layer, self._tail(slot, new), new)
        for chain in (self._loops, *self._probes):
            tail: Entry | None = None
            for slot, layer in chain:
                tail = self._tail(slot, new) or tail
                if tail is not None:
                    self._put(layer, tail, new)

    def _tail(self, slot: str, new: int) -> Entry | None:
        entry = self.entries.get(slot)
        if entry is None or super().slot_length(slot) < self.length + new:
            return None
        return {name: tensor[:, self.length :] for name, tensor in entry.items()}

    def _put(self, layer: int, tail: Entry | None, new: int) -> None:
        if tail is None:
            raise RuntimeError(f"nobody wrote the new tokens of virtual layer {layer}")
        device, size = self._pool.table.device, self._pool.page_size
        positions = torch.arange(self.length, self.length + new, device=device)
        pages = self._pool.table[self._row, layer, positions // size].long()
        self._pool.scatter(pages.unsqueeze(0), (positions % size).unsqueeze(0), tail)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._pool.page_size)
