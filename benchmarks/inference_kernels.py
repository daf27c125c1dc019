"""Options of the decode kernels on one GPU, and where a token's time goes. What is best is written into TritonRows.

python benchmarks/inference_kernels.py --attention mla
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from inference_gpu import Bench, Noted, Rows, device_ms
from torch import Tensor

from open_mythos.rows.plain import Entries


def variants(bench: Bench) -> None:
    """Shared experts beside the routed ones, or before."""
    for attn_type in bench.attentions:
        model = bench.model(attn_type)
        for count in (1, 16):
            seen: list[Tensor] = []
            for fork in (True, False):
                name = f"variant_{attn_type}_{count}_fork_{int(fork)}"
                with Noted(bench, name):
                    some = Rows(bench, model, count, room=4 * bench.new)
                    some.runner.fork = fork
                    some.prefill(bench.ids(count, bench.prompt))
                    some.feed(bench.ids(count))
                    seen.append(some.token().clone())
                    some.greedy(2)
                    ms = min(some.greedy(bench.new) for _ in range(2))
                    bench.note(name, {"ms_per_token": ms, "other_bits": int((seen[-1] != seen[0]).sum())})


def sweep(bench: Bench) -> None:
    """Microseconds of each operation alone, with other options too; from here on the best by both batches is used."""
    if bench.toy:
        return
    model, began = bench.model("mla"), time.perf_counter()
    some = {n: Rows(bench, model, n) for n in (1, 16)}
    for n, rows in some.items():
        rows.prefill(bench.ids(n, bench.prompt))
        rows.feed(bench.ids(n))
        rows.by_loops()
    for name in (*TILES, *OTHERS):
        results: list[tuple[float, list[float], dict[str, int]]] = []
        for changes in options_of(name):
            if time.perf_counter() - began > bench.seconds:
                print("sweep: out of time")
                return
            try:
                us = [time_operation(rows, name, changes) for rows in some.values()]
                results.append((sum(us), us, changes))
            except Exception as error:
                print(f"  {name} {changes}: {type(error).__name__}: {str(error)[:120]}")
        results.sort(key=lambda item: item[0])
        bench.report[f"sweep_{name}"] = [(us, changes) for _, us, changes in results]
        shown = [f"{us[0]:.1f}/{us[1]:.1f} {changes or 'as is'};" for _, us, changes in results]
        print(f"{name:12s}", *shown, flush=True)
        if results and name in some[1].runner._ops.tuning:
            bench.tuning[name] = results[0][2]


def options_of(name: str) -> list[dict[str, int]]:
    """Options to try, the first as they are."""
    if name in TILES:
        fields = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
        return [{}, *(dict(zip(fields, values, strict=True)) for values in TILES[name])]
    return [{}, *OTHERS[name]]


TILES = {
    "experts_in": [(32, 256, 4, 2), (16, 256, 4, 3), (64, 64, 4, 4), (32, 128, 8, 3), (32, 64, 4, 5)],
    "experts_out": [(32, 256, 4, 3), (64, 128, 4, 4), (16, 256, 4, 3), (64, 64, 4, 5)],
    "gated": [(16, 256, 4, 3), (32, 256, 4, 2), (32, 128, 8, 3), (16, 128, 4, 4)],
    "linear:down": [(16, 256, 4, 4), (16, 512, 4, 3), (16, 256, 8, 4), (32, 256, 4, 4)],
    "linear:qkv": [(16, 256, 4, 3), (16, 256, 8, 3), (16, 512, 8, 2)],
    "linear:wo": [(16, 256, 4, 3), (16, 256, 8, 3)],
    "head": [(128, 64, 4, 4), (64, 256, 4, 3), (32, 256, 4, 4), (128, 128, 8, 3)],
}
OTHERS: dict[str, list[dict[str, int]]] = {
    "queries": [{"BLOCK_R": 128}, {"num_warps": 8}, {"BLOCK_R": 32}],
    "attend": [
        {"BLOCK_C": 32},
        {"BLOCK_C": 32, "SPLITS": 32},
        {"num_warps": 8},
        {"BLOCK_C": 128, "num_warps": 8},
    ],
    "route": [{"BLOCK_K": 256, "num_stages": 3}, {"BLOCK_K": 256, "num_warps": 8, "num_stages": 3}],
    "rows": [{"num_warps": 4}, {"num_warps": 16}],
}


class Loop:
    """The operations of a loop of ``n`` rows, each alone, by the name of its options and what follows a colon."""

    def __init__(self, some: Rows, n: int) -> None:
        runner, cfg = some.runner, some.model.cfg
        self.block: Any = some.model.recurrent.block
        self.runner, self.ops, self.room, self.n, self.eps = (
            runner,
            runner._ops,
            runner._whole,
            n,
            cfg.norm_eps,
        )
        self.slots, self.gain = n * cfg.n_experts_per_tok, self.block.ffn_norm.weight
        self.pages = runner._pages(runner.pool.layers.of_loop(0), True)
        table = torch.tensor(
            [[*range(n)], [some.position] * n, [0] * n, [0] * n], dtype=torch.int32, device="cuda"
        )
        table = torch.cat((table, table.new_full((4, 32 - n), -1)), 1)  # addresses stay aligned
        self.entries = Entries(*table[:, :n].unbind())

    def linear(self, a: str, weights: Any, out: str, **more: Any) -> None:
        """A product of what lies in the room."""
        a, out = getattr(self.room, a)[: self.n], getattr(self.room, out)[: self.n]
        self.ops.linear(self.entries, a, weights, out, eps=self.eps, **more)

    def experts(self, name: str) -> None:
        """One of the experts' two products."""
        room, moe, n, slots = self.room, self.block.ffn, self.n, self.slots
        hidden, chosen, weights = room.hidden[:slots], room.chosen[:n], room.weights[:n]
        if name == "experts_in":
            k, inner = slots // n, room.inner[:n]
            self.ops._experts(name, inner, self.gain, moe.w_in, chosen, weights, hidden, slots, k, self.eps)
        else:
            out = room.slots[:slots]
            self.ops._experts(name, hidden, hidden, moe.w_out, chosen, weights, out, slots, 1, self.eps)

    def run(self, name: str) -> None:
        """Launch it once."""
        room, n, eps, entries, block, runner = (
            self.room,
            self.n,
            self.eps,
            self.entries,
            self.block,
            self.runner,
        )
        attn, moe = block.attn, block.ffn
        if name.startswith("experts"):
            self.experts(name)
        elif name == "gated":
            self.linear("inner", (moe.shared.gate_up.weight,), "shared_hidden", gain=self.gain, gated=True)
        elif name == "linear:down":
            self.linear("shared_hidden", (moe.shared.down.weight,), "shared")
        elif name == "linear:qkv":
            self.linear("inner", (attn.q_down.weight, attn.kv_down.weight), "low", gain=self.gain)
        elif name == "linear:wo":
            self.linear("mixed", (attn.wo.weight,), "inner")
        elif name == "head":
            self.linear("inner", (runner.model.head.weight,), "logits", gain=runner.model.norm.weight)
        elif name == "queries":
            gains, ups = (attn.q_norm.weight, attn.kv_norm.weight), (attn.q_up.weight, attn.kv_up.weight)
            low, q = room.low[:n], room.q[:n]
            self.ops.queries(entries, low, *gains, *ups, runner._rope, self.pages, q, attn.nope_dim, eps)
        elif name == "attend":
            up = attn.kv_up.weight
            self.ops.attend(entries, room.q[:n], self.pages, room.mixed[:n], attn.scale, up, attn.nope_dim)
        elif name == "route":
            chosen, weights, router = room.chosen[:n], room.weights[:n], moe.router.weight
            self.ops.route(entries, room.inner[:n], self.gain, router, moe.router_bias, chosen, weights, eps)
        else:
            entries.loop.zero_()
            self.ops.advance(
                entries, runner._injection, room.inner[:n], room.shared[:n], room.slots[: self.slots]
            )


def time_operation(some: Rows, name: str, changes: dict[str, int]) -> float:
    """Microseconds of one of ten calls in a graph."""
    key, kept = name.split(":")[0], some.runner._ops.tuning
    some.runner._ops.tuning = {k: {**v, **(changes if k == key else {})} for k, v in kept.items()}
    loop = Loop(some, len(some.rows))
    try:
        loop.run(name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                loop.run(name)
        graph.replay()
        return statistics.median(device_ms(graph.replay) for _ in range(5)) * 100
    finally:
        some.runner._ops.tuning = kept


def costliest(title: str, work: Callable[[], Any], steps: int, rows: int = 16) -> None:
    """Print the costliest kernels of some steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = totals.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.device_time_total / steps
            entry[1] += 1 / steps
    busy, launches = (sum(each[i] for each in totals.values()) for i in range(2))
    print(f"{title}: kernels {busy:.0f} us in {launches:.0f} launches")
    for name, (us, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:rows]:
        print(f"  {us:8.1f} us {count:5.0f} x {us / count:7.1f}  {name[:100]}")


def profile(bench: Bench) -> None:
    """The costliest kernels of a token."""
    for attn_type in bench.attentions if not bench.toy else ():
        model = bench.model(attn_type)
        for count in (1, 16):
            some = Rows(bench, model, count)
            some.feed(some.prefill(bench.ids(count, bench.prompt)).argmax(-1).cpu())
            some.greedy(2)
            costliest(f"token {attn_type} {count}", lambda s=some: s.greedy(4), 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"variants": variants, "sweep": sweep, "profile": profile}
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; without: all")
    parser.add_argument("--attention", nargs="+", default=["mla", "gqa"], choices=["mla", "gqa"])
    parser.add_argument("--seconds", type=float, default=120.0, help="for the sweep, at most")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, to try the script")
    arguments = parser.parse_args()
    arguments.upstream = None
    bench = Bench(arguments)
    for name in arguments.parts or parts:
        with Noted(bench, name), torch.no_grad():
            parts[name](bench)


if __name__ == "__main__":
    main()
