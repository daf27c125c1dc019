"""The operations of :class:`~open_mythos.rows.plain.PlainRows` in Triton kernels: one each, attention and experts two.

Shape letters: those of :mod:`open_mythos.rows.plain`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_mythos.rows.plain import Asks, Entries, Exits, Injection, Pages

__all__ = ["SPLITS", "TritonRows"]

SPLITS = 128
"""Parts of a row's context, which are attended to side by side."""

_LOG2_E = 1.4426950408889634  # the kernels take powers of two


def _up(n: int, least: int = 16) -> int:
    """The power of two that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def _tuning() -> dict[str, dict[str, int]]:
    """Block sizes and launch options of each kernel: none may depend on the batch, so that no result does."""
    return {
        "linear": {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        "gated": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        "head": {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        "experts_in": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        "experts_out": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        "queries": {"BLOCK_R": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        "route": {"BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        "attend": {"SPLITS": SPLITS, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
        "combine": {"BLOCK_V": 32, "num_warps": 4},
        "rows": {"num_warps": 4},
    }


@dataclass
class TritonRows:
    """What :class:`~open_mythos.rows.plain.PlainRows` computes, launched on the current stream. Needs Triton.

    Args:
        most: entries of the largest batch that is known of.
        tuning: block sizes and launch options by kernel.
        block_m: rows of a tile.
    """

    most: int = 1
    tuning: dict[str, dict[str, int]] = field(default_factory=_tuning)
    block_m: int = 16

    def __post_init__(self) -> None:
        from open_mythos.rows import attention, kernels

        self._k: Any = kernels
        self._a: Any = attention
        self._rooms: dict[Any, tuple[Tensor, Tensor]] = {}

    def embed(
        self, entries: Entries, ids: Tensor, weight: Tensor, scale: float, inverse: Tensor, rope: Tensor, z: Tensor
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.embed`."""
        width, half = z.shape[1], rope.shape[1] // 2
        self._k.embed[(len(entries.rows),)](
            ids, entries.pos, entries.rows, weight, inverse, rope, z, width, half, scale,
            BLOCK=_up(width), BLOCK_HALF=_up(half), **self.tuning["rows"],
        )  # fmt: skip

    def linear(
        self, entries: Entries, a: Tensor, weights: Sequence[Tensor], out: Tensor, *, gain: Tensor | None = None,
        eps: float = 0.0, gated: bool = False, add: Tensor | None = None, maps: str = "",
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.linear`."""
        widths = [len(w) // (1 + gated) for w in weights]
        options = dict(self.tuning["gated" if gated else "head" if sum(widths) >= 16384 else "linear"])
        block, inner, count = options["BLOCK_N"], weights[0].shape[1], len(entries.rows)
        even = inner % options["BLOCK_K"] == 0 and all(n % block == 0 for n in widths)
        tiles = sum(-(-n // block) for n in widths)
        ws = [*weights, *[weights[0]] * (3 - len(weights))]
        ns = [*widths, *[0] * (3 - len(widths))]
        self._k.linear[(tiles, -(-count // self.block_m))](
            a, a if gain is None else gain, *ws, a if add is None else add, out, entries.rows,
            count, inner, *ns, widths[0] * inner, eps, NORM=gain is not None, GATED=gated, ADD=add is not None,
            EVEN=even, SKIP=entries.thin, MAP_A="a" in maps, MAP_ADD="+" in maps, MAP_OUT="o" in maps,
            BLOCK_M=self.block_m, **options,
        )  # fmt: skip

    def queries(
        self, entries: Entries, low: Tensor, q_gain: Tensor, kv_gain: Tensor, q_up: Tensor, kv_up: Tensor, rope: Tensor,
        pages: Pages, q: Tensor, nope: int, eps: float,
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.queries`."""
        options = dict(self.tuning["queries"])
        (count, heads, both), half, table = q.shape, rope.shape[1] // 2, pages.table
        rank = both - 2 * half
        inner, value = low.shape[1] - both, len(kv_up) // heads - nope
        parts = -(-rank // options["BLOCK_R"])
        grid = (heads * (parts + 1) + 1, -(-count // self.block_m))
        self._a.queries[grid](
            low, q_gain, kv_gain, q_up, kv_up, rope, entries.rows, entries.loop, entries.pos, table, pages.keys, q,
            count, heads, inner, rank, nope, value, half, pages.layer, *table.stride()[:2], pages.keys.shape[1], eps,
            LOOPED=pages.looped, EVEN=inner % options["BLOCK_K"] == 0 and nope == _up(nope), SKIP=entries.thin,
            PARTS=parts, BLOCK_M=self.block_m, BLOCK_NOPE=_up(nope), BLOCK_HALF=_up(half), WIDE_R=_up(rank),
            **options,
        )  # fmt: skip

    def heads(
        self, entries: Entries, qkv: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, rope: Tensor, pages: Pages,
        q: Tensor, eps: float,
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.heads`."""
        (count, heads, width), groups = q.shape, pages.keys.shape[2]
        self._a.heads[(count, heads + 2 * groups)](
            qkv, qkv if q_gain is None else q_gain, qkv if k_gain is None else k_gain, rope, entries.rows, entries.loop,
            entries.pos, pages.table, pages.keys, pages.values, q, heads, groups, width // 2, pages.layer,
            *pages.table.stride()[:2], pages.keys.shape[1], eps, LOOPED=pages.looped, NORM=q_gain is not None,
            BLOCK=_up(width // 2), num_warps=1,
        )  # fmt: skip

    def spread(self, entries: Entries, asks: Asks, pages: Pages, loops: int) -> None:
        """As :meth:`PlainRows.spread`."""
        if loops < 2:
            return
        table, keys = pages.table, pages.keys
        width = keys[0, 0].numel()
        self._a.spread[(len(entries.rows), loops - 1)](
            entries.rows, entries.loop, entries.pos, asks.until, table, keys,
            keys if pages.values is None else pages.values, width, pages.layer, *table.stride()[:2], keys.shape[1],
            VALUES=pages.values is not None, BLOCK=_up(width), **self.tuning["rows"],
        )  # fmt: skip

    def attend(
        self, entries: Entries, q: Tensor, pages: Pages, out: Tensor, scale: float, kv_up: Tensor | None = None,
        nope: int = 0,
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.attend`."""
        options, latent = dict(self.tuning["attend"]), kv_up is not None
        count, heads, width = q.shape
        rank = width if kv_up is None else kv_up.shape[1]
        groups = 1 if latent else pages.keys.shape[2]
        splits, block = options["SPLITS"], options["BLOCK_C"]
        partial, stats = self._room(q, count, heads, splits, rank)
        per_group = math.ceil(math.ceil(heads / groups) / 16)
        self._a.attend[(count, groups * per_group, splits)](
            q, entries.rows, entries.loop, entries.pos, pages.table, pages.keys,
            pages.keys if pages.values is None else pages.values, partial, stats, heads, groups, rank, width - rank,
            pages.layer, *pages.table.stride()[:2], pages.keys.shape[1], scale * _LOG2_E,
            LOOPED=pages.looped, LATENT=latent, BLOCK_H=16, BLOCK_R=_up(rank), BLOCK_P=_up(width - rank),
            **options,
        )  # fmt: skip
        per_head = 0 if kv_up is None else len(kv_up) // heads
        self._a.combine[(count, heads)](
            partial, stats, entries.rows, entries.pos, partial if kv_up is None else kv_up, out, heads, rank,
            per_head - nope, nope, per_head, LATENT=latent, SPLITS=splits, BLOCK_C=block, BLOCK_R=_up(rank),
            **self.tuning["combine"],
        )  # fmt: skip

    def _room(self, like: Tensor, count: int, *sizes: int) -> tuple[Tensor, Tensor]:
        """Sums and statistics of attention's splits, kept so that captured graphs may go on writing there."""
        count = max(count, self.most)
        key = (like.device, count, sizes)
        if key not in self._rooms:
            self._rooms[key] = (
                like.new_empty((count, *sizes), dtype=torch.float32),
                like.new_empty((count, *sizes[:2], 2), dtype=torch.float32),
            )
        return self._rooms[key]

    def route(
        self, entries: Entries, x: Tensor, gain: Tensor, router: Tensor, bias: Tensor, chosen: Tensor, weights: Tensor,
        eps: float,
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.route`."""
        (experts, inner), (count, k), options = router.shape, chosen.shape, dict(self.tuning["route"])
        even = inner % options["BLOCK_K"] == 0 and experts == _up(experts)
        self._k.route[(-(-count // self.block_m),)](
            x, gain, router, bias, entries.rows, chosen, weights, count, inner, experts, k, eps,
            EVEN=even, SKIP=entries.thin, BLOCK_M=self.block_m, BLOCK_N=_up(experts), KEPT=_up(k, 2),
            **options,
        )  # fmt: skip

    def experts(
        self, x: Tensor, gain: Tensor, w_in: Tensor, w_out: Tensor, chosen: Tensor, weights: Tensor, hidden: Tensor,
        out: Tensor, eps: float,
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.experts`."""
        slots, k = chosen.numel(), chosen.shape[1]
        self._experts("experts_in", x, gain, w_in, chosen, weights, hidden, slots, k, eps)
        self._experts("experts_out", hidden, hidden, w_out, chosen, weights, out, slots, 1, eps)

    def _experts(
        self, name: str, a: Tensor, gain: Tensor, w: Tensor, chosen: Tensor, weights: Tensor, out: Tensor, slots: int,
        divide: int, eps: float,
    ) -> None:  # fmt: skip
        options, first = dict(self.tuning[name]), name == "experts_in"
        (count, inner, step), width = w.shape, out.shape[1]
        even = inner % options["BLOCK_K"] == 0 and width % options["BLOCK_N"] == 0
        by_slot = slots <= count
        self._k.experts[(-(-width // options["BLOCK_N"]), slots if by_slot else count)](
            a, gain, w, chosen, weights, out, slots, inner, width, width, inner * step, step, divide, eps,
            NORM=first, GATED=first, EVEN=even, BY_SLOT=by_slot, SLOTS=_up(slots), BLOCK_M=self.block_m,
            **options,
        )  # fmt: skip

    def lift(self, entries: Entries, source: Tensor, z: Tensor) -> None:
        """As :meth:`PlainRows.lift`."""
        width = z.shape[1]
        options = self.tuning["rows"]
        self._k.lift[(len(entries.rows),)](source, entries.rows, z, width, BLOCK=_up(width), **options)

    def enter(self, entries: Entries, state: Injection, z: Tensor | None = None) -> None:
        """As :meth:`PlainRows.enter`."""
        w, width = state.weights, state.e.shape[1]
        gain, sines = w.get("input_norm", state.x), w.get("sines", state.x)
        self._k.enter[(len(entries.rows),)](
            state.x if z is None else z, entries.rows, gain, w["loop_norm"], sines, state.e, state.h, state.x,
            state.chosen, state.mass, state.running, entries.loop, width, state.loop_dim, state.eps,
            FRESH=z is not None, NORM="input_norm" in w, AT_INPUT=state.at_input, LOOP_DIM=state.loop_dim > 0,
            BLOCK=_up(width), **self.tuning["rows"],
        )  # fmt: skip

    def advance(
        self, entries: Entries, state: Injection, inner: Tensor, shared: Tensor | None, slots: Tensor,
        exits: Exits | None = None,
    ) -> None:  # fmt: skip
        """As :meth:`PlainRows.advance`."""
        w, width, none = state.weights, state.e.shape[1], state.x
        rank, lora_rows = (w["lora_down"].shape[0], len(w["lora_scale"])) if "lora_down" in w else (0, 1)
        names = [
            "loop_norm",
            "update_norm",
            "state_norm",
            "sines",
            "log_A",
            "log_dt",
            "B",
            "halt",
            "halt_bias",
        ]
        names += ["lora_down", "lora_B", "lora_scale"]
        asked, later, apart = (none,) * 6, 0, 0
        if exits is not None:
            asks, gone, rows = exits.asks, exits.gone, exits.later
            asked = asks.tolerance, asks.first, asks.until, gone.rows, gone.loop, rows
            later, apart = len(rows), rows.stride(0)
        self._k.advance[(len(entries.rows),)](
            inner, inner if shared is None else shared, slots, entries.rows, entries.ruled,
            *(w.get(name, none) for name in names), state.e, state.h, state.x, state.before, state.chosen, state.mass,
            state.running, entries.loop, *asked, width, len(slots) // len(inner), rank, lora_rows, state.loop_dim,
            later, apart,
            0.0 if state.still is None else state.still, *state.limits, state.eps,
            SHARED=shared is not None, KEEP=state.keep, LORA=rank > 0, UPDATE="update_norm" in w,
            STATE="state_norm" in w, SELECT=state.still is not None, LOOP_DIM=state.loop_dim > 0,
            ASK=exits is not None, BLOCK=_up(width), BLOCK_L=min(8, _up(rank, 1)), **self.tuning["rows"],
        )  # fmt: skip
