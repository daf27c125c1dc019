"""What fewer bits cost: bits per byte on held-out text with weights or cache in int8 or bfloat16, on trained models.

Two byte models (configs/demo-lm.toml with latent and with grouped-query attention) are trained on the text of the
Python installation, unless ``--runs`` holds them already; or name trained runs of your own. Every way reads the same
blocks of the test split in one pass with a cache, in which each token is seen as it is stored, so the figures are those
of decoding too. The price is the paired difference from float32, with its standard error over the blocks. ``--out``
writes JSON, and the table beside it as Markdown.

    python benchmarks/quantised.py [RUN ...] [--attention mla] [--runs FOLDER] [--out docs/results/quantised.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos import KVCache, OpenMythos, from_pretrained
from open_mythos.inference.quantise import Int8Cache, quantise
from open_mythos.tasks.base import IGNORE_INDEX
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.sources import evaluation_batches
from open_mythos.training.trainer import train

Model = Callable[[OpenMythos], OpenMythos]


def _same(model: OpenMythos) -> OpenMythos:
    return model


WAYS: dict[str, tuple[Model, type[KVCache]]] = {
    "float32": (_same, KVCache),
    "bfloat16 weights": (lambda m: quantise(m, "bfloat16"), KVCache),
    "int8 weights": (lambda m: quantise(m, "int8"), KVCache),
    "int8 cache": (_same, Int8Cache),
    "int8 weights and cache": (lambda m: quantise(m, "int8"), Int8Cache),
}


def trained(folder: Path, attention: str, overrides: list[str]) -> Path:
    """The run of this attention, trained if it is not there."""
    run = folder / attention
    if not (run / "model" / "config.json").is_file():
        config = load_config(Path("configs/demo-lm.toml"), [f"model.attn_type={attention}", *overrides])
        train(config, run, resume=(run / "run.json").is_file(), tell=lambda text: print(text, flush=True))
    return run


@torch.inference_mode()
def nats(
    model: OpenMythos, batches: list[dict[str, Tensor]], loops: int, make: type[KVCache]
) -> tuple[list[float], list[Tensor], int]:
    """Nats of each block, the likeliest tokens, and bytes of cache for a token."""
    blocks: list[float] = []
    likeliest: list[Tensor] = []
    held = 0
    for batch in batches:
        cache = make()
        logits = model(batch["ids"], loops, cache, document_ids=batch.get("document_ids")).float()
        targets = batch["targets"]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
        blocks += losses.sum(1).tolist()
        likeliest.append(logits.argmax(-1)[targets != IGNORE_INDEX])
        held = cache.nbytes // targets.numel()
    return blocks, likeliest, held


def weight_bytes(model: OpenMythos) -> int:
    """Of all parameters and buffers, a tied head once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def study(run: Path, examples: int) -> dict[str, Any]:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    config = RunConfig.from_dict(record["config"])
    config = replace(config, eval=replace(config.eval, examples=examples))
    model = from_pretrained(run / "model")
    loops = model.cfg.max_loop_iters
    batches = list(evaluation_batches(config, "test"))
    scored = sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in batches)
    rows: list[dict[str, Any]] = []
    first: tuple[list[float], list[Tensor]] | None = None
    for name, (change, make) in WAYS.items():
        other = change(model)
        blocks, likeliest, held = nats(other, batches, loops, make)
        first = (blocks, likeliest) if first is None else first
        scale = len(blocks) / scored / math.log(2)
        apart = torch.tensor(blocks, dtype=torch.float64) - torch.tensor(first[0], dtype=torch.float64)
        same = sum(int((a == b).sum()) for a, b in zip(likeliest, first[1], strict=True))
        row: dict[str, Any] = {"way": name, "bits_per_byte": sum(blocks) / scored / math.log(2)}
        row |= {"more": float(apart.mean()) * scale}
        row |= {"standard_error": float(apart.std()) / math.sqrt(len(blocks)) * scale}
        row |= {"same_likeliest": same / scored, "weight_bytes": weight_bytes(other), "cache_bytes": held}
        rows.append(row)
        print(f"  {name:24}{row['bits_per_byte']:.5f}  {row['more']:+.6f}", flush=True)
    return {
        "attention": model.cfg.attn_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.train.steps,
        "loops": loops,
        "bytes_scored": scored,
        "ways": rows,
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        "# What fewer bits cost",
        "",
        f"    {report['command']}",
        "",
        f"torch {report['torch']}, {report['date']}. Bits per byte on held-out text; the price is the paired "
        "difference from float32",
        "with its standard error over blocks; agreement is how often the likeliest byte is the same. A token's cache "
        "is that of all loops.",
    ]
    for each in report["models"]:
        lines += [
            "",
            f"## {each['attention'].upper()}, {each['parameters']:,} parameters, {each['steps']} steps, "
            f"{each['loops']} loops, {each['bytes_scored']:,} bytes scored",
            "",
            "| way | bits per byte | price | agreement | weights, bytes | cache of a token, bytes |",
            "|---|---|---|---|---|---|",
        ]
        for row in each["ways"]:
            price = f"{row['more']:+.6f} ± {row['standard_error']:.6f}" if row["way"] != "float32" else ""
            lines.append(
                f"| {row['way']} | {row['bits_per_byte']:.5f} | {price} | {row['same_likeliest']:.2%} | "
                f"{row['weight_bytes']:,} | {row['cache_bytes']:,} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="*", type=Path, help="trained runs on text; the two byte models by default"
    )
    parser.add_argument(
        "--attention", nargs="+", default=["mla", "gqa"], choices=("mla", "gqa"), help="which of the two"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quantised"), help="where those are trained")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for their training")
    parser.add_argument("--examples", type=int, default=256, help="blocks of the test split (default 256)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and a table beside it")
    args = parser.parse_args()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    command = ["python benchmarks/quantised.py", *(run.as_posix() for run in args.run)]
    command += ["--attention", *args.attention] if len(args.attention) == 1 and not args.run else []
    command += ["--set", *args.set] if args.set else []
    report |= {"command": " ".join(command), "models": []}
    runs = args.run or [trained(args.runs, attention, args.set) for attention in args.attention]
    for run in runs:
        print(run.name)
        report["models"].append(study(run, args.examples))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            args.out.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
