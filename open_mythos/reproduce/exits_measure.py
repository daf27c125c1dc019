"""Measuring exit rules on text: settings searched on the validation split, figures from another.

All figures are of whole sequences in one pass with exits, which is what decoding token by token with a cache
gives (docs/exits.md); :mod:`open_mythos.reproduce.exits_decode` checks that on the trained model itself.

Shape letters: B batch, S sequence, N scored tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig
from open_mythos.inference import exits
from open_mythos.inference.exit_cache import Group
from open_mythos.inference.exit_rules import Predicting
from open_mythos.model import LastLoop, OpenMythos
from open_mythos.model.cache import Entry
from open_mythos.tasks.base import IGNORE_INDEX
from open_mythos.training.acceleration import lowered
from open_mythos.training.config import RunConfig
from open_mythos.training.sources import evaluation_batches

__all__ = [
    "FAMILIES",
    "Family",
    "Kept",
    "LastEntries",
    "Scored",
    "Study",
    "Text",
    "learned",
    "search",
    "shares",
    "shown_text",
    "spearman",
]

Record = dict[str, Any]
Found = dict[str, tuple[list[Record], float | None]]


@dataclass(frozen=True)
class Family:
    """Rules that differ in one number.

    Attributes:
        title: for tables and figures.
        make: (number, full depth) → rule.
        values: from those that leave early to those that leave late.
        heeds: per token; a fixed count is a baseline, not an exit rule.
    """

    title: str
    make: Callable[[float, int], exits.Rule]
    values: tuple[float, ...]
    heeds: bool = True


def _geometric(first: float, last: float, count: int = 33) -> tuple[float, ...]:
    return tuple(first * (last / first) ** (i / (count - 1)) for i in range(count))


def learned(gate: exits.Gate) -> Family:
    """The rule that asks this gate, by the price of a loop."""
    return Family(
        "learned gate", lambda x, full: exits.Learned(gate, x, max_loops=full), _geometric(0.5, 2e-4)
    )


def _rising(first: float, last: float) -> tuple[float, ...]:
    """Probabilities whose distance to one falls evenly on a logarithmic scale."""
    return tuple(1 - x for x in _geometric(1 - first, 1 - last))


FAMILIES: dict[str, Family] = {
    "fixed": Family(
        "the same for every token",
        lambda x, full: exits.Fixed(int(x), max_loops=full),
        tuple(range(1, 65)),
        heeds=False,
    ),
    "state": Family(
        "change of state", lambda x, full: exits.StateChange(x, max_loops=full), _geometric(1.0, 1e-3)
    ),
    "act": Family("halting head", lambda x, full: exits.ACT(x, max_loops=full), _rising(0.02, 0.9999)),
    "kl": Family(
        "KL of predictions",
        lambda x, full: exits.PredictionChange(x, max_loops=full),
        _geometric(1.0, 1e-6),
    ),
    "kl-second": Family(
        "KL, every second loop",
        lambda x, full: exits.PredictionChange(x, every=2, max_loops=full),
        _geometric(1.0, 1e-6),
    ),
    "kl-head": Family(
        "KL, head only",
        lambda x, full: exits.PredictionChange(x, reads="head", max_loops=full),
        _geometric(1.0, 1e-6),
    ),
    "same": Family(
        "same likeliest token",
        lambda x, full: exits.SamePrediction(int(x), max_loops=full),
        tuple(range(1, 17)),
    ),
    "top": Family(
        "top probability", lambda x, full: exits.Confidence(x, max_loops=full), _rising(0.05, 0.99999)
    ),
    "entropy": Family(
        "entropy",
        lambda x, full: exits.Confidence(x, measure="entropy", max_loops=full),
        _geometric(8.0, 1e-4),
    ),
}


@dataclass(frozen=True)
class Scored:
    """What each scored token cost: nats (N,) float32 and loops (N,) int64, on the CPU; and the bytes of all.

    Where it is not known what a token stands for, ``units`` are tokens.
    """

    nats: Tensor
    loops: Tensor
    units: int

    @property
    def bits(self) -> float:
        """Bits per byte."""
        return float(self.nats.double().sum()) / self.units / math.log(2)


class Text:
    """The first tokens of a split, in the fixed order of evaluation, and a model to score them.

    Args:
        model: in eval mode, where it is to run.
        config: of its run.
        split: "validation" or "test".
        tokens: about how many, at least one row.
        batch_tokens: of one pass.
    """

    def __init__(
        self, model: OpenMythos, config: RunConfig, split: str, tokens: int, batch_tokens: int
    ) -> None:
        length = int(config.data.options["seq_len"])
        wanted = replace(config, eval=replace(config.eval, examples=max(1, -(-tokens // length))))
        found = list(evaluation_batches(wanted, split))
        self.model, self.config = model, config
        self.rows = {name: torch.cat([batch[name] for batch in found]) for name in found[0]}
        self.step = max(1, batch_tokens // length)
        targets = self.rows["targets"][self.rows["targets"] != IGNORE_INDEX]
        lengths = config.data.byte_lengths()
        self.unit = "token" if lengths is None else "byte"
        self.units = len(targets) if lengths is None else int(torch.tensor(lengths)[targets].sum())

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Its rows where the model is, in order."""
        device = self.model.embed.weight.device
        for start in range(0, len(self.rows["ids"]), self.step):
            yield {name: rows[start : start + self.step].to(device) for name, rows in self.rows.items()}

    def precision(self) -> AbstractContextManager[object]:
        """The matrices in the precision of the training."""
        low = torch.bfloat16 if self.config.parallel.precision == "bf16" else None
        return lowered(self.model, low)

    def score(
        self, rule: exits.Rule, n_loops: int, cache: Callable[[], exits.ExitCache] | None = None
    ) -> Scored:
        """Every token under a rule, in one pass a batch; bfloat16 products on a GPU.

        Args:
            rule: asked after each loop.
            n_loops: the most loops.
            cache: makes another cache than :func:`~open_mythos.inference.exits.forward` does.
        """
        found = []
        with self.precision():
            for batch in self.batches():
                documents, own = batch.get("document_ids"), None if cache is None else cache()
                answer = exits.forward(self.model, batch["ids"], rule, n_loops, own, document_ids=documents)
                asked = batch["targets"] != IGNORE_INDEX
                flat = answer.logits.flatten(0, 1)
                parts = zip(flat.split(4096), batch["targets"].flatten().split(4096), strict=True)
                nats = torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in parts])
                found.append((nats[asked.flatten()].cpu(), answer.loops[asked].cpu()))
        nats, loops = (torch.cat(part) for part in zip(*found, strict=True))
        return Scored(nats, loops, self.units)


class LastEntries(exits.ExitCache):
    """The other meaning that was considered: deeper loops see the entry of the last loop that a token ran.

    It needs no further projection, but shows one loop less. For comparison only, and for whole sequences.
    """

    def _leave(self, group: Group, new: Entry) -> None:
        last = self.entries[self.policy.slot(0)]
        super()._leave(group, {name: group.take(tensor[:, self.length :]) for name, tensor in last.items()})


def shares(cfg: MythosConfig, rule: exits.Rule, loops: Tensor, full: int, context: int) -> Record:
    """Mean loops, and loops and FLOPs against full depth, the rule's own decoding counted.

    Args:
        cfg: of the model.
        rule: that was asked.
        loops: (N,) loops spent.
        full: loops of full depth.
        context: keys that a token sees, on average.
    """

    def flops(config: MythosConfig, n: int) -> int:
        return flops_per_token(config, n, context=context)

    loop = flops(cfg, 2) - flops(cfg, 1)
    once = flops(cfg, 1) - loop
    counts = loops.bincount(minlength=full + 1).double()
    mean = float((counts * torch.arange(len(counts))).sum() / counts.sum())
    asks, price = torch.zeros_like(counts), 0
    if isinstance(rule, Predicting):
        price = 2 * cfg.dim * cfg.vocab_size
        if rule.reads == "coda":
            price += flops(cfg, 1) - flops(cfg.replace(coda_layers=0), 1)
    elif isinstance(rule, exits.Learned):
        price = 2 * rule.gate.inner.weight.numel()
    if price:
        asked = [rule.asks(n) if isinstance(rule, Predicting) else True for n in range(1, full)]
        asks[1:] = torch.tensor([*asked, False]).cumsum(0)[: len(counts) - 1]
    spent = once + mean * loop + float((counts * asks).sum() / counts.sum()) * price
    return {"loops": mean, "loops_share": mean / full, "flops_share": spent / (once + full * loop)}


def search(
    family: Family, point: Callable[[float], Record], full: int, limit: float
) -> tuple[list[Record], float | None]:
    """The number with the fewest loops whose bits stay within the limit, as far as bits fall with loops.

    Every fourth number is tried, then those between the last that fails and the first that passes.

    Args:
        family: what is searched.
        point: number → at least ``bits`` and ``loops``.
        full: loops of full depth.
        limit: bits.

    Returns:
        All points by rising loops, and the chosen number; None when none passes.
    """
    values = family.values if family.heeds else family.values[:full]
    stride = 1 if len(values) <= 16 or not family.heeds else 4
    tried = {i: point(values[i]) for i in range(0, len(values), stride)}
    while True:
        passing = [i for i in sorted(tried) if tried[i]["bits"] <= limit]
        if not passing:
            break
        first = passing[0]
        before = max((i for i in tried if i < first), default=first)
        middle = (before + first) // 2
        if middle in tried:
            break
        tried[middle] = point(values[middle])
    points = [{"value": values[i], **tried[i]} for i in sorted(tried)]
    return points, values[passing[0]] if passing else None


class Kept:
    """Points that were measured, in a file, so that a measurement that was cut off goes on.

    Args:
        path: of the file.
        identity: of the model and the settings; a file of another identity is begun anew.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.points: dict[str, Record] = {}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["identity"] == identity:
                self.points = found["points"]

    def of(self, name: str, measure: Callable[[], Record]) -> Record:
        """The record of this name, measured if it is not there."""
        if name not in self.points:
            self.points[name] = measure()
            text = json.dumps({"identity": self.identity, "points": self.points})
            part = self.path.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            part.replace(self.path)
        return self.points[name]


class Study:
    """All rules on one model.

    Args:
        model: in eval mode.
        config: of its run.
        full: loops of full depth.
        batch_tokens: of one pass.
        kept: what has been measured already.
    """

    def __init__(
        self, model: OpenMythos, config: RunConfig, full: int, batch_tokens: int, kept: Kept
    ) -> None:
        self.model, self.config, self.full = model, config, full
        self.batch_tokens, self.kept = batch_tokens, kept
        self.context = (int(config.data.options["seq_len"]) + 1) // 2

    def gate(self, path: Path, tokens: int, steps: int) -> exits.Gate:
        """A gate fitted on the training split, or the one that was kept at this path."""
        device = self.model.embed.weight.device
        gate = exits.Gate(self.model.cfg.dim, self.full)
        if path.is_file():
            gate.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return gate.to(device).requires_grad_(False).eval()
        rows = Text(self.model, self.config, "train", tokens, self.batch_tokens)
        with rows.precision():
            gate = exits.fit(self.model, rows.batches(), self.full, steps=steps)
        torch.save(gate.state_dict(), path)
        return gate

    def search(self, families: Mapping[str, Family], tokens: int, slack: float) -> tuple[float, float, Found]:
        """The setting of each rule, on the validation split.

        Args:
            families: by name.
            tokens: of the split.
            slack: share of the bits of full depth that may be lost.

        Returns:
            Bits at full depth, the most bits allowed, and for each name its points and the number chosen.
        """
        text = Text(self.model, self.config, "validation", tokens, self.batch_tokens)
        bits = self.kept.of("full", lambda: {"bits": text.score(exits.Never(), self.full).bits})["bits"]
        limit = bits * (1 + slack)
        found: Found = {}
        for name, family in families.items():
            rules = {number: family.make(number, self.full) for number in family.values}
            found[name] = search(family, partial(self._point, text, name, rules), self.full, limit)
        return bits, limit, found

    def _point(self, text: Text, name: str, rules: Mapping[float, exits.Rule], number: float) -> Record:
        def measure() -> Record:
            scored = text.score(rules[number], self.full)
            return {"bits": scored.bits, **self._shares(rules[number], scored)}

        return self.kept.of(f"{name} {number!r}", measure)

    def _shares(self, rule: exits.Rule, scored: Scored) -> Record:
        return shares(self.model.cfg, rule, scored.loops, self.full, self.context)

    def report(
        self, families: Mapping[str, Family], found: Found, text: Text
    ) -> tuple[dict[str, Scored], list[Record]]:
        """Each rule with the number chosen for it (its strictest, if none kept the bits) on other text.

        Returns:
            That text at full depth and after two loops, and a record for each rule.
        """
        whole = {name: text.score(exits.Never(), loops) for name, loops in (("full", self.full), ("two", 2))}
        records = []
        for name, family in families.items():
            points, chosen = found[name]
            number = points[-1]["value"] if chosen is None else chosen
            measure = partial(self._reported, family, family.make(number, self.full), text, whole)
            told = {
                "name": name,
                "title": family.title,
                "heeds": family.heeds,
                "number": number,
                "met_in_search": chosen is not None,
                "search": points,
            }
            records.append({**told, **self.kept.of(f"{name} {number!r}, reported", measure)})
        return whole, records

    def meanings(self, rule: exits.Rule, tokens: int) -> Record:
        """Bits and loops of a rule on the validation split, when later tokens see of one that left the entry of
        its next loop (ours), or that of its last.
        """
        text = Text(self.model, self.config, "validation", tokens, self.batch_tokens)
        found = {
            "next": text.score(rule, self.full),
            "last": text.score(rule, self.full, lambda: LastEntries(LastLoop())),
        }
        return {
            name: {"bits": scored.bits, "loops": float(scored.loops.double().mean())}
            for name, scored in found.items()
        }

    def _reported(self, family: Family, rule: exits.Rule, text: Text, whole: Mapping[str, Scored]) -> Record:
        """Bits, loops, how both compare with full depth, and whom the loops went to."""
        scored, full = text.score(rule, self.full), whole["full"]
        tenths = full.nats.argsort().tensor_split(10)
        return {
            "bits": scored.bits,
            "bits_ratio": scored.bits / full.bits,
            **self._shares(rule, scored),
            "histogram": scored.loops.bincount(minlength=self.full + 1).tolist(),
            "spearman": spearman(scored.loops, full.nats) if family.heeds else None,
            "spearman_two_loops": spearman(scored.loops, whole["two"].nats) if family.heeds else None,
            "loops_by_difficulty": [float(scored.loops[tenth].double().mean()) for tenth in tenths],
        }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two (N,), ties at their mean rank; 0 when either is constant."""

    def ranks(x: Tensor) -> Tensor:
        _, place, counts = x.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        return (last - (counts - 1) / 2)[place]

    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def shown_text(text: Text, rule: exits.Rule, n_loops: int, tokens: int = 1200) -> list[list[Record]]:
    """Windows of a text, each a list of tokens as ``text`` beside the ``loops`` that they spent."""
    decoding = getattr(text.config.data.tokenizer(), "decode", None)
    length = text.rows["ids"].shape[1]
    ids = text.rows["ids"][: -(-tokens // length), :tokens].to(text.model.embed.weight.device)
    documents = text.rows.get("document_ids")  # absent where documents are not kept apart
    if documents is not None:
        documents = documents[: len(ids), :tokens].to(ids.device)
    loops = exits.forward(text.model, ids, rule, n_loops, document_ids=documents).loops
    return [
        [
            {"text": str(i) if decoding is None else str(decoding([i])), "loops": n}
            for i, n in zip(row, spent, strict=True)
        ]
        for row, spent in zip(ids.tolist(), loops.tolist(), strict=True)
    ]
