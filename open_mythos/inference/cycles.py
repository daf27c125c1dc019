"""Requests whose rows go on by themselves: cycles of a few loops, in which the device says who rests and who begins.

In a cycle, rows whose loops are done go through the coda, draw their likeliest token and begin it, and the others run
some loops, or fewer where their rule lets them leave. It is one CUDA graph, and what was drawn is read a cycle or two
later: the host only lets requests in and out. So a token that leaves early costs no waiting for the host, and tokens of
all depths share their loops. :class:`~open_mythos.rows.turns.Turns` is what the device keeps of each row.

Shape letters: n rows of a call.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from open_mythos.inference.device_rows import DeviceRows
from open_mythos.inference.running import Lane, Numbers, Running, Stats, batch_of
from open_mythos.rows.turns import NONE

__all__ = ["Cycles"]

_log = logging.getLogger(__name__)

_LAG = 2
"""Cycles whose tokens may not have been read."""


@dataclass
class _Told:
    """What a cycle tells, of whom."""

    runs: dict[int, Running]
    numbers: Numbers


class Cycles:
    """Which requests go on by themselves, and what they have told.

    Args:
        runner: who may have :class:`DeviceRows`.
        stats: counted in.
        hand_out: takes a request and its new token, below zero if its logits were not finite.
    """

    def __init__(self, runner: Any, stats: Stats, hand_out: Callable[[Running, int], None]) -> None:
        self._runner, self._stats, self._hand_out = runner, stats, hand_out
        self._runs: dict[int, Running] = {}
        self._told: deque[_Told] = deque()
        self._spent = 0.0  # loops of a token, of late
        self._rows: DeviceRows | None = None
        self._broken = False

    @property
    def busy(self) -> bool:
        """Somebody is there."""
        return any(not run.handle.done for run in self._runs.values())

    def takes(self, lanes: Sequence[Lane]) -> bool:
        """Whether all of these may go on by themselves. If not, or if the model has changed, nobody is left there."""
        rows = None if self._broken else self._runner.device_rows()
        fits = rows is not None and all(self._takes(lane) for lane in lanes)
        if not fits or rows is not self._rows:
            self.leave()
        self._rows = rows
        return fits

    def give_up(self, error: Exception) -> None:
        """A cycle failed; from here on all go as the host says."""
        _log.warning("rows do not go on by themselves any more: %r", error)
        self._broken = True
        self.leave()

    def _takes(self, lane: Lane) -> bool:
        request = lane.run.checked.request
        plain = request.speculate is None and request.temperature == 0
        return plain and (lane.rule is None or self._runner.asks(lane.rule))

    def new(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Those of the lanes that are not there yet."""
        return [lane for lane in lanes if self._runs.get(lane.row) is not lane.run]

    def step(self, lanes: Sequence[Lane], most: int) -> int:
        """One cycle of these, whose tokens have begun.

        Args:
            lanes: n, all that decode.
            most: loops at most.

        Returns:
            Loops of the cycle.
        """
        assert self._rows is not None
        new = self.new(lanes)
        left = [row for row, run in self._runs.items() if run.handle.done]
        if left:
            self._rows.drop(left)
            for row in left:
                del self._runs[row]
        if new:
            self._runner.hand_over(batch_of(new))
            self._rows.enter(new)
            self._stats.row_loops -= sum(lane.loops for lane in new)  # counted with their tokens
            self._runs |= {lane.row: lane.run for lane in new}
        ruled = any(lane.rule is not None for lane in lanes)
        loops = self._loops(max(most // 2, 1) if self._rows.apart(len(lanes)) else most, ruled)
        self._told.append(_Told(dict(self._runs), self._rows.cycle(len(lanes), loops, ruled)))
        self._read(_LAG)
        return loops

    def _loops(self, most: int, ruled: bool) -> int:
        """Of a cycle: a power of two; under rules about as many as a token has needed of late, so that few wait."""
        wanted = min(most, max(2, round(self._spent))) if ruled and self._spent else most
        return 1 << (wanted.bit_length() - 1)

    def leave(self) -> None:
        """All go on as the host says. Reads the device."""
        self._read(0)
        if self._rows is None or not self._runs:
            return
        _, positions, loops, rests, *_ = self._rows.where()
        self._rows.drop(list(self._runs))
        for row, run in self._runs.items():
            if run.handle.done:
                continue
            (lane,) = run.active
            self._stats.row_loops += loops[row]
            lane.start(positions[row], lane.most)
            lane.begun, lane.loops = True, loops[row]
            lane.rests = lane.done = bool(rests[row])
        self._runs = {}

    def _read(self, lag: int) -> None:
        while self._told and (len(self._told) > lag or self._told[0].numbers.ready()):
            told = self._told.popleft()
            tokens, loops = told.numbers.read()
            for row, run in told.runs.items():
                if tokens[row] == NONE or run.handle.done:
                    continue
                run.drawn += 1
                run.handle.state.loops.append(loops[row])
                self._stats.row_loops += loops[row]
                self._spent += (loops[row] - self._spent) / 64 if self._spent else loops[row]
                self._hand_out(run, tokens[row])
