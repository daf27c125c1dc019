"""Prompts of a few fixed shapes through torch.compile, on a GPU.

The compiler joins the small steps between matrix products, which take half the time of a long prompt. It needs about a
minute for each shape, so this is for those who send many prompts of one length.

Shape letters: n rows, S tokens of a prompt, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.pages import moved, on_device
from open_mythos.inference.runner import Chunk
from open_mythos.model.attention import SequenceContext
from open_mythos.model.cache import Entry
from open_mythos.model.recurrence import HaltingWeights

__all__ = ["CompiledRunner"]


class _Collected:
    """Keeps what layers would have cached, layer after layer, where nothing comes before."""

    length = 0

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def slot(self, loop: int | Tensor) -> str:
        return "loop"

    def write(self, slot: str, new: Entry) -> Entry:
        self.entries.append(new)
        return new


class CompiledRunner(GraphRunner):
    """A :class:`GraphRunner` that compiles whole prompts, for the first :attr:`shapes` shapes (n, S) that it meets.

    A chunk is served if all its prompts begin in it and are equally long and deep, without an exit rule. So
    ``prefill_chunk`` of the engine has to hold the prompts. Others run as in :class:`GraphRunner`.

    Attributes:
        refused: shapes that the compiler gave up, and what it said.
    """

    shapes = 4
    backend = "inductor"

    def refresh(self) -> None:
        """Also compile anew what has changed."""
        known = self._watch
        super().refresh()
        if self._watch is not known:
            self._compiled: dict[tuple[int, ...], dict[str, Any]] = {}
            self.refused: dict[tuple[int, ...], str] = {}

    def prefill(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """As :meth:`PlainRunner.prefill`."""
        shape = tuple(chunk.ids.shape)
        room = shape in self._compiled or len(self._compiled) < self.shapes
        begins = chunk.depth.rule is None and not any(chunk.starts) and chunk.even
        if self.reason is not None or not begins or not room or shape in self.refused:
            return super().prefill(chunk)
        from torch._dynamo.exc import TorchDynamoException

        if shape not in self._compiled:
            self._compiled[shape] = self._compile()
        self._after_prompts()
        try:
            return self._whole_prompts(chunk, self._compiled[shape]), None
        except TorchDynamoException as error:  # such as one program too many
            self.refused[shape] = f"{type(error).__name__}: {error}"
            return super().prefill(chunk)

    def _compile(self) -> dict[str, Any]:
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": self.backend}
        compiling: Any = torch.compile
        parts = {"prelude": self._prelude_of, "loop": self._loop_of, "coda": self._coda_of}
        return {name: compiling(part, **options) for name, part in parts.items()}

    def _whole_prompts(self, chunk: Chunk, parts: dict[str, Any]) -> Tensor | None:
        model, layers, rows = self.model, self.pool.layers, on_device(chunk.rows, self.rope.device)
        ids, loops = moved(chunk.ids, self.rope.device), (chunk.most or (chunk.depth.most,))[0]
        rope, select = model.context(ids).rope, model.cfg.halting == "select" and not chunk.depth.ruled
        e, entries = parts["prelude"](ids, rope)
        self._keep(rows, [layers.of_prelude(i) for i in range(layers.prelude)], entries)
        h = out = model.initial_state(e)
        mass = torch.ones(ids.shape, dtype=self.rope.dtype, device=ids.device)
        for t, index in enumerate(torch.arange(loops, device=ids.device)):
            h, out, mass, entries = parts["loop"](h, e, index, rope, out, mass, select)
            self._keep(rows, [layers.of_loop(t)], entries)
        features, entries = parts["coda"](out, rope)
        self._keep(rows, [layers.of_coda(j) for j in range(layers.coda)], entries)
        return model.head(features) if chunk.last else None

    def _prelude_of(self, ids: Tensor, rope: Tensor) -> tuple[Tensor, list[Entry]]:
        seen = _Collected()
        return self.model.prelude(ids, SequenceContext(rope, None, seen)), seen.entries  # type: ignore[arg-type]

    def _loop_of(
        self, h: Tensor, e: Tensor, t: Tensor, rope: Tensor, out: Tensor, mass: Tensor, select: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Entry]]:
        seen = _Collected()
        h = self.model.step(h, e, t, SequenceContext(rope, None, seen))  # type: ignore[arg-type]
        if not select:
            return h, h, mass, seen.entries
        weights = HaltingWeights(self.model.cfg)
        weights.mass, weights.running = mass, mass > 1 - weights.threshold
        out = weights.observe(h, self.model.recurrent.act(h), out)
        assert weights.mass is not None
        return h, out, weights.mass, seen.entries

    def _coda_of(self, h: Tensor, rope: Tensor) -> tuple[Tensor, list[Entry]]:
        seen = _Collected()
        return self.model.features(h, SequenceContext(rope, None, seen))[:, -1], seen.entries  # type: ignore[arg-type]

    def _keep(self, rows: Tensor, layers: list[int], entries: list[Entry]) -> None:
        """Write the entries of these layers, tensors (n, S, …), to the rows' pages."""
        pool, size = self.pool, self.pool.page_size
        for layer, entry in zip(layers, entries, strict=True):
            positions = torch.arange(next(iter(entry.values())).shape[1], device=pool.table.device)
            if len(positions) % size:
                pages = pool.table[rows[:, None], layer, positions // size].long()
                pool.scatter(pages, (positions % size).expand_as(pages), entry)
                continue
            pages = pool.table[rows, layer, : len(positions) // size].long().flatten()
            for name, tensor in entry.items():  # whole pages
                pool.tensors[name].index_copy_(0, pages, tensor.reshape(-1, size, *tensor.shape[2:]))
