"""Training speed on several GPUs of one machine against one of them, in one run.

Reference config M (docs/results/gpu_training.md): bfloat16, compiled, clipped, fused AdamW, 8 × 1024 tokens a GPU
and step, so that N GPUs train on N times the batch. First rank 0 trains alone, the others waiting; then all train
together, in each of these ways:

- ``fsdp``: FSDP2, kernel by kernel.
- ``fsdp_captured``: the same with forward, backward and their collectives as one CUDA graph, as a run with torchrun
  and ``parallel.graphs=true`` does it. This is the figure that counts.
- ``replicated``: whole copies, the captured step of one GPU, then one average of all gradients, not overlapped.

The median step of the slowest rank counts. ``--toy`` tries the script at toy size on the CPU.

    torchrun --standalone --nproc-per-node=2 benchmarks/gpu_fsdp.py --out docs/results/gpu_fsdp.json
    torchrun --standalone --nproc-per-node=2 benchmarks/gpu_fsdp.py --toy
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_training import LOOPS
from model_configs import CONFIG_M, TOY
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.accounting import flops_per_token, parameters
from open_mythos.training.acceleration import accelerate
from open_mythos.training.gradients import Gradients
from open_mythos.training.loops import LoopPlan
from open_mythos.training.monitor import gradient_norms
from open_mythos.training.objective import Objective
from open_mythos.training.optim import clip_gradients
from open_mythos.training.parallel import World, init_world, parallelize

WAYS = ("one_uncaptured", "fsdp", "fsdp_captured", "replicated")


class Bench:
    """Sizes of one run of this script, and what all its ways of training have in common."""

    def __init__(self, toy: bool, attn_type: str, compile: bool) -> None:
        self.toy, self.compile = toy, compile and not toy
        self.config = MythosConfig(**(TOY if toy else CONFIG_M), attn_type=attn_type)
        self.batch, self.length = (2, 32) if toy else (8, 1024)
        self.warm, self.repeats = (1, 3) if toy else (8, 40)
        self.plan = LoopPlan(0, LOOPS)
        self.objective: Any = None

    def build(self, world: World, ranks: int) -> Tensor:
        """A fresh model, as the same seed makes it on each rank, and this rank's ids (3, B, S + 1)."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.objective = Objective(OpenMythos(self.config)).train()
        self.ranks = ranks
        generator = torch.Generator().manual_seed(world.rank)
        shape = (3, self.batch, self.length + 1)
        ids = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        return ids.to(world.device)

    def step(
        self, descend: Callable[[dict[str, Tensor], Tensor], Tensor], ids: Tensor, world: World
    ) -> Callable[[int], Tensor]:
        """One optimiser step on batch i, given what adds the gradients."""
        parameters = list(self.objective.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        divisor = torch.tensor(float(self.batch * self.length), device=ids.device)

        def step(i: int) -> Tensor:
            rows = ids[i % len(ids)]
            loss = descend({"ids": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}, divisor)
            clip_gradients(parameters, 1.0, gradient_norms(self.objective.model, world).norm())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    def alone(self, world: World, capture: bool) -> Callable[[int], Tensor]:
        """As a run on one GPU does it."""
        ids = self.build(world, 1)
        self.objective.to(world.device)
        accelerate(self.objective, compile=self.compile)
        gradients = Gradients(self.objective, torch.bfloat16, capture=capture)
        return self.step(lambda batch, divisor: gradients(batch, self.plan, divisor), ids, world)

    def fsdp(self, world: World, capture: bool) -> Callable[[int], Tensor]:
        """Sharded over the world."""
        ids = self.build(world, world.size)
        parallelize(self.objective, world, compile=self.compile, precision="bf16")

        gradients = Gradients(self.objective, capture=capture, sharded=True)
        return self.step(lambda batch, divisor: gradients(batch, self.plan, divisor), ids, world)

    def replicated(self, world: World) -> Callable[[int], Tensor]:
        """Whole on each rank."""
        ids = self.build(world, world.size)
        self.objective.to(world.device)
        accelerate(self.objective, compile=self.compile)
        gradients = Gradients(self.objective, torch.bfloat16, capture=True)

        def descend(batch: dict[str, Tensor], divisor: Tensor) -> Tensor:
            loss = gradients(batch, self.plan, divisor)
            grads = [p.grad for p in self.objective.parameters() if p.grad is not None]
            works = [dist.all_reduce(grad, async_op=True) for grad in grads]
            for work in works:
                work.wait()
            torch._foreach_div_(grads, float(world.size))
            return loss

        return self.step(descend, ids, world)

    def time(self, step: Callable[[int], Tensor], world: World) -> dict[str, Any]:
        """Milliseconds of a step and what follows from them, on the slowest rank."""
        cuda = world.device.type == "cuda"
        losses = [float(step(i)) for i in range(self.warm)]
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        marks: list[Any] = []
        world.barrier()
        for i in range(self.repeats + 1):
            # No wait between steps: the host may run ahead, as in training.
            marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
            if cuda:
                marks[-1].record()
            step(i)
        if cuda:
            torch.cuda.synchronize()
        spans = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        spans.sort()
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        mine = {
            "ms": statistics.median(spans),
            "p10": spans[len(spans) // 10],
            "p90": spans[-1 - len(spans) // 10],
        }
        ranks = [mine | {"gb": peak, "loss": losses}]
        if world.size > 1:
            gathered = [torch.zeros(4 + len(losses), dtype=torch.float64) for _ in range(world.size)]
            dist.all_gather(gathered, torch.tensor([*mine.values(), peak, *losses], dtype=torch.float64))
            ranks = [
                {"ms": t[0], "p10": t[1], "p90": t[2], "gb": t[3], "loss": t[4:]}
                for t in (tensor.tolist() for tensor in gathered)
            ]
        slowest = max(ranks, key=lambda rank: rank["ms"])
        tokens = self.ranks * self.batch * self.length
        flops = 3 * flops_per_token(self.config, LOOPS, context=1)
        rate = tokens / slowest["ms"] * 1e3
        figures = {"tokens_per_s": round(rate), "tflops_per_gpu": round(rate * flops / self.ranks / 1e12, 1)}
        return figures | {"gpus": self.ranks, "ranks": ranks}


def measure(bench: Bench, world: World, build: Callable[[], Callable[[int], Tensor]]) -> dict[str, Any]:
    """The figures, or what went wrong; the memory is free again afterwards."""
    began, step = time.perf_counter(), None
    try:
        step = build()
        figures = bench.time(step, world)
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}"[:600]}
    del step
    bench.objective = None
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return figures | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attn", choices=["mla", "gqa"], default="mla")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rows", type=int, default=8, help="sequences of 1024 tokens on each GPU and step")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, to try the script")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    device, local = "cpu" if arguments.toy else "cuda", int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local)
    bench = Bench(arguments.toy, arguments.attn, not arguments.no_compile)
    bench.batch = bench.batch if arguments.toy else arguments.rows
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else "CPU, toy size: the times mean nothing",
        "attention": arguments.attn,
        "parameters": parameters(bench.config).total,
        "tokens_per_gpu_and_step": bench.batch * bench.length,
    }
    # Before there is a process group: alone, and the experts' counts are nobody else's.
    done = Path(tempfile.gettempdir()) / f"gpu-fsdp-{os.environ.get('TORCHELASTIC_RUN_ID', 'alone')}"
    lonely = World(device=torch.device(device, local) if device == "cuda" else torch.device("cpu"))
    if os.environ.get("RANK", "0") == "0":
        for name, capture in (("one_uncaptured", False), ("one", True)):
            if not capture and name not in arguments.ways:
                continue
            report[name] = measure(bench, lonely, lambda capture=capture: bench.alone(lonely, capture))
            print(name, json.dumps(report[name]), flush=True)
        done.touch()
    while not done.exists():
        time.sleep(0.2)
    world = init_world(device, timeout=180.0)
    world.barrier()
    done.unlink(missing_ok=True)
    builds = {
        "fsdp": lambda: bench.fsdp(world, capture=False),
        "replicated": lambda: bench.replicated(world),
        "fsdp_captured": lambda: bench.fsdp(world, capture=True),
    }
    for name in (name for name in builds if name in arguments.ways):  # the riskiest last
        report[name] = measure(bench, world, builds[name])
        if world.is_main:
            one = report["one"].get("tokens_per_s")
            if one and "tokens_per_s" in report[name]:
                report[name]["times_one"] = round(report[name]["tokens_per_s"] / one, 3)
            print(name, json.dumps(report[name]), flush=True)
            if arguments.out:
                Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")
        if not world.all_agree("error" not in report[name]):
            break  # the ranks may have parted in the middle of a collective
    world.close()


if __name__ == "__main__":
    main()
