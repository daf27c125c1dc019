"""Parts of a token in kernel calls, for rows that are at different positions and loops: float32, on the CPU.

:class:`PagedDecoder` is to rows with keys and values in pages what :class:`~open_mythos.model.decode.Decoder` is to a
batch with a cache of its own: it stands in for prelude, step and coda, under the same conditions, which are looked at
when it is made and by :meth:`PagedDecoder.holds`.

Shape letters: R rows in all, n rows of a call, S new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from open_mythos import kernels
from open_mythos.model.cache import Entry
from open_mythos.model.decode import Plan, plan_of
from open_mythos.model.layers import rope_table
from open_mythos.model.transformer import OpenMythos

__all__ = ["MAX_TOKENS", "Numbering", "PagedDecoder"]

MAX_TOKENS = kernels.MAX_TOKENS
"""Rows times new tokens of a call at most."""

_ROTATIONS = 256  # positions by which their table grows


@dataclass(frozen=True)
class Numbering:
    """Where the table of pages has the layers.

    Args:
        loops: number of the looped block in its first loop; the prelude's layers come before.
        coda: number of the coda's first layer.
        shared: all loops have that one number.
    """

    loops: int
    coda: int
    shared: bool


class PagedDecoder:
    """The kernel on pages.

    Args:
        model: any model.
        plan: what was read of it.
        tensors: pools by name, (pages, page_size, …), float32.
        table: (R, layers, blocks) int32, pages of each row and layer.
        numbering: of the layers.
        kept: ``e``, ``h``, ``before``, ``chosen``, each (R, D), and ``mass`` (R,), float32.
    """

    def __init__(
        self,
        model: OpenMythos,
        plan: Plan,
        tensors: Entry,
        table: Tensor,
        numbering: Numbering,
        kept: dict[str, Tensor],
    ) -> None:
        assert plan.layers is not None
        cfg = model.cfg
        self._model, self._plan, self._alive = model, plan, (tensors, table, kept)
        self._theta, self._vocab, self._numbering = cfg.rope_theta, cfg.vocab_size, numbering
        self._width = cfg.rope_dim
        keys, *values = tensors.values()
        self._pool = {"keys": keys.data_ptr(), "values": values[0].data_ptr() if values else None}
        self._token = keys[0, 0].numel()
        self._layers = (kernels.Layer * len(plan.layers))(*plan.layers)
        self._outer = list(range(cfg.prelude_layers)), [numbering.coda + j for j in range(cfg.coda_layers)]
        fields: dict[str, Any] = plan.fields | {
            "threads": torch.get_num_threads(),
            "layers": ctypes.addressof(self._layers),
            "pages": table.data_ptr(),
            "pages_row": table.stride(0),
            "pages_layer": table.stride(1),
            "page": keys.shape[1],
            "kept_e": kept["e"].data_ptr(),
            "kept_h": kept["h"].data_ptr(),
            "before": kept["before"].data_ptr(),
            "picked": kept["chosen"].data_ptr(),
            "kept_mass": kept["mass"].data_ptr(),
        }
        self._step = kernels.Step(**fields)
        self._slots: dict[int, Any] = {}
        self._rope = self._room = torch.empty(0)
        self._positions, self._size = 0, (0, 0)

    @classmethod
    def begin(
        cls, model: OpenMythos, tensors: Entry, table: Tensor, numbering: Numbering, kept: dict[str, Tensor]
    ) -> PagedDecoder | str:
        """A decoder, or why the model's own modules must be called."""
        why = kernels.unserved(1, model.embed.weight)
        if why is not None:
            return why
        if not all(kernels.readable(x) for x in (*tensors.values(), *kept.values())):
            return "pages or states are not float32 on the CPU"
        plan = plan_of(model)
        return plan if isinstance(plan, str) else cls(model, plan, tensors, table, numbering, kept)

    def holds(self) -> bool:
        """Whether it may still stand in for the model, after somebody else had their turn."""
        same_threads = self._step.threads == torch.get_num_threads()
        return (
            same_threads
            and kernels.serves(1, self._model.embed.weight)
            and plan_of(self._model) is self._plan
        )

    def prelude(self, rows: Sequence[int], past: Sequence[int], ids: Tensor) -> None:
        """Begin a token in each row: e, h and mass are kept.

        Args:
            rows: number of each.
            past: cached tokens of each.
            ids: (n,) int64.
        """
        self._part(0, rows, past, None, None, ids)

    def loop(
        self, rows: Sequence[int], past: Sequence[int], loops: Sequence[int], ruled: Sequence[bool]
    ) -> None:
        """One loop of each row, on what is kept.

        Args:
            rows: number of each.
            past: cached tokens of each.
            loops: index of each row's loop, from 0.
            ruled: whether the row's last state counts, whatever the model's own halting says.
        """
        self._part(1, rows, past, loops, ruled, None)

    def loops(
        self,
        rows: Sequence[int],
        past: Sequence[int],
        loops: Sequence[int],
        ruled: Sequence[bool],
        times: Sequence[int],
    ) -> None:
        """Some loops of each row, on what is kept.

        Args:
            rows: number of each.
            past: cached tokens of each.
            loops: index of each row's first loop.
            ruled: as for :meth:`loop`.
            times: loops of each, falling.
        """
        step, kept = self._prepare(rows, past, ruled, 1, 0)
        at = _numbers([loop + i for i in range(times[0]) for loop in loops])
        step.at = ctypes.addressof(at)
        counts = _numbers([sum(each > i for each in times) for i in range(times[0])])
        kernels.call("om_parts", ctypes.addressof(step), 0, ctypes.addressof(counts), times[0], 0)
        del kept, at, counts

    def coda(self, rows: Sequence[int], past: Sequence[int], ruled: Sequence[bool]) -> Tensor:
        """Logits (n, V) of what is kept."""
        logits = self._part(2, rows, past, None, ruled, None)
        assert logits is not None
        return logits

    def tokens(
        self, rows: Sequence[int], past: Sequence[int], ruled: Sequence[bool], ids: Tensor, n_loops: int
    ) -> Tensor:
        """Whole tokens: ids (n, S) int64 → logits (n, S, V)."""
        step, kept = self._prepare(rows, past, ruled, ids.shape[1], n_loops)
        ids = ids.contiguous()
        logits = torch.empty(*ids.shape, self._vocab, dtype=torch.float32, device="cpu")
        step.ids, step.logits, step.at = ids.data_ptr(), logits.data_ptr(), None
        kernels.call("om_step", ctypes.addressof(step))
        del kept
        return logits

    def parts(
        self,
        rows: Sequence[int],
        past: Sequence[int],
        loops: Sequence[int],
        ruled: Sequence[bool],
        count: int,
        ids: Tensor | None = None,
    ) -> Tensor:
        """So many loops of each row, and logits (n, V), on what is kept; with ids (n,) a token begins before."""
        step, kept = self._prepare(rows, past, ruled, 1, 0)
        at, counts = (
            _numbers([loop + i for i in range(count) for loop in loops]),
            _numbers([len(rows)] * count),
        )
        logits = torch.empty(len(rows), self._vocab, dtype=torch.float32, device="cpu")
        step.at, step.logits = ctypes.addressof(at), logits.data_ptr()
        if ids is not None:
            ids = ids.contiguous()
            step.ids = ids.data_ptr()
        begins = int(ids is not None)
        kernels.call("om_parts", ctypes.addressof(step), begins, ctypes.addressof(counts), count, 1)
        del kept, at, counts
        return logits

    def _part(
        self,
        which: int,
        rows: Sequence[int],
        past: Sequence[int],
        loops: Sequence[int] | None,
        ruled: Sequence[bool] | None,
        ids: Tensor | None,
    ) -> Tensor | None:
        step, kept = self._prepare(rows, past, ruled or [False] * len(rows), 1, 0)
        at = _numbers(loops if loops is not None else [0] * len(rows))
        step.at = ctypes.addressof(at)
        if ids is not None:
            ids = ids.contiguous()
            step.ids = ids.data_ptr()
        logits = None
        if which == 2:
            logits = torch.empty(len(rows), self._vocab, dtype=torch.float32, device="cpu")
            step.logits = logits.data_ptr()
        kernels.call("om_part", ctypes.addressof(step), which)
        del kept, at
        return logits

    def _prepare(
        self, rows: Sequence[int], past: Sequence[int], ruled: Sequence[bool], new: int, n_loops: int
    ) -> tuple[kernels.Step, list[Any]]:
        """The step for these rows, and what has to live as long as its call."""
        step, context = self._step, max(past) + new
        if n_loops not in self._slots:
            self._slots[n_loops] = self._all_slots(n_loops)
        step.slots = ctypes.addressof(self._slots[n_loops])
        # A part has one slot for all loops, which finds each row's own.
        step.T, step.N, step.S, step.C = n_loops or 1, len(rows) * new, new, context
        self.reserve(step.N, context)
        numbers, before, flags = _numbers(rows), _numbers(past), _array(ctypes.c_ubyte, len(rows))(*ruled)
        step.rows, step.past, step.ruled = (ctypes.addressof(each) for each in (numbers, before, flags))
        return step, [numbers, before, flags]

    def reserve(self, tokens: int, context: int) -> None:
        """Make room for calls of so many tokens with so much context; they then take none before they compute."""
        step = self._step
        if context > self._positions:
            count = -(-context // _ROTATIONS) * _ROTATIONS
            positions = torch.arange(count, device="cpu").unsqueeze(0)
            self._rope = rope_table(positions, self._width, self._theta).contiguous()
            step.rope, step.rope_half, self._positions = self._rope.data_ptr(), self._rope.stride(0), count
        if self._size[0] < tokens or self._size[1] < context:
            self._grow(tokens, context)

    def _all_slots(self, n_loops: int) -> Any:
        """Of the prelude, each loop (0: one that finds the row's own), and the coda."""
        first, last = self._outer
        inner = [self._numbering.loops + (0 if self._numbering.shared else t) for t in range(max(n_loops, 1))]
        by_loop = n_loops == 0 and not self._numbering.shared
        slots = [
            kernels.Slot(**self._pool, batch=layer, token=self._token, by_loop=by_loop and layer in inner)
            for layer in (*first, *inner, *last)
        ]
        return (kernels.Slot * len(slots))(*slots)

    def _grow(self, tokens: int, context: int) -> None:
        """Room for so many tokens of so much context."""
        step, floats = self._step, ctypes.c_int64()
        now, size = (step.N, step.C), (max(tokens, self._size[0]), max(context + 64, self._size[1]))
        step.N, step.C = size
        kernels.call("om_room", ctypes.addressof(step), ctypes.addressof(floats))
        step.N, step.C = now
        self._room = torch.empty(floats.value, dtype=torch.float32, device="cpu")
        step.room, self._size = self._room.data_ptr(), size


@cache
def _array(kind: Any, length: int) -> Any:
    return kind * length


def _numbers(values: Sequence[int]) -> Any:
    return _array(ctypes.c_int64, len(values))(*values)
