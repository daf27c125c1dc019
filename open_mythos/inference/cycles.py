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

from open_mythos.inference.device_rows import Cycle, DeviceRows
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
        hand_out: takes a request, its new token, below zero if its logits were not finite, and the loops before it.
            Returns whether the request was still waiting for it.
    """

    def __init__(self, runner: Any, stats: Stats, hand_out: Callable[[Running, int, int], bool]) -> None:
        self._runner, self._stats, self._hand_out = runner, stats, hand_out
        self._runs: dict[int, Running] = {}
        self._counted: dict[Running, int] = {}  # loops of its token that were counted before it came
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
        rows = self._device_rows()
        fits = rows is not None and all(self._takes(lane) for lane in lanes)
        if not fits or rows is not self._rows:
            self.leave()
        self._rows = rows
        return fits

    def _device_rows(self) -> DeviceRows | None:
        if self._broken:
            return None
        try:
            found: DeviceRows | None = self._runner.device_rows()
        except Exception as error:  # no memory for it; the host's way needs none
            self.give_up(error)
            return None
        return found

    def _takes(self, lane: Lane) -> bool:
        request = lane.run.checked.request
        plain = request.speculate is None and request.temperature == 0
        return plain and (lane.rule is None or self._runner.asks(lane.rule))

    def new(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Those of the lanes that are not there yet."""
        return [lane for lane in lanes if self._runs.get(lane.row) is not lane.run]

    def begin(self, lanes: Sequence[Lane], most: int) -> Cycle:
        """Let in who is new, and make the next cycle ready. Where it raises, nobody has moved.

        Args:
            lanes: n, all that decode; their tokens have begun.
            most: loops of the cycle at most.
        """
        assert self._rows is not None
        left = [row for row, run in self._runs.items() if run.handle.done]
        if left:
            self._rows.drop(left)
            for row in left:
                self._counted.pop(self._runs.pop(row), None)
        new = self.new(lanes)
        if new:
            self._runner.hand_over(batch_of(new))
            self._rows.enter(new)
            self._counted |= {lane.run: lane.loops for lane in new}
            self._runs |= {lane.row: lane.run for lane in new}
        return self._rows.ready(len(lanes), self._loops(lanes, most), any(lane.rule for lane in lanes))

    def run(self, cycle: Cycle) -> None:
        """Run it. Where it raises, nobody knows how far rows are, see :meth:`lost`."""
        self._told.append(_Told(dict(self._runs), cycle.run()))

    def _loops(self, lanes: Sequence[Lane], most: int) -> int:
        """Of a cycle, a power of two: under rules about as many as tokens have needed of late, so that few wait."""
        assert self._rows is not None
        wanted = min(most, self._runner.stride)
        if self._rows.apart(len(lanes)):
            wanted = max(wanted // 2, 1)
        if self._spent and any(lane.rule for lane in lanes):
            wanted = min(wanted, max(2, round(self._spent)))
        deepest = max(lane.most for lane in lanes)
        return min(1 << (wanted.bit_length() - 1), 1 << (deepest - 1).bit_length())

    def leave(self) -> None:
        """All go on as the host says. Reads the device."""
        self.read(0)
        if self._rows is None or not self._runs:
            return
        _, positions, loops, rests, *_ = self._rows.where()
        self._rows.drop(list(self._runs))
        for row, run in self._runs.items():
            if run.handle.done:
                continue
            (lane,) = run.active
            self._stats.row_loops += loops[row] - self._counted.get(run, 0)
            lane.start(positions[row], lane.most)
            lane.begun, lane.loops = True, loops[row]
            lane.rests = lane.done = bool(rests[row])
        self._runs, self._counted = {}, {}

    def give_up(self, error: Exception) -> None:
        """A cycle could not be made ready; from here on all go as the host says."""
        _log.warning("rows do not go on by themselves any more: %r", error)
        self._broken = True
        self.leave()

    def lost(self) -> list[Running]:
        """A cycle failed on its way; nobody goes on by themselves any more, and these can not go on at all."""
        self._broken = True
        runs, self._runs, self._counted = list(self._runs.values()), {}, {}
        self._told.clear()
        return [run for run in runs if not run.handle.done]

    def read(self, lag: int = _LAG) -> None:
        """Hand out what was told, the oldest first, until so many cycles have not been read."""
        while self._told and (len(self._told) > lag or self._told[0].numbers.ready()):
            told = self._told.popleft()
            tokens, loops = told.numbers.read()
            for row, run in told.runs.items():
                if tokens[row] == NONE or not self._hand_out(run, tokens[row], loops[row]):
                    continue
                self._stats.row_loops += loops[row] - self._counted.pop(run, 0)
                self._spent += (loops[row] - self._spent) / 64 if self._spent else loops[row]
