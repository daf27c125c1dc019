"""Language modelling against dense models: bits per byte over loops, cost, and what a loop is worth in layers.

Letters: N parameters, T loops, φ the exponent of loops against layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.accounting import parameters
from open_mythos.reproduce.base import Experiment, Record, Run, Verdict, by_arm, curves, spread, value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from open_mythos.config import MythosConfig
    from open_mythos.model import OpenMythos
    from open_mythos.training.config import RunConfig

__all__ = ["Language", "active", "exponent", "exponents", "rise", "training_flops"]

# Forward passes whose loop counts are drawn to find the mean cost of a distribution.
_PLANS = 4096


class Language(Experiment):
    """A looped language model and dense ones, trained on the same tokens in the same order.

    ``options``:

        reach: "level" is asked up to so many times the mean training depth.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"reach": 4}

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Bits per byte at every loop count, and what the run cost.

        Returns:
            What :func:`open_mythos.reproduce.base.curves` does, and

            - ``mean``: mean training depth, ``rise``, ``best_over_mean``: see :func:`rise`; the loop count of the best
              bits per byte over the mean depth;
            - ``once``, ``block``: parameters that one token uses outside the loop and in it, without embedding;
            - ``train_flops``: of a training token; ``unique_tokens``, ``epochs``, ``scored_tokens``.
        """
        config = run.config
        found = curves(model, config, run.record, split, run.loops)
        bits, mean = found["curves"]["trained"], mean_depth(config)
        finite = [one for one in bits if math.isfinite(one)]
        once, block = active(config.model)
        return {
            **found,
            "mean": mean,
            "rise": rise(found["loops"], bits, run.options["reach"] * mean),
            "best_over_mean": found["loops"][bits.index(min(finite))] / mean if finite else None,
            "once": once,
            "block": block,
            "train_flops": training_flops(config),
            **_data(config, split),
        }

    def judge(self, records: Sequence[Record]) -> Verdict:
        """The targets, and φ at the mean training depth, which is reported and not judged."""
        verdict = super().judge(records)
        arm = next(iter(self.arms), "")
        found = exponents(records, arm)
        if not found:
            return verdict
        near = min(found, key=lambda loops: abs(loops - by_arm(records)[arm][0]["measured"]["mean"]))
        figure = {
            "label": f"exponent φ of loops against layers, at {near} loops",
            "target": "reported",
            **spread(found[near]),
            "shown": f"{median(found[near]):.2f}",
            "met": True,
            "moonshot": True,
        }
        sentence = f"{verdict.sentence}; {figure['label']}: {figure['shown']}"
        return dataclasses.replace(verdict, sentence=sentence, figures=[*verdict.figures, figure])

    def summary(self, records: Sequence[Record]) -> Record:
        """One row an arm: size, cost, and bits per byte at 1 loop, the mean, the best and ``reach`` times the mean."""
        reach = self.options.get("reach", self.OPTIONS["reach"])
        rows = []
        for arm, some in by_arm(records).items():
            found = [record["measured"] for record in some]
            first = found[0]
            cells: list[Any] = [
                f"{some[0]['parameters'] / 1e6:.1f}",
                f"{first['train_flops'] / 1e9:.3f}",
                f"{some[0]['tokens'] / 1e6:.1f} ({first['unique_tokens'] / 1e6:.1f} × {first['epochs']:.2f})",
                spread([_at(m, 1) for m in found]),
                spread([_at(m, m["mean"]) for m in found]),
                spread([value(record) for record in some]),
                spread([m["best_over_mean"] and m["best_over_mean"] * m["mean"] for m in found]),
                spread([_at(m, reach * m["mean"]) for m in found]),
                "" if len(first["loops"]) == 1 else _greatest([m["rise"] for m in found]),
            ]
            title = self.arms[arm].title if arm in self.arms else arm
            rows.append({"arm": arm, "title": title, "cells": cells})
        size = ["M parameters", "training GFLOP a token", "M tokens (unique × epochs)"]
        columns = [
            *size,
            "1 loop",
            "mean depth",
            "best",
            "at loops",
            f"{reach} × mean depth",
            "greatest rise",
        ]
        return {"columns": columns, "rows": rows, "format": "plain"}

    def draw(self, records: Sequence[Record]) -> Figure:
        """Bits per byte over loops, whole and near the best."""
        from open_mythos.reproduce.language_figure import draw

        return draw(records, {name: arm.title for name, arm in self.arms.items()}, self.title)


def mean_depth(config: RunConfig) -> float:
    """Loops of a training sequence, on average."""
    from open_mythos.training.loops import loop_distribution

    return loop_distribution(config.loops.kind, **config.loops.options).mean


def training_flops(config: RunConfig) -> float:
    """FLOPs of one training token, the mean over the loop counts of the run: backward counts twice a forward, and only
    the loops that carry gradient have one (:func:`open_mythos.training.meter.train_flops`).
    """
    import torch

    from open_mythos.training.loops import loop_distribution
    from open_mythos.training.meter import train_flops

    plans = loop_distribution(config.loops.kind, **config.loops.options)
    draws, length = torch.Generator().manual_seed(0), config.data.options["seq_len"]
    costs = [train_flops(config.model, plans.sample(draws), length) for _ in range(_PLANS)]
    return sum(costs) / len(costs)


def active(model: MythosConfig) -> tuple[int, int]:
    """Parameters that one token uses, embedding and head left out: outside the loop, and in it (counted once)."""
    count = parameters(model)
    once = count.parts["prelude"] + count.parts["coda"]
    embedding = count.parts["embed"] if model.tie_embeddings else model.dim + count.parts["head"]
    return once, count.active - once - embedding


def rise(loops: Sequence[int], bits: Sequence[float], last: float) -> float:
    """The greatest share by which bits per byte lie above their least at fewer loops, up to ``last`` loops; 0 where
    they never rise, infinite where one of them is not finite.
    """
    greatest, least = 0.0, math.inf
    for count, here in zip(loops, bits, strict=True):
        if count > last:
            break
        if not math.isfinite(here):
            return math.inf
        least = min(least, here)
        greatest = max(greatest, here / least - 1)
    return greatest


def exponents(records: Sequence[Record], arm: str) -> dict[int, list[float]]:
    """φ of one arm at each loop count above 1, up to twice its mean depth: a value for each seed that has one.

    The dense models are those of the records that were trained and measured at one loop only. Empty with fewer than
    two of them.
    """
    arms = by_arm(records)
    dense = [some[0]["measured"] for some in arms.values() if some[0]["measured"]["loops"] == [1]]
    sizes = [(m["once"] + m["block"], m["curves"]["trained"][0]) for m in dense]
    points = sorted(point for point in sizes if point[1] is not None)
    if len(points) < 2 or arm not in arms:
        return {}
    found: dict[int, list[float]] = {}
    for record in arms[arm]:
        m = record["measured"]
        for loops, bits in zip(m["loops"], m["curves"]["trained"], strict=True):
            if bits is None or not 1 < loops <= 2 * m["mean"]:
                continue
            phi = exponent(points, m["once"], m["block"], loops, bits)
            if phi is not None:
                found.setdefault(loops, []).append(phi)
    return found


def exponent(
    dense: Sequence[tuple[int, float]], once: int, block: int, loops: int, bits: float
) -> float | None:
    """φ of N_once + T^φ · N_block = N, where N is the size at which a dense model has as many bits per byte.

    The law is that of arXiv 2604.21106 at one number of tokens. There it is fitted to models trained at each T; here
    one model is asked at T, and N is read off a line through the two nearest dense models, bits per byte against ln N.

    Args:
        dense: parameters (without embedding) and bits per byte of dense models, ascending; at least two.
        once: N_once, active parameters outside the loop, without embedding.
        block: N_block, active parameters of the loop.
        loops: T, above 1.
        bits: bits per byte of the looped model.

    Returns:
        φ; None where the line is not falling, or N does not exceed N_once.
    """
    pairs = list(pairwise(dense))
    (small, high), (large, low) = next((p for p in pairs if p[1][1] <= bits), pairs[-1])
    if not low < high:
        return None
    steps = (high - bits) / (high - low)
    size = small * (large / small) ** min(steps, 50.0)
    return math.log((size - once) / block) / math.log(loops) if size > once else None


def _greatest(rises: Sequence[float | None]) -> str:
    """In percent; one that was not finite is the greatest."""
    known = [share for share in rises if share is not None]
    return f"{100 * max(known):.2f} %" if len(known) == len(rises) else "not finite"


def _at(measured: Mapping[str, Any], loops: float) -> float | None:
    """Bits per byte at the loop count nearest to this one; None if they were not finite."""
    counts = measured["loops"]
    nearest = min(range(len(counts)), key=lambda i: abs(counts[i] - loops))
    found: float | None = measured["curves"]["trained"][nearest]
    return found


def _data(config: RunConfig, split: str) -> dict[str, Any]:
    """How many tokens there were to train on, how often each was seen, and how many were scored."""
    from open_mythos.training.prepare import prepare

    prepared, length = prepare(config.data), config.data.options["seq_len"]
    blocks = prepared.blocks("train", length)
    rows = config.train.steps * config.train.batch_size * config.train.accumulate
    scored = min(config.eval.examples, prepared.blocks(split, length))
    return {
        "unique_tokens": blocks * length,
        "epochs": rows / blocks,
        "scored_tokens": scored * length,
    }
