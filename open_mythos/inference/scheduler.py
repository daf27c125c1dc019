"""Which rows compute next: continuous batching by depth.

One turn: those who were cancelled go; waiting requests take free rows and pages, in the order in which they came; at
most one chunk of prompts; then one tick. A tick is one loop of every row that decodes, each at its own loop. Rows whose
loops are done go through the coda, get a token, and begin the next one in the next tick. A row that has finished is
free at once.

A runner may do several ticks in one call, as far as the next coda, and whole prompts beside the ticks: who has one
there decodes once it is done.

Nothing here reads the device, but the answers of exit rules and the new tokens; these may come late (``lag``), and what
a row computed after its end is dropped.

Shape letters: n rows of a call, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from open_mythos.inference.cycles import Cycles
from open_mythos.inference.outlet import Outlet
from open_mythos.inference.pages import PagePool, on_device
from open_mythos.inference.row_exits import answer, asked_together
from open_mythos.inference.runner import Chunk, Runner
from open_mythos.inference.running import (
    Lane,
    Running,
    Stats,
    batch_of,
    checked_drafts,
    chunk_of,
    drawn,
    piece_of,
    round_done,
    round_of,
    rounds_alike,
)
from open_mythos.model import OpenMythos

__all__ = ["Scheduler", "Stats"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_WHOLE = 16
"""Loops of a token up to which running all of them, many of them empty, costs less than waiting for the host."""

_UNDER_RULES = 4
"""Loops of a call with several rows, some of which may leave in it, and then wait for its end."""


class Scheduler(Outlet):
    """Turns of those who run. One thread at a time runs a turn; submitting is safe from any.

    Args:
        model: in eval mode whenever a turn runs.
        pool: its pages.
        runner: who computes.
        rows: requests that run at once.
        chunk: tokens of prompts in one call; a prompt is cut at multiples of it, whatever else goes on.
        queue: requests that may wait.
        coda_every: ticks between codas, while more than half of the rows still loop.
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
        super().__init__(pool, rows, queue, runner.state.ids.device)
        self.model, self.runner = model, runner
        self._chunk, self._coda_every, self._alone, self._lag = chunk, coda_every, alone, lag
        self._owed = 0  # ticks, before the next chunk
        self._since_coda = 0
        self._told: set[type[Exception]] = set()
        self._cycles = Cycles(runner, self.stats, self._cycled)

    # A turn.

    def turn(self) -> None:
        """A little of everything."""
        self.sweep()
        self._read(self._lag)
        self._arrive()
        self.admit()
        reading = [run for run in self._running if not run.drawn]
        if reading and not self._apart and (self._owed <= 0 or len(reading) == len(self._running)):
            self._prompts(reading)
        self._tick()
        self._read(self._lag if self._running else 0)

    # Prompts.

    def _prompts(self, reading: list[Running]) -> None:
        """A chunk of the prompt that has waited longest for one, and of others beside it."""
        reading.sort(key=lambda run: (run.served, run.handle.number))
        self._chunks += 1
        together = sorted(self._beside(reading), key=lambda run: (-run.depth.most, run.row))

        chunk = chunk_of(together, self._chunk)
        whole = all(piece_of(run, self._chunk) == (0, run.checked.prompt.numel()) for run in together)
        beside = self.runner.beside(chunk) if whole and not self._alone else None
        self._prompts_of(together, chunk, beside)
        # A chunk takes about as long as so many ticks. Of the time, those who decode get a fifth to a half: the
        # more they are, the more. Beside them it takes none.
        decoding, ticks = sum(run.decodes for run in self._running), together[0].depth.most
        self._owed = 0 if beside else max(ticks // 4, ticks * decoding // self._count, 1)

    def _prompts_of(
        self, together: list[Running], chunk: Chunk, beside: AbstractContextManager[Any] | None
    ) -> None:
        def prefill(lanes: list[Lane]) -> tuple[Tensor | None, Tensor | None]:
            some = [lane.run for lane in lanes]
            return self.runner.prefill(chunk if some == together else chunk_of(some, self._chunk))

        for lanes, (logits, loops) in self._each([run.lanes[0] for run in together], prefill, beside):
            self.stats.chunks += 1
            ends = []
            for i, lane in enumerate(lanes):
                start, stop = piece_of(lane.run, self._chunk)
                self.stats.prompt_tokens += stop - start
                lane.run.fed, lane.run.served = stop, self._chunks
                spent = [lane.most] * (stop - start) if loops is None else loops[i].tolist()
                lane.run.handle.state.prompt_loops += spent
                if stop == lane.run.checked.prompt.numel():
                    ends.append(i)
            if logits is not None:
                some = logits if len(ends) == len(lanes) else logits[on_device(ends, logits.device)]
                self._drawn([lanes[i] for i in ends], some, beside)

    def _beside(self, reading: list[Running]) -> list[Running]:
        """Who joins the first: as many as a chunk holds, without padding where that does not pay."""
        first, together = reading[0], reading[:1]
        start, stop = piece_of(first, self._chunk)
        if first.depth.rule is not None:
            return together
        uneven = self.runner.ragged and self.model.cfg.halting in ("select", "off") and not self._alone
        longest = stop - start
        # They run as many loops as the deepest, so those of about the same depth.
        for run in sorted(reading[1:], key=lambda run: abs(run.depth.most - first.depth.most)):
            begin, end = piece_of(run, self._chunk)
            alike = (begin, end, run.depth) == (start, stop, first.depth)
            fits = run.depth.rule is None and run.depth.ruled == first.depth.ruled
            wide = max(longest, end - begin)
            if wide * (len(together) + 1) > self._chunk or not (alike or (uneven and fits)):
                continue
            longest = wide
            together.append(run)
        return together

    # Tokens.

    def _tick(self) -> None:
        active = self._active()
        if self._cycling(active):
            self._cycle(active)
            return
        active = self._active()
        lanes = self._alone_at_once(self._at_once(self._rounds(active)))
        if not lanes:
            return
        self._each([lane for lane in lanes if not lane.begun], self._begin)
        looping = [lane for lane in lanes if lane.begun and not lane.rests]
        times = self._stride(looping, len(active))
        moved = [lane for group, _ in self._each(looping, partial(self._advance, times)) for lane in group]
        if moved:
            self.stats.ticks += times
            self._owed -= times
        self._ask([lane for lane in moved if self._asked_here(lane) and not lane.done])
        self._since_coda += times
        self._codas()

    def _active(self) -> list[Lane]:
        """Lanes that compute. Runners are promised rising rows, and lanes of requests may interleave."""
        lanes = [lane for run in self._running if run.decodes for lane in run.active]
        lanes.sort(key=lambda lane: lane.row)
        return lanes

    def _cycling(self, lanes: list[Lane]) -> bool:
        """Whether these go on by themselves. If not, nobody does afterwards, and lanes are as far as they are."""
        if self._alone or not lanes:
            return False
        alike = lanes[0].rule is None and len({(lane.loops, lane.goal, lane.rule) for lane in lanes}) == 1
        if alike and not self._cycles.busy:
            return False
        return self._cycles.takes(lanes)

    def _cycle(self, lanes: list[Lane]) -> None:
        self._each([lane for lane in self._cycles.new(lanes) if not lane.begun], self._begin)
        lanes = [lane for lane in lanes if not lane.run.handle.done]
        if not lanes:
            return
        try:
            cycle = self._cycles.begin(lanes, self._coda_every)
        except Exception as error:
            self._cycles.give_up(error)
            return
        try:
            self._cycles.run(cycle)
        except Exception as error:
            for run in self._cycles.lost():
                self._end(run, "failed", error)
            return
        self._cycles.read()
        self.stats.ticks += cycle.loops
        self.stats.codas += 1
        self._owed -= cycle.loops

    def _stride(self, lanes: list[Lane], count: int) -> int:
        """Loops that these lanes, of so many that are active, run before somebody is asked or decoded: 1, 2, 4, …"""
        if self.runner.stride == 1 or not lanes or any(self._asked_here(lane) for lane in lanes):
            return 1
        lefts, resting = sorted(lane.goal - lane.loops for lane in lanes), count - len(lanes)
        most = max(self._coda_every - self._since_coda, 1 if resting else lefts[0])
        for i, left in enumerate(lefts):
            if left >= most:
                break
            if 2 * (resting + i + 1) >= count:
                most = left
                break
        if count > 1 and any(lane.rule is not None for lane in lanes):
            most = min(most, _UNDER_RULES)
        return 1 << (min(most, self.runner.stride).bit_length() - 1)

    def _asked_here(self, lane: Lane) -> bool:
        """Under a rule that the runner does not ask itself."""
        return lane.rule is not None and not self.runner.asks(lane.rule)

    def _codas(self) -> None:
        """Decode who rests, unless that may wait for more of them."""
        runs = [run for run in self._running if run.decodes]
        rests = [lane.rests for run in runs for lane in run.active]
        if self._since_coda < self._coda_every and 2 * sum(rests) < len(rests):
            return
        ready = [lane for run in runs if run.active[0].rests for lane in run.ready()]
        if ready:
            self._since_coda = 0
            self.stats.codas += 1
            ready.sort(key=lambda lane: lane.row)
            for group, logits in self._each(ready, lambda group: self.runner.coda(batch_of(group))):
                self._decoded(group, logits)

    def _rounds(self, lanes: list[Lane]) -> list[Lane]:
        """Where all begin drafts alike, a runner may draft and check at once.

        Returns:
            Who must go step by step.
        """
        if self._alone or not lanes or not rounds_alike([lane.run for lane in lanes]):
            return lanes
        drafts, loops, most = lanes[0].run.drafts, lanes[0].goal, lanes[0].most
        left: list[Lane] = []

        def call(group: list[Lane]) -> Tensor | None:
            return self.runner.round(round_of([lane.run for lane in group]), drafts, loops)

        for group, logits in self._each(lanes, call):
            if logits is None:
                left += group
                continue
            ticks, runs = drafts * loops + most, [lane.run for lane in group]
            self.stats.ticks += ticks
            self.stats.row_loops += len(runs) * (drafts + 1) * most
            self.stats.codas += drafts + 1
            self._owed -= ticks
            round_done(runs, logits)
            self._checked(runs)
        return left

    def _at_once(self, lanes: list[Lane]) -> list[Lane]:
        """Where all have the same loops before them, and then a coda, a runner may run them at once.

        Returns:
            Who must loop.
        """
        if not lanes:
            return lanes
        first = lanes[0].begun, lanes[0].loops, lanes[0].goal, None
        if any((lane.begun, lane.loops, lane.goal, lane.rule) != first for lane in lanes):
            return lanes
        begun = lanes[0].begun
        if not all(lane.run.checking or (not begun and lane.run.proposes(lane)) for lane in lanes):
            return lanes
        call = self.runner.rest if begun else self.runner.token
        loops, left = lanes[0].goal - lanes[0].loops, []
        for group, logits in self._each(lanes, lambda group: call(batch_of(group, to_goal=True))):
            if logits is None:
                left += group
                continue
            self.stats.ticks += loops
            self.stats.row_loops += loops * len(group)
            self.stats.codas += 1
            self._owed -= loops
            for lane in group:
                lane.begun, lane.loops, lane.rests = True, lane.goal, True
                lane.done = lane.loops == lane.most
            self._decoded(group, logits)
        return left

    def _alone_at_once(self, lanes: list[Lane]) -> list[Lane]:
        """Under a rule that the runner asks, one row alone may run a whole token: nobody waits for what it answers.

        Returns:
            Who must loop.
        """
        lane = lanes[0] if len(lanes) == 1 else None
        if lane is None or lane.begun or lane.run.drafts or lane.most > _WHOLE:
            return lanes
        rule = lane.rule
        if rule is None or not self.runner.asks(rule):
            return lanes
        for group, (logits, left) in self._each(
            lanes, lambda _: self.runner.token_under(batch_of(lanes), [rule])
        ):
            self.stats.ticks += lane.most
            self.stats.codas += 1
            self._owed -= lane.most
            lane.begun, lane.loops, lane.rests, lane.done = True, lane.most, True, True
            self._drawn(group, logits, left=left)
        return []

    def _begin(self, lanes: list[Lane]) -> None:
        self.runner.prelude(batch_of(lanes))
        for lane in lanes:
            lane.begun = True

    def _advance(self, times: int, lanes: list[Lane]) -> None:
        each = [min(times, lane.goal - lane.loops) for lane in lanes]
        rules = [None if self._asked_here(lane) else lane.rule for lane in lanes]
        left: Sequence[int | None] = [None] * len(lanes)
        if any(rule is not None for rule in rules):
            left = self.runner.loops_under(batch_of(lanes), each, rules)
        elif times == 1:
            self.runner.loop(batch_of(lanes))
        else:
            self.runner.loops(batch_of(lanes), each)
        for lane, more, end in zip(lanes, each, left, strict=True):
            done = lane.loops + more if end is None else end
            self.stats.row_loops += done - lane.loops
            lane.loops = done
            if done >= lane.goal or end is not None:
                lane.rests, lane.done = True, done == lane.most or end is not None

    def _ask(self, lanes: list[Lane]) -> None:
        """Let rules say who leaves; those at the same loop under equal rules are asked together."""
        asking = partial(answer, self.model, self.runner)
        asked = [found for group in asked_together(lanes) for found in self._each(group, asking)]
        decided = [(group, found) for group, found in asked if found is not None]
        if not decided:
            return
        answers = torch.cat([found for _, found in decided]).tolist()  # the only read
        everyone = [lane for group, _ in decided for lane in group]
        gone = [lane for lane, leaves in zip(everyone, answers, strict=True) if leaves]
        gone.sort(key=lambda lane: lane.row)
        for group, _ in self._each(gone, self._leave):
            for lane in group:
                lane.done = lane.rests = True

    def _leave(self, lanes: list[Lane]) -> None:
        probes = [lane.depth.probes for lane in lanes]
        self.runner.leave(batch_of(lanes), [lane.probed for lane in lanes], probes)

    # New tokens.

    def _decoded(self, lanes: list[Lane], logits: Tensor) -> None:
        """Logits (n, V) after lanes whose loops are done: draw, or keep them until a draft is checked."""
        drawing = [i for i, lane in enumerate(lanes) if not (lane.run.checking and lane.run.drafts)]
        if len(drawing) == len(lanes):
            self._drawn(lanes, logits)
            return
        if drawing:
            self._drawn([lanes[i] for i in drawing], logits[on_device(drawing, logits.device)])
        checked = [
            (lane, row)
            for lane, row in zip(lanes, logits, strict=True)
            if lane.run.checking and lane.run.drafts
        ]
        for lane, row in checked:
            lane.answer = row.clone() if len(lanes) == 1 else row
        runs = list(dict.fromkeys(lane.run for lane, _ in checked))
        self._checked([run for run in runs if all(lane.answer is not None for lane in run.active)])

    def _drawn(
        self,
        lanes: list[Lane],
        logits: Tensor,
        beside: AbstractContextManager[Any] | None = None,
        left: Tensor | None = None,
    ) -> None:
        """Draw a token after each; feed it next, in this lane or the one that goes on with the draft.

        Those whose prompts run beside wait until it is there. ``left`` are loops (n,) of lanes without drafts that only
        the device knows, see :meth:`Runner.token_under`.
        """
        with beside or nullcontext():
            late = drawn(self.runner.state, lanes, logits, left)
        if late is None:
            return
        (self._late if beside is None else self._apart).append(late)
        for run in late.runs:
            run.waits = beside is not None
            run.next_token()
            # Who waits may still write to its pages.
            if run.drawn == run.checked.request.max_new_tokens and not run.waits:
                self._free(run)

    def _checked(self, runs: list[Running]) -> None:
        """Keep what the full depth agrees with, and begin the next draft. Reads the device once."""
        if not runs:
            return
        ids = self.runner.state.ids
        found = checked_drafts(runs, ids)
        self._read(0)
        going: dict[int, int] = {}
        for run, (count, new) in zip(runs, found, strict=True):
            self.stats.checks += 1
            self.stats.drafted += run.drafts
            self.stats.kept += count - 1
            for lane, token in zip(run.active, new[:count], strict=False):
                if run.handle.done:
                    break
                if token >= 0:
                    run.handle.state.loops.append(lane.loops)
                self._hand_out(run, token)
            if not run.handle.done:
                going[run.row] = new[count - 1]
                run.next_token(count)
        if going:
            rows, tokens = torch.tensor([[*going], [*going.values()]]).to(ids.device)
            ids[rows] = tokens

    def _each(
        self,
        lanes: list[Lane],
        call: Callable[[list[Lane]], T],
        within: AbstractContextManager[Any] | None = None,
    ) -> list[tuple[list[Lane], T]]:
        """What the call gives for all; where it raises, for each alone, and who raises then has failed."""
        done: list[tuple[list[Lane], T]] = []
        todo = [[lane] for lane in lanes] if self._alone else [lanes] if lanes else []
        while todo:
            group = todo.pop(0)
            if len(group) == 1 and group[0].run.handle.done:
                continue
            try:
                with within or nullcontext():
                    found = call(group)
                    # Runners use their buffers again in the next call.
                    done.append((group, _kept(found) if len(group) < len(lanes) else found))
            except Exception as error:
                if len(group) == 1:
                    self._end(group[0].run, "failed", error)
                else:
                    if type(error) not in self._told:  # one that fails alone is told to whoever asked
                        self._told.add(type(error))
                        _log.warning(
                            "%d rows failed together, and are tried one by one: %r", len(group), error
                        )
                    self.stats.retried += 1
                    todo += [[lane] for lane in group]
        return done


def _kept(found: Any) -> Any:
    """A copy, of tensors and of what holds them."""
    if isinstance(found, tuple):
        return tuple(_kept(each) for each in found)
    return found.clone() if isinstance(found, Tensor) else found
