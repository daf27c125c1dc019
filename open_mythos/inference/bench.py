"""What the engine does in a second: prefill, decode at batch sizes, and requests of mixed depths.

Every figure is taken several times, turn by turn with the others, so that all see the same machine.

Shape letters: T loops.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from open_mythos.inference.engine import Engine
from open_mythos.inference.pages import CacheCodec
from open_mythos.model import OpenMythos

__all__ = ["measure"]


def measure(
    model: OpenMythos,
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 64,
    new: int = 32,
    loops: int | None = None,
    rounds: int = 3,
    codec: CacheCodec | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Tokens per second of the engine on this model.

    Args:
        model: in eval mode; its weights decide nothing but when an answer ends.
        batches: requests at once.
        prompt: tokens of each prompt.
        new: tokens to add, 2 or more; the first comes with the prefill.
        loops: T; ``cfg.max_loop_iters`` when None.
        rounds: times that each figure is taken.
        codec: how the cache is kept; as it is when None.
        tell: called with a short phrase before each round.

    Returns:
        JSON-ready: ``loops``, ``setting`` and ``runner`` in words, and ``figures``, each with ``work``, its medians
        ``tokens_per_s`` and ``seconds``, and the ``range`` of the first over the rounds.

    Raises:
        ValueError: the tokens do not fit the model, or a number is below 1.
    """
    depth = model.cfg.max_loop_iters if loops is None else loops
    bed = _Bed(model, prompt, new, depth, codec)
    works: dict[str, Callable[[], tuple[int, float]]] = {}
    for batch in batches:
        works[f"prefill, batch {batch}"] = partial(bed.prefill, batch)
        works[f"decode, batch {batch}"] = partial(bed.decode, batch)
    if depth > 2:
        rows = max(batches)
        depths = [2 + i * (depth - 1) // (2 * rows) for i in range(2 * rows)]
        works[f"{2 * rows} requests of 2 to {depth} loops on {rows} rows"] = partial(bed.mixed, rows, depths)
        works[f"the same, all at {depth} loops"] = partial(bed.mixed, rows, [depth] * len(depths))
    seen: dict[str, list[tuple[int, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        if tell is not None:
            tell(f"round {turn} of {rounds}" if turn else "warming up")
        for name, work in works.items():
            found = work()
            if turn:
                seen[name].append(found)
    weight = model.embed.weight
    name = (
        torch.cuda.get_device_name(weight.device)
        if weight.is_cuda
        else f"{torch.get_num_threads()} CPU threads"
    )
    return {
        "torch": torch.__version__,
        "loops": depth,
        "setting": f"{prompt} prompt and {new} new tokens, {str(weight.dtype).removeprefix('torch.')}, {name}",
        "runner": bed.runner,
        "figures": [_figure(name, found) for name, found in seen.items()],
    }


def _figure(work: str, found: list[tuple[int, float]]) -> dict[str, Any]:
    rates = [tokens / seconds for tokens, seconds in found]
    return {
        "work": work,
        "tokens_per_s": statistics.median(rates),
        "range": [min(rates), max(rates)],
        "seconds": statistics.median(seconds for _, seconds in found),
    }


@dataclass
class _Bed:
    """A model and the sizes to try it with."""

    model: OpenMythos
    prompt: int
    new: int
    loops: int
    codec: CacheCodec | None
    runner: str = ""

    def __post_init__(self) -> None:
        tokens, most = self.prompt + self.new - 1, self.model.cfg.max_seq_len
        if tokens > most:
            raise ValueError(
                f"prompt = {self.prompt} and new = {self.new} are not allowed together: {tokens} tokens would be "
                f"cached, more than max_seq_len = {most}"
            )

    def prefill(self, batch: int) -> tuple[int, float]:
        """Tokens of prompts, and seconds."""
        _, seconds = self._run(batch, [self.loops] * batch, 1)
        return batch * self.prompt, seconds

    def decode(self, batch: int) -> tuple[int, float]:
        """New tokens after the first of each, and seconds: those of the whole less those of the prefill."""
        _, before = self._run(batch, [self.loops] * batch, 1)
        tokens, seconds = self._run(batch, [self.loops] * batch, self.new)
        return max(tokens - batch, 1), max(seconds - before, 1e-9)

    def mixed(self, rows: int, depths: list[int]) -> tuple[int, float]:
        """New tokens of more requests than rows, and seconds, prefill included."""
        return self._run(rows, depths, self.new)

    def _run(self, rows: int, depths: list[int], new: int) -> tuple[int, float]:
        context = self.prompt + new - 1
        with Engine(
            self.model, max_rows=rows, max_context=context, max_loops=max(depths), codec=self.codec
        ) as engine:
            prompts = self._prompts(len(depths))
            if self.model.embed.weight.is_cuda:
                # Graphs are captured when they are first used, which is no part of the work.
                engine.generate(prompts, new, depths, temperature=0)
            start = time.perf_counter()
            results = engine.generate(prompts, new, depths, temperature=0)
            seconds = time.perf_counter() - start  # tokens are read on the host, so a GPU is done
            reason = engine.runner.reason
            modules = "" if reason is None else f", by the modules, since {reason}"
            self.runner = type(engine.runner).__name__ + modules
        return sum(len(result.tokens) for result in results), seconds

    def _prompts(self, count: int) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        return torch.randint(self.model.cfg.vocab_size, (count, self.prompt), generator=draws)
