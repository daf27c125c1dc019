"""Exit rules on a GPU or CPU: does the time of decoding fall as the loops do?

Decodes the same text under a rule and at full depth with the engine's fastest runner, turn by turn, at several
tolerances, batch sizes and depths. What can be saved is the time of loops: the ideal of a rule is the saved loops times
what one more loop costs in the same engine, from half the depth to full depth or from one loop, whichever is more (few
loops may take the host longer than the GPU, which would make the ideal look small). The share of the ideal is the time
saved over that.

Without --model a byte model is trained first, as for benchmarks/speculation.py.

    python benchmarks/exit_speed.py --out docs/results/exit_speed.json
    python benchmarks/exit_speed.py --model runs/speculation-run/model
    python benchmarks/exit_speed.py --toy
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speculation import Plan, Results, prompts, settle, trained
from torch import Tensor

from open_mythos import OpenMythos, from_pretrained
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.exits import Fixed, Rule, StateChange
from open_mythos.inference.pages import Layers, PagePool

TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.4)


def decode(engine: Engine, ids: Tensor, new: int, loops: int, rule: Rule | None) -> tuple[float, float]:
    """Milliseconds a step of prompts (B, S) together, and mean loops of their tokens.

    Only tokens count that come while all rows decode: prompts under a rule are read one after the other.
    """
    came: list[list[float]] = [[] for _ in ids]

    def noting(times: list[float]) -> Callable[[int], None]:
        return lambda _: times.append(time.perf_counter())

    handles = [
        engine.submit(Request(row, new, loops, temperature=0, exit=rule, on_token=noting(times)))
        for row, times in zip(ids.cpu(), came, strict=True)
    ]
    results = [handle.result() for handle in handles]
    begin, end = max(times[0] for times in came), min(times[-1] for times in came)
    spent = [
        n
        for result, times in zip(results, came, strict=True)
        for n, at in zip(result.loops, times[1:], strict=True)
        if begin < at <= end
    ]
    if len(spent) < len(ids) * new // 4:
        raise SystemExit(f"all rows decoded together for only {len(spent)} tokens: raise --new ({new})")
    return 1e3 * (end - begin) * len(ids) / len(spent), statistics.mean(spent)


def measure(engine: Engine, ids: Tensor, new: int, depth: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table at this depth: full depth, and every tolerance."""
    rules: dict[str, tuple[int, Rule | None]] = {
        f"{n} loops": (n, None) for n in sorted({1, depth // 2, depth})
    }
    rules |= {f"change {tolerance}": (depth, StateChange(tolerance)) for tolerance in TOLERANCES}
    rules["fixed, half"] = (depth, Fixed(max(1, depth // 2)))
    times: dict[str, list[float]] = {name: [] for name in rules}
    loops: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, (most, rule) in rules.items():
            settle(engine.model.embed.weight.device)
            took, loops[name] = decode(engine, ids, new, most, rule)
            if turn:  # the first captures
                times[name].append(took)
    ms = {name: statistics.median(values) for name, values in times.items()}
    full = ms[f"{depth} loops"]
    slope = max((full - ms[f"{n} loops"]) / (depth - n) for n in {1, depth // 2})
    rows = []
    for name in rules:
        ideal = slope * (depth - loops[name])
        row = {"batch": len(ids), "depth": depth, "rule": name, "loops": loops[name], "ms_per_step": ms[name]}
        if ideal > 0:
            row["share_of_ideal"] = (full - ms[name]) / ideal
        rows.append(row)
    return rows


def main() -> None:
    """Print a table and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/exit_speed.json"))
    parser.add_argument("--model", type=Path, help="a saved model, instead of training one")
    parser.add_argument("--set", nargs="+", default=[], help="changes to the config of the training")
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--depths", type=int, nargs="+")
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    gpu = torch.cuda.is_available() and not args.toy
    model: OpenMythos = from_pretrained(args.model or trained(args.out, args.toy, args.set))
    model = model.to("cuda", torch.bfloat16).eval() if gpu else model.eval()
    plan = Plan(prompt=16, new=args.new)
    ids = prompts("test", max(args.batches), plan, args.toy)
    results = Results(args.out)
    depths = args.depths or [model.cfg.max_loop_iters, 2 * model.cfg.max_loop_iters]
    print(f"{'batch':>5} {'depth':>5} {'rule':12} {'loops':>6} {'ms/step':>8} {'of ideal':>8}")
    for batch in args.batches:
        context = plan.prompt + args.new
        pages = len(Layers(model.cfg.prelude_layers, max(depths), model.cfg.coda_layers).needed(max(depths)))
        room = (
            batch * pages * -(-context // 64) * PagePool.page_bytes(model.cfg, 64, model.embed.weight.dtype)
        )
        with Engine(
            model, max_rows=batch, max_loops=max(depths), max_context=context, cache_bytes=room
        ) as engine:
            results.data["runner"] = type(engine.runner).__name__
            for depth in depths:
                for row in measure(engine, ids[:batch], args.new, depth, args.rounds):
                    results.add(**row)
                    share = f"{row['share_of_ideal']:8.0%}" if "share_of_ideal" in row else ""
                    print(
                        f"{batch:5} {depth:5} {row['rule']:12} {row['loops']:6.2f} {row['ms_per_step']:8.3f} {share}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
