"""Quality against loops: one model, the same held-out rows, every loop count asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.config import ConfigError
from open_mythos.model import OpenMythos
from open_mythos.model.attention import SequenceContext
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.model.transformer import evaluating
from open_mythos.tasks.base import IGNORE_INDEX, SPLIT_SHARES
from open_mythos.training.acceleration import lowered
from open_mythos.training.checks import choice
from open_mythos.training.config import RunConfig
from open_mythos.training.sources import evaluation_batches

__all__ = ["states", "sweep"]

# What one step of a task's difficulty is called.
_UNITS = {"parity": "bits"}

Tell = Callable[[str], None]


def sweep(
    model: OpenMythos,
    config: RunConfig,
    run: Mapping[str, Any],
    loops: Sequence[int] | None = None,
    tell: Tell | None = None,
    split: str = "test",
) -> dict[str, Any]:
    """Evaluate one split at each loop count.

    A task is scored by the share of right answers, and once more at every difficulty in ``eval.levels``. Text
    is scored in bits per byte: cross entropy in nats over ln 2 and over the UTF-8 bytes of the text that is
    scored, the end mark of a document counted as one, so that tokenizers can be compared. Where what a token
    stands for is not known (token files, tokenizers that are not byte-level) it is bits per token. The model runs
    as it would in use, halting included; on text in the precision of its training.

    Args:
        model: the trained model; its mode is left as it was.
        config: the run's config.
        run: the run's run.json, for the loops that it was trained with.
        loops: loop counts; ``eval.loops`` when None.
        tell: called with a short phrase before each difficulty.
        split: "train", "validation" or "test".

    Returns:
        What eval.json holds: task, metric, loops, trained_mean, trained_max, splits: name → loops and values; the
        difficulty that was trained on first, then those of ``eval.levels`` in their order.

    Raises:
        ConfigError: the split or a loop count is not allowed, or the data is not there.
    """
    choice("split", split, SPLIT_SHARES)
    chosen = _counts(config.eval.loops if loops is None else loops)
    lengths = None if config.data.is_task else config.data.byte_lengths()
    splits: dict[str, Any] = {}
    with evaluating(model):
        for name, level in _levels(config, split).items():
            if tell is not None:
                tell(f"evaluating {name}")
            batches = [_to(model, batch) for batch in evaluation_batches(config, split, level)]
            if config.data.is_task:
                values = [_accuracy(model, batches, count) for count in chosen]
            else:
                with lowered(model, torch.bfloat16 if config.parallel.precision == "bf16" else None):
                    values = _bits(model, batches, chosen, lengths)
            splits[name] = {"loops": chosen, "values": values}
    return {
        "task": config.data.source if config.data.is_task else _text_name(config.data.source),
        "metric": "accuracy" if config.data.is_task else _unit(lengths),
        "loops": chosen,
        "trained_mean": run["loops"]["mean"],
        "trained_max": run["loops"]["max"],
        "splits": splits,
    }


def _counts(loops: Sequence[int]) -> list[int]:
    for count in loops:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"loops = {count!r} is not allowed: each must be a whole number of at least 1")
    return list(loops)


def _levels(config: RunConfig, split: str) -> dict[str, int | None]:
    """Name → difficulty of everything that is scored; None stands for that of the training."""
    names: dict[str, int | None] = {split: None}
    if config.data.is_task:
        unit = _UNITS.get(config.data.source, config.data.task().difficulty)
        names |= {f"{split}@{level} {unit}": level for level in config.eval.levels}
    return names


def _unit(lengths: Sequence[int] | None) -> str:
    return "bits_per_token" if lengths is None else "bits_per_byte"


def _to(model: OpenMythos, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch where the model is."""
    return {key: value.to(model.embed.weight.device) for key, value in batch.items()}


def _text_name(source: str) -> str:
    """The source without the place where it stands on this machine."""
    return "python" if source == "python" else Path(source).name


@torch.inference_mode()
def _accuracy(model: OpenMythos, batches: Sequence[Mapping[str, Tensor]], n_loops: int) -> float:
    right = scored = 0
    for batch in batches:
        asked = batch["targets"] != IGNORE_INDEX
        answers = model(batch["ids"], n_loops, document_ids=batch.get("document_ids")).argmax(-1)
        right += int(((answers == batch["targets"]) & asked).sum())
        scored += int(asked.sum())
    return right / scored


@torch.inference_mode()
def _bits(
    model: OpenMythos,
    batches: Sequence[Mapping[str, Tensor]],
    counts: Sequence[int],
    lengths: Sequence[int] | None,
) -> list[float]:
    """Bits per byte at each loop count, or per token where ``lengths``, the bytes of each id, are not known."""
    device = model.embed.weight.device
    sizes = torch.ones(model.cfg.vocab_size, dtype=torch.int64, device=device)
    if lengths is not None:
        sizes[: len(lengths)] = torch.tensor(lengths, device=device)
    nats = {count: torch.zeros((), dtype=torch.float64, device=device) for count in counts}
    scored = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        targets = batch["targets"].flatten()
        scored += sizes[targets[targets != IGNORE_INDEX]].sum()
        ctx = model.context(batch["ids"], document_ids=batch.get("document_ids"))
        for count, state in states(model, batch["ids"], ctx, sorted(set(counts))):
            logits = model.coda(state, ctx).flatten(0, 1).float()
            nats[count] += F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return [float(nats[count]) / int(scored) / math.log(2) for count in counts]


def states(
    model: OpenMythos, ids: Tensor, ctx: SequenceContext, counts: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """What :meth:`OpenMythos.think` hands over after each of these loop counts, each loop run once.

    Unless halting averages states: what a position then reads depends on which loop is the last, and every count
    begins anew.

    Args:
        model: in eval mode.
        ids: (B, S).
        ctx: of the ids.
        counts: ascending, all different.

    Returns:
        Loop count and state (B, S, D), in that order.
    """
    e = model.prelude(ids, ctx)
    h = out = model.initial_state(e)
    if model.cfg.halting in ("average", "upstream"):
        yield from ((count, model.think(h, e, ctx, range(count))) for count in counts)
        return
    weights = HaltingWeights(model.cfg)
    for t in range(counts[-1]):
        h = model.step(h, e, t, ctx)
        out = h if model.cfg.halting == "off" else weights.observe(h, model.recurrent.act(h), out)
        if t + 1 in counts:
            yield t + 1, out
