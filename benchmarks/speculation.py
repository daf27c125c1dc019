"""Speculation by depth on a trained model: speed against the same path without it, acceptance, equal tokens.

Trains a byte model on Python's own text first (benchmarks/speculation.toml, minutes on one GPU), or takes --model.
Loops and tokens of the draft are chosen on prompts of the validation split; what is reported is measured on the
test split, turn by turn with plain generation, on two paths: the engine with its fastest runner, and model.generate on
the model's modules. Results are written as they come.

    python benchmarks/speculation.py --out docs/results/speculation.json
    python benchmarks/speculation.py --train-only --out runs/speculation.json
    python benchmarks/speculation.py --model runs/speculation-run/model --out docs/results/speculation.json
    python benchmarks/speculation.py --toy               # the same code at toy size on the CPU
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos import OpenMythos, from_pretrained, kernels
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.exits import LoopReport
from open_mythos.inference.generate import stream
from open_mythos.inference.speculative import Draft
from open_mythos.training.config import load_config
from open_mythos.training.sources import evaluation_batches

CONFIG = Path(__file__).with_suffix(".toml")
TOY = [
    "model.variant='mythos_nano'", "model.max_loop_iters=8", "loops.high=8", "data.seq_len=128", "train.steps=150",
    "train.batch_size=8", "optim.lr=2e-3", "eval.examples=16",
]  # fmt: skip
FAST = ["parallel.precision=bf16", "parallel.compile=true", "parallel.graphs=true"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    prompt: int = 128
    new: int = 128
    tuning: int = 4
    timed: int = 16
    together: int = 8
    compared: int = 1000
    batch: int = 50
    loops: tuple[int, ...] = (1, 2)
    tokens: tuple[int, ...] = (2, 3, 4, 5, 6, 8)


SMALL = Plan(
    prompt=16, new=32, tuning=2, timed=4, together=4, compared=8, batch=4, loops=(1, 2), tokens=(2, 4)
)


def trained(out: Path, toy: bool, changes: list[str]) -> Path:
    """Train as the config says, with changes to it; the folder of the model."""
    folder = out.parent / "speculation-run"
    command = [sys.executable, "-m", "open_mythos.cli", "train", str(CONFIG)]
    overrides = TOY if toy else FAST if torch.cuda.is_available() else []
    subprocess.run([*command, *overrides, *changes, "--out", str(folder), "--overwrite"], check=True)
    return folder / "model"


def prompts(split: str, count: int, plan: Plan, toy: bool) -> Tensor:
    """Pieces of blocks that lie in one document, (N, S)."""
    config = load_config(CONFIG, TOY if toy else [])
    config = replace(config, eval=replace(config.eval, examples=count))
    found: list[Tensor] = []
    for batch in evaluation_batches(config, split):
        ids = torch.cat(batch["ids"].split(plan.prompt, 1)[: batch["ids"].shape[1] // plan.prompt])
        documents = batch.get("document_ids")
        if documents is not None:
            owners = torch.cat(documents.split(plan.prompt, 1)[: documents.shape[1] // plan.prompt])
            ids = ids[(owners == owners[:, :1]).all(1)]
        found.append(ids)
        if sum(map(len, found)) >= count:
            break
    rows = torch.cat(found)[:count]
    if len(rows) < count:
        raise SystemExit(f"{split} has {len(rows)} prompts of {plan.prompt} tokens, and {count} are needed")
    return rows


@torch.inference_mode()
def bits(model: OpenMythos, ids: Tensor, n_loops: int) -> float:
    """Bits per byte of prompts."""
    logs = [model(part, n_loops)[:, :-1].float().log_softmax(-1) for part in ids.split(16)]
    picked = torch.cat(logs).gather(2, ids[:, 1:].unsqueeze(2))
    return float(-picked.mean() / math.log(2))


Way = Callable[[Tensor, Draft | None, LoopReport | None], tuple[list[list[int]], float]]


def by_generate(model: OpenMythos, plan: Plan) -> Way:
    """New tokens of prompts (B, S) by model.generate, all rows together; when the first ones came, in seconds."""

    def run(ids: Tensor, draft: Draft | None, report: LoopReport | None) -> tuple[list[list[int]], float]:
        start, first = time.perf_counter(), 0.0
        columns = []
        with kernels.disabled():  # plain generation's own C kernel does not draft
            counted = report if draft else None
            for column in stream(model, ids, plan.new, temperature=0, speculate=draft, report=counted):
                columns.append(column.tolist())
                first = first or time.perf_counter() - start
        return [list(row) for row in zip(*columns, strict=True)], first

    return run


def by_engine(engine: Engine, plan: Plan) -> Way:
    """The same by the engine, as many at once as it has rows for."""

    def run(ids: Tensor, draft: Draft | None, report: LoopReport | None) -> tuple[list[list[int]], float]:
        before, start = replace(engine.stats.done), time.perf_counter()
        came: dict[int, float] = {}
        handles = []
        for i, prompt in enumerate(ids.cpu()):

            def arrived(token: int, i: int = i) -> None:
                came.setdefault(i, time.perf_counter() - start)

            request = Request(prompt, plan.new, temperature=0, speculate=draft, on_token=arrived)
            handles.append(engine.submit(request))
        found = [handle.result().tokens for handle in handles]
        if report is not None:
            for name in ("checks", "drafted", "kept"):
                gained = getattr(engine.stats.done, name) - getattr(before, name)
                setattr(report, name, getattr(report, name) + gained)
        return found, max(came.values())

    return run


def timed(
    way: Way, ids: Tensor, drafts: list[Draft | None], batch: int = 1
) -> dict[Draft | None, dict[str, float]]:
    """Tokens a second of each, so many prompts at once, turn by turn: after the first token, and prompts included."""
    seconds: dict[Draft | None, list[tuple[float, float]]] = {draft: [] for draft in drafts}
    tokens: dict[Draft | None, int] = dict.fromkeys(drafts, 0)
    reports = {draft: LoopReport() for draft in drafts}
    for draft in drafts:  # what is compiled or captured on first use
        way(ids[:batch], draft, None)
    for part in ids.split(batch):
        for draft in drafts:
            settle(ids.device)
            start = time.perf_counter()
            out, first = way(part, draft, reports[draft])
            settle(ids.device)
            whole = time.perf_counter() - start
            seconds[draft].append((whole, whole - first))
            tokens[draft] += sum(map(len, out))
    found = {}
    for draft in drafts:
        report, (whole, after) = reports[draft], map(sum, zip(*seconds[draft], strict=True))
        rates = {
            "tokens_per_s": (tokens[draft] - len(ids)) / after,
            "with_prompts_tokens_per_s": tokens[draft] / whole,
        }
        if draft is not None:
            rates["acceptance"] = report.kept / max(1, report.drafted)
            rates["tokens_per_check"] = 1 + report.kept / max(1, report.checks)
        found[draft] = rates
    return found


def gain(found: dict[Draft | None, dict[str, float]], draft: Draft) -> dict[str, float]:
    """Speed with the draft over speed without."""
    return {
        name: found[draft][rate] / found[None][rate]
        for name, rate in (("speedup", "tokens_per_s"), ("speedup_with_prompts", "with_prompts_tokens_per_s"))
    }


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def compare(way: Way, model: OpenMythos, ids: Tensor, draft: Draft, batch: int) -> dict[str, Any]:
    """Prompts whose tokens are the same; where not, how far the two likeliest tokens were apart.

    ``alone`` says the same of plain generation against itself, prompt by prompt and in a batch, on some of the prompts.
    """
    differ, gaps, plains = 0, [], []
    for part in ids.split(batch):
        plain, quick = (way(part, each, None)[0] for each in (None, draft))
        plains += plain
        for prompt, a, b in zip(part, plain, quick, strict=True):
            if a == b:
                continue
            differ += 1
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            fed = torch.cat((prompt, torch.tensor(a[:at], dtype=torch.int64, device=prompt.device)))
            top = model(fed.unsqueeze(0))[0, -1].float().topk(2).values
            gaps.append(float(top[0] - top[1]))
    some = ids[: max(1, len(ids) // 20)]
    alone = [way(row, None, None)[0][0] for row in some.split(1)]
    found: dict[str, Any] = {"prompts": len(ids), "different": differ, "batch": batch}
    found["alone"] = {
        "prompts": len(some),
        "different": sum(a != b for a, b in zip(alone, plains, strict=False)),
    }
    return found | ({"largest_gap_in_logits_where_different": max(gaps)} if gaps else {})


class Results:
    """Written after every change."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "rows": self.rows,
        }

    def add(self, **row: Any) -> None:
        """One more row."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """As JSON."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.data, indent=2) + "\n")


def name(draft: Draft | None) -> str:
    return "plain" if draft is None else f"d={draft.loops} g={draft.tokens}"


def measure(
    way: Way, label: dict[str, Any], model: OpenMythos, plan: Plan, ids: dict[str, Tensor], results: Results
) -> None:
    """Choose a draft, measure it, compare tokens; one row of results each."""
    n_loops = model.cfg.max_loop_iters
    drafts: list[Draft | None] = [Draft(d, g) for d in plan.loops if d < n_loops for g in plan.tokens]
    tuning = timed(way, ids["validation"], [None, *drafts])
    for draft, row in tuning.items():
        results.add(**label, part="choosing", draft=name(draft), **row)
    best = max(drafts, key=lambda draft: tuning[draft]["tokens_per_s"])
    assert best is not None
    for batch in (1, plan.together):
        found = timed(way, ids["test"][: plan.timed], [None, best], batch)
        gains = gain(found, best)
        results.add(**label, part="speed", batch=batch, draft=name(None), **found[None])
        results.add(**label, part="speed", batch=batch, draft=name(best), **found[best], **gains)
        print(
            f"{label['path']:9} {label['dtype']:5} {batch:5} {found[None]['tokens_per_s']:9.1f} {name(best):9} "
            f"{found[best]['tokens_per_s']:9.1f} {gains['speedup']:6.2f}x {gains['speedup_with_prompts']:8.2f}x "
            f"{found[best]['acceptance']:6.1%}",
            flush=True,
        )
    same = compare(way, model, ids["test"][: plan.compared], best, plan.batch)
    results.add(**label, part="tokens", draft=name(best), **same)
    print(f"{'':15} tokens differ in {same['different']} of {same['prompts']} prompts", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/speculation.json"), help="JSON to write")
    parser.add_argument("--model", type=Path, help="a saved model, instead of training one")
    parser.add_argument("--train-only", action="store_true", help="train, and stop")
    parser.add_argument(
        "--set", nargs="+", default=[], help="changes to the config of the training: section.key=value"
    )
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: bf16 and fp32 on a GPU, else fp32"
    )
    parser.add_argument("--paths", nargs="+", choices=("engine", "generate"), default=["engine", "generate"])
    parser.add_argument("--prompts", type=int, help="prompts whose tokens are compared")
    args = parser.parse_args()
    plan = SMALL if args.toy else Plan()
    plan = replace(plan, compared=args.prompts or plan.compared)
    device = "cuda" if torch.cuda.is_available() and not args.toy else "cpu"
    folder = args.model or trained(args.out, args.toy, args.set)
    if args.train_only:
        return
    ids = {
        "validation": prompts("validation", plan.tuning, plan, args.toy).to(device),
        "test": prompts("test", max(plan.timed, plan.compared), plan, args.toy).to(device),
    }
    results = Results(args.out)
    model = from_pretrained(folder).to(device).eval()
    depths = {n: bits(model, ids["test"][:200], n) for n in range(1, model.cfg.max_loop_iters + 1)}
    results.data["bits_per_byte"] = depths
    print("bits per byte by loops: " + ", ".join(f"{n}: {x:.3f}" for n, x in depths.items()))
    print(
        f"{'path':9} {'dtype':5} batch {'plain t/s':>9} {'draft':9} {'t/s':>9} {'gain':>7} {'+prompts':>9} {'kept':>6}"
    )
    for dtype in args.dtypes or (["bf16", "fp32"] if device == "cuda" else ["fp32"]):
        model = model.to(DTYPES[dtype])
        if "engine" in args.paths:
            with Engine(model, max_rows=64, max_context=plan.prompt + plan.new) as engine:
                runner = type(engine.runner).__name__
                label = {"path": "engine", "dtype": dtype, "runner": runner}
                measure(by_engine(engine, plan), label, model, plan, ids, results)
        if "generate" in args.paths:
            label = {"path": "generate", "dtype": dtype}
            measure(by_generate(model, plan), label, model, plan, ids, results)


if __name__ == "__main__":
    main()
