"""Halting on a task: whether the head learns to stop somewhere between the first loop and the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.reproduce.base import Experiment, Record, Run, by_arm, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from open_mythos.inference.exits import Rule
    from open_mythos.model import OpenMythos
    from open_mythos.training.config import RunConfig

__all__ = ["Halting"]


@dataclass(frozen=True)
class Halting(Experiment):
    """Whether the halting head learns to stop somewhere, and costs no accuracy.

    Options:
        level: difficulty that is measured; 0: the one trained on.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"level": 0}

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Mean loops under the head's own threshold with exits, and the accuracy with and without them.

        ``alive`` is 1 if that mean lies above one loop and below the most, by more than a hundredth of a loop.
        """
        from open_mythos.inference import exits

        most = int(run.record["loops"]["max"])
        act = exits.ACT(min(model.cfg.act_threshold, 1.0))
        rows = _answers(
            model, run.config, split, run.options["level"], {"act": act, "last": exits.Never()}, most
        )
        mean = rows["act"]["loops"]
        return {
            "metric": "accuracy",
            "most": most,
            "mean_exit": mean,
            "histogram": rows["act"]["histogram"],
            "halting": rows["act"]["accuracy"],
            "last": rows["last"]["accuracy"],
            "lost": rows["last"]["accuracy"] - rows["act"]["accuracy"],
            "alive": float(1.01 < mean < most - 0.01),
        }

    def summary(self, records: Sequence[Record]) -> Record:
        """Exit, accuracies and loss of each arm."""
        columns = {
            "mean exit": "mean_exit",
            "alive": "alive",
            "accuracy, halting": "halting",
            "accuracy, last state": "last",
            "lost": "lost",
        }
        rows = [
            {
                "arm": arm,
                "title": self.arms[arm].title,
                "cells": [spread([r["measured"][key] for r in some]) for key in columns.values()],
            }
            for arm, some in by_arm(records).items()
        ]
        return {"columns": list(columns), "rows": rows, "format": ["plain", "plain", *["percent"] * 3]}

    def draw(self, records: Sequence[Record]) -> Figure:
        """Mean exit and lost accuracy of every seed."""
        from open_mythos.reproduce.exits_figure import halting

        return halting(records, self.title)


def _answers(
    model: OpenMythos,
    config: RunConfig,
    split: str,
    level: int,
    rules: Mapping[str, Rule],
    n_loops: int,
) -> dict[str, Record]:
    """Accuracy, mean loops and histogram of each rule on a task, over its scored positions.

    Args:
        model: in eval mode.
        config: of its run.
        split: "validation" or "test".
        level: difficulty; 0: the one trained on.
        rules: by name.
        n_loops: the most loops.
    """
    import torch

    from open_mythos.inference import exits
    from open_mythos.tasks.base import IGNORE_INDEX
    from open_mythos.training.sources import evaluation_batches

    device = model.embed.weight.device
    right = dict.fromkeys(rules, 0)
    spent: dict[str, list[Tensor]] = {name: [] for name in rules}
    for batch in evaluation_batches(config, split, level or None):
        ids, targets = batch["ids"].to(device), batch["targets"].to(device)
        asked = targets != IGNORE_INDEX
        for name, rule in rules.items():
            answer = exits.forward(model, ids, rule, n_loops)
            right[name] += int(((answer.logits.argmax(-1) == targets) & asked).sum())
            spent[name].append(answer.loops[asked].cpu())
    found = {name: torch.cat(parts) for name, parts in spent.items()}
    return {
        name: {
            "accuracy": right[name] / len(loops),
            "loops": float(loops.double().mean()),
            "histogram": loops.bincount(minlength=n_loops + 1).tolist(),
        }
        for name, loops in found.items()
    }
