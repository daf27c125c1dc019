"""Decode and prefill on one GPU: ours beside the public 0.5.0 release, and the least time that memory allows.

Reference config M (docs/results/inference_gpu.md), bfloat16 weights, random prompts. Every part may fail without the
others; each is bounded by --seconds.

    pip download open-mythos==0.5.0 --no-deps -d peer && unzip -d peer/src peer/*.whl
    python benchmarks/inference_gpu.py --upstream peer/src --out docs/results/inference_gpu.json
    python benchmarks/inference_gpu.py check decode      # some parts only
    python benchmarks/inference_gpu.py --toy             # the same code at toy size on the CPU

Options of the kernels and where the time goes: benchmarks/inference_kernels.py.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model_configs import CONFIG_M, TOY
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.accounting import flops_per_token, kv_bytes_per_token
from open_mythos.inference.compiled_runner import CompiledRunner
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.pages import Layers, PagePool
from open_mythos.inference.requests import Depth
from open_mythos.inference.runner import Batch, Chunk, PlainRunner, RowState
from open_mythos.rows.plain import PlainRows

PARTS = ("check", "decode", "engine", "prefill", "long", "peer")


class Bench:
    """Sizes, clock and figures of one run of this script."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.toy, self.seconds = arguments.toy, arguments.seconds
        self.attentions = arguments.attention
        self.upstream, self.out = arguments.upstream, arguments.out
        self.device = torch.device("cpu" if self.toy else "cuda")
        own = {"max_seq_len": 96, "max_loop_iters": 3} if self.toy else {"max_seq_len": 131072 + 256}
        self.config = (TOY if self.toy else CONFIG_M) | own
        self.loops = self.config["max_loop_iters"]
        self.prompt, self.new = (8, 4) if self.toy else (512, 64)
        self.report: dict[str, Any] = {}
        self.tuning: dict[str, dict[str, int]] = {}

    def model(self, attn_type: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> OpenMythos:
        """A model of which no weight is zero, rounded to bfloat16."""
        torch.manual_seed(0)
        model = OpenMythos(MythosConfig(**{**self.config, "attn_type": attn_type, **changes}))
        with torch.no_grad():
            lora = model.recurrent.lora
            assert lora is not None
            lora.B.normal_(std=0.02)  # zero at the start, and zeros would hide a wrong product
            for norm in model.modules():
                if isinstance(norm, torch.nn.RMSNorm):
                    norm.weight.add_(0.1 * torch.randn_like(norm.weight))
            model.recurrent.block.ffn.router_bias.normal_(std=0.1)
        return model.to(self.device, torch.bfloat16).to(dtype).eval()

    def ids(self, *shape: int, seed: int = 0) -> Tensor:
        """Random ids, on the host."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config["vocab_size"], shape, generator=generator)

    def sync(self) -> None:
        """Wait for the device."""
        if not self.toy:
            torch.cuda.synchronize()

    def note(self, name: str, figures: dict[str, Any]) -> None:
        """Print figures, keep them, and write what there is so far."""
        self.report[name] = figures
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        print(f"{name:28s}", shown, flush=True)
        if self.out:
            Path(self.out).write_text(json.dumps(self.report, indent=2) + "\n")


class Traced(CompiledRunner):
    """Compiled down to the operators that are there anyway."""

    backend = "eager"


class Rows:
    """A runner with some rows whose prompts are in the pool.

    Args:
        bench: sizes.
        model: any model.
        count: rows.
        kind: runner's class.
        prompt: tokens of each row's prompt, all different.
        room: tokens to make room for.
    """

    def __init__(
        self, bench: Bench, model: OpenMythos, count: int, kind: Any = GraphRunner, prompt: int = 0, room: int = 0,
        **options: Any,
    ) -> None:  # fmt: skip
        self.bench, self.model, self.rows = bench, model, tuple(range(count))
        prompt = prompt or bench.prompt
        tokens = prompt + (room or bench.new) + 1
        layers = Layers(model.cfg.prelude_layers, bench.loops, model.cfg.coda_layers)
        pages = count * layers.plain * -(-tokens // kind.page_size)
        self.pool = PagePool(
            model.cfg, layers, rows=count, pages=pages, page_size=kind.page_size, max_context=tokens,
            dtype=model.embed.weight.dtype, device=bench.device,
        )  # fmt: skip
        if bench.toy and kind is not PlainRunner:
            options = {**options, "rows": PlainRows()}
        self.runner = kind(model, self.pool, RowState(model, count), **options)
        if isinstance(self.runner, GraphRunner) and self.runner.reason:
            raise RuntimeError(f"not served: {self.runner.reason}")
        for name, values in bench.tuning.items():
            if not bench.toy and isinstance(self.runner, GraphRunner):
                self.runner._ops.tuning[name].update(values)
        for row in self.rows:
            self.pool.take(row, layers.needed(bench.loops), tokens)
        self.position = prompt

    def prefill(self, ids: Tensor) -> Tensor:
        """Compute the prompts (rows, S), and return the last tokens' logits."""
        starts, depth = (0,) * len(self.rows), Depth(self.bench.loops, None)
        logits, _ = self.runner.prefill(Chunk(self.rows, starts, ids, depth, True))
        assert logits is not None
        return logits

    def batch(self, loops: int = 0) -> Batch:
        """All rows, each having done so many loops of its token."""
        n = len(self.rows)
        return Batch(self.rows, (self.position,) * n, (loops,) * n, (self.bench.loops,) * n, (False,) * n)

    def feed(self, ids: Tensor) -> None:
        """Set the next tokens, (rows,)."""
        self.runner.state.ids.copy_(ids.to(self.bench.device))

    def token(self) -> Tensor:
        """Logits of one token a row, all loops."""
        logits = self.runner.token(self.batch())
        if logits is None:
            logits = self.by_loops()
        self.position += 1
        return logits

    def by_loops(self) -> Tensor:
        """The same without counting it, one call for each part."""
        self.runner.prelude(self.batch())
        for t in range(self.bench.loops):
            self.runner.loop(self.batch(t))
        return self.runner.coda(self.batch(self.bench.loops))

    def greedy(self, count: int) -> float:
        """Milliseconds of each of so many greedy tokens, host and device."""
        self.bench.sync()
        began = time.perf_counter()
        for _ in range(count):
            self.runner.state.ids.copy_(self.token().argmax(-1))
        self.bench.sync()
        return (time.perf_counter() - began) * 1e3 / count


def relative(a: Tensor, b: Tensor) -> float:
    """Relative distance of logits (steps, rows, V), the median over tokens: near a tie, precision chooses experts."""
    a, b = a.double().cpu(), b.double().cpu()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def check(bench: Bench) -> None:
    """Logits of fed tokens, in float32 and bfloat16, against the plain path in float32; and against itself."""
    steps, count = 4, 3
    prompt, fed = bench.ids(count, bench.prompt), bench.ids(steps, count, seed=1)

    def run(model: OpenMythos, kind: Any, rows: slice = slice(None)) -> Tensor:
        some = Rows(bench, model, len(prompt[rows]), kind)
        out = [some.prefill(prompt[rows]).clone()]
        for ids in fed[:, rows]:
            some.feed(ids)
            out.append(some.token().clone())
        return torch.stack(out)[1:]

    for attn_type in bench.attentions:
        exact = run(bench.model(attn_type, torch.float32), PlainRunner)
        figures = {"float32": relative(run(bench.model(attn_type, torch.float32), GraphRunner), exact)}
        model = bench.model(attn_type)
        plain, ours = run(model, PlainRunner), run(model, GraphRunner)
        figures["bfloat16_modules"], figures["bfloat16"] = relative(plain, exact), relative(ours, exact)
        alone = torch.cat([run(model, GraphRunner, slice(i, i + 1)) for i in range(count)], 1)
        figures["batch_changes_bits"] = int((alone != ours).sum())
        figures["nan"] = int(ours.isnan().sum())
        figures["passed"] = figures["float32"] < 1e-4 and figures["bfloat16"] < max(
            0.02, 1.25 * figures["bfloat16_modules"]
        )
        bench.note(f"check_{attn_type}", figures)


def floor_ms(bench: Bench, config: MythosConfig, rows: int, context: int) -> dict[str, float]:
    """Bytes that a decode step of ``rows`` rows has to move through memory, in MB, and the time at 3.0 TB/s.

    Each weight once a use (a loop's once a loop), experts that are expected to be asked, each row's keys and values.
    """
    c, size = config, 2
    if c.attn_type == "mla":
        heads = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        attention = c.dim * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim) + c.q_lora_rank * heads
        attention += c.n_heads * (c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) + c.v_head_dim * c.dim)
    else:
        attention = c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads)
    asked = c.n_experts * (1 - (1 - c.n_experts_per_tok / c.n_experts) ** rows)
    experts = 3 * c.dim * (asked * c.expert_dim + c.shared_dim)
    loop = size * (attention + experts + c.dim * (c.n_experts + 2 * c.lora_rank))
    outer = size * (c.prelude_layers + c.coda_layers) * (attention + 3 * c.dim * c.dense_dim)
    head = size * c.dim * c.vocab_size
    cache = rows * context * kv_bytes_per_token(c, n_loops=bench.loops)
    parts = {"loop": loop, "loops": loop * bench.loops, "outer": outer, "head": head, "cache": cache}
    total = sum(v for k, v in parts.items() if k != "loop")
    return {f"{k}_MB": v / 1e6 for k, v in parts.items()} | {"floor_ms": total / 3.0e9}


def decode(bench: Bench) -> None:
    """Milliseconds of a step: whole tokens in one graph, loop by loop, and graphs alone by the device's clock."""
    for attn_type in bench.attentions:
        model = bench.model(attn_type)
        for count in (1, 16):
            some = Rows(bench, model, count, room=8 * bench.new)
            some.feed(some.prefill(bench.ids(count, bench.prompt)).argmax(-1).cpu())
            some.greedy(2)
            times = [some.greedy(bench.new) for _ in range(3)]
            figures: dict[str, Any] = {
                "ms_per_token": statistics.median(times),
                "low": min(times),
                "high": max(times),
            }
            figures |= floor_ms(bench, model.cfg, count, bench.prompt + 2 * bench.new)
            figures["over_floor"] = figures["ms_per_token"] / figures["floor_ms"]
            if not bench.toy:
                figures |= parts_of_a_step(some)
            bench.note(f"decode_{attn_type}_{count}", figures)


def parts_of_a_step(some: Rows) -> dict[str, float]:
    """Device milliseconds of each captured graph, replayed alone, and of a step taken loop by loop."""
    some.by_loops()
    runner, figures = some.runner, {}
    for (what, bucket), graph in list(runner._graphs.items()):
        times = []
        for _ in range(20):
            runner._tables[bucket][2].zero_()
            times.append(device_ms(graph.replay))
        figures["graph_" + (what if isinstance(what, str) else what[0])] = statistics.median(times)
    runner._shown.clear()
    some.bench.sync()
    began = time.perf_counter()
    for _ in range(20):
        some.by_loops()
    some.bench.sync()
    return figures | {"by_loops": (time.perf_counter() - began) * 50}


def device_ms(work: Callable[[], Any], repeats: int = 1) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(100_000)  # so that the device never waits for the host in between
    events[0].record()
    for _ in range(repeats):
        work()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / repeats


def engine(bench: Bench) -> None:
    """The same through the whole engine, with its scheduler and sampler."""
    from open_mythos.inference.engine import Engine

    def toy_runner(model: OpenMythos, pool: PagePool, state: RowState) -> GraphRunner:
        return GraphRunner(model, pool, state, PlainRows())

    for attn_type in bench.attentions:
        model = bench.model(attn_type)
        for count in (1, 16):
            served = Engine(
                model, max_rows=count, max_loops=bench.loops, max_context=bench.prompt + 4 * bench.new,
                prefill_chunk=bench.prompt, runner=toy_runner if bench.toy else GraphRunner,
            )  # fmt: skip
            with served:
                few, many = (served_seconds(bench, served, count, n * bench.new // 4) for n in (1, 9))
            bench.note(f"engine_{attn_type}_{count}", {"ms_per_step": (many - few) * 1e3 / (2 * bench.new)})


def served_seconds(bench: Bench, served: Any, count: int, new: int) -> float:
    """Seconds for so many greedy tokens a prompt, after some to warm up."""
    prompts = bench.ids(count, bench.prompt).tolist()
    served.generate(prompts, bench.new // 4, n_loops=bench.loops, temperature=0)
    bench.sync()
    began = time.perf_counter()
    served.generate(prompts, new, n_loops=bench.loops, temperature=0)
    bench.sync()
    return time.perf_counter() - began


def prefill(bench: Bench) -> None:
    """8 × 4096 tokens: achieved rate beside a large matrix product's."""
    rows, length = (2, 16) if bench.toy else (8, 4096)
    ceiling, ids = 1.0 if bench.toy else matmul_tflops(), bench.ids(rows, length)
    for attn_type in bench.attentions:
        model = bench.model(attn_type)
        kind = Traced if bench.toy else CompiledRunner
        modules, compiled = (Rows(bench, model, rows, each, prompt=length) for each in (GraphRunner, kind))
        flops = flops_per_token(model.cfg, bench.loops, context=(length + 1) // 2)
        flops = (
            rows * length * (flops - 2 * model.cfg.dim * model.cfg.vocab_size)
        )  # only the last token has logits
        ways = {"compiled": partial(compiled.prefill, ids), "modules": partial(modules.prefill, ids)}
        for name, way in ways.items():
            with Noted(bench, f"prefill_{attn_type}_{name}"):
                way()
                ms = statistics.median(timed(bench, way) for _ in range(5))
                rate = flops / ms / 1e9
                figures = {
                    "ms": ms,
                    "tokens_per_s": rows * length / ms * 1e3,
                    "tflops": rate,
                    "share": rate / ceiling,
                }
                bench.note(f"prefill_{attn_type}_{name}", figures | {"ceiling": ceiling})


class Noted:
    """Print what goes wrong inside, and go on."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> bool:
        if isinstance(error, Exception):
            traceback.print_exception(kind, error, where, limit=-6)
            self.bench.note(self.name, {"error": f"{kind.__name__}: {error}"[:300]})
            with suppress(Exception):
                self.bench.sync()
        return isinstance(error, Exception)


def timed(bench: Bench, work: Callable[[], Any]) -> float:
    if not bench.toy:
        return device_ms(work)
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def matmul_tflops() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    return 2 * 8192**3 / statistics.median(device_ms(lambda: a @ b) for _ in range(10)) / 1e9


def long(bench: Bench) -> None:
    """One long prompt and some tokens after it."""
    length, new = (48, 4) if bench.toy else (131072, 256)
    for attn_type in bench.attentions:
        with Noted(bench, f"long_{attn_type}"):
            model = bench.model(attn_type)
            if not bench.toy:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            some = Rows(bench, model, 1, prompt=length, room=new + 4)
            bench.sync()
            began = time.perf_counter()
            some.feed(some.prefill(bench.ids(1, length)).argmax(-1).cpu())
            seconds = time.perf_counter() - began
            some.greedy(2)
            ms = some.greedy(new)
            cached = kv_bytes_per_token(model.cfg, n_loops=bench.loops) * length
            figures = {"prefill_s": seconds, "ms_per_token": ms, "cache_GB_computed": cached / 1e9}
            figures["pool_GB"] = some.pool.nbytes / 1e9
            figures["peak_GB"] = 0.0 if bench.toy else torch.cuda.max_memory_allocated() / 1e9
            bench.note(f"long_{attn_type}", figures)
            del some
            gc.collect()


def peer(bench: Bench) -> None:
    """The public release, in a process of its own."""
    if not bench.upstream:
        print("peer: no --upstream given")
        return
    for attn_type in bench.attentions:
        for count in (1, 16):
            command = [sys.executable, __file__, "--peer", bench.upstream, attn_type, str(count)]
            command += ["--toy"] if bench.toy else []
            done = subprocess.run(command, capture_output=True, text=True, timeout=bench.seconds)
            if done.returncode:
                bench.note(f"peer_{attn_type}_{count}", {"error": done.stderr.strip()[-300:]})
                continue
            figures = json.loads(done.stdout.strip().splitlines()[-1])
            ours = bench.report.get(f"decode_{attn_type}_{count}", {}).get("ms_per_token")
            if ours:
                figures["times_ours"] = figures["ms_per_token"] / ours
            bench.note(f"peer_{attn_type}_{count}", figures)


def run_peer(bench: Bench, folder: str, attn_type: str, count: int) -> None:
    """Decode with the release as its users run it, under autocast; print the figures."""
    spec = importlib.util.spec_from_file_location("upstream", Path(folder) / "open_mythos" / "main.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"--upstream {folder}: no open_mythos/main.py there")
    release: Any = importlib.util.module_from_spec(spec)
    sys.modules["upstream"] = release
    spec.loader.exec_module(release)
    torch.manual_seed(0)
    sizes = {**bench.config, "max_seq_len": 1024 if not bench.toy else 96}
    config = release.MythosConfig(**sizes, attn_type=attn_type)
    model, cache = release.OpenMythos(config).to(bench.device).eval(), {}
    ids, position = bench.ids(count, bench.prompt).to(bench.device), 0
    times = []
    with torch.no_grad(), torch.autocast(bench.device.type, dtype=torch.bfloat16):
        for _ in range(4 if bench.toy else 12):
            bench.sync()
            began = time.perf_counter()
            logits = model(ids, n_loops=bench.loops, kv_cache=cache, start_pos=position)
            position, ids = position + ids.shape[1], logits[:, -1:].argmax(-1)
            bench.sync()
            times.append((time.perf_counter() - began) * 1e3)
    print(json.dumps({"ms_per_token": statistics.median(times[3:]), "prefill_ms": times[0]}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; without: all")
    parser.add_argument("--upstream", help="folder that holds the release's open_mythos/")
    parser.add_argument("--attention", nargs="+", default=["mla", "gqa"], choices=["mla", "gqa"])
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, for each peer")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, to try the script")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.peer:
        folder, attn_type, count = arguments.peer
        run_peer(bench, folder, attn_type, int(count))
        return
    bench.report = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    bench.report["command"] = " ".join(["python", "benchmarks/inference_gpu.py", *sys.argv[1:]])
    if not bench.toy:
        bench.report["gpu"] = torch.cuda.get_device_name()
    for name in arguments.parts or PARTS:
        if name not in PARTS:
            parser.error(f"{name!r} is no part: choose from {', '.join(PARTS)}")
        began = time.perf_counter()
        with Noted(bench, name), torch.no_grad():
            globals()[name](bench)
        print(f"-- {name} took {time.perf_counter() - began:.0f} s", flush=True)
        if not bench.toy:
            gc.collect()
            torch.cuda.empty_cache()
    if bench.out:
        Path(bench.out).write_text(json.dumps(bench.report, indent=2) + "\n")


if __name__ == "__main__":
    main()
