"""Training speed on one GPU: ours, the public 0.5.0 release, and a compiled dense stack of equal active FLOPs.

Reference config M (docs/results/gpu_training.md), bfloat16, one fused AdamW step per batch of 8 × 1024 tokens,
everything in one process, turn by turn. The release runs under autocast as its users run it, and all loops.

    pip download open-mythos==0.5.0 --no-deps -d peer && unzip -d peer/src peer/*.whl
    python benchmarks/gpu_training.py --upstream peer/src --out docs/results/gpu_training.json
    python benchmarks/gpu_training.py --profile mla        # where the time goes, by kernel
    python benchmarks/gpu_training.py --toy                # the same code at toy size on the CPU
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model_configs import CONFIG_M, TOY
from torch import Tensor, nn

from open_mythos import MythosConfig, OpenMythos, mythos_1b
from open_mythos.accounting import flops_per_token
from open_mythos.model.attention import GQAttention, MLAttention, SequenceContext
from open_mythos.model.layers import Expert, RMSNorm, rope_table
from open_mythos.training.acceleration import accelerate
from open_mythos.training.gradients import Gradients
from open_mythos.training.objective import LoopPlan, Objective

LOOPS, BATCH = 8, 8


class Bench:
    """Sizes and clock of one run of this script."""

    def __init__(self, toy: bool) -> None:
        self.device = "cpu" if toy else "cuda"
        self.config = TOY if toy else CONFIG_M
        self.batch, self.length = (2, 32) if toy else (BATCH, 1024)
        self.repeats, self.warm = (2, 1) if toy else (12, 4)
        self.toy = toy

    def ids(self, batch: int = 0, length: int = 0) -> Tensor:
        """Random ids (B, S + 1)."""
        shape = (batch or self.batch, (length or self.length) + 1)
        return torch.randint(0, self.config["vocab_size"], shape, device=self.device)

    def time(self, build: Callable[[], Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of a step, its spread, and the peak of the memory reserved for it from the start."""
        if not self.toy:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = build()
        for _ in range(self.warm):
            step()
        if self.toy:
            return {"ms": 1.0, "low": 1.0, "high": 1.0, "gb": 0.0}
        torch.cuda.synchronize()
        times = []
        for _ in range(self.repeats):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            step()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        # Reserved, not allocated: what a captured graph holds counts only so.
        peak = torch.cuda.max_memory_reserved() / 1e9
        return {"ms": statistics.median(times), "low": min(times), "high": max(times), "gb": peak}


def optimizer_of(module: nn.Module, device: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=device == "cuda")


def our_step(
    bench: Bench, *, recompute: str = "none", compile: bool = True, capture: bool = True, plan: LoopPlan | None = None,
    shape: tuple[int, int] = (0, 0), **changes: Any,
) -> Callable[[], Tensor]:  # fmt: skip
    """One optimiser step of the library's own recipe."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = MythosConfig(**{**bench.config, **changes})
    objective = Objective(OpenMythos(config).to(bench.device)).train()
    accelerate(objective, compile=compile, recompute=recompute)
    optimizer = optimizer_of(objective, bench.device)
    ids = bench.ids(*shape) % config.vocab_size
    batch = {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    plan = LoopPlan(0, LOOPS) if plan is None else plan
    gradients = Gradients(objective, torch.bfloat16, capture=capture)

    def step() -> Tensor:
        loss = gradients(batch, plan)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


class Dense(nn.Module):
    """A plain transformer: as many blocks as the looped model runs, the same FLOPs in each, its own weights."""

    def __init__(self, config: MythosConfig, loops: int) -> None:
        super().__init__()
        wide = config.n_experts_per_tok * config.expert_dim + config.shared_dim
        widths = [config.dense_dim] * config.prelude_layers + [wide] * loops
        widths += [config.dense_dim] * config.coda_layers
        attention = MLAttention if config.attn_type == "mla" else GQAttention
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.attn = nn.ModuleList(attention(config) for _ in widths)
        self.ffn = nn.ModuleList(Expert(config.dim, width) for width in widths)
        self.norms = nn.ModuleList(RMSNorm(config.dim) for _ in range(2 * len(widths) + 1))
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Ids and targets, (B, S) → mean cross entropy."""
        config = self.config
        width = config.rope_dim
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        ctx = SequenceContext(rope_table(positions, width, config.rope_theta))
        x = self.embed(ids)
        for i, (attn, ffn) in enumerate(zip(self.attn, self.ffn, strict=True)):
            x = x + attn(self.norms[2 * i](x), ctx, "")
            x = x + ffn(self.norms[2 * i + 1](x))
        return F.cross_entropy(self.head(self.norms[-1](x)).flatten(0, 1).float(), targets.flatten())


def dense_step(bench: Bench, **changes: Any) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Dense(MythosConfig(**{**bench.config, **changes}), LOOPS).to(bench.device)
    forward = torch.compile(model, dynamic=False, backend="eager" if bench.toy else "inductor")
    optimizer = optimizer_of(model, bench.device)
    ids = bench.ids()
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> Tensor:
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def upstream_step(bench: Bench, folder: str, attn_type: str) -> Callable[[], Tensor]:
    """The public release, as its users run it."""
    if "upstream" not in sys.modules:
        spec = importlib.util.spec_from_file_location("upstream", Path(folder) / "open_mythos" / "main.py")
        if spec is None or spec.loader is None:
            raise SystemExit(f"--upstream {folder}: no open_mythos/main.py there")
        sys.modules["upstream"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["upstream"])
    peer: Any = sys.modules["upstream"]
    torch.manual_seed(0)
    config = peer.MythosConfig(**bench.config, attn_type=attn_type, act_threshold=1e9)
    model = peer.OpenMythos(config).to(bench.device)
    optimizer = optimizer_of(model, bench.device)
    ids = bench.ids()

    def step() -> Tensor:
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            logits = model(ids[:, :-1], n_loops=LOOPS)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def ceiling() -> float:
    """Measured bfloat16 matrix product rate, TFLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    times = []
    for _ in range(10):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        a @ b
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return 2 * 8192**3 / statistics.median(times) / 1e9


def profile(bench: Bench, attn_type: str, rows: int = 45) -> None:
    """The costliest GPU kernels of a step, and the whole step beside their sum."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step = our_step(bench, attn_type=attn_type)
    figures = bench.time(lambda: step)
    print({k: round(v, 2) for k, v in figures.items()}, "loss", float(step()))
    activities = [ProfilerActivity.CPU, *([] if bench.toy else [ProfilerActivity.CUDA])]
    with record(activities=activities) as trace:
        for _ in range(3):
            step()
        if not bench.toy:
            torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "Optimizer" not in event.name:
            entry = totals.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.device_time_total / 3000
            entry[1] += 1 / 3
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    busy = sum(ms for ms, _ in totals.values())
    (Path(os.environ.get("OUT", ".")) / f"profile_{attn_type}.txt").write_text(
        "".join(f"{ms:9.4f} ms {count:7.1f} x  {name[:220]}\n" for name, (ms, count) in ordered)
    )
    print(f"kernels {busy:.2f} ms in {sum(n for _, n in totals.values()):.0f} launches a step")
    for name, (ms, count) in ordered[:rows]:
        print(f"{ms:8.3f} ms {count:6.0f} x  {name[:150]}")


def limits(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """A large model, many experts, many loops, a long sequence."""
    report: dict[str, Any] = {}

    def note(name: str, build: Callable[[], Callable[[], Tensor]], tokens: int, flops: float = 0.0) -> None:
        began = time.perf_counter()
        try:
            figures: dict[str, Any] = bench.time(build)
            figures["tokens_per_s"] = round(tokens / figures["ms"] * 1e3)
            if flops:
                figures["tflops"] = round(figures["tokens_per_s"] * flops / 1e12, 1)
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:400]}
        report[name] = figures
        print(name, figures, f"in {time.perf_counter() - began:.0f} s", flush=True)

    tokens = bench.batch * bench.length
    for count, active in ((16, 4), (100, 8), (100, 16)) if "experts" in names else ():
        changes = {"n_experts": count, "n_experts_per_tok": active, "attn_type": "mla"}
        changes["expert_dim"] = bench.config["expert_dim"] * bench.config["n_experts_per_tok"] // active
        note(f"experts_{count}_active_{active}", lambda c=changes: our_step(bench, **c), tokens)
    for free in (0, 248) if "loops" in names else ():
        plan = LoopPlan(free if not bench.toy else free // 50, 8)
        note(f"loops_{free + 8}", lambda p=plan: our_step(bench, plan=p, attn_type="mla"), tokens)
    if "large" in names:
        large = mythos_1b() if not bench.toy else MythosConfig(**bench.config)
        length, loops = 4096 if not bench.toy else 32, large.max_loop_iters
        flops = 3 * flops_per_token(large, loops, context=(length + 1) // 2)
        for batch in (1, 2):
            note(
                f"mythos_1b_batch_{batch}",
                lambda b=batch: our_step(
                    bench, plan=LoopPlan(0, loops), shape=(b, length), **large.to_dict()
                ),
                batch * length,
                flops,
            )
    if "long" in names:
        long = 131072 if not bench.toy else 48
        bench.repeats, bench.warm = 1, 1
        options: dict[str, Any] = {"recompute": "loop", "capture": False, "shape": (1, long)}
        changes = {"max_seq_len": long, "attn_type": "mla"}
        note("sequence_131072", lambda: our_step(bench, **options, **changes), long)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upstream", help="folder that holds the release's open_mythos/")
    parser.add_argument("--out", help="JSON file for the figures")
    names = ("experts", "loops", "large", "long")
    parser.add_argument(
        "--limits", nargs="*", choices=names, help="many experts, loops, weights and tokens instead"
    )
    parser.add_argument("--profile", choices=["mla", "gqa"], help="only print where the time goes")
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, to try the script")
    arguments = parser.parse_args()
    bench = Bench(arguments.toy)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    if arguments.profile:
        profile(bench, arguments.profile)
        return
    tokens = bench.batch * bench.length
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    report["command"] = " ".join(["python", "benchmarks/gpu_training.py", *sys.argv[1:]])
    if not bench.toy:
        report["gpu"], report["matmul_tflops"] = torch.cuda.get_device_name(), round(ceiling(), 1)
    if arguments.limits is not None:
        report |= limits(bench, arguments.limits or names)
    for attn_type in () if arguments.limits is not None else ("mla", "gqa"):
        flops = 3 * flops_per_token(
            MythosConfig(**bench.config, attn_type=attn_type), LOOPS, context=(bench.length + 1) // 2
        )
        sides: dict[str, Callable[[], Callable[[], Tensor]]] = {
            "ours": lambda a=attn_type: our_step(bench, attn_type=a),
            "dense": lambda a=attn_type: dense_step(bench, attn_type=a),
            "recompute_loop": lambda a=attn_type: our_step(bench, attn_type=a, recompute="loop"),
            "recompute_selective": lambda a=attn_type: our_step(bench, attn_type=a, recompute="selective"),
        }
        if arguments.upstream:
            sides["upstream"] = lambda a=attn_type: upstream_step(bench, arguments.upstream, a)
        for side, build in sides.items():
            began = time.perf_counter()
            try:
                figures: dict[str, Any] = bench.time(build)
                figures["tokens_per_s"] = round(tokens / figures["ms"] * 1e3)
                figures["tflops"] = round(figures["tokens_per_s"] * flops / 1e12, 1)
            except Exception as error:
                figures = {"error": f"{type(error).__name__}: {error}"[:400]}
            report[f"{attn_type}_{side}"] = figures
            print(attn_type, side, figures, f"in {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
