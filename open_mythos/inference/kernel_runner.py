"""The engine's rows in fused kernels of the CPU, where they serve; otherwise the model's modules.

Shape letters: n rows of a call, S tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.inference.pages import PagePool
from open_mythos.inference.runner import STRIDE, Batch, Chunk, PlainRunner, RowState
from open_mythos.model import OpenMythos
from open_mythos.model.paged import MAX_TOKENS, Numbering, PagedDecoder
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.model.transformer import evaluating

__all__ = ["KernelRunner"]


class KernelRunner(PlainRunner):
    """A :class:`PlainRunner` that computes in kernels as long as they serve: float32, on the CPU, nobody watching.

    Args:
        model: any model.
        pool: where keys and values are.
        state: the rows.

    Attributes:
        reason: why the model's modules are called instead, or None.
    """

    def __init__(self, model: OpenMythos, pool: PagePool, state: RowState) -> None:
        super().__init__(model, pool, state)
        self.ragged = False  # products are bound by arithmetic here, which padding would waste
        self._decoder: PagedDecoder | None = None
        with evaluating(model), torch.inference_mode():  # as whenever it computes
            self.refresh()

    def refresh(self) -> None:
        """Look whether the kernels still do what the model's modules would."""
        if self._decoder is not None and self._decoder.holds():
            return
        if self._decoder is not None and self.model.cfg.halting == "select":
            # The kernels keep the mass only.
            self.state.running.copy_(self.state.mass > 1 - HaltingWeights(self.model.cfg).threshold)
        found = self._begin()
        self._decoder, self.reason = (None, found) if isinstance(found, str) else (found, None)

    def _begin(self) -> PagedDecoder | str:
        """A decoder, or why there is none."""
        if self.pool.codec is not None:
            return "keys and values are kept in another form"
        layers, names = self.pool.layers, ("e", "h", "before", "chosen", "mass")
        numbering = Numbering(layers.of_loop(0), layers.of_coda(0), layers.shared)
        kept = {name: getattr(self.state, name) for name in names}
        return PagedDecoder.begin(self.model, self.pool.tensors, self.pool.table, numbering, kept)

    def prefill(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """As the plain one; short chunks in one kernel."""
        served = chunk.depth.rule is None and chunk.even and chunk.ids.numel() <= MAX_TOKENS
        if self._decoder is None or not served:
            return super().prefill(chunk)
        ruled = [chunk.depth.ruled] * len(chunk.rows)
        logits = self._decoder.tokens(chunk.rows, chunk.starts, ruled, chunk.ids, chunk.depth.most)
        return logits[:, -1] if chunk.last else None, None

    def prelude(self, batch: Batch) -> None:
        """As the plain one."""
        if self._decoder is None:
            super().prelude(batch)
            return
        for part in _pieces(batch):
            self._decoder.prelude(part.rows, part.positions, self._ids(part))

    def loop(self, batch: Batch) -> None:
        """As the plain one."""
        if self._decoder is None:
            super().loop(batch)
            return
        self._make_room(batch)
        for part in _pieces(batch):
            self._decoder.loop(part.rows, part.positions, part.loops, part.ruled)

    @property
    def stride(self) -> int:
        """Loops of one call."""
        return 1 if self._decoder is None else STRIDE

    def loops(self, batch: Batch, times: Sequence[int]) -> None:
        """Several loops in one kernel; who does most of them comes first."""
        if self._decoder is None:
            super().loops(batch, times)
            return
        self._make_room(batch)
        order = sorted(range(len(times)), key=lambda at: -times[at])
        for start in range(0, len(order), MAX_TOKENS):
            places = order[start : start + MAX_TOKENS]
            part = batch.pick(places)
            self._decoder.loops(
                part.rows, part.positions, part.loops, part.ruled, [times[at] for at in places]
            )

    def coda(self, batch: Batch) -> Tensor:
        """As the plain one."""
        if self._decoder is None:
            return super().coda(batch)
        return torch.cat([self._decoder.coda(p.rows, p.positions, p.ruled) for p in _pieces(batch)])

    def token(self, batch: Batch) -> Tensor | None:
        """A whole token in one kernel."""
        if self._decoder is None:
            return None
        decoder, pieces = self._decoder, _pieces(batch)
        if batch.keep:
            logits = [
                decoder.parts(p.rows, p.positions, p.loops, p.ruled, p.most[0], self._ids(p)) for p in pieces
            ]
        else:
            logits = [
                decoder.tokens(p.rows, p.positions, p.ruled, self._ids(p).unsqueeze(1), p.most[0])[:, 0]
                for p in pieces
            ]
        return torch.cat(logits)

    def rest(self, batch: Batch) -> Tensor | None:
        """The loops that are left in one kernel, if that takes all rows: a second one might raise."""
        if self._decoder is None or len(batch.rows) > MAX_TOKENS:
            return None
        left = batch.most[0] - batch.loops[0]
        return self._decoder.parts(batch.rows, batch.positions, batch.loops, batch.ruled, left)

    def _make_room(self, batch: Batch) -> None:
        """For all pieces, so that none raises when others have moved."""
        if self._decoder is not None and len(batch.rows) > MAX_TOKENS:
            self._decoder.reserve(MAX_TOKENS, max(batch.positions) + 1)

    def _ids(self, batch: Batch) -> Tensor:
        return self.state.ids[list(batch.rows)]


def _pieces(batch: Batch) -> list[Batch]:
    """As many rows at once as the kernels take."""
    count, most = len(batch.rows), MAX_TOKENS
    if count <= most:
        return [batch]
    return [batch.pick(range(i, min(i + most, count))) for i in range(0, count, most)]
