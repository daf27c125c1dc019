"""Memory for keys and values: a pool of pages, and who holds which.

A page holds a few tokens in a row of one request in one virtual layer. Virtual layers are the prelude's layers, the
looped block in each loop, the coda's layers; where an exit rule decodes states to decide, also the coda after a loop.
A request that runs at most n loops takes pages for n loops. It takes all it may ever need when it is admitted, so
that nothing has to be taken away from anybody, and nobody waits for pages while holding some.

Shape letters: B rows, C context tokens, P, T, and N the prelude's, the looped and the coda's virtual layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import Entry

__all__ = ["CacheCodec", "Layers", "PagePool", "PoolFull", "moved", "on_device"]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for what the device still does."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers on the device, likewise."""
    return moved(torch.tensor(values, device="cpu"), device)


class CacheCodec(Protocol):
    """How keys and values are kept, where not as they are."""

    def encode(self, new: Entry) -> Entry:
        """By name, (B, S, …) → what is stored of it, by whatever names, (B, S, …)."""
        ...

    def decode(self, stored: Entry, dtype: torch.dtype) -> Entry:
        """Back."""
        ...


class PoolFull(RuntimeError):  # noqa: N818 (a state of the pool, which the scheduler waits for to pass)
    """There are not enough free pages now."""


@dataclass(frozen=True)
class Layers:
    """Numbers of the virtual layers.

    Args:
        prelude: P.
        loops: the most loops of any request.
        coda: N.
        shared: all loops share one virtual layer (``LastLoop``).
    """

    prelude: int
    loops: int
    coda: int
    shared: bool = False

    @property
    def kept(self) -> int:
        """T: virtual layers of the looped block."""
        return 1 if self.shared else self.loops

    @property
    def plain(self) -> int:
        """All but those in which a rule decodes."""
        return self.prelude + self.kept + self.coda

    @property
    def count(self) -> int:
        """All of them."""
        return self.plain + self.kept * self.coda

    def of_prelude(self, layer: int) -> int:
        """Prelude layer i."""
        return layer

    def of_loop(self, loop: int) -> int:
        """The looped block in loop t, from 0."""
        return self.prelude + (0 if self.shared else loop)

    def of_coda(self, layer: int) -> int:
        """Coda layer j, on the states with which tokens left."""
        return self.prelude + self.kept + layer

    def of_probe(self, loop: int, layer: int) -> int:
        """Coda layer j, on the states after loop t, from 0."""
        return self.plain + (0 if self.shared else loop) * self.coda + layer

    def of_slot(self, slot: str, loop: int | Tensor) -> int | Tensor:
        """The layer that the model calls ``prelude_0``, ``coda_0``, …, or the looped block's in this loop, or (n,)."""
        part, _, number = slot.partition("_")
        if part == "prelude":
            return self.of_prelude(int(number))
        # Numbers of layers are sums and products, which tensors of loops go through as ints do.
        return self.of_coda(int(number)) if part == "coda" else self.of_loop(loop)  # type: ignore[arg-type]

    def needed(self, loops: int, probes: Iterable[int] = ()) -> list[int]:
        """Virtual layers of a request.

        Args:
            loops: the most that a token of it runs.
            probes: loops, from 0, after which its rule decodes.
        """
        wanted = [self.of_prelude(i) for i in range(self.prelude)]
        wanted += [self.of_loop(t) for t in range(loops)] + [self.of_coda(j) for j in range(self.coda)]
        wanted += [self.of_probe(t, j) for t in probes for j in range(self.coda)]
        return sorted(set(wanted))


class PagePool:
    """Pages, a table of who holds them, and a list of the free ones.

    Page 0 is nobody's: table entries that point nowhere point there, and what is written there is never read.

    Args:
        cfg: of the model.
        layers: virtual layers.
        rows: requests that run at once.
        pages: to share among them.
        page_size: tokens a page.
        max_context: most cached tokens of a request.
        dtype: of what is cached.
        device: where.
        codec: how it is kept; None: as it is.

    Attributes:
        tensors: by name, (pages + 1, page_size, …): ``{"latent"}`` for MLA, ``{"k", "v"}`` for GQA, or what
            ``codec`` makes of them.
        table: (rows, layers, blocks) int32 on the device; its memory never moves.
        host: the same on the host.
    """

    # Whoever cancels frees pages outside of inference mode, which may not touch tensors that were made inside.
    @torch.inference_mode(False)
    def __init__(
        self,
        cfg: MythosConfig,
        layers: Layers,
        *,
        rows: int,
        pages: int,
        page_size: int,
        max_context: int,
        dtype: torch.dtype,
        device: torch.device,
        codec: CacheCodec | None = None,
    ) -> None:
        self.layers, self.page_size, self.capacity = layers, page_size, pages
        self.codec, self.dtype = codec, dtype
        self.blocks = -(-max_context // page_size)
        # Zeros: a column that is masked still takes part in a product with zero, which NaN would survive.
        self.tensors: Entry = {
            name: torch.zeros(pages + 1, page_size, *one.shape[2:], dtype=one.dtype, device=device)
            for name, one in _stored(cfg, dtype, codec).items()
        }
        self.host = torch.zeros(rows, layers.count, self.blocks, dtype=torch.int32, device="cpu")
        self.table = self.host if device.type == "cpu" else self.host.to(device)
        self._free = list(range(pages, 0, -1))
        self._held: dict[int, list[int]] = {}

    @staticmethod
    def page_bytes(
        cfg: MythosConfig, page_size: int, dtype: torch.dtype, codec: CacheCodec | None = None
    ) -> int:
        """Bytes of a page."""
        stored = _stored(cfg, dtype, codec).values()
        return page_size * sum(one.numel() * one.element_size() for one in stored)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def pages_for(self, n_layers: int, tokens: int) -> int:
        """Pages that so many tokens take in so many virtual layers."""
        return n_layers * -(-tokens // self.page_size)

    def take(self, row: int, layers: Sequence[int], tokens: int) -> None:
        """Give a row pages for so many tokens in these virtual layers: all of them, or none.

        Raises:
            PoolFull: there are not enough.
        """
        blocks = -(-tokens // self.page_size)
        need = len(layers) * blocks
        if row in self._held:
            raise RuntimeError(f"row {row} holds pages already")
        if need > len(self._free):
            raise PoolFull(f"{need} pages are needed, and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(need)]
        self._held[row] = taken
        if taken:
            pages = torch.tensor(taken, dtype=torch.int32, device="cpu").view(-1, blocks)
            # Whoever reads past a row's end, for the sake of longer rows beside it, reads its own first page.
            rest = pages[:, :1].expand(-1, self.blocks - blocks)
            self.host[row, list(layers)] = torch.cat((pages, rest), 1)
        self._show(row)

    def release(self, row: int) -> None:
        """Take a row's pages back, emptied."""
        pages = self._held.pop(row, [])
        if not pages:
            return
        self._free.extend(reversed(pages))  # first, so that none is lost where the device fails
        self.host[row] = 0
        self._show(row)
        self.clear(on_device(pages, self.table.device))

    def share(self, row: int, others: Sequence[int]) -> None:
        """Let other rows, which hold nothing themselves, read and write a row's pages, until it is released."""
        for other in others:
            self.host[other] = self.host[row]
            self._show(other)

    def _show(self, row: int) -> None:
        if self.table is not self.host:
            # A copy, since the host's may change before the device has read it.
            self.table[row].copy_(moved(self.host[row].clone(), self.table.device))

    def clear(self, pages: Tensor) -> None:
        """Zero these pages."""
        for tensor in self.tensors.values():
            tensor.index_fill_(0, pages, 0)

    def copy(self, pages: Tensor, into: Tensor, offsets: Tensor) -> None:
        """Copy single tokens from page to page, at the same place; all of one shape."""
        for tensor in self.tensors.values():
            tensor[into, offsets] = tensor[pages, offsets]

    def scatter(self, pages: Tensor, offsets: Tensor, new: Entry) -> None:
        """Write tokens.

        Args:
            pages: (B, S), page of each token.
            offsets: (B, S), its place there.
            new: by name, (B, S, …).
        """
        stored = new if self.codec is None else self.codec.encode(new)
        for name, tensor in stored.items():
            self.tensors[name][pages, offsets] = tensor

    def gather(self, pages: Tensor) -> Entry:
        """Whole pages one after the other, (B, n) → by name, (B, n · page_size, …)."""
        flat = pages.flatten()
        stored = {
            name: tensor.index_select(0, flat).view(pages.shape[0], -1, *tensor.shape[2:])
            for name, tensor in self.tensors.items()
        }
        return stored if self.codec is None else self.codec.decode(stored, self.dtype)


def _stored(cfg: MythosConfig, dtype: torch.dtype, codec: CacheCodec | None) -> Entry:
    """What is kept of one token in one layer, by name, (1, 1, …), or what ``codec`` makes of it."""
    shapes = cfg.cached_shapes()
    plain = {name: torch.zeros(1, 1, *shape, dtype=dtype, device="cpu") for name, shape in shapes.items()}
    return plain if codec is None else codec.encode(plain)
