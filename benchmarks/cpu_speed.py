"""Training and generation speed on the CPU, ours against the public 0.5.0 release, in one run.

Reference config S (docs/results/cpu_speed.md). Each side runs in its own process, turn by turn, so that both
see the same machine; the figure to read is the ratio of medians. The release halts all tokens after two loops
at initialisation; here both sides are made to run all loops, so that the work is equal. ``--kernels off`` leaves
out the C kernels of open_mythos/kernels.py. ``--out`` writes JSON, and the table beside it as Markdown.

    pip download open-mythos==0.5.0 --no-deps -d peer && unzip -d peer/src peer/*.whl
    python benchmarks/cpu_speed.py --upstream peer/src [--rounds 5] [--out docs/results/cpu_speed.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from model_configs import CONFIG_S

LOOPS, BATCH, LENGTH, PROMPT, NEW = 8, 4, 256, 64, 64


def release(source: str) -> Any:
    """The release's model of config S, made to run all loops, from the directory that holds its package."""
    spec = importlib.util.spec_from_file_location("upstream", Path(source) / "open_mythos" / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["upstream"] = module
    spec.loader.exec_module(module)
    return module.OpenMythos(module.MythosConfig(**CONFIG_S, act_threshold=1e9))


def measure(side: str, upstream: str, training: bool, generation: bool) -> dict[str, float]:
    """Tokens per second of one process: train, generate at batch 1 and 8."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    if side == "upstream":
        model = release(upstream)
    else:
        from open_mythos import MythosConfig, OpenMythos

        model = OpenMythos(MythosConfig(**CONFIG_S))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, CONFIG_S["vocab_size"], (BATCH, LENGTH + 1))

    def train() -> None:
        optimizer.zero_grad()
        logits = model(ids[:, :-1], n_loops=LOOPS)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    def rate(work: object, tokens: int, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return tokens / statistics.median(times)

    result = {}
    if training:
        for _ in range(2):  # the first steps of either side are slow: memory is new
            train()
        result["train"] = rate(train, BATCH * LENGTH, 8)
    if not generation:
        return result
    model.eval()
    for batch in (1, 8):
        prompt = ids[:1, :PROMPT].repeat(batch, 1)
        model.generate(prompt, max_new_tokens=2, n_loops=LOOPS)
        result[f"generate_batch_{batch}"] = rate(
            lambda prompt=prompt: model.generate(prompt, max_new_tokens=NEW, n_loops=LOOPS), batch * NEW, 3
        )
    return result


def ready_kernels() -> str:
    """Build the kernels before anything is timed, and say whether they are in use."""
    from open_mythos import kernels

    return kernels.status()


def table(report: dict[str, object], keys: list[str]) -> str:
    lines = ["# CPU speed against the public 0.5.0 release", ""]
    lines += [
        f"{report['date']}, torch {report['torch']}, {report['threads']} threads, float32, reference config S,"
    ]
    lines += [
        f"{report['rounds']} interleaved rounds. {report['kernels']}",
        "Figures are tokens per second: medians,",
    ]
    lines += ["and of the ratio also the range over rounds.", "", f"    {report['command']}", ""]
    lines += ["| work | release | ours | ratio | range |", "|---|---|---|---|---|"]
    for key in keys:
        row = report[key]
        assert isinstance(row, dict)
        low, high = row["ratio_range"]
        name = key.replace("_", " ")
        lines.append(f"| {name} | {row['upstream']} | {row['ours']} | {row['ratio']} | {low} to {high} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--upstream", required=True, help="directory that contains the release's open_mythos package"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument(
        "--kernels", choices=("on", "off"), default="on", help="off: our side on PyTorch alone"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--skip-training", action="store_true", help="measure generation only")
    only.add_argument("--skip-generation", action="store_true", help="measure training only")
    parser.add_argument("--side", choices=("ours", "upstream"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.upstream, not args.skip_training, not args.skip_generation)))
        return
    if args.kernels == "off":
        os.environ["OPEN_MYTHOS_KERNELS"] = "0"
    kernels = ready_kernels()
    print(kernels)
    skipped = ["--skip-training"] if args.skip_training else []
    skipped += ["--skip-generation"] if args.skip_generation else []
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "upstream": []}
    for _ in range(args.rounds):
        for side in runs:
            command = [sys.executable, __file__, "--upstream", args.upstream, "--side", side]
            command += skipped
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    import torch

    report: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    report |= {"python": platform.python_version(), "threads": torch.get_num_threads(), "rounds": args.rounds}
    report["kernels"] = kernels
    report["command"] = f"python benchmarks/cpu_speed.py --upstream DIR --rounds {args.rounds}"
    if args.kernels == "off":
        report["command"] = f"{report['command']} --kernels off"
    report["command"] = " ".join([str(report["command"]), *skipped])
    print(f"{'tokens/s':20}{'upstream':>10}{'ours':>10}{'ratio':>8}")
    for key in runs["ours"][0]:
        ours = statistics.median(run[key] for run in runs["ours"])
        theirs = statistics.median(run[key] for run in runs["upstream"])
        ratios = [a[key] / b[key] for a, b in zip(runs["ours"], runs["upstream"], strict=True)]
        report[key] = {
            "upstream": round(theirs, 1),
            "ours": round(ours, 1),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
        print(f"{key:20}{theirs:10.1f}{ours:10.1f}{statistics.median(ratios):8.2f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(report, list(runs["ours"][0])))


if __name__ == "__main__":
    main()
