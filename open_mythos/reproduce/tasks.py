"""Reasoning tasks beyond the difficulty that was trained: accuracy against loops, and whether it stays.

Letters: B batch, S sequence, V vocabulary, T loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.config import ConfigError
from open_mythos.reproduce.base import Experiment, Record, Run

if TYPE_CHECKING:
    from torch import Tensor

    from open_mythos.model import OpenMythos
    from open_mythos.tasks import Batch, Task

__all__ = ["Extrapolation", "kept", "levels", "needed", "readouts"]

SCORES = ("token", "sequence", "last_token")


class Extrapolation(Experiment):
    """A task trained up to one difficulty and asked at greater ones, with more loops.

    ``[eval]`` says which difficulties and loop counts; ``options``:

        score: "token" (every scored place), "sequence" (rows with all places right) or "last_token" (the last scored
            place of a row, which needs the most steps).
        ranges: further difficulties, each an inclusive [low, high], written "6-8" as a level of a target.
        tokens: fewer rows than ``eval.examples``, down to 16, are asked where they would hold more tokens than this.
        slack: what counts as no worse, of accuracy 1.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "score": "token",
        "ranges": [],
        "tokens": 12_288,
        "slack": 0.005,
    }

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Accuracy against loops at every difficulty.

        Returns:
            What :func:`open_mythos.reproduce.base.curves` does, and for each difficulty ``needed``: the fewest loops
            that come within ``slack`` of the best, ``kept``: accuracy at four times as many loops minus the best,
            None where so many were not measured, and ``rows``.
        """
        options, config = run.options, run.config
        if options["score"] not in SCORES:
            allowed = " or ".join(map(repr, SCORES))
            raise ConfigError(f"options.score = {options['score']!r} is not allowed: it must be {allowed}")
        task, loops = config.data.task(), run.loops
        found: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for name, level in levels(task, config.eval.levels, options["ranges"]).items():
            rows = _rows(task, level, options["tokens"], config.eval.examples)
            counts[name] = rows
            found[name] = _accuracies(
                model, _batches(task, level, rows, split), task, loops, options["score"]
            )
        own = getattr(task, task.difficulty)
        slack = options["slack"]
        return {
            "metric": "accuracy",
            "better": "higher",
            "unit": "bits" if config.data.source == "parity" else task.difficulty,
            "trained": _named(own),
            "score": options["score"],
            "loops": loops,
            "curves": found,
            "needed": {name: needed(loops, curve, slack) for name, curve in found.items()},
            "kept": {name: kept(loops, curve, slack) for name, curve in found.items()},
            "rows": counts,
        }


def levels(task: Task, single: Sequence[int], ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Name → difficulty: "trained", each single one and each range."""
    found: dict[str, Any] = {"trained": getattr(task, task.difficulty)}
    found |= {str(level): level for level in single}
    return found | {_named(pair): (pair[0], pair[1]) for pair in ranges}


def needed(loops: Sequence[int], curve: Sequence[float], slack: float) -> int:
    """The fewest loops of those measured whose accuracy comes within ``slack`` of the best."""
    best = max(curve)
    return next(count for count, value in zip(loops, curve, strict=True) if value >= best - slack)


def kept(loops: Sequence[int], curve: Sequence[float], slack: float, times: int = 4) -> float | None:
    """Accuracy at ``times`` the loops needed (the next count measured) minus the best; None if none was measured."""
    enough = times * needed(loops, curve, slack)
    later = [value for count, value in zip(loops, curve, strict=True) if count >= enough]
    return later[0] - max(curve) if later else None


def readouts(model: OpenMythos, ids: Tensor, loops: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Logits (B, S, V) at each of these loop counts, as ``model(ids, T)`` gives them, in ascending order.

    One pass through the loops serves all of them where :func:`~open_mythos.training.evaluate.states` can.
    """
    import torch

    from open_mythos.training.evaluate import states

    with torch.inference_mode():
        ctx = model.context(ids)
        for count, state in states(model, ids, ctx, sorted(set(loops))):
            yield count, model.coda(state, ctx)


def _named(level: Any) -> str:
    return f"{level[0]}-{level[1]}" if isinstance(level, (tuple, list)) else str(level)


def _rows(task: Task, level: Any, tokens: int, most: int) -> int:
    width = task.width(level[1] if isinstance(level, (tuple, list)) else level)
    return min(most, max(16, tokens // width))


def _batches(task: Task, level: Any, rows: int, split: str) -> list[Batch]:
    """The same rows for every arm and seed."""
    from open_mythos.tasks import seeded_generator

    generator = seeded_generator("reproduce", split, repr(level))
    parts = [min(32, rows - first) for first in range(0, rows, 32)]
    return [task.sample(part, generator=generator, split=split, **{task.difficulty: level}) for part in parts]


def _accuracies(
    model: OpenMythos, batches: Sequence[Batch], task: Task, loops: Sequence[int], score: str
) -> list[float]:
    """One accuracy for each loop count; a batch counts by its places or rows."""
    right = dict.fromkeys(loops, 0.0)
    total = 0
    for given in batches:
        batch = given.to(model.embed.weight.device)
        weight = int((batch.targets >= 0).sum()) if score == "token" else len(batch.ids)
        total += weight
        for count, logits in readouts(model, batch.ids, loops):
            right[count] += weight * task.accuracy(logits, batch)[f"{score}_accuracy"]
    return [round(right[count] / total, 6) for count in loops]
