"""Speculation by depth: the first loops of the same model draft tokens, all loops together check them.

    draft    y_1 … y_g, one after the other: prelude, loops 0 … d − 1, coda
    check    loops d … T − 1 of the g + 1 tokens that were fed, in one pass, and the coda again
    keep     the longest start of the draft that the full depth agrees with, and one token more

The first d loops of a drafted token are the first d loops of the token: its state, keys and values are kept, and
checking begins where the draft stopped. Only the coda runs twice. What comes out is what would have come out
without: the same tokens where the likeliest are taken, and the same distribution where tokens are drawn (Leviathan
et al., arXiv 2211.17192). See docs/speculation.md.

Shape letters: B batch, S tokens of a call, D model width, V vocabulary, T loops; d loops of a draft, g its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.inference.checks import check_whole
from open_mythos.inference.exit_cache import ExitCache
from open_mythos.inference.exit_loop import Thinking
from open_mythos.inference.exit_rules import Rule
from open_mythos.inference.exits import LoopReport, forward
from open_mythos.inference.sampling import Settings
from open_mythos.model import EveryLoop, LoopPolicy, OpenMythos
from open_mythos.model.attention import SequenceContext
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.model.transformer import evaluating

__all__ = ["Draft", "accept_drawn", "accept_likeliest", "check_draft", "drafted"]


@dataclass(frozen=True)
class Draft:
    """How far to look ahead, and how cheaply.

    Args:
        loops: d, loops of a draft, at least 1 and fewer than the generation's.
        tokens: g, tokens drafted before they are checked, at least 1.
    """

    loops: int
    tokens: int

    def __post_init__(self) -> None:
        check_whole("Draft.loops", self.loops, 1)
        check_whole("Draft.tokens", self.tokens, 1)


def accept_likeliest(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the drafted tokens up to the first that is not the likeliest.

    Args:
        drafted: (B, g) ids.
        logits: (B, g + 1, V) at full depth, of what follows each token fed.

    Returns:
        How many are kept, (B,) from 0 to g; the token that follows them, (B,).
    """
    best = logits.argmax(-1)
    kept = (best[:, :-1] == drafted).long().cumprod(1).sum(1)
    return kept, best.gather(1, kept.unsqueeze(1)).squeeze(1)


def accept_drawn(
    drafted: Tensor, proposed: Tensor, wanted: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Keep each drafted token y with probability min(1, p(y) / q(y)), up to the first that is refused.

    The token after the kept ones is drawn from max(p − q, 0), scaled to sum to one, where one was refused, and from p
    where none was. Tokens then have the distribution p, whatever q is (arXiv 2211.17192, theorem 1).

    Args:
        drafted: (B, g) ids, each drawn from its row of ``proposed``.
        proposed: (B, g, V) q, the draft's distributions.
        wanted: (B, g + 1, V) p, those at full depth.
        generator: source of randomness.

    Returns:
        How many are kept, (B,) from 0 to g; the token that follows them, (B,).
    """
    chance = torch.rand(drafted.shape, dtype=wanted.dtype, device=wanted.device, generator=generator)
    kept = (chance < keeping(drafted, proposed, wanted)).long().cumprod(1).sum(1)
    return kept, torch.multinomial(following(kept, proposed, wanted), 1, generator=generator).squeeze(1)


def keeping(drafted: Tensor, proposed: Tensor, wanted: Tensor) -> Tensor:
    """Probability with which :func:`accept_drawn` keeps each drafted token whose predecessors are kept, (B, g)."""
    q, p = (x.gather(2, drafted.unsqueeze(2)).squeeze(2) for x in (proposed, wanted[:, :-1]))
    return (p / q).clamp(max=1)


def following(kept: Tensor, proposed: Tensor, wanted: Tensor) -> Tensor:
    """What :func:`accept_drawn` draws the token after the kept ones from, (B, V), not scaled to sum to one."""
    place = kept.view(-1, 1, 1).expand(-1, 1, wanted.shape[2])
    p, q = (x.gather(1, place).squeeze(1) for x in (wanted, F.pad(proposed, (0, 0, 0, 1))))
    rest = (p - q).clamp(min=0)
    # Nothing is left when p and q differ by rounding alone; then p is as good.
    return torch.where(rest.sum(1, keepdim=True) > 0, rest, p)


class DraftCache(ExitCache):
    """An :class:`ExitCache` whose last tokens may be computed again, and whose rows may forget different tokens."""

    @contextmanager
    def rewound(self, length: int) -> Iterator[None]:
        """Inside, calls come after the first ``length`` tokens; what the slots hold of the others stays."""
        full, marks = self.length, self.segments
        self.length, self.segments = length, None if marks is None else marks[:, :length]
        try:
            yield
        finally:
            self.length, self.segments = full, marks

    def keep(self, past: int, counts: Sequence[int]) -> None:
        """Of the tokens from column ``past`` on, keep the first ``counts[row]`` of each row.

        Rows that keep fewer than others have padding in their place, which nobody looks at.
        """
        self.trim(past + max(counts))
        if min(counts) == max(counts):
            return
        marks = self._marks()
        columns = torch.arange(self.length - past, device=marks.device)
        refused = columns >= torch.tensor(counts, device=marks.device).unsqueeze(1)
        self.segments = torch.cat((marks[:, :past], marks[:, past:].masked_fill(refused, -1)), 1)

    def settle(self, loops: int | None = None) -> None:
        """Fill what the slots of the first ``loops`` loops (None: of all) lack of tokens that left before them."""
        chains: dict[str, dict[int, str]] = {}
        for slot in self.entries:
            layer, found, number = slot.rpartition("recurrent_loop_")
            if found and (loops is None or int(number) < loops):
                chains.setdefault(layer, {})[int(number)] = slot
        for chain in chains.values():
            for below, loop in pairwise(sorted(chain)):
                self._complete(chain[loop], chain[below])

    def squeeze(self) -> None:
        """Move each row's tokens to the front, over its padding."""
        self.settle()
        marks = self._marks()
        real = marks >= 0
        counts = real.sum(1, keepdim=True)
        width = int(counts.max())
        # A stable sort leaves the tokens in order.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        rows = torch.arange(len(marks), device=marks.device).unsqueeze(1)
        for slot, entry in self.entries.items():
            self.entries[slot] = {name: tensor[rows, order] for name, tensor in entry.items()}
        self._buffers.clear()
        self.length = width
        padding = torch.arange(width, device=marks.device) >= counts
        self.segments = torch.zeros_like(order).masked_fill(padding, -1) if bool(padding.any()) else None

    def _marks(self) -> Tensor:
        if self.segments is not None:
            return self.segments
        device = next(iter(next(iter(self.entries.values())).values())).device
        return torch.zeros((self.batch_size or 0, self.length), dtype=torch.int64, device=device)


class _Thought:
    """Tokens of a call on their way through all loops, with the model's own halting; see :class:`Thinking`.

    Args:
        model: in eval mode.
        e: (B, S, D).
        ctx: its context.
        n_loops: T.

    Attributes:
        state: (B, S, D) that the coda reads, were this the last loop.
        loops: (B, S) int64, loops run.
    """

    def __init__(self, model: OpenMythos, e: Tensor, ctx: SequenceContext, n_loops: int) -> None:
        self._model, self._e, self._ctx, self._most, self._done = model, e, ctx, n_loops, 0
        self._weights = HaltingWeights(model.cfg) if model.cfg.halting == "select" else None
        self._h = self.state = model.initial_state(e)

    @classmethod
    def joined(cls, parts: Sequence[_Thought], ctx: SequenceContext) -> _Thought:
        """All tokens of calls that paused after equally many loops, one call after the other."""
        first = parts[0]
        whole = cls(first._model, torch.cat([part._e for part in parts], 1), ctx, first._most)
        whole._h = torch.cat([part._h for part in parts], 1)
        whole.state = torch.cat([part.state for part in parts], 1)
        whole._done = first._done
        if whole._weights is not None:
            weights = [part._weights for part in parts]
            for name in ("mass", "running"):
                setattr(whole._weights, name, torch.cat([getattr(one, name) for one in weights], 1))
        return whole

    @property
    def loops(self) -> Tensor:
        return torch.full(self._e.shape[:2], self._done, device=self._e.device)

    def run(self, until: int | None = None) -> None:
        """Loops up to number ``until``, or all."""
        until = self._most if until is None else until
        for t in range(self._done, until):
            self._h = self._model.step(self._h, self._e, t, self._ctx)
            if self._weights is None:
                self.state = self._h
            else:
                self.state = self._weights.observe(self._h, self._model.recurrent.act(self._h), self.state)
        self._done = until


class _Speculation:
    """One generation: a cache, and the rows that still run.

    Args:
        model: in eval mode when it is called.
        draft: how to draft.
        settings: of the generation.
        rule: by which tokens leave the loop; None: all run all loops.
        report: counts loops and drafts, or None.
    """

    def __init__(
        self,
        model: OpenMythos,
        draft: Draft,
        settings: Settings,
        rule: Rule | None,
        report: LoopReport | None,
    ) -> None:
        self._model, self._draft, self._settings = model, draft, settings
        self._rule, self._report = rule, report
        self._columns = min(settings.columns + draft.tokens, model.cfg.max_seq_len)
        self._cache = DraftCache(None, self._columns)
        self._spent: Tensor | None = None

    def prompt(self, ids: Tensor, mask: Tensor | None, last: Tensor) -> Tensor:
        """Prompts (B, S) → logits (B, V) of each one's last token."""
        model, cache, n_loops = self._model, self._cache, self._settings.n_loops
        if self._rule is None:
            logits = model(ids, n_loops, cache, attention_mask=mask, logits_at=last)
            loops = torch.full(ids.shape, n_loops, device=ids.device)
        else:
            answer = forward(model, ids, self._rule, n_loops, cache, attention_mask=mask, logits_at=last)
            logits, loops = answer.logits, answer.loops
        if self._report is not None:
            self._report.add("prompt", loops, mask)
        return logits[:, -1]

    def advance(self, fed: Tensor, most: int) -> tuple[Tensor, list[int]]:
        """Draft after the tokens (B, 1), and check.

        Args:
            fed: each row's last token, which no call has seen.
            most: tokens that some row still wants, at least 1.

        Returns:
            (B, g + 1) ids, and how many of them hold in each row, at least 1.
        """
        model, cache = self._model, self._cache
        drafts = self._room(min(self._draft.tokens, most - 1))
        past = cache.length
        parts, ids, proposed = [], [fed], []
        for i in range(drafts + 1):
            ctx = model.context(ids[-1], cache=cache)
            part = self._thought(model.prelude(ids[-1], ctx), ctx)
            part.run(self._draft.loops)
            parts.append(part)
            if i < drafts:
                logits = model.coda(part.state, ctx)[:, -1]
                ids.append(self._settings.pick(logits).unsqueeze(1))
                proposed.append(logits)
            cache.commit(1, ctx.segments)
        tokens = torch.cat(ids, 1)
        if self._rule is not None:
            cache.settle(self._draft.loops)
        with cache.rewound(past):
            ctx = model.context(tokens, cache=cache)
            whole = type(parts[0]).joined(parts, ctx)
            whole.run()
            logits = model.coda(whole.state, ctx)
        kept, after = self._accept(tokens[:, 1:], proposed, logits)
        counts = (kept + 1).tolist()
        cache.keep(past, counts)
        self._spent = whole.loops
        return F.pad(tokens[:, 1:], (0, 1)).scatter_(1, kept.unsqueeze(1), after.unsqueeze(1)), counts

    def count(self, gained: list[int], taken: list[int]) -> None:
        """Report what the last check gained in each row, and how much of that was wanted."""
        if self._report is None or self._spent is None:
            return
        width = self._spent.shape[1]
        self._report.checks += len(gained)
        self._report.drafted += len(gained) * (width - 1)
        self._report.kept += sum(gained) - len(gained)
        columns = torch.arange(width, device=self._spent.device)
        wanted = columns < torch.tensor(taken, device=columns.device).unsqueeze(1)
        self._report.add("new", self._spent, wanted)

    def select(self, rows: list[int], device: torch.device) -> None:
        """Go on with these rows alone."""
        self._cache.select(torch.tensor(rows, device=device))
        if self._cache.segments is not None:
            self._cache.squeeze()

    def _thought(self, e: Tensor, ctx: SequenceContext) -> Any:
        if self._rule is None:
            return _Thought(self._model, e, ctx, self._settings.n_loops)
        return Thinking(self._model, e, ctx, self._rule, self._settings.n_loops)

    def _accept(self, drafted: Tensor, proposed: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        settings = self._settings
        if settings.temperature == 0:
            return accept_likeliest(drafted, logits)
        if not proposed:
            after = settings.pick(logits[:, -1])
            return torch.zeros_like(after), after
        draft = settings.chances(torch.stack(proposed, 1))
        return accept_drawn(drafted, draft, settings.chances(logits), settings.generator)

    def _room(self, drafts: int) -> int:
        """So many tokens to draft, or fewer at the end of the longest sequence."""
        if self._cache.length + drafts + 1 > self._columns and self._cache.segments is not None:
            self._cache.squeeze()
        return min(drafts, self._columns - self._cache.length - 1)


class _Output:
    """The new tokens of each row, and the columns that all rows have reached."""

    def __init__(self, rows: int, settings: Settings, fill: int | None) -> None:
        self._rows: list[list[int]] = [[] for _ in range(rows)]
        self.running = list(range(rows))
        self._most, self._eos, self._fill = settings.max_new_tokens, settings.eos, fill
        self._sent = 0

    @property
    def wanted(self) -> int:
        """Tokens that some running row still needs."""
        return self._most - min((len(self._rows[row]) for row in self.running), default=self._most)

    def add(self, new: list[list[int]], counts: list[int]) -> list[int]:
        """Take what the running rows gained; returns how many of it each still wanted."""
        taken = []
        for row, tokens, count in zip(self.running, new, counts, strict=True):
            tokens = tokens[: min(count, self._most - len(self._rows[row]))]
            if self._eos is not None and self._eos in tokens:
                tokens = tokens[: tokens.index(self._eos) + 1]
            self._rows[row] += tokens
            taken.append(len(tokens))
        return taken

    def stay(self) -> list[int]:
        """Drop the running rows that are finished; returns which of them, counted from 0, go on."""
        on = [i for i, row in enumerate(self.running) if not self._finished(self._rows[row])]
        self.running = [self.running[i] for i in on]
        return on

    def ready(self) -> Iterator[list[int]]:
        """Columns that no running row has yet to reach, once each."""
        rows = [self._rows[row] for row in self.running] or [max(self._rows, key=len)]
        for at in range(self._sent, min(len(row) for row in rows)):
            self._sent = at + 1
            yield [row[at] if at < len(row) else self._filled() for row in self._rows]

    def _finished(self, row: list[int]) -> bool:
        return len(row) == self._most or (self._eos is not None and row[-1] == self._eos)

    def _filled(self) -> int:
        filler = self._eos if self._fill is None else self._fill
        assert filler is not None  # only an EOS id ends a row before the others
        return filler


def check_draft(draft: object, model: OpenMythos, n_loops: int, policy: LoopPolicy | None) -> None:
    """Refuse what is no draft, and a generation that cannot be drafted this way.

    Raises:
        ValueError: naming what does not fit.
    """
    if not isinstance(draft, Draft):
        raise ValueError(
            f"speculate = {draft!r} is not allowed: it must be a Draft such as Draft(2, 4), or None"
        )
    if n_loops < 2:
        raise ValueError("speculate is not allowed with n_loops = 1: a draft must run fewer loops than that")
    if draft.loops >= n_loops:
        raise ValueError(
            f"Draft.loops = {draft.loops} is not allowed with n_loops = {n_loops}: it must be 1 to {n_loops - 1}"
        )
    if policy is not None and not isinstance(policy, EveryLoop):
        raise ValueError(
            f"cache_policy = {policy!r} is not allowed with speculate: drafted tokens must show their first loops, "
            "and others their last; it must be EveryLoop() or None"
        )
    if model.cfg.halting not in ("select", "off"):
        raise ValueError(
            f"halting = {model.cfg.halting!r} is not allowed with speculate: its coda was trained on a mix of "
            "states; it must be 'select' or 'off'"
        )


def drafted(
    model: OpenMythos,
    ids: Tensor,
    mask: Tensor | None,
    last: Tensor,
    draft: Draft,
    settings: Settings,
    rule: Rule | None = None,
    report: LoopReport | None = None,
    alone: bool = True,
) -> Iterator[Tensor]:
    """The new tokens of all rows, (B,) int64 column by column, each as soon as every row has reached it.

    Args:
        model: any model that :meth:`Draft.check` allows.
        ids: (B, S) prompts.
        mask: (B, S) bool, False where they are padded; None: nowhere.
        last: (B,) column of each prompt's last token.
        draft: how to draft.
        settings: of the generation.
        rule: by which tokens leave the loop, also those of a draft; None: all run all loops.
        report: counts loops and drafts.
        alone: the model is in eval mode and nobody changes that between two tokens.
    """
    run = _Speculation(model, draft, settings, rule, report)
    output = _Output(len(ids), settings, model.cfg.pad_token_id)
    fed: Tensor | None = None
    while output.wanted:
        with nullcontext() if alone else evaluating(model), torch.inference_mode():
            if fed is None:
                new, counts = settings.pick(run.prompt(ids, mask, last)).unsqueeze(1), [1] * len(ids)
            else:
                new, counts = run.advance(fed, output.wanted)
            taken = output.add(new.tolist(), counts)
            if fed is not None:
                run.count(counts, taken)
            fed = new.gather(1, torch.tensor(counts, device=new.device).unsqueeze(1) - 1)
            going = output.stay()
            if 0 < len(going) < len(counts):
                run.select(going, ids.device)
                fed = fed[going]
        for column in output.ready():
            yield torch.tensor(column, device=ids.device)
