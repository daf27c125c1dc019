"""Stability: learning rates over two decades, several depths of training, and what the state does far beyond them.

A run *learns* if it beats every predictor that ignores context by a margin: its bits per byte lie at least
``margin`` below the entropy of single bytes in the text that is scored. A model that has collapsed to one distribution
for all positions, uniform or not, cannot. The text is Python's own, because parity and its like are still at chance
after so few steps at the lowest rate, which would say nothing of stability.

Shape letters: B batch, S sequence, T loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.reproduce.base import Verdict
from open_mythos.reproduce.grid import Grid, cells
from open_mythos.reproduce.runs import Run
from open_mythos.reproduce.targets import Record, shown, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from open_mythos.model import OpenMythos

__all__ = ["Stability", "byte_entropy", "growth"]


@dataclass(frozen=True)
class Stability(Grid):
    """Trains at a fixed number of loops, and asks whether the run stayed finite, learned, and holds its state.

    Options: ``margin``, bits below the entropy of single bytes that count as learning; ``far``, how many times the
    trained loops the state is followed; ``growth``, the largest ratio of its norms; ``beyond``, learning rates that
    are reported but not part of the claim.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        **Grid.OPTIONS, "margin": 0.5, "far": 64, "growth": 2.0, "beyond": ["1e-1"]
    }  # fmt: skip

    def perform(self, run: Run, split: str) -> Record:
        """A run that the trainer gives up is a result here, not a failure."""
        from open_mythos.training.step import TrainingError

        try:
            return super().perform(run, split)
        except TrainingError as problem:
            lost = dict.fromkeys(("bits", "entropy", "norm", "norm_far", "growth"))
            return {
                "place": run.options["place"],
                **lost,
                "skipped": None,
                "finite": False,
                "why": str(problem),
            }

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Quality at the trained loops, and the norm of the state there and far beyond."""
        from open_mythos.training.evaluate import sweep
        from open_mythos.training.sources import evaluation_batches

        loops = run.config.loops.options["loops"]
        swept = sweep(model, run.config, run.record, [loops], split=split)
        (bits,) = swept["splits"][split]["values"]
        batches = list(evaluation_batches(run.config, split))
        near, far = growth(model, batches[0], loops, loops * run.options["far"])
        finite = all(map(math.isfinite, (bits, near, far))) and not run.record["skipped"]
        return {
            "bits": bits,
            "entropy": byte_entropy(batch["targets"] for batch in batches),
            "norm": near,
            "norm_far": far,
            "growth": far / near if near else None,
            "skipped": run.record["skipped"],
            "finite": finite,
        }

    def learned(self, record: Record) -> bool:
        """Finite throughout, and better than any predictor that ignores context."""
        found = record["measured"]
        gain = None if found["bits"] is None else found["entropy"] - found["bits"]
        return bool(found["finite"]) and gain is not None and gain >= self.options["margin"]

    def steady(self, record: Record) -> bool:
        """The state far beyond the trained loops is no longer than it may be."""
        ratio = record["measured"]["growth"]
        return ratio is not None and ratio <= self.options["growth"]

    def judge(self, records: Sequence[Record]) -> Verdict:
        """Every run of the first arm learns, and holds its state."""
        first = next(iter(cells(records, "row")))
        own = [r for (row,), some in cells(records, "row").items() if (row,) == first for r in some]
        own = [r for r in own if r["measured"]["place"]["lr"] not in self.options["beyond"]]
        wanted = self._wanted(first[0])
        figures = [self._count("finite and learning", own, wanted, self.learned, "bits")]
        label = f"state at {self.options['far']} × the trained loops ≤ {self.options['growth']:g} ×"
        figures.append(self._count(label, own, wanted, self.steady, "growth"))
        words = "; ".join(f"{f['label']}: {f['shown']}" for f in figures)
        return Verdict(all(f["met"] for f in figures), words, figures)

    def _wanted(self, row: str) -> int:
        """Runs that the claim is about."""
        arms = [arm for arm in self.arms.values() if arm.name.startswith(f"{row}-")]
        return sum(
            arm.seeds for arm in arms if not any(f"-{lr}-" in arm.name for lr in self.options["beyond"])
        )

    def _count(self, label: str, records: Sequence[Record], wanted: int, holds: Any, metric: str) -> Record:
        held = sum(holds(record) for record in records)
        found = spread([record["measured"][metric] for record in records])
        worst = shown(found["max"], percent=False)
        return {
            "label": label,
            "target": f"{wanted} of {wanted} runs",
            **found,
            "shown": f"{held} of {len(records)} runs (largest {metric} {worst})",
            "met": held == len(records) == wanted,
            "moonshot": False,
        }

    def summary(self, records: Sequence[Record]) -> Record:
        """A row for every arm and learning rate: runs that learned, bits, the state far out."""
        loops = list(dict.fromkeys(record["measured"]["place"]["loops"] for record in records))
        rows = []
        for (_, lr), some in cells(records, "row", "lr").items():
            by_loops = cells(some, "loops")
            bits = [_bits(by_loops.get((count,), [])) for count in loops]
            learned = f"{sum(map(self.learned, some))} of {len(some)}"
            ratios = [record["measured"]["growth"] for record in some]
            worst = None if None in ratios else max(ratios)
            first = some[0]
            rows.append(
                {"arm": first["arm"], "title": self.title_of(first), "cells": [lr, learned, *bits, worst]}
            )
        return {
            "columns": [
                "learning rate",
                "finite and learning",
                *(f"bits per byte, {count} loops" for count in loops),
                f"largest ratio of norms, {self.options['far']} ×",
            ],
            "format": "plain",
            "rows": rows,
        }

    def draw(self, records: Sequence[Record]) -> Figure:
        """Bits per byte against the learning rate, a panel for each number of loops."""
        entropies = [r["measured"]["entropy"] for r in records if r["measured"]["entropy"] is not None]
        names = ("single bytes", "learning")
        heights = [min(entropies), min(entropies) - self.options["margin"]] if entropies else []
        return self.lines(
            records,
            lambda record: record["measured"]["bits"],
            panel="loops",
            along="lr",
            xlabel="learning rate",
            ylabel="bits per byte (lower is better)",
            unit=" loops",
            levels=list(zip(names, heights, strict=False)),
        )


def _bits(records: Sequence[Record]) -> Record | None:
    return spread([record["measured"]["bits"] for record in records]) if records else None


def byte_entropy(targets: Iterable[Tensor]) -> float:
    """Entropy of single tokens in bits: what the best predictor that ignores context pays on this very text.

    Args:
        targets: (B, S) each, -100 where nothing is scored.
    """
    import torch

    from open_mythos.tasks.base import IGNORE_INDEX

    wanted = torch.cat([batch[batch != IGNORE_INDEX] for batch in targets])
    share = torch.bincount(wanted).double() / len(wanted)
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


def growth(model: OpenMythos, batch: Mapping[str, Tensor], near: int, far: int) -> tuple[float, float]:
    """Mean norm of the state over all positions after ``near`` and after ``far`` loops, halting aside."""
    import torch

    norms = {}
    with torch.inference_mode():
        ids, marks = (batch.get(key) for key in ("ids", "document_ids"))
        assert ids is not None
        ids = ids.to(model.embed.weight.device)
        ctx = model.context(ids, document_ids=None if marks is None else marks.to(ids.device))
        e = model.prelude(ids, ctx)
        h = model.initial_state(e)
        for t in range(far):
            h = model.step(h, e, t, ctx)
            if t + 1 in (near, far):
                norms[t + 1] = float(h.float().norm(dim=-1).mean())
    return norms[near], norms[far]
