"""Short prompts on a GPU: the modules' prelude, one loop and coda, each in a CUDA graph, for a few padded shapes.

A loop of the modules is about forty kernels, which take the host longer to launch than the GPU to compute when the
prompts are short. The graphs read tokens, rows and depths from memory, so those of a shape serve all prompts that fit.

Shape letters: n prompts, S tokens, both rounded up; D model width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from open_mythos.capture import capturing
from open_mythos.inference.pages import PagePool, moved
from open_mythos.inference.runner import Chunk
from open_mythos.model import OpenMythos
from open_mythos.model.attention import SequenceContext
from open_mythos.model.cache import Entry
from open_mythos.model.layers import rope_table
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.rows.plain import wide

__all__ = ["PromptGraphs"]

_TOKENS = 4096  # more keep the GPU busy without graphs
_LEAST = 64  # S is at least this
_SHAPES = 64  # that are kept


def _padded(count: int, least: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, … times the least: at most half as much again, beyond two of it."""
    size = least
    while size < count:
        size *= 2
    smaller = size * 3 // 4
    return smaller if size > 2 * least and smaller >= count else size


class PromptGraphs:
    """Runs chunks of prompts that begin in them.

    Args:
        model: in eval mode whenever this is called; its halting is off or selects.
        pool: where keys and values go.
        capture: into graphs, which bfloat16 weights are served by; otherwise the same work is done call by call, which
            any device can.
    """

    def __init__(self, model: OpenMythos, pool: PagePool, capture: bool) -> None:
        self._model, self._pool, self._capture = model, pool, capture
        moe: Any = model.recurrent.block.ffn
        self._able = not capture or moe.grouped  # what the host reads, no graph can
        self._shapes: OrderedDict[tuple[int, int, bool], tuple[_Shape, list[Callable[[], None]]]]
        self._shapes = OrderedDict()
        self._memory: Any = None
        self._states: Tensor | None = None  # of any shape, since one follows the other

    def serves(self, chunk: Chunk) -> bool:
        """Whether these prompts are short enough, nothing of them is cached, and a graph can hold the model's step."""
        n, length = self._shape(chunk)
        fits = chunk.depth.rule is None and not any(chunk.starts) and n * length <= _TOKENS
        return self._able and fits

    def __call__(self, chunk: Chunk) -> Tensor | None:
        """Logits (n, V) after the prompts if they end here, in a buffer that the next chunk reuses."""
        key = (*self._shape(chunk), chunk.depth.ruled)
        if key not in self._shapes:
            self._shapes[key] = self._make(*key)
            if len(self._shapes) > _SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        shape, (begin, loop, end) = self._shapes[key]
        most = chunk.most or (chunk.depth.most,) * len(chunk.rows)
        shape.show(chunk, most)
        begin()
        for _ in range(max(most)):
            loop()
        end()
        return shape.logits[: len(chunk.rows)] if chunk.last else None

    @staticmethod
    def _shape(chunk: Chunk) -> tuple[int, int]:
        n, length = chunk.ids.shape
        return _padded(n, 1), _padded(length, _LEAST)

    def _make(self, n: int, length: int, ruled: bool) -> tuple[_Shape, list[Callable[[], None]]]:
        like, dim = self._model.embed.weight, self._model.cfg.dim
        if self._states is None:
            self._states = like.new_zeros(3, _TOKENS * dim)
        states = self._states[:, : n * length * dim].view(3, n, length, dim)
        shape = _Shape(self._model, self._pool, states, ruled)
        works = [shape.begin, shape.loop, shape.end]
        return shape, [self._captured(work) for work in works] if self._capture else works

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """Compile by running it while no prompt is shown, which does nothing, and capture."""
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # One after the other, on one stream, these graphs may share what memory they need between two kernels.
        with capturing(graph, self._memory):
            work()
        self._memory = graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay


class _Shape:
    """Prompts of one padded shape, and the three parts of the work on them; its states are (3, n, S, D)."""

    def __init__(self, model: OpenMythos, pool: PagePool, states: Tensor, ruled: bool) -> None:
        self._model, self._select, cfg = model, model.cfg.halting == "select" and not ruled, model.cfg
        like, (_, n, length, _) = model.embed.weight, states.shape
        # Of each prompt the row, the tokens, the loops, and the ids. None is there until somebody is shown.
        self._table = torch.zeros(n, 3 + length, dtype=torch.int32, device=like.device)
        self._t = torch.zeros(n, dtype=torch.long, device=like.device)
        self._e, self._h, self._out = states.unbind()
        self._mass = torch.ones(n, length, dtype=wide(like.dtype), device=like.device)
        self.logits = like.new_zeros(n, cfg.vocab_size)
        self._written = _Written(pool, self._table, length)
        positions = torch.arange(length, device=like.device).unsqueeze(0)
        self._rope = rope_table(positions, cfg.rope_dim, cfg.rope_theta, like.dtype)

    def _context(self) -> SequenceContext:
        """A new one for each part: what layers remember of a call, a graph would remember for ever."""
        return SequenceContext(self._rope, None, self._written)  # type: ignore[arg-type]

    def show(self, chunk: Chunk, most: tuple[int, ...]) -> None:
        """Write down whose turn it is."""
        n, length = chunk.ids.shape
        wanted = torch.zeros(self._table.shape, dtype=torch.int32)
        counts = chunk.counts or (length,) * n
        wanted[:n, :3] = torch.tensor([chunk.rows, counts, most], dtype=torch.int32).T
        wanted[:n, 3 : 3 + length] = chunk.ids
        self._table.copy_(moved(wanted, self._table.device))

    def begin(self) -> None:
        """The prelude, and the state before the first loop."""
        model = self._model
        self._e.copy_(model.prelude(self._table[:, 3:], self._context()))
        self._h.copy_(model.initial_state(self._e))
        self._out.zero_()
        self._mass.fill_(1.0)
        self._t.zero_()

    def loop(self) -> None:
        """The next loop of those who have not done theirs."""
        model = self._model
        t = torch.where(self._t < self._table[:, 2], self._t, -1)
        h = model.step(self._h, self._e, t, self._context())
        if self._select:
            weights = HaltingWeights(model.cfg)
            weights.mass, weights.running = self._mass, self._mass > 1 - weights.threshold
            p = model.recurrent.act(h).masked_fill(t.unsqueeze(1) < 0, 0.0)
            self._out.copy_(weights.observe(h, p, self._out))
            assert weights.mass is not None
            self._mass.copy_(weights.mass)
        self._h.copy_(h)
        self._t += 1

    def end(self) -> None:
        """The coda, and the head after the last token of each."""
        features = self._model.features(self._out if self._select else self._h, self._context())
        ends = (self._table[:, 1].long() - 1).clamp(min=0)
        self.logits.copy_(self._model.head(features[torch.arange(len(ends), device=ends.device), ends]))


class _Written:
    """A cache in which nothing is yet: layers get back what they show, and it goes to the rows' pages."""

    length = 0

    def __init__(self, pool: PagePool, table: Tensor, length: int) -> None:
        self._pool, self._table, self._loop = pool, table, table[:, 0]
        positions = torch.arange(length, device=table.device).expand(len(table), -1)
        self._positions, self._block = positions, positions // pool.page_size
        self._offset = positions % pool.page_size

    def slot(self, loop: Tensor) -> str:
        """From here on ``loop`` is the looped block, in each prompt's own loop, (n,); below zero it shows nothing."""
        self._loop = loop
        return "loop"

    def write(self, slot: str, new: Entry) -> Entry:
        """Put the tokens (n, S, …) in their pages, and return them."""
        # Page 0 is nobody's: padding goes there.
        nowhere = self._positions >= self._table[:, 1:2]
        if slot == "loop":
            nowhere = nowhere | (self._loop.unsqueeze(1) < 0)
        layer = self._pool.layers.of_slot(slot, self._loop.clamp(min=0))
        pages = self._pool.table[self._table[:, 0].long(), layer].long()
        own = pages.gather(1, self._block.masked_fill(nowhere, 0)).masked_fill(nowhere, 0)
        self._pool.scatter(own, self._offset, new)
        return new
