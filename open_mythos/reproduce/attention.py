"""MLA against GQA: what each costs in bits, bytes and milliseconds, with a cache for every loop or for the last alone.

Quality comes from trained models on byte-level text. With a cache for every loop, reading a row token by token gives
what one call over the whole row gives, so that is how it is scored. With the last loop's cache it does not (Ouro,
arXiv 2510.25741, serves so), so there the row is read token by token, as serving would.

Latency comes from models of the same proportions, so many times as wide, with random weights, which take as long.

Shape letters: B batch, S sequence, T loops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.accounting import kv_bytes_per_token, parameters
from open_mythos.config import MythosConfig
from open_mythos.reproduce.grid import Grid, cells
from open_mythos.reproduce.runs import Run
from open_mythos.reproduce.targets import Record, Verdict, spread

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from open_mythos.model import LoopPolicy, OpenMythos

__all__ = ["Attention", "latency", "read_by_token", "wider"]

POLICIES = ("every-loop", "last-loop")
ON = "on"
# Where a record's numbers are from: a trained model, or a clock.
QUALITY = "text"


@dataclass(frozen=True)
class Attention(Grid):
    """Trains each attention on text; times it, untrained and wider, on the machine that the axis "on" names.

    Options: ``loops``, T; ``scale``, how many times as wide the timed model is; ``prompt`` and ``new``, tokens;
    ``batches``, sequences side by side; ``rounds``, of which the median counts.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        **Grid.OPTIONS, "loops": 8, "scale": 4, "prompt": 512, "new": 32, "batches": [1, 16], "rounds": 3
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        # A clock needs no seeds: its rounds are in the run.
        arms = {
            name: arm if _is_quality(arm.options.get("place", {})) else replace(arm, seeds=1)
            for name, arm in self.arms.items()
        }
        object.__setattr__(self, "arms", arms)

    def perform(self, run: Run, split: str) -> Record:
        """Train and score, or build and time."""
        if _is_quality(run.options["place"]):
            return super().perform(run, split)
        return {"place": run.options["place"], **self._timed(run)}

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Bits per byte with either cache, and what the cache holds."""
        from open_mythos.model import LastLoop
        from open_mythos.training.evaluate import sweep
        from open_mythos.training.sources import evaluation_batches

        loops = run.options["loops"]
        (every,) = sweep(model, run.config, run.record, [loops], split=split)["splits"][split]["values"]
        last = read_by_token(model, evaluation_batches(run.config, split), loops, LastLoop())
        cfg = run.config.model
        return {
            "bits": {"every-loop": every, "last-loop": last},
            "bytes": {name: kv_bytes_per_token(cfg, name, loops) for name in POLICIES},
            "parameters": parameters(cfg).total,
        }

    def _timed(self, run: Run) -> Record:
        import torch

        from open_mythos.model import EveryLoop, LastLoop, OpenMythos

        options, on = run.options, run.device.type
        cfg = wider(run.config.model, options["scale"], options["prompt"] + options["new"] + 1)
        dtype = torch.bfloat16 if on == "cuda" else torch.float32
        model = OpenMythos(cfg).to(run.device, dtype).eval()
        policies: dict[str, LoopPolicy] = {"every-loop": EveryLoop(), "last-loop": LastLoop()}
        return {
            "parameters": parameters(cfg).total,
            "threads": torch.get_num_threads(),
            "precision": str(dtype).removeprefix("torch."),
            "times": {
                name: {
                    str(batch): latency(
                        model,
                        policy,
                        batch,
                        options["prompt"],
                        options["new"],
                        options["loops"],
                        options["rounds"],
                    )
                    for batch in options["batches"]
                }
                for name, policy in policies.items()
            },
        }

    def judge(self, records: Sequence[Record]) -> Verdict:
        """The table is whole: every attention was scored with either cache, and timed on every machine."""
        wanted = list(self.arms)
        have = {record["arm"] for record in records}
        figures = [
            {
                "label": "rows of the table measured",
                "target": str(len(wanted)),
                **spread([float(sum(name in have for name in wanted))]),
                "shown": f"{sum(name in have for name in wanted)} of {len(wanted)}",
                "met": all(name in have for name in wanted),
                "moonshot": False,
            }
        ]
        return Verdict(
            bool(figures[0]["met"]), "; ".join(self._words(records)) or "nothing scored yet", figures
        )

    def _words(self, records: Sequence[Record]) -> list[str]:
        words = []
        for some in _quality(records).values():
            bits = {name: spread([r["measured"]["bits"][name] for r in some])["median"] for name in POLICIES}
            if None not in bits.values():
                words.append(
                    f"{self.title_of(some[0])}: {bits['every-loop']:.3f} bits per byte, "
                    f"{bits['last-loop']:.3f} with the last loop's cache, "
                    f"{some[0]['measured']['bytes']['every-loop']} cache bytes a token"
                )
        return words

    def summary(self, records: Sequence[Record]) -> Record:
        """A row for every attention and cache: parameters, bytes, bits, milliseconds on every machine."""
        machines = [on for (on,) in cells(records, ON) if on != QUALITY]
        batches = _batches(records)
        rows = []
        for row, some in _by_row(records).items():
            quality = _quality(records).get(row, [])
            for policy in POLICIES:
                bits = spread([r["measured"]["bits"][policy] for r in quality]) if quality else None
                known = quality[0]["measured"] if quality else None
                costs = [known["parameters"], known["bytes"][policy]] if known else [None, None]
                times = [
                    _time(some, on, policy, str(b), kind) for on in machines for kind, b in _kinds(batches)
                ]
                rows.append(
                    {
                        "arm": some[0]["arm"],
                        "title": self.title_of(some[0]),
                        "cells": [policy, *costs, bits, *times],
                    }
                )
        named = [f"{on}: {_KINDS[kind].format(b)}" for on in machines for kind, b in _kinds(batches)]
        return {
            "columns": ["cache", "parameters", "cache bytes a token (bf16)", "bits per byte", *named],
            "format": "plain",
            "rows": rows,
        }

    def draw(self, records: Sequence[Record]) -> Figure:
        """Bits against cache bytes: a mark for every attention, filled for every loop's cache, open for the last's."""
        from open_mythos.reproduce.attention_figure import trade

        titles = {record["measured"]["place"]["row"]: self.title_of(record) for record in records}
        return trade(_quality(records), titles, self.title)


_KINDS = {
    "decode_ms": "decoding, ms a step, batch {}",
    "prefill_tokens_per_s": "prompt, tokens a second, batch {}",
}


def _is_quality(place: Mapping[str, str]) -> bool:
    return place.get(ON, QUALITY) == QUALITY


def _by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    return {row: some for (row,), some in cells(records, "row").items()}


def _quality(records: Sequence[Record]) -> dict[str, list[Record]]:
    return _by_row([record for record in records if _is_quality(record["measured"]["place"])])


def _batches(records: Sequence[Record]) -> list[int]:
    """All batch sizes that were timed."""
    timed = [record["measured"]["times"]["every-loop"] for record in records if "times" in record["measured"]]
    return sorted({int(batch) for times in timed for batch in times})


def _kinds(batches: Sequence[int]) -> list[tuple[str, int]]:
    """Columns of each machine: decoding at every batch size, the prompt at the smallest."""
    return [("decode_ms", batch) for batch in batches] + [("prefill_tokens_per_s", b) for b in batches[:1]]


def _time(records: Sequence[Record], on: str, policy: str, batch: str, kind: str) -> float | None:
    for record in records:
        if record["measured"]["place"][ON] == on:
            value: float | None = record["measured"]["times"][policy].get(batch, {}).get(kind)
            return value
    return None


def wider(cfg: MythosConfig, scale: int, tokens: int) -> MythosConfig:
    """The same proportions, so many times as wide: more heads of the same width, wider latents and experts.

    Args:
        cfg: the small one.
        scale: how many times.
        tokens: that it must be able to read.
    """
    grown = ("dim", "n_heads", "n_kv_heads", "kv_lora_rank", "q_lora_rank", "expert_dim")
    sizes = {name: scale * getattr(cfg, name) for name in grown}
    return cfg.replace(**sizes, ffn_dim=scale * cfg.dense_dim, max_seq_len=max(tokens, cfg.max_seq_len))


def read_by_token(model: OpenMythos, batches: Any, loops: int, policy: LoopPolicy) -> float:
    """Bits for each target when rows are read one token at a time, as serving reads its own text.

    Args:
        model: in eval mode.
        batches: mappings with ``ids`` and ``targets`` (B, S), perhaps ``document_ids``.
        loops: T.
        policy: of the cache.
    """
    import torch
    import torch.nn.functional as F

    from open_mythos.model import KVCache
    from open_mythos.tasks.base import IGNORE_INDEX

    nats, scored = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            some = {key: value.to(model.embed.weight.device) for key, value in batch.items()}
            cache = KVCache(policy, capacity=some["ids"].shape[1])
            for i in range(some["ids"].shape[1]):
                column = {key: value[:, i : i + 1] for key, value in some.items()}
                logits = model(column["ids"], loops, cache, document_ids=column.get("document_ids"))
                nats += float(
                    F.cross_entropy(
                        logits[:, 0].float(),
                        column["targets"][:, 0],
                        ignore_index=IGNORE_INDEX,
                        reduction="sum",
                    )
                )
            scored += int((some["targets"] != IGNORE_INDEX).sum())
    return nats / scored / math.log(2)


def latency(
    model: OpenMythos, policy: LoopPolicy, batch: int, prompt: int, new: int, loops: int, rounds: int
) -> Record:
    """Time of a prompt and of the tokens after it, the median of some rounds after one that is not counted.

    Args:
        model: in eval mode, on the device to be timed.
        policy: of the cache.
        batch: sequences side by side.
        prompt: tokens read in one call.
        new: tokens read one by one afterwards.
        loops: T.
        rounds: how often.

    Returns:
        ``prefill_tokens_per_s`` of all sequences together, ``decode_ms`` of a step, ``cache_bytes`` at the end.
    """
    import torch

    from open_mythos.model import KVCache

    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.cfg.vocab_size, (batch, prompt + new), generator=generator).to(device)
    seconds: list[tuple[float, float]] = []
    held = 0
    with torch.inference_mode():
        for _ in range(rounds + 1):
            cache = KVCache(policy, capacity=prompt + new)
            first = _clocked(device, lambda c=cache: model(ids[:, :prompt], loops, c))  # type: ignore[misc]

            def after(c: KVCache = cache) -> None:
                for i in range(prompt, prompt + new):
                    model(ids[:, i : i + 1], loops, c)

            seconds.append((first, _clocked(device, after)))
            held = cache.nbytes
    prefill, decode = (median(times) for times in zip(*seconds[1:], strict=True))
    return {
        "prefill_tokens_per_s": round(batch * prompt / prefill, 1),
        "decode_ms": round(1000 * decode / new, 3),
        "cache_bytes": held,
    }


def _clocked(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that it takes, until the device has finished."""
    import torch

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began
