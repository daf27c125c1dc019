"""Requests of all depths in one batch, against batches in which every token runs the largest depth.

Requests arrive one by one (Poisson), each with its own number of loops, uniform from --least to --most, and its own
number of new tokens. Four ways to serve the same requests, in one run on the same machine:

    own depth   the engine; tokens at different loops share a batch
    most depth  the same engine, every token runs --most loops; a row that is free is filled at once
    batches     the same engine at --most loops on as many requests as wait (at most --rows); the next batch begins
                when the last request of this one has finished
    generate    such batches through model.generate

Tokens per second count from the first arrival to the last token. On a GPU each engine serves the requests twice before,
so that all its graphs are captured. --check requests are then run alone by model.generate, and their tokens compared.
--out writes JSON after each part.

    python benchmarks/depth_batching.py                                      # toy size, on the CPU
    python benchmarks/depth_batching.py --config M --device cuda --dtype bfloat16 --rows 64
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_configs import CONFIG_M, CONFIG_S
from torch import Tensor

from open_mythos import Engine, MythosConfig, OpenMythos, Request
from open_mythos.inference.engine import Handle
from open_mythos.inference.pages import Layers, PagePool
from open_mythos.inference.runner import PlainRunner

CONFIGS: dict[str, dict[str, Any]] = {
    "toy": {
        "vocab_size": 512,
        "dim": 128,
        "n_heads": 4,
        "max_seq_len": 1024,
        "max_loop_iters": 8,
        "prelude_layers": 1,
        "coda_layers": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_experts": 8,
        "n_experts_per_tok": 2,
        "n_shared_experts": 1,
        "expert_dim": 128,
    },
    "S": CONFIG_S | {"max_seq_len": 1024},
    "M": CONFIG_M,
}


def build(args: argparse.Namespace) -> OpenMythos:
    """A model with random weights."""
    torch.manual_seed(0)
    cfg = MythosConfig(**(CONFIGS[args.config] | {"attn_type": args.attention}))
    return OpenMythos(cfg).to(args.device, getattr(torch, args.dtype)).eval()


def requests(args: argparse.Namespace, vocabulary: int) -> list[Request]:
    """The same at every call."""
    draws = random.Random(args.seed)
    made = []
    for _ in range(args.requests):
        length, loops = draws.randint(*args.prompt), draws.randint(args.least, args.most)
        prompt = [draws.randrange(vocabulary) for _ in range(length)]
        made.append(Request(prompt, draws.randint(*args.new), loops, temperature=0))
    return made


def at_most(request: Request, loops: int) -> Request:
    """The request at another depth."""
    return Request(request.prompt, request.max_new_tokens, loops, temperature=0)


def make_engine(model: OpenMythos, args: argparse.Namespace) -> Engine:
    """An engine with room for all rows at full depth."""
    longest, cfg, page = args.prompt[1] + args.new[1], model.cfg, 64
    layers = len(Layers(cfg.prelude_layers, args.most, cfg.coda_layers).needed(args.most))
    row = layers * -(-longest // page) * PagePool.page_bytes(cfg, page, model.embed.weight.dtype)
    return Engine(
        model,
        max_rows=args.rows,
        max_loops=args.most,
        max_context=longest,
        cache_bytes=row * args.rows,
        queue=args.requests,
        prefill_chunk=args.chunk,
        coda_every=args.coda_every,
        runner=PlainRunner if args.plain else None,
    )


def synchronize(args: argparse.Namespace) -> None:
    """Wait for the device."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def serve(
    engine: Engine, work: list[Request], arrivals: list[float], limit: float, batch: int = 0
) -> dict[str, Any]:
    """Submit each request when its time has come, or so many at once when nobody runs; cancel the rest at the limit."""
    before = replace(engine.stats.done)
    begun = time.perf_counter()
    handles: list[Handle] = []
    delays: dict[int, float] = {}
    waits: set[int] = set()

    def now() -> float:
        return time.perf_counter() - begun

    def due() -> int:
        return sum(arrival <= now() for arrival in arrivals[len(handles) : len(handles) + (batch or 1)])

    def pause() -> bool:
        for i in [i for i in waits if handles[i].done]:
            delays[i] = now() - arrivals[i]
            waits.remove(i)
        return (due() > 0 and (not batch or not waits)) or len(delays) == len(work) or now() > limit

    while len(delays) < len(work) and now() < limit:
        while (count := due()) and (not batch or not waits):
            for _ in range(count):
                waits.add(len(handles))
                handles.append(engine.submit(work[len(handles)]))
        engine.drive(pause)
        pause()
        if engine.stats.running + engine.stats.waiting == 0 and len(handles) < len(work):
            time.sleep(max(0.0, arrivals[len(handles)] - now()))
    seconds, done = now(), engine.stats.done
    for handle in handles:
        handle.cancel()
    tokens = [handle.state.tokens for handle in handles]
    return summary(seconds, tokens, list(delays.values())) | {
        "rows_per_loop": (done.row_loops - before.row_loops) / max(done.ticks - before.ticks, 1),
        "ticks": done.ticks - before.ticks,
        "codas": done.codas - before.codas,
        "chunks": done.chunks - before.chunks,
    }


def serve_warm(
    model: OpenMythos, args: argparse.Namespace, work: list[Request], arrivals: list[float], batch: int = 0
) -> dict[str, Any]:
    """As :func:`serve`, by an engine of its own that on a GPU has captured its graphs; the median of some rounds."""
    engine = make_engine(model, args)
    for _ in range(2 if args.device.startswith("cuda") else 0):
        serve(engine, work, arrivals, args.seconds, batch)
    rounds = [serve(engine, work, arrivals, args.seconds, batch) for _ in range(args.rounds)]
    rounds.sort(key=lambda found: found["tokens_per_second"])
    return rounds[len(rounds) // 2] | {"rounds": [found["tokens_per_second"] for found in rounds]}


def serve_generate(
    model: OpenMythos, work: list[Request], arrivals: list[float], rows: int, limit: float
) -> dict[str, Any]:
    """As many as wait at once, and the next ones when all of them are done."""
    begun, at = time.perf_counter(), 0
    tokens: list[list[int]] = []
    delays: list[float] = []
    while at < len(work) and time.perf_counter() - begun < limit:
        wait = arrivals[at] - (time.perf_counter() - begun)
        if wait > 0:
            time.sleep(wait)
        came = sum(arrival <= time.perf_counter() - begun for arrival in arrivals)
        batch = work[at : min(came, at + rows)]
        longest = max(request.max_new_tokens for request in batch)
        prompts = [list(request.prompt) for request in batch]
        ids = model.generate(prompts, longest, batch[0].n_loops, 0)
        for request, row in zip(batch, ids[:, -longest:].tolist(), strict=True):
            tokens.append(row[: request.max_new_tokens])
        seconds = time.perf_counter() - begun
        delays += [seconds - arrival for arrival in arrivals[at : at + len(batch)]]
        at += len(batch)
    return summary(time.perf_counter() - begun, tokens, delays)


def summary(seconds: float, tokens: list[list[int]], delays: list[float]) -> dict[str, Any]:
    """Figures of one way to serve."""
    count = sum(len(each) for each in tokens)
    return {
        "seconds": seconds,
        "tokens": count,
        "tokens_per_second": count / seconds,
        "finished": len(delays),
        "median_delay": statistics.median(delays) if delays else None,
        "answers": tokens,
    }


def same_as_alone(
    model: OpenMythos, work: list[Request], answers: list[list[int]], count: int
) -> dict[str, int]:
    """How many of the answers are, token for token, those of model.generate on the prompt alone."""
    places = range(0, len(answers), max(1, len(answers) // max(count, 1)))[:count]
    same = tokens = equal = 0
    for i in places:
        request, found = work[i], answers[i]
        ids = torch.as_tensor(request.prompt, device=model.embed.weight.device)[None]
        alone: Tensor = model.generate(ids, request.max_new_tokens, request.n_loops, 0)
        wanted = alone[0, ids.shape[1] :].tolist()[: len(found)]
        same += wanted == found
        tokens += len(found)
        equal += next((k for k, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b), len(found))
    return {"requests": len(places), "same": same, "tokens": tokens, "tokens_before_a_difference": equal}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=CONFIGS, default="toy")
    parser.add_argument("--attention", choices=("mla", "gqa"), default="mla")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--least", type=int, default=2)
    parser.add_argument("--most", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 32), help="shortest and longest")
    parser.add_argument("--new", type=int, nargs=2, default=(8, 24), help="fewest and most new tokens")
    parser.add_argument("--load", type=float, default=4.0, help="arrivals, in what most depth could serve")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of prompts in one call")
    parser.add_argument("--coda-every", type=int, default=8, help="loops between codas")
    parser.add_argument("--plain", action="store_true", help="the model's own modules, no kernels or graphs")
    parser.add_argument(
        "--ways", nargs="+", default=["most depth", "batches", "generate"], help="to compare with"
    )
    parser.add_argument("--check", type=int, default=16, help="requests that are run alone")
    parser.add_argument("--seconds", type=float, default=150.0, help="at most, for each way")
    parser.add_argument("--rounds", type=int, default=1, help="of each way but generate; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run all ways and print a table."""
    args = arguments()
    model = build(args)
    work = requests(args, model.cfg.vocab_size)
    deep = [at_most(request, args.most) for request in work]
    record: dict[str, Any] = {
        "args": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "torch": torch.__version__,
    }

    def save() -> None:
        if args.out is not None:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    # Warm all paths up, and learn what most depth can serve, which sets the pace of arrivals.
    begun = time.perf_counter()
    few = deep[: 2 * args.rows]
    serve(make_engine(model, args), few[:2], [0.0] * 2, args.seconds)
    pace = serve_warm(model, args, few, [0.0] * len(few))
    model.generate([list(deep[0].prompt)], 2, args.most, 0)
    rate = args.load * pace["finished"] / pace["seconds"]
    draws = random.Random(args.seed + 1)
    arrivals: list[float] = []
    for _ in work:
        arrivals.append((arrivals[-1] if arrivals else 0.0) + draws.expovariate(rate))
    record["arrivals_per_second"] = rate
    print(
        f"{rate:.3g} arrivals a second (after {time.perf_counter() - begun:.1f} s of warming up)", flush=True
    )
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "own depth": lambda: serve_warm(model, args, work, arrivals),
        "most depth": lambda: serve_warm(model, args, deep, arrivals),
        "batches": lambda: serve_warm(model, args, deep, arrivals, args.rows),
        "generate": lambda: serve_generate(model, deep, arrivals, args.rows, args.seconds),
    }
    ways = {name: way for name, way in ways.items() if name in args.ways or name == "own depth"}
    print(f"{'':12} {'tokens/s':>9} {'finished':>9} {'median s':>9} {'rows/loop':>9}")
    for name, way in ways.items():
        found = way()
        synchronize(args)
        answers = found.pop("answers")
        if name == "own depth":
            record["alone"] = same_as_alone(model, work, answers, args.check)
        record[name] = found
        save()
        print(
            f"{name:12} {found['tokens_per_second']:9.1f} {found['finished']:9} "
            f"{found['median_delay'] or 0:9.3f} {found.get('rows_per_loop', 0):9.2f}",
            flush=True,
        )
    own = record["own depth"]["tokens_per_second"]
    record["ratios"] = {name: own / record[name]["tokens_per_second"] for name in list(ways)[1:]}
    save()
    for name, ratio in record["ratios"].items():
        print(f"own depth against {name}: {ratio:.2f}")
    print(f"as alone: {record['alone']}")


if __name__ == "__main__":
    main()
