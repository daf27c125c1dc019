"""Exits while decoding with the cache: the same numbers as in one pass, the cache policies, and the time.

Shape letters: B batch, S sequence.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.inference import exits
from open_mythos.model import EveryLoop, LastLoop, LoopPolicy, OpenMythos
from open_mythos.reproduce.exits_measure import Text
from open_mythos.tasks.base import IGNORE_INDEX

__all__ = ["consistency", "decode", "policies"]

Record = dict[str, Any]


def consistency(model: OpenMythos, ids: Tensor, rule: exits.Rule, n_loops: int) -> Record:
    """One row of ids (1, S) in float64: in one pass, in chunks, and token by token with the cache.

    Returns:
        ``tokens``, ``largest_difference`` of any log-probability, and ``loops_differ``: tokens.
    """
    model = copy.deepcopy(model).double()
    whole = exits.forward(model, ids, rule, n_loops)
    logs = whole.logits.log_softmax(-1)
    worst, differ = 0.0, 0
    for size in (1, 7):
        cache = exits.ExitCache()
        parts = [exits.forward(model, chunk, rule, n_loops, cache) for chunk in ids.split(size, 1)]
        found = torch.cat([part.logits for part in parts], 1).log_softmax(-1)
        worst = max(worst, float((found - logs).abs().max()))
        differ += int((torch.cat([part.loops for part in parts], 1) != whole.loops).sum())
    return {"tokens": ids.shape[1], "largest_difference": worst, "loops_differ": differ}


def decode(model: OpenMythos, ids: Tensor, rule: exits.Rule, full: int, prompt: int) -> Record:
    """Seconds of decoding at batch 1 under the rule and at full depth: a text fed token by token with the cache.

    Both are fed the same tokens, so sampling plays no part, turn by turn: the median of three rounds.

    Args:
        model: in eval mode.
        ids: (1, S), all of which are fed.
        rule: asked after each loop.
        full: loops of full depth.
        prompt: first tokens, fed at once and not timed.

    Returns:
        ``tokens`` timed, ``seconds`` of each, ``time_share`` and ``loops_share``.
    """

    def timed(asks: exits.Rule, until: int) -> tuple[float, float]:
        cache = exits.ExitCache(None, ids.shape[1])
        exits.forward(model, ids[:, :prompt], asks, full, cache)
        if ids.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        rest = ids[:, prompt:until].split(1, 1)
        spent = [exits.forward(model, token, asks, full, cache).loops for token in rest]
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began, float(torch.cat(spent, 1).double().mean())

    ways = {"full": exits.Never(), "rule": rule}
    for asks in ways.values():
        timed(asks, prompt + 2)  # warms up
    rounds = [{name: timed(asks, ids.shape[1]) for name, asks in ways.items()} for _ in range(3)]
    seconds = {name: statistics.median(found[name][0] for found in rounds) for name in ways}
    return {
        "tokens": ids.shape[1] - prompt,
        "seconds": seconds,
        "time_share": seconds["rule"] / seconds["full"],
        "loops_share": rounds[0]["rule"][1] / rounds[0]["full"][1],
    }


def policies(text: Text, rule: exits.Rule, full: int, rows: int, tokens: int) -> Record:
    """Nats per token of windows of a text, fed token by token with the cache, as decoding would.

    Returns:
        ``tokens`` scored, and for ``every`` and ``last`` (:class:`EveryLoop`, :class:`LastLoop`) the ``full`` depth's
        and the ``rule``'s ``nats`` and ``loops``; for the rule in one pass, too, as ``one_pass``.
    """
    device = text.model.embed.weight.device
    batch = {name: value[:rows, :tokens].to(device) for name, value in text.rows.items()}
    asked = batch["targets"] != IGNORE_INDEX

    def scored(answers: list[exits.Answer]) -> Record:
        logits = torch.cat([answer.logits for answer in answers], 1)[asked].float()
        loops = torch.cat([answer.loops for answer in answers], 1)[asked]
        nats = F.cross_entropy(logits, batch["targets"][asked])
        return {"nats": float(nats), "loops": float(loops.double().mean())}

    def fed(policy: LoopPolicy | None, asks: exits.Rule) -> Record:
        cache = None if policy is None else exits.ExitCache(policy, batch["ids"].shape[1])
        size = batch["ids"].shape[1] if policy is None else 1
        ids, documents = batch["ids"].split(size, 1), batch.get("document_ids")
        marks = [None] * len(ids) if documents is None else documents.split(size, 1)
        parts = zip(ids, marks, strict=True)
        return scored([exits.forward(text.model, i, asks, full, cache, document_ids=d) for i, d in parts])

    found: Record = {"tokens": int(asked.sum()), "one_pass": fed(None, rule)}
    for name, policy in (("every", EveryLoop()), ("last", LastLoop())):
        found[name] = {"full": fed(policy, exits.Never()), "rule": fed(policy, rule)}
    return found
