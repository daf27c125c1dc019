"""Exits: each token leaves the loop when a rule says so, with a cache that stays consistent for later tokens.

    after loop n:  rule.leaves(seen)  →  the token keeps h_n; in deeper loops later tokens see of it what it
                                         would have shown in the next one

:func:`forward` composes prelude, step and coda from outside the model; nothing in the model knows of exits. The
meaning with each cache policy is in docs/exits.md.

Shape letters: B batch, S new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from open_mythos.inference.exit_cache import ExitCache
from open_mythos.inference.exit_gate import Gate, Learned, fit
from open_mythos.inference.exit_loop import Thinking
from open_mythos.inference.exit_rules import (
    ACT,
    Confidence,
    Fixed,
    Never,
    PredictionChange,
    Rule,
    SamePrediction,
    Seen,
    StateChange,
)
from open_mythos.model import KVCache, LastLoop, OpenMythos
from open_mythos.model.attention import SequenceContext
from open_mythos.model.cache import CacheError
from open_mythos.model.inputs import check_ids, check_loops
from open_mythos.model.transformer import evaluating

__all__ = [
    "ACT",
    "Answer",
    "Confidence",
    "ExitCache",
    "Fixed",
    "Gate",
    "Learned",
    "LoopReport",
    "Never",
    "PredictionChange",
    "Rule",
    "SamePrediction",
    "Seen",
    "StateChange",
    "Thinking",
    "fit",
    "forward",
    "think",
]


@dataclass(frozen=True)
class Answer:
    """What a call with exits gives.

    Attributes:
        logits: (B, S, V), or (B, 1, V) of one column of each row.
        loops: (B, S) int64, loops that each token ran.
    """

    logits: Tensor
    loops: Tensor


@torch.no_grad()
def forward(
    model: OpenMythos,
    input_ids: Tensor,
    rule: Rule,
    n_loops: int | None = None,
    cache: KVCache | None = None,
    *,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    logits_at: Tensor | None = None,
    idle: Tensor | None = None,
    dense: bool = False,
) -> Answer:
    """The model's forward, where each token leaves the loop when the rule says so. In eval mode, no gradients.

    One call over a whole sequence, chunks, and one token at a time give the same with ``EveryLoop``.

    Args:
        model: the model; its mode is given back.
        input_ids: (B, S) token ids.
        rule: asked after each loop.
        n_loops: T, the most loops; ``cfg.max_loop_iters`` when None.
        cache: an :class:`ExitCache` whose sequence goes on; None: the ids are all there is.
        attention_mask: (B, S), zero for padding.
        document_ids: (B, S); a token sees only its own document.
        logits_at: (B,) column of each row whose logits are wanted.
        idle: (B, S) bool, tokens that nobody needs, such as those of finished rows: they leave first.
        dense: compute all tokens of the call until the last one leaves. The same result; it saves only
            whole loops, and needs no gathering.

    Raises:
        ValueError: an argument does not fit the model, the ids or the cache.
    """
    n_loops = check_loops(model.cfg.max_loop_iters if n_loops is None else n_loops)
    check_ids(input_ids, model.cfg.vocab_size)
    check_rule(rule, model)
    if cache is not None and not isinstance(cache, ExitCache):
        raise CacheError(f"cache must be an ExitCache or None, got {type(cache).__name__}")
    if idle is not None and (idle.shape != input_ids.shape or idle.dtype != torch.bool):
        raise ValueError(
            f"idle must be bool of the shape of input_ids, {tuple(input_ids.shape)}, got {idle.dtype} of "
            f"shape {tuple(idle.shape)}"
        )
    # Within one call tokens meet at equal loops whatever the policy, so one slot will do.
    cache = ExitCache(LastLoop()) if cache is None else cache
    ctx = model.context(input_ids, attention_mask, document_ids, cache)
    past = cache.length
    if attention_mask is not None:
        padding = attention_mask.to(input_ids.device) == 0
        idle = padding if idle is None else idle | padding
    try:
        with evaluating(model):
            e = model.prelude(input_ids, ctx)
            h, loops = think(model, e, ctx, rule, n_loops, idle=idle, dense=dense)
            logits = model.coda(h, ctx, logits_at)
    except BaseException:
        cache.trim(past)
        raise
    cache.commit(input_ids.shape[1], ctx.segments, ctx.packed)
    return Answer(logits, loops)


@torch.no_grad()
def think(
    model: OpenMythos,
    e: Tensor,
    ctx: SequenceContext,
    rule: Rule,
    n_loops: int,
    *,
    idle: Tensor | None = None,
    dense: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loop with exits: injected input (B, S, D) → state of each token as it left, (B, S, D), and its loops, (B, S).

    A token that has left does not run the block again (unless ``dense``), and the loop ends when all have left.

    Args:
        model: in eval mode.
        e: what the prelude gave.
        ctx: its context, whose cache is an :class:`ExitCache`.
        rule: asked after each loop but the last.
        n_loops: the most loops.
        idle: (B, S) bool, tokens that leave at the first opportunity.
        dense: as in :func:`forward`.

    Raises:
        ValueError: the context has no ExitCache, or the rule's answer has another shape than it was asked for.
    """
    thinking = Thinking(model, e, ctx, rule, n_loops, idle=idle, dense=dense)
    thinking.run()
    return thinking.state, thinking.loops


@dataclass
class LoopReport:
    """Loops spent by the tokens of a generation, those of the prompts and the new ones apart; what drafts were worth.

    Padding, tokens of rows that had finished and drafted tokens that were refused are not counted. The last new
    token is never fed to the model, so it has spent none and is not there.

    Attributes:
        checks: drafts that were checked, one a row.
        drafted: tokens that they held.
        kept: those that the full depth agreed with.
    """

    checks: int = 0
    drafted: int = 0
    kept: int = 0
    _spent: dict[str, list[Tensor]] = field(default_factory=lambda: {"prompt": [], "new": []})

    def add(self, part: Literal["prompt", "new"], loops: Tensor, real: Tensor | None = None) -> None:
        """Count loops (B, S) of the tokens where ``real`` (B, S) bool is True; None: of all."""
        self._spent[part].append(loops.flatten() if real is None else loops[real])

    def histogram(self, part: Literal["prompt", "new"]) -> list[int]:
        """Tokens that ran 0, 1, 2, … loops."""
        spent = self._spent[part]
        return torch.cat(spent).bincount().tolist() if spent else []

    def mean(self, part: Literal["prompt", "new"]) -> float:
        """Mean loops of a token; NaN when there is none."""
        counts = self.histogram(part)
        return sum(i * n for i, n in enumerate(counts)) / sum(counts) if sum(counts) else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: for ``prompt`` and ``new`` the tokens, their mean loops (None of none) and the histogram.

        And for ``drafts``, where there were any, how many were checked, and how many of their tokens were kept.
        """
        parts: dict[str, Any] = {}
        names: tuple[Literal["prompt"], Literal["new"]] = ("prompt", "new")
        for part in names:
            counts = self.histogram(part)
            tokens = sum(counts)
            total = sum(i * n for i, n in enumerate(counts))
            parts[part] = {"tokens": tokens, "mean": total / tokens if tokens else None, "histogram": counts}
        if self.checks:
            parts["drafts"] = {"checks": self.checks, "drafted": self.drafted, "kept": self.kept}
        return parts


def check_rule(rule: object, model: OpenMythos) -> None:
    """Refuse what is no rule, and a model that the rule cannot serve."""
    if not isinstance(rule, Rule):
        raise ValueError(f"exit = {rule!r} is not allowed: it must be an exit rule such as StateChange(0.05)")
    rule.check(model)
