"""Who comes and who goes: the queue, the rows and pages of those who run, and how requests end.

First come, first served. A request takes the rows and pages it may need at most when it is let in, and frees them when
it ends, however that comes about.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

import torch

from open_mythos.inference.pages import PagePool
from open_mythos.inference.requests import Checked, Handle, QueueFull, Reason
from open_mythos.inference.running import Late, Running, Stats, lanes_of
from open_mythos.inference.sampler import Sampler

__all__ = ["Intake"]


class Intake:
    """Requests from when they are submitted until they have ended. Submitting is safe from any thread.

    Args:
        pool: pages of those who run.
        rows: how many there are.
        queue: requests that may wait.
        device: where tokens are drawn.
    """

    def __init__(self, pool: PagePool, rows: int, queue: int, device: torch.device) -> None:
        self.pool, self.stats = pool, Stats()
        self._device, self._queue = device, queue
        self._inbox: deque[Handle] = deque()
        self._waiting: deque[Handle] = deque()
        self._count, self._free_rows = rows, list(range(rows))
        self._running: list[Running] = []  # by row
        self._cancelled = False
        self._late: deque[Late] = deque()
        self._apart: list[Late] = []  # first tokens after prompts that run beside those who decode
        self._chunks = 0  # of prompts, so far

    def check(self, checked: Checked) -> None:
        """Refuse what would never fit.

        Raises:
            ValueError: it takes more pages or rows than there are.
        """
        need = self._pages(checked)
        if need > self.pool.capacity:
            raise ValueError(
                f"the request needs {need} pages of {self.pool.page_size} tokens ({checked.cached} tokens, "
                f"{checked.depth.most} loops), more than the {self.pool.capacity} there are: raise cache_bytes"
            )
        lanes = lanes_of(checked)
        if lanes > self._count:
            raise ValueError(
                f"Draft.tokens = {lanes - 1} is not allowed: it takes {lanes} rows, and max_rows = {self._count}"
            )

    def submit(self, handle: Handle) -> None:
        """Queue a request, which has been checked.

        Raises:
            QueueFull: as many wait as may.
        """
        if self.waiting >= self._queue:
            raise QueueFull(f"{self.waiting} requests wait already: try again when some have finished")
        self._inbox.append(handle)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._inbox) + len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return len(self._running)

    def room(self) -> bool:
        """Whether one more may wait."""
        return self.waiting < self._queue

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not (self._running or self._late or self._apart or self.waiting)

    def cancel(self, handle: Handle) -> None:
        """Let a request go in the next sweep."""
        handle.cancelled = self._cancelled = True

    def sweep(self) -> None:
        """Take in who has come, and let go of who was cancelled."""
        # Looked at before the inbox: who comes and is cancelled meanwhile is let go in the next sweep.
        cancelled = self._cancelled
        if cancelled:
            self._cancelled = False
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
        if not cancelled:
            return
        for run in list(self._running):
            if run.handle.cancelled:
                self._end(run, "cancelled")
        for handle in [handle for handle in self._waiting if handle.cancelled]:
            self._waiting.remove(handle)
            self._close(handle, "cancelled")
        for run in self._outstanding():
            if run.handle.cancelled:
                self._close(run.handle, "cancelled")

    def cancel_all(self) -> None:
        """Cancel everything."""
        self.sweep()
        runs = self._running + self._outstanding()
        for handle in [*self._waiting, *(run.handle for run in runs)]:
            self.cancel(handle)
        self.sweep()
        self._late.clear()
        self._apart.clear()

    def fail_all(self, error: Exception) -> None:
        """End everything."""
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
        runs = self._running + self._outstanding()
        # Before anything is freed, which fails as well where the device has.
        for handle in [*(run.handle for run in runs), *self._waiting]:
            if handle.cancelled:
                self._close(handle, "cancelled")
            self._close(handle, "failed", error)
        self._waiting.clear()
        self._late.clear()
        self._apart.clear()
        for run in list(self._running):
            self._free(run)

    def _outstanding(self) -> list[Running]:
        """Those with tokens that were drawn, and not read."""
        return [run for late in (*self._late, *self._apart) for run in late.runs]

    def _layers(self, checked: Checked) -> list[int]:
        return self.pool.layers.needed(checked.depth.most, checked.depth.probes)

    def _pages(self, checked: Checked) -> int:
        return self.pool.pages_for(len(self._layers(checked)), checked.cached)

    def _end(self, run: Running, reason: Reason, error: Exception | None = None) -> None:
        """Free the row, and close the request."""
        try:
            self._free(run)
        finally:
            self._close(run.handle, reason, error)

    def _free(self, run: Running) -> None:
        if run in self._running:
            rows = [lane.row for lane in run.lanes]
            self._running.remove(run)
            self._free_rows = sorted(self._free_rows + rows)
            self.pool.release(run.row)
            self.pool.share(run.row, rows[1:])

    def _close(self, handle: Handle, reason: Reason, error: Exception | None = None) -> None:
        if not handle.done:
            handle.state.error, handle.state.reason = error, reason
            self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1

    def admit(self) -> None:
        """First come, first served: who does not fit yet keeps those behind waiting, so that nobody starves."""
        while self._waiting and self._free_rows:
            handle = self._waiting[0]
            checked = handle.checked
            lanes = lanes_of(checked)
            if len(self._free_rows) < lanes or self._pages(checked) > self.pool.free:
                return
            # Before anything is taken: where it raises, the request still waits and holds nothing.
            sampler = Sampler(checked, handle.number, self._device)
            rows, self._free_rows = self._free_rows[:lanes], self._free_rows[lanes:]
            self.pool.take(rows[0], self._layers(checked), checked.cached)
            self.pool.share(rows[0], rows[1:])
            self._waiting.popleft()
            run = Running(handle, rows, sampler)
            run.served = self._chunks
            insort(self._running, run, key=lambda run: run.row)
