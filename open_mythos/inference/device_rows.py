"""Rows that go on without the host, and the graphs of their cycles; see :mod:`open_mythos.inference.cycles`.

Shape letters: X rows of the engine, n rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from open_mythos.inference.exit_rules import StateChange
from open_mythos.inference.graph_room import Room
from open_mythos.inference.graph_tables import Asking, entries_of, width_of
from open_mythos.inference.pages import moved, on_device
from open_mythos.inference.running import Lane, Numbers
from open_mythos.rows.launch import TritonRows
from open_mythos.rows.plain import Exits, PlainRows
from open_mythos.rows.turns import PlainTurns, TritonTurns, Turns

__all__ = ["Cycle", "DeviceRows"]

_APART = 24
"""Rows from which on codas run beside the loops of the others, instead of before them."""


@dataclass(frozen=True)
class Cycle:
    """One that is ready.

    Attributes:
        loops: of it.
        replay: does it.
        host: memory for what it tells.
        told: (2, X) on the device, see :class:`~open_mythos.rows.turns.Turns`.
    """

    loops: int
    replay: Callable[[], None]
    host: Numbers
    told: torch.Tensor

    def run(self) -> Numbers:
        """Do it; what it tells is on its way."""
        self.replay()
        return self.host.filled(self.told)


class DeviceRows:
    """Rows on the device.

    Args:
        runner: a :class:`~open_mythos.inference.graph_runner.GraphRunner` that serves its model.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, state = runner, runner.state
        rows, device = len(state.ids), state.ids.device
        self._turns = Turns.empty(rows, runner.rope.dtype, device)
        plain = isinstance(runner.ops, PlainRows)
        self._ops: PlainTurns | TritonTurns = PlainTurns() if plain else TritonTurns()
        self._most = most = runner.bucket(rows)
        # Of codas that run beside loops, made when the first do.
        self._beside: tuple[Any, Room] | None = None
        self._asks = Asking(most, runner.rope.dtype, device)
        self._ends = torch.full((4, width_of(most)), -1, dtype=torch.int32, device=device)
        self._tables: dict[tuple[int, int], torch.Tensor] = {}
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    def enter(self, lanes: Sequence[Lane]) -> None:
        """Rows whose tokens have begun go on here."""
        numbers, tolerances = [], []
        for lane in lanes:
            run, rule = lane.run, lane.rule
            eos = run.checked.eos
            asked = isinstance(rule, StateChange)
            numbers.append(
                [
                    run.checked.request.max_new_tokens - run.drawn,
                    lane.position,
                    lane.loops,
                    lane.rests,
                    lane.most,
                    lane.ruled,
                    rule.min_loops if rule else 0,
                    lane.most if asked else 0,
                    -1 if eos is None else eos,
                ]
            )
            tolerances.append(rule.tolerance if isinstance(rule, StateChange) else 0.0)
        turns, device = self._turns, self._turns.numbers.device
        rows = on_device([lane.row for lane in lanes], device)
        turns.numbers[:, rows] = moved(torch.tensor(numbers, dtype=torch.int32).T.contiguous(), device)
        turns.tolerance[rows] = moved(torch.tensor(tolerances, dtype=turns.tolerance.dtype), device)

    def drop(self, rows: Sequence[int]) -> None:
        """These do nothing from here on."""
        self._turns.numbers[0, on_device(rows, self._turns.numbers.device)] = 0

    def where(self) -> list[list[int]]:
        """:class:`~open_mythos.rows.turns.Turns`' numbers. Reads the device."""
        found: list[list[int]] = self._turns.numbers.tolist()
        return found

    @staticmethod
    def apart(count: int) -> bool:
        """Whether codas of so many rows run beside loops. Rows then wait a cycle longer, and shorter ones pay."""
        return count >= _APART

    def ready(self, count: int, loops: int, ruled: bool) -> Cycle:
        """The next cycle, for at most so many rows, captured, with memory for what it tells."""
        runner = self._runner
        bucket, apart = runner.bucket(count), self.apart(count)
        table = self._tables.get((bucket, loops))
        if table is None:
            columns = (loops + 1) * width_of(bucket)
            table = torch.full((4, columns), -1, dtype=torch.int32, device=self._turns.numbers.device)
            self._tables[bucket, loops] = table
        if apart and self._beside is None:
            ops = runner.ops if isinstance(runner.ops, PlainRows) else TritonRows(most=self._most)
            self._beside = ops, Room(runner.model, self._most)
        work = partial(self._do_cycle, table, bucket, loops, ruled, apart)
        replay = runner.ready(("cycle", bucket, loops, ruled, apart), work, self._turns.numbers)
        return Cycle(loops, replay, Numbers.room(self._turns.told), self._turns.told)

    def _do_cycle(self, table: torch.Tensor, bucket: int, loops: int, ruled: bool, apart: bool) -> None:
        ops, turns, width = self._ops, self._turns, width_of(bucket)
        asks = self._asks.of(bucket)
        ended = entries_of(self._ends[:, :bucket], thin=True)
        ops.ends(turns, ended)
        if apart:
            ops.begins(turns, table, loops, width, bucket, asks)
        with self._runner.branch(self._stream, *self._beside) if apart and self._beside else nullcontext():
            logits = self._runner.do_coda(ended)
            ops.pick(turns, ended, logits, self._runner.state.ids)
            self._runner.do_prelude(ended)
        if not apart:
            ops.begins(turns, table, loops, width, bucket, asks)
        blocks = [table[:, i * width :][:, :bucket] for i in range(loops + 1)]
        *steps, gone = [entries_of(block, thin=True) for block in blocks]
        rows = table[0].view(loops + 1, width)[:, :bucket]
        for i, entries in enumerate(steps):
            self._runner.do_loop(entries, Exits(asks, gone, rows[i + 1 : loops]) if ruled else None)
        if ruled:
            self._runner.do_leave(gone, asks)
            ops.leaves(turns, gone)
        self._runner.join(self._stream if apart else None)
