"""A request that has rows: how far it is, and the tokens that it computes.

A request computes one token at a time, in one lane. With a draft of g tokens it has g + 1 lanes, each a row of the
engine that shows the same pages at a position of its own. The lanes draft one after the other and are checked
together, see :mod:`open_mythos.inference.speculative`: what a lane has computed up to the draft's depth stays in its
row.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.inference.pages import on_device
from open_mythos.inference.requests import Checked, Handle
from open_mythos.inference.runner import Batch, Chunk, RowState
from open_mythos.inference.sampler import Sampler, draw
from open_mythos.inference.sampling import probabilities
from open_mythos.inference.speculative import accept_drawn, accept_likeliest

__all__ = [
    "Lane",
    "Late",
    "Numbers",
    "Running",
    "Stats",
    "batch_of",
    "checked_drafts",
    "chunk_of",
    "drawn",
    "lanes_of",
    "piece_of",
    "round_done",
    "round_of",
    "rounds_alike",
]


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
        checks: drafts that were checked.
        drafted: tokens that they held.
        kept: those that the full depth agreed with.
        retried: calls for several rows that raised, so that each row was tried alone.
        finished: requests that came to their end, by reason.
    """

    ticks: int = 0
    row_loops: int = 0
    codas: int = 0
    tokens: int = 0
    chunks: int = 0
    prompt_tokens: int = 0
    checks: int = 0
    drafted: int = 0
    kept: int = 0
    retried: int = 0
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Lane:
    """One token on its way.

    Attributes:
        run: whose.
        row: of the engine.
        position: of the token.
        loops: it has done.
        goal: loops after which it rests.
        begun: the prelude has run.
        rests: the coda is next, or others must come as far.
        done: its loops are done.
        memory: what its rule remembers of it.
        probed: loop after which its rule last decoded it.
        proposed: (V,) logits of the draft after it, where tokens are drawn.
        answer: (V,) logits of the check after it.
    """

    run: Running
    row: int
    position: int = 0
    loops: int = 0
    goal: int = 0
    begun: bool = False
    rests: bool = False
    done: bool = False
    memory: dict[str, Tensor] = field(default_factory=dict)
    probed: int | None = None
    proposed: Tensor | None = None
    answer: Tensor | None = None

    def __post_init__(self) -> None:
        # Asked in every loop of every row.
        self.depth = self.run.depth
        self.most, self.rule, self.ruled = self.depth.most, self.depth.rule, self.depth.ruled

    def start(self, position: int, goal: int) -> None:
        """A new token."""
        self.position, self.loops, self.goal = position, 0, goal
        self.begun = self.rests = self.done = False
        self.memory, self.probed, self.proposed, self.answer = {}, None, None, None


class Running:
    """A request that has rows.

    Args:
        handle: of the request.
        rows: of the engine, in rising order; one for each lane.
        sampler: how it draws.

    Attributes:
        depth: of its tokens.
        row: the first, whose pages they are.
        fed: tokens of the prompt that are cached.
        served: chunks of any prompts before its last one.
        drawn: new tokens drawn, of which some may not have been read yet.
        waits: its prompt is computed beside those who decode, and not done yet.
        lanes: in the order of their positions.
        drafts: tokens that are drafted in this round.
        checking: the draft is complete.
        active: lanes that compute now.
    """

    def __init__(self, handle: Handle, rows: Sequence[int], sampler: Sampler) -> None:
        self.handle, self.sampler, self.fed, self.served, self.drawn = handle, sampler, 0, 0, 0
        self.depth, self.row = handle.checked.depth, rows[0]
        self.lanes = [Lane(self, row) for row in rows]
        self.drafts, self.checking, self.waits = 0, True, False
        self.active = self.lanes[:1]

    @property
    def decodes(self) -> bool:
        """Has had its prompt, and computes tokens."""
        return self.drawn > 0 and not self.waits

    @property
    def checked(self) -> Checked:
        """What was asked."""
        return self.handle.checked

    def next_token(self, gained: int = 1) -> None:
        """So many tokens were drawn, and the last of them is to be fed next."""
        self.drawn += gained
        draft, most = self.checked.request.speculate, self.depth.most
        left = self.checked.request.max_new_tokens - self.drawn
        self.drafts = 0 if draft is None else max(0, min(draft.tokens, left - 1))
        self.checking = not self.drafts
        goal = most if draft is None or self.checking else min(draft.loops, most)
        position = self.checked.prompt.numel() + self.drawn - 1
        for i, lane in enumerate(self.lanes):
            lane.start(position + i, goal)
        self.active = self.lanes[:1]

    def proposes(self, lane: Lane) -> bool:
        """Whether a token is drafted after this lane's."""
        return not self.checking and lane is not self.lanes[self.drafts]

    def drafted(self, lane: Lane) -> Lane:
        """The token after this lane's was drafted; returns the lane that is fed with it."""
        following = self.lanes[self.lanes.index(lane) + 1]
        self.active = [following]
        return following

    def ready(self) -> list[Lane]:
        """Lanes for the coda, all of them or none. A complete draft goes on to be checked."""
        if not all(lane.rests for lane in self.active):
            return []
        if self.checking or self.proposes(self.active[0]):
            return self.active
        self.checking, self.active = True, self.lanes[: self.drafts + 1]
        for lane in self.active:
            lane.goal = self.depth.most
            lane.rests = lane.done or lane.loops == lane.goal
        return self.active if all(lane.rests for lane in self.active) else []


@dataclass(frozen=True)
class Numbers:
    """Whole numbers on their way to the host.

    Attributes:
        numbers: on the host once ``event`` has come.
        event: None: they are there.
    """

    numbers: Tensor
    event: torch.cuda.Event | None

    @classmethod
    def room(cls, like: Tensor) -> Numbers:
        """Memory on the host for as many."""
        # Pinned, or the copy would wait for all that the device has to do.
        pinned = like.is_cuda
        host = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
        return cls(host, torch.cuda.Event() if pinned else None)

    def filled(self, numbers: Tensor) -> Numbers:
        """Send them here; what is written there later does not matter."""
        self.numbers.copy_(numbers, non_blocking=True)
        if self.event is not None:
            self.event.record()
        return self

    @classmethod
    def of(cls, numbers: Tensor) -> Numbers:
        """Send them."""
        return cls.room(numbers).filled(numbers)

    def ready(self) -> bool:
        """Whether reading them is no waiting."""
        return self.event is None or self.event.query()

    def read(self) -> list[Any]:
        """As lists."""
        if self.event is not None:
            self.event.synchronize()
        found: list[Any] = self.numbers.tolist()
        return found


@dataclass(frozen=True)
class Late:
    """Tokens on their way to the host.

    Attributes:
        runs: n, whose they are.
        loops: spent by the new token before each; None before the first.
        left: whether the device says after how many loops those new tokens left.
        numbers: (n,) tokens, or (2 n,) with those loops, which are below zero where ``loops`` has them.
    """

    runs: list[Running]
    loops: list[int | None]
    left: bool
    numbers: Numbers

    @classmethod
    def of(cls, runs: list[Running], loops: list[int | None], tokens: Tensor, left: Tensor | None) -> Late:
        """Send them."""
        numbers = tokens if left is None else torch.cat((tokens, left.to(tokens.dtype)))
        return cls(runs, loops, left is not None, Numbers.of(numbers))

    def ready(self) -> bool:
        """Whether reading them is no waiting."""
        return self.numbers.ready()

    def read(self) -> list[tuple[Running, int | None, int]]:
        """Each with the loops of the new token before it, and the token."""
        found, loops, n = self.numbers.read(), self.loops, len(self.runs)
        if self.left:
            loops = [most if end < 0 else end for most, end in zip(loops, found[n:], strict=True)]
        return list(zip(self.runs, loops, found[:n], strict=True))


def drawn(state: RowState, lanes: list[Lane], logits: Tensor, left: Tensor | None) -> Late | None:
    """Draw a token after each of n lanes, from logits (n, V), and feed it.

    Args:
        state: of the rows; its ids are written.
        lanes: whose tokens' loops are done.
        logits: after them.
        left: loops (n,) that only the device knows, see :class:`Late`.

    Returns:
        The tokens that are no drafts, on their way to the host.
    """
    tokens, fed = draw([lane.run.sampler for lane in lanes], logits), []
    for i, lane in enumerate(lanes):
        if lane.run.drafts and lane.run.drawn:
            lane.proposed = logits[i].clone() if lane.run.sampler.generator is not None else None
            fed.append(lane.run.drafted(lane).row)
        else:
            fed.append(lane.row)
    state.ids[on_device(fed, state.ids.device)] = tokens.clamp(min=0)
    own = [i for i, lane in enumerate(lanes) if fed[i] == lane.row]
    if not own:
        return None
    runs = [lanes[i].run for i in own]
    if len(own) < len(lanes):
        tokens = tokens[on_device(own, tokens.device)]
    loops = [run.lanes[0].loops if run.drawn else None for run in runs]
    return Late.of(runs, loops, tokens, left)


def batch_of(lanes: Sequence[Lane], to_goal: bool = False) -> Batch:
    """What a runner is told of lanes; their most loops are those to their goal if asked for."""
    return Batch(
        tuple([lane.row for lane in lanes]),
        tuple([lane.position for lane in lanes]),
        tuple([lane.loops for lane in lanes]),
        tuple([lane.goal if to_goal else lane.most for lane in lanes]),
        tuple([lane.ruled for lane in lanes]),
        any(not lane.run.checking for lane in lanes),
    )


def lanes_of(checked: Checked) -> int:
    """Rows that a request takes."""
    draft = checked.request.speculate
    return 1 if draft is None else 1 + max(0, min(draft.tokens, checked.request.max_new_tokens - 2))


def piece_of(run: Running, size: int) -> tuple[int, int]:
    """The next tokens of a prompt, from a multiple of the size."""
    return run.fed, min(run.fed + size, run.checked.prompt.numel())


def chunk_of(runs: list[Running], size: int) -> Chunk:
    """The next tokens of these prompts, padded on the right."""
    pieces = [run.checked.prompt[slice(*piece_of(run, size))] for run in runs]
    counts, most = tuple(piece.numel() for piece in pieces), tuple(run.depth.most for run in runs)
    last = any(run.fed + count == run.checked.prompt.numel() for run, count in zip(runs, counts, strict=True))
    return Chunk(
        tuple(run.row for run in runs),
        tuple(run.fed for run in runs),
        torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True),
        runs[0].depth,
        last,
        counts if min(counts) < max(counts) else None,
        most,
    )


def rounds_alike(runs: Sequence[Running]) -> bool:
    """Whether all begin equally long drafts of the likeliest tokens, to be checked at equal depth under no rule."""
    first = runs[0]
    return all(
        run.drafts
        and run.sampler.generator is None
        and run.depth.rule is None
        and run.active[0] is run.lanes[0]
        and not (run.checking or run.lanes[0].begun)
        and (run.drafts, run.lanes[0].goal, run.depth) == (first.drafts, first.lanes[0].goal, first.depth)
        for run in runs
    )


def round_of(runs: Sequence[Running]) -> Batch:
    """All lanes of drafts that begin: the first ones, the second ones, and so on."""
    return batch_of([run.lanes[i] for i in range(runs[0].drafts + 1) for run in runs])


def round_done(runs: Sequence[Running], logits: Tensor) -> None:
    """Drafts and checks have run at once, with these logits (n, V) in the order of :func:`round_of`."""
    for at, run in enumerate(runs):
        run.checking, run.active = True, run.lanes[: run.drafts + 1]
        for i, lane in enumerate(run.active):
            lane.begun = lane.done = lane.rests = True
            lane.loops = lane.goal = run.depth.most
            lane.answer = logits[i * len(runs) + at]


def checked_drafts(runs: Sequence[Running], ids: Tensor) -> list[tuple[int, list[int]]]:
    """What the checks of drafts come to. Reads the device once.

    Args:
        runs: all of whose active lanes have an answer.
        ids: (R,) tokens that rows were fed.

    Returns:
        For each how many tokens are gained, and g + 1 tokens, of which only those count; all of them are below zero
        where logits are not finite.
    """
    groups: dict[object, list[Running]] = {}
    for run in runs:  # who draws has a generator of its own
        groups.setdefault(len(run.active) if run.sampler.generator is None else run, []).append(run)
    found = [_gained(group, ids) for group in groups.values()]
    numbers = iter(torch.cat([gained.flatten() for gained in found]).tolist())
    answers: dict[Running, tuple[int, list[int]]] = {}
    for group in groups.values():
        for run in group:
            answers[run] = next(numbers), [next(numbers) for _ in run.active]
    return [answers[run] for run in runs]


def _gained(runs: list[Running], ids: Tensor) -> Tensor:
    """Tokens gained and the tokens, (n, g + 2), of runs with equally long drafts; only one where tokens are drawn."""
    lanes, sampler = [lane for run in runs for lane in run.active], runs[0].sampler
    rows = on_device([[lane.row for lane in run.active[1:]] for run in runs], ids.device)
    drafted = ids[rows]
    answers = torch.stack([lane.answer for lane in lanes if lane.answer is not None])
    answers = answers.view(len(runs), -1, answers.shape[-1])
    finite = answers.isfinite().flatten(1).all(1, keepdim=True)
    answers = answers.masked_fill(~finite.unsqueeze(2), 0)
    if sampler.generator is None:
        kept, after = accept_likeliest(drafted, answers)
    else:
        draft = torch.stack([lane.proposed for lane in lanes if lane.proposed is not None]).unsqueeze(0)
        finite = finite & draft.isfinite().all()
        q, p = (probabilities(x, *sampler.settings) for x in (draft.masked_fill(~finite, 0), answers))
        kept, after = accept_drawn(drafted, q, p, sampler.generator)
    kept, after = kept.unsqueeze(1), after.unsqueeze(1)
    tokens = F.pad(drafted, (0, 1)).scatter_(1, kept, after).masked_fill(~finite, -1)
    return torch.cat((kept + 1, tokens), 1)
