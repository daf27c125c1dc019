"""Generation on the CPU, ours against the public 0.5.0 release, in one run: config S, float32, 64 + 64 tokens, 8 loops.

Each side runs in its own process, turn by turn, so that both see the same machine; the figure to read is the ratio, its
median and its range over the rounds. Ours is measured through ``model.generate`` and through the engine, and with
weights kept as bfloat16 and int8, which are not exact and stand apart. The release halts all tokens after two loops at
initialisation; here it is made to run all of them, as we do. ``--out`` writes JSON after every round, and the table
beside it as Markdown.

    pip download open-mythos==0.5.0 --no-deps -d peer && unzip -d peer/src peer/*.whl
    python benchmarks/inference_cpu.py --upstream peer/src [--rounds 5] [--out docs/results/inference_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu_speed import LOOPS, NEW, PROMPT, ready_kernels, release
from model_configs import CONFIG_S

BATCHES = (1, 8)
EXACT, FEWER = ("generate", "engine"), ("generate, bfloat16 weights", "generate, int8 weights")
TARGETS = {1: 6.0, 8: 5.0}  # of model.generate in float32


def rate(work: Callable[[], object], tokens: int, repeats: int) -> float:
    """Tokens per second, the median of some repeats after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return tokens / statistics.median(times[1:])


def measure_upstream(source: str) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    model = release(source).eval()
    ids = torch.randint(0, CONFIG_S["vocab_size"], (max(BATCHES), PROMPT))
    model.generate(ids[:1], max_new_tokens=2, n_loops=LOOPS)
    return {
        str(batch): rate(
            lambda batch=batch: model.generate(ids[:batch], max_new_tokens=NEW, n_loops=LOOPS), batch * NEW, 1
        )
        for batch in BATCHES
    }


def measure_ours() -> dict[str, float]:
    import torch

    from open_mythos import Engine, MythosConfig, OpenMythos
    from open_mythos.inference.quantise import quantise

    torch.manual_seed(0)
    model = OpenMythos(MythosConfig(**CONFIG_S)).eval()
    ids = torch.randint(0, CONFIG_S["vocab_size"], (max(BATCHES), PROMPT))
    sides: dict[str, Any] = {"generate": model}
    sides |= {f"generate, {kind} weights": quantise(model, kind) for kind in ("bfloat16", "int8")}  # type: ignore[arg-type]
    found = {}
    for batch in BATCHES:
        for name, each in sides.items():
            work = lambda each=each, batch=batch: each.generate(ids[:batch], NEW, LOOPS)  # noqa: E731
            found[f"{name}/{batch}"] = rate(work, batch * NEW, 3)
        with Engine(model, max_rows=batch, max_context=PROMPT + NEW) as engine:
            work = lambda engine=engine, batch=batch: engine.generate(ids[:batch], NEW, LOOPS)  # noqa: E731
            found[f"engine/{batch}"] = rate(work, batch * NEW, 3)
    return found


def summary(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each way and batch: medians, and the ratio with its range."""
    rows = []
    for batch in BATCHES:
        for way in (*EXACT, *FEWER):
            ours = [each["ours"][f"{way}/{batch}"] for each in rounds]
            theirs = [each["upstream"][str(batch)] for each in rounds]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            row: dict[str, Any] = {"way": way, "batch": batch, "exact": way in EXACT}
            row |= {
                "upstream": round(statistics.median(theirs), 1),
                "ours": round(statistics.median(ours), 1),
            }
            row |= {"ratio": round(statistics.median(ratios), 2)}
            row |= {"ratio_range": [round(min(ratios), 2), round(max(ratios), 2)]}
            rows.append(row | ({"target": TARGETS[batch]} if way == "generate" else {}))
    return rows


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Generation on the CPU against the public 0.5.0 release",
        "",
        f"{report['date']}, torch {report['torch']}, {report['threads']} threads, reference config S: {PROMPT} prompt "
        f"and {NEW} new",
        f"tokens, {LOOPS} loops, {report['rounds']} interleaved rounds. {report['kernels']}",
        "Figures are tokens per second, prefill included: medians, and of the ratio also the range over rounds. The "
        "engine",
        "computes what `model.generate` does. Weights in fewer bits are not exact; docs/inference.md has their price.",
        "",
        f"    {report['command']}",
        "",
        "| way | batch | release | ours | ratio | range | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["figures"]:
        low, high = row["ratio_range"]
        goal = f"≥ {row['target']:g}" if "target" in row else ""
        lines.append(
            f"| {row['way']} | {row['batch']} | {row['upstream']} | {row['ours']} | {row['ratio']} | {low} to {high} | "
            f"{goal} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upstream", required=True, help="directory that contains the release's package")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and a table beside it")
    parser.add_argument("--side", choices=("ours", "upstream"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_ours() if args.side == "ours" else measure_upstream(args.upstream)))
        return
    import torch

    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    report |= {"python": platform.python_version(), "threads": torch.get_num_threads(), "config": CONFIG_S}
    report |= {"kernels": ready_kernels(), "rounds": 0, "load": os.getloadavg()[0]}
    report["command"] = f"python benchmarks/inference_cpu.py --upstream DIR --rounds {args.rounds}"
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(args.rounds):
        each = {}
        for side in ("upstream", "ours"):
            command = [sys.executable, __file__, "--upstream", args.upstream, "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            each[side] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(each)
        report |= {"rounds": len(rounds), "figures": summary(rounds)}
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report | {"turns": rounds}, indent=2) + "\n")
            args.out.with_suffix(".md").write_text(table(report))
        print(table(report).partition("| way")[2].join(["| way", ""]), flush=True)


if __name__ == "__main__":
    main()
