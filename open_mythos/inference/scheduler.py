"""Which rows compute next: continuous batching by depth.

One turn: those who were cancelled go; waiting requests take free rows and pages, in the order in which they came; at
most one chunk of prompts; then one tick. A tick is one loop of every row that decodes, each at its own loop. Rows whose
loops are done go through the coda, get a token, and begin the next one in the next tick. A row that has finished is
free at once.

Nothing here reads the device, but the answers of exit rules and the new tokens; these may come late (``lag``), and what
a row computed after its end is dropped.

Shape letters: n rows of a call, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from open_mythos.inference.pages import PagePool
from open_mythos.inference.requests import Checked, Depth, Handle, QueueFull, Reason
from open_mythos.inference.row_exits import RowSeen, leaving
from open_mythos.inference.runner import Batch, Chunk, Runner
from open_mythos.inference.sampler import Sampler, draw
from open_mythos.model import OpenMythos

__all__ = ["Scheduler", "Stats"]

T = TypeVar("T")


@dataclass
class Stats:
    """What was done since the engine was made.

    Attributes:
        ticks: loops of the batch.
        row_loops: loops of rows; over ``ticks`` it is the mean number of rows in a loop.
        codas: calls of the coda.
        tokens: new tokens handed out.
        chunks: chunks of prompts.
        prompt_tokens: tokens of prompts.
        finished: requests that came to their end, by reason.
    """

    ticks: int = 0
    row_loops: int = 0
    codas: int = 0
    tokens: int = 0
    chunks: int = 0
    prompt_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Running:
    """A request that has a row.

    Attributes:
        fed: tokens of the prompt that are cached.
        position: of the token that is being computed.
        loops: it has done.
        begun: the prelude has run.
        done: its loops are done, and the coda is next.
        drawn: new tokens drawn, of which some may not have been read yet.
        memory: what its rule remembers of this token.
        probed: loop after which its rule last decoded this token.
    """

    handle: Handle
    row: int
    sampler: Sampler
    fed: int = 0
    position: int = 0
    loops: int = 0
    begun: bool = False
    done: bool = False
    drawn: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    probed: int | None = None

    @property
    def checked(self) -> Checked:
        return self.handle.checked

    @property
    def depth(self) -> Depth:
        return self.handle.checked.depth

    def next_token(self) -> None:
        """A token was drawn, and is to be fed next."""
        self.position = self.checked.prompt.numel() + self.drawn
        self.drawn += 1
        self.loops, self.begun, self.done = 0, False, False
        self.memory, self.probed = {}, None


class Scheduler:
    """Rows, pages, a queue, and turns. One thread at a time runs a turn; submitting is safe from any.

    Args:
        model: in eval mode whenever a turn runs.
        pool: its pages.
        runner: who computes.
        rows: requests that run at once.
        chunk: tokens of prompts in one call; a prompt is cut at multiples of it, whatever else goes on.
        queue: requests that may wait.
        coda_every: ticks between codas, while others still loop.
        alone: compute each row by itself, so that its bits do not depend on others.
        lag: reads of new tokens that may be outstanding.
    """

    def __init__(
        self,
        model: OpenMythos,
        pool: PagePool,
        runner: Runner,
        *,
        rows: int,
        chunk: int,
        queue: int,
        coda_every: int,
        alone: bool,
        lag: int,
    ) -> None:
        self.model, self.pool, self.runner, self.stats = model, pool, runner, Stats()
        self._chunk, self._queue, self._coda_every, self._alone, self._lag = (
            chunk,
            queue,
            coda_every,
            alone,
            lag,
        )
        self._inbox: deque[Handle] = deque()
        self._waiting: deque[Handle] = deque()
        self._rows: list[_Running | None] = [None] * rows
        self._late: deque[_Late] = deque()
        self._owed = 0  # ticks, before the next chunk
        self._since_coda = 0

    # Coming and going.

    def submit(self, handle: Handle) -> None:
        """Queue a request.

        Raises:
            QueueFull: as many wait as may.
            ValueError: it would never fit.
        """
        need, checked = self._pages(handle.checked), handle.checked
        if need > self.pool.capacity:
            raise ValueError(
                f"the request needs {need} pages of {self.pool.page_size} tokens ({checked.cached} tokens, "
                f"{checked.depth.most} loops), more than the {self.pool.capacity} there are: raise cache_bytes"
            )
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
        return len(self._all())

    def room(self) -> bool:
        """Whether one more may wait."""
        return self.waiting < self._queue

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not (self.waiting or self._late or self.running)

    def sweep(self) -> None:
        """Take in who has come, and let go of who was cancelled."""
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
        for run in self._all():
            if run.handle.cancelled:
                self._end(run, "cancelled")
        for handle in [handle for handle in self._waiting if handle.cancelled]:
            self._waiting.remove(handle)
            self._close(handle, "cancelled")
        for late in self._late:
            for run in late.runs:
                if run.handle.cancelled:
                    self._close(run.handle, "cancelled")

    def cancel_all(self) -> None:
        """Cancel everything."""
        self.sweep()
        runs = self._all() + [run for late in self._late for run in late.runs]
        for handle in [*self._waiting, *(run.handle for run in runs)]:
            handle.cancelled = True
        self.sweep()
        self._late.clear()

    def fail_all(self, error: Exception) -> None:
        """End everything."""
        self.sweep()
        for run in self._all():
            self._end(run, "failed", error)
        for late in self._late:
            for run in late.runs:
                self._close(run.handle, "failed", error)
        while self._waiting:
            self._close(self._waiting.popleft(), "failed", error)
        self._late.clear()

    def _all(self) -> list[_Running]:
        return [run for run in self._rows if run is not None]

    def _layers(self, checked: Checked) -> list[int]:
        return self.pool.layers.needed(checked.depth.most, checked.depth.probes)

    def _pages(self, checked: Checked) -> int:
        return self.pool.pages_for(len(self._layers(checked)), checked.cached)

    def _end(self, run: _Running, reason: Reason, error: Exception | None = None) -> None:
        """Free the row, and close the request."""
        self._free(run)
        self._close(run.handle, reason, error)

    def _free(self, run: _Running) -> None:
        if self._rows[run.row] is run:
            self._rows[run.row] = None
            self.pool.release(run.row)

    def _close(self, handle: Handle, reason: Reason, error: Exception | None = None) -> None:
        if not handle.done:
            handle.state.error, handle.state.reason = error, reason
            self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1

    # A turn.

    def turn(self) -> None:
        """A little of everything."""
        self.sweep()
        self._read(self._lag)
        self._admit()
        # Those who decode run as many loops between two chunks as a chunk took, so half of the time is theirs.
        if self._owed <= 0 or not any(run.drawn for run in self._all()):
            self._prompts()
        self._tick()
        self._read(self._lag if self.running else 0)

    def _admit(self) -> None:
        """First come, first served: who does not fit yet keeps those behind waiting, so that nobody starves."""
        for row, run in enumerate(self._rows):
            if run is not None or not self._waiting:
                continue
            checked = self._waiting[0].checked
            if self._pages(checked) > self.pool.free:
                return
            self.pool.take(row, self._layers(checked), checked.cached)
            handle = self._waiting.popleft()
            self._rows[row] = _Running(
                handle, row, Sampler(checked, handle.number, self.runner.state.ids.device)
            )

    # Prompts.

    def _prompts(self) -> None:
        """A chunk of the prompt that came first, and of others that are as far, as long and as deep."""
        reading = sorted((run for run in self._all() if not run.drawn), key=lambda run: run.handle.number)
        if not reading:
            return
        first = reading[0]
        start, stop = self._piece(first)
        room = 1 if first.depth.rule is not None else max(1, self._chunk // (stop - start))
        alike = [r for r in reading if self._piece(r) == (start, stop) and r.depth == first.depth]
        last = [run.checked.prompt.numel() == stop for run in alike]
        together = [run for run, ends in zip(alike, last, strict=True) if ends == last[0]][:room]
        together.sort(key=lambda run: run.row)

        def prefill(runs: list[_Running]) -> tuple[Tensor | None, Tensor | None]:
            ids = torch.stack([run.checked.prompt[start:stop] for run in runs])
            rows = tuple(run.row for run in runs)
            return self.runner.prefill(Chunk(rows, (start,) * len(runs), ids, first.depth, last[0]))

        for runs, (logits, loops) in self._each(together, prefill):
            self.stats.chunks += 1
            self.stats.prompt_tokens += len(runs) * (stop - start)
            for run in runs:
                run.fed = stop
            if loops is not None:
                runs[0].handle.state.prompt_loops += loops[0].tolist()
            if logits is not None:
                self._drawn(runs, logits)
        self._owed = first.depth.most

    def _piece(self, run: _Running) -> tuple[int, int]:
        return run.fed, min(run.fed + self._chunk, run.checked.prompt.numel())

    # Tokens.

    def _tick(self) -> None:
        runs = self._tokens([run for run in self._all() if run.drawn])
        if not runs:
            return
        self._each([run for run in runs if not run.begun], self._begin)
        moved = [each for runs, _ in self._each(self._looping(), self._advance) for each in runs]
        if moved:
            self.stats.ticks += 1
            self.stats.row_loops += len(moved)
            self._owed -= 1
        self._ask([run for run in moved if run.depth.rule is not None and not run.done])
        self._since_coda += 1
        ready = [run for run in self._all() if run.done]
        if ready and (self._since_coda >= self._coda_every or not self._looping()):
            self._since_coda = 0
            self.stats.codas += 1
            for group, logits in self._each(ready, lambda group: self.runner.coda(_batch(group))):
                self._drawn(group, logits)

    def _looping(self) -> list[_Running]:
        return [run for run in self._all() if run.begun and not run.done]

    def _tokens(self, runs: list[_Running]) -> list[_Running]:
        """Where all begin a token of equal depth a runner may compute it at once; who is left must loop."""
        same = len({run.depth.most for run in runs}) == 1
        if not same or any(run.begun or run.depth.rule is not None for run in runs):
            return runs
        left: list[_Running] = []
        for group, logits in self._each(runs, lambda group: self.runner.token(_batch(group))):
            if logits is None:
                left += group
                continue
            self.stats.ticks += group[0].depth.most
            self.stats.row_loops += group[0].depth.most * len(group)
            self.stats.codas += 1
            self._owed -= group[0].depth.most
            self._drawn(group, logits)
        return left

    def _begin(self, runs: list[_Running]) -> None:
        self.runner.prelude(_batch(runs))
        for run in runs:
            run.begun = True

    def _advance(self, runs: list[_Running]) -> None:
        self.runner.loop(_batch(runs))
        for run in runs:
            run.loops += 1
            run.done = run.loops == run.depth.most
            if run.done and run.depth.rule is not None:
                run.handle.state.loops.append(run.loops)

    def _ask(self, runs: list[_Running]) -> None:
        """Let rules say who leaves; those at the same loop under equal rules are asked together."""
        groups: dict[tuple[object, int], list[_Running]] = {}
        for run in runs:
            groups.setdefault((_key(run.depth.rule), run.loops), []).append(run)
        asked = [answer for group in groups.values() for answer in self._each(group, self._answer)]
        decided = [(group, answer) for group, answer in asked if answer is not None]
        if not decided:
            return
        answers = torch.cat([answer for _, answer in decided]).tolist()  # the only read
        everyone = [run for group, _ in decided for run in group]
        gone = [run for run, leaves in zip(everyone, answers, strict=True) if leaves]
        gone.sort(key=lambda run: run.row)
        for group, _ in self._each(gone, self._leave):
            for run in group:
                run.done = True
                run.handle.state.loops.append(run.loops)

    def _answer(self, runs: list[_Running]) -> Tensor | None:
        """Who of these leaves, (n,) bool, or None where nobody may yet."""
        rule, loops, state, batch = runs[0].depth.rule, runs[0].loops, self.runner.state, _batch(runs)
        assert rule is not None
        rows = torch.tensor(batch.rows, device=state.h.device)
        memories = [dict(run.memory) for run in runs]
        probed: list[int] = []

        def predict() -> Tensor:
            probed.append(loops - 1)
            return self.runner.predict(batch)

        seen = RowSeen(loops, state.h[rows], state.before[rows], self.model, predict, memories)
        answer = leaving(rule, seen)
        for run, memory in zip(runs, memories, strict=True):
            run.memory, run.probed = memory, probed[-1] if probed else run.probed
        return answer if loops >= min(rule.min_loops, runs[0].depth.most) else None

    def _leave(self, runs: list[_Running]) -> None:
        self.runner.leave(_batch(runs), [run.probed for run in runs], [run.depth.probes for run in runs])

    # New tokens.

    def _drawn(self, runs: list[_Running], logits: Tensor) -> None:
        """Draw, feed in the next tick, and read later."""
        tokens = draw([run.sampler for run in runs], logits)
        state = self.runner.state
        state.ids[torch.tensor([run.row for run in runs], device=state.ids.device)] = tokens.clamp(min=0)
        event = None
        if tokens.is_cuda:
            tokens = tokens.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._late.append(_Late(list(runs), tokens, event))
        for run in runs:
            run.next_token()
            if run.drawn == run.checked.request.max_new_tokens:
                self._free(run)

    def _read(self, lag: int) -> None:
        """Hand out tokens, the oldest first, until so many reads are outstanding."""
        while self._late and (len(self._late) > lag or self._late[0].ready()):
            late = self._late.popleft()
            if late.event is not None:
                late.event.synchronize()
            for run, token in zip(late.runs, late.tokens.tolist(), strict=True):
                if not run.handle.done:
                    self._hand_out(run, token)

    def _hand_out(self, run: _Running, token: int) -> None:
        handle, request = run.handle, run.checked.request
        if token < 0:
            self._end(run, "failed", ValueError("the logits are not finite"))
            return
        handle.state.tokens.append(token)
        self.stats.tokens += 1
        try:
            if request.on_token is not None:
                request.on_token(token)
        except Exception as error:
            self._end(run, "failed", error)
            return
        if token == run.checked.eos:
            self._end(run, "eos")
        elif len(handle.state.tokens) == request.max_new_tokens:
            self._end(run, "length")

    def _each(
        self, runs: list[_Running], call: Callable[[list[_Running]], T]
    ) -> list[tuple[list[_Running], T]]:
        """What the call gives for all; where it raises, for each alone, and who raises then has failed."""
        done: list[tuple[list[_Running], T]] = []
        todo = [[run] for run in runs] if self._alone else [runs] if runs else []
        while todo:
            group = todo.pop(0)
            try:
                done.append((group, call(group)))
            except Exception as error:
                if len(group) == 1:
                    self._end(group[0], "failed", error)
                else:
                    todo += [[run] for run in group]
        return done


@dataclass(frozen=True)
class _Late:
    """Tokens on their way to the host."""

    runs: list[_Running]
    tokens: Tensor
    event: torch.cuda.Event | None

    def ready(self) -> bool:
        return self.event is None or self.event.query()


def _batch(runs: list[_Running]) -> Batch:
    return Batch(
        tuple(run.row for run in runs),
        tuple(run.position for run in runs),
        tuple(run.loops for run in runs),
        tuple(run.depth.most for run in runs),
        tuple(run.depth.ruled for run in runs),
    )


def _key(rule: object) -> object:
    """Equal rules are one; those that cannot be compared only if they are the same object."""
    try:
        hash(rule)
    except TypeError:
        return id(rule)
    return rule
