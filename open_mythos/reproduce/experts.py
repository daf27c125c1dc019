"""Experts: whether every one of them is used on every task, and what keeping them in use costs in loss.

An expert's share is the number of slots that it takes over the number that each would take if all took the same, on
held-out text or problems, over all loops of the mean training depth. Padding is not counted.

Shape letters: B batch, S sequence, E experts, T loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.reproduce.grid import Grid, cells
from open_mythos.reproduce.runs import Run
from open_mythos.reproduce.targets import Record, Verdict, shown, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from open_mythos.model import OpenMythos

__all__ = ["Experts", "watch"]


@dataclass(frozen=True)
class Experts(Grid):
    """Trains every arm on every task with every number of experts, and counts who takes what.

    Options: ``least``, the smallest share that an expert may have; ``loops``, T.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {**Grid.OPTIONS, "least": 0.5, "loops": 8}

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Shares of all experts, and the loss in bits for each target."""
        from open_mythos.training.sources import evaluation_batches

        found = watch(
            model, list(evaluation_batches(run.config, split)), run.options["loops"], run.config.data.is_task
        )
        loads = found.pop("loads")
        mean = sum(loads) / len(loads)
        shares = sorted(load / mean for load in loads)
        return {
            **found,
            "least": shares[0],
            "most": shares[-1],
            "starved": sum(share < run.options["least"] for share in shares),
            "entropy": -sum(s * math.log(s) for s in (load / sum(loads) for load in loads) if s)
            / math.log(len(loads)),
        }

    def judge(self, records: Sequence[Record]) -> Verdict:
        """Every run of the first arm keeps every expert in use; what that costs is told, not judged."""
        first = next(iter(cells(records, "row")))[0]
        own = [record for record in records if record["measured"]["place"]["row"] == first]
        wanted = sum(arm.seeds for arm in self.arms.values() if arm.name.startswith(f"{first}-"))
        least = self.options["least"]
        held = sum(record["measured"]["least"] >= least for record in own)
        figures = [
            {
                "label": f"runs in which every expert takes at least {least:g} × its fair share",
                "target": f"{wanted} of {wanted}",
                **spread([record["measured"]["least"] for record in own]),
                "shown": f"{held} of {len(own)}",
                "met": held == len(own) == wanted,
                "moonshot": False,
            }
        ]
        for (experts,), some in cells(own, "experts").items():
            found = spread([record["measured"]["least"] for record in some])
            figures.append(
                {
                    "label": f"smallest share with {experts} experts, all tasks",
                    "target": f"≥ {least:g} in every run",
                    **found,
                    "shown": f"{shown(found['median'], percent=False)} (worst {shown(found['min'], percent=False)})",
                    "met": found["min"] >= least,
                    "moonshot": False,
                }
            )
        words = f"{held} of {len(own)} runs keep every expert in use; {'; '.join(self._prices(records))}"
        return Verdict(bool(figures[0]["met"]), words, figures)

    def _prices(self, records: Sequence[Record]) -> list[str]:
        """What balance costs with each number of experts, in words: the median over tasks and seeds."""
        words = []
        for (experts,), some in cells(records, "experts").items():
            if (found := prices(some)) is not None:
                words.append(f"with {experts} experts balance costs {found:+.4f} bits in the median")
        return words

    def summary(self, records: Sequence[Record]) -> Record:
        """A row for every arm, task and number of experts; the price is against the second arm, seed by seed."""
        rows = []
        for (row, task, experts), some in cells(records, "row", "task", "experts").items():
            own = [r["measured"] for r in some]
            beside = [r for r in records if _where(r) == (task, experts)]
            price = prices(beside) if row == records[0]["measured"]["place"]["row"] else None
            cell = [spread([m[key] for m in own]) for key in ("least", "most", "bits")]
            rows.append(
                {
                    "arm": some[0]["arm"],
                    "title": self.title_of(some[0]),
                    "cells": [task, experts, *cell, price],
                }
            )
        return {
            "columns": [
                "task",
                "experts",
                "smallest share",
                "largest share",
                "bits a target",
                "price of balance, bits",
            ],
            "format": "plain",
            "rows": rows,
        }

    def draw(self, records: Sequence[Record]) -> Figure:
        """The smallest share of any expert, a panel for each number of experts."""
        return self.lines(
            records,
            lambda record: record["measured"]["least"],
            panel="experts",
            along="task",
            xlabel="",
            ylabel="smallest share of an expert (1 is fair)",
            unit=" experts",
            levels=[("target", self.options["least"])],
        )


def _where(record: Record) -> tuple[str, str]:
    place = record["measured"]["place"]
    return place["task"], place["experts"]


def prices(records: Sequence[Record]) -> float | None:
    """Bits of the first row less those of the second, run by run: their median. None without pairs."""
    rows = list(dict.fromkeys(record["measured"]["place"]["row"] for record in records))
    if len(rows) < 2:
        return None
    bits = {
        (record["measured"]["place"]["row"], *_where(record), record["seed"]): record["measured"]["bits"]
        for record in records
    }
    pairs = [(value, bits.get((rows[1], *rest))) for (row, *rest), value in bits.items() if row == rows[0]]
    known = [one - other for one, other in pairs if one is not None and other is not None]
    return median(known) if known else None


def watch(
    model: OpenMythos, batches: Sequence[Mapping[str, Tensor]], loops: int, padded: bool
) -> dict[str, Any]:
    """Run the batches as in use, and count the slots of every expert in every loop.

    Args:
        model: in eval mode.
        batches: ``ids`` and ``targets`` (B, S), perhaps ``document_ids``.
        loops: T.
        padded: token 0 is padding, which is not counted.

    Returns:
        ``loads`` (E), ``bits`` for each target, ``right``: share of targets that the model finds.
    """
    import torch
    import torch.nn.functional as F

    from open_mythos.model import MoEFFN
    from open_mythos.tasks.base import IGNORE_INDEX, PAD

    ffn = model.recurrent.block.ffn
    assert isinstance(ffn, MoEFFN)
    loads = torch.zeros(ffn.n_experts, dtype=torch.int64)
    chosen: list[Tensor] = []
    handle = ffn.router.register_forward_hook(
        lambda _module, _inputs, logits: chosen.append(
            (logits.float() + ffn.router_bias).topk(ffn.topk).indices
        )
    )
    nats, right, scored = 0.0, 0, 0
    try:
        for batch in batches:
            chosen.clear()
            some = {key: value.to(model.embed.weight.device) for key, value in batch.items()}
            with torch.inference_mode():
                logits = model(some["ids"], loops, document_ids=some.get("document_ids")).float()
            asked = some["targets"] != IGNORE_INDEX
            targets = some["targets"][asked]
            nats += float(F.cross_entropy(logits[asked], targets, reduction="sum"))
            right += int((logits.argmax(-1)[asked] == targets).sum())
            scored += len(targets)
            real = (some["ids"] != PAD).flatten() if padded else torch.ones_like(asked).flatten()
            for experts in chosen:
                loads += torch.bincount(experts[real].flatten(), minlength=ffn.n_experts).cpu()
    finally:
        handle.remove()
    return {"loads": loads.tolist(), "bits": nats / scored / math.log(2), "right": right / scored}
