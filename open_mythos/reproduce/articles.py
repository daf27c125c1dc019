"""The published articles' own scripts: their model, data and plain loop, with whatever defaults we have.

    python -m open_mythos.reproduce.articles --script parity --seeds 6 --jobs 32 --out parity.jsonl

Nothing of our trainer takes part: ``model(x, n_loops=3)``, cross entropy, AdamW at 3e-4. What an article leaves out
is said at its function. Letters: B batch, S sequence, T loops, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.model.moe import MoEFFN
from open_mythos.model.transformer import evaluating

__all__ = ["SCRIPTS", "chain_script", "expert_shares", "parity_script"]

PARITY_LOOPS = (1, 2, 3, 4, 8, 12, 16)
CHAIN_LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
PAD, START, EQ, DIGIT_BASE, MODULUS = 0, 1, 2, 10, 7

# Sizes that the first tutorial's function gives for MLA at a width of 64, and those of its footprint block (the
# release's defaults for what it does not name), which its parity block follows on.
PARITY_MODELS: dict[str, dict[str, Any]] = {
    "tutorial": {
        "vocab_size": 256,
        "dim": 64,
        "n_heads": 4,
        "max_seq_len": 128,
        "max_loop_iters": 16,
        "prelude_layers": 1,
        "coda_layers": 1,
        "n_experts": 4,
        "n_shared_experts": 1,
        "n_experts_per_tok": 2,
        "expert_dim": 64,
        "lora_rank": 8,
        "attn_type": "mla",
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "footprint": {
        "vocab_size": 256,
        "dim": 128,
        "n_heads": 4,
        "max_seq_len": 128,
        "max_loop_iters": 8,
        "n_experts": 4,
        "n_experts_per_tok": 2,
        "attn_type": "mla",
        "kv_lora_rank": 32,
    },
}
CHAIN_BASE: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 128,
    "n_heads": 4,
    "max_seq_len": 32,
    "max_loop_iters": 8,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 64,
    "lora_rank": 8,
}
CHAIN_MODELS: dict[str, dict[str, Any]] = {
    "mla": {
        **CHAIN_BASE,
        "attn_type": "mla",
        "n_kv_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "gqa": {**CHAIN_BASE, "attn_type": "gqa", "n_kv_heads": 2},
}


def parity_script(
    seed: int,
    steps: int = 600,
    model_overrides: Mapping[str, Any] | None = None,
    *,
    size: str = "tutorial",
    bits: int = 24,
    train_loops: int = 3,
    lr: float = 3e-4,
    batch_size: int = 64,
    rows: int = 512,
    loops: Sequence[int] = PARITY_LOOPS,
    build: Callable[[dict[str, Any]], OpenMythos] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The first tutorial: cumulative parity of 24 bits (tokens 1 and 2, no BOS), 600 steps at T = 3, then more loops.

    The article prints the loop; the number of bits and the model's sizes are the full tutorial's. It calls the model
    without ``eval()``, so the figures do so too; ``evaluating`` has those after ``eval()``.

    Args:
        seed: of weights and data.
        steps: optimiser steps.
        model_overrides: fields of MythosConfig over the article's own.
        size: "tutorial" (width 64) or "footprint" (the model of the article's footprint block).
        bits: S.
        train_loops: T of training.
        lr: of AdamW, everything else as torch has it.
        batch_size: B.
        rows: fresh rows that accuracy is measured on.
        loops: T of measuring.
        build: makes the model out of the fields of its config; None: ``OpenMythos(MythosConfig(**fields))``.
        tell: called with a short phrase now and then.

    Returns:
        ``accuracy`` and ``evaluating``: T → share of right bits; ``last_bit``: T → share of right last bits after
        ``eval()``; ``shares``: of the routed experts; ``loss`` of the last step, ``seconds``, ``ms_per_step``,
        ``parameters``, ``finite``.
    """
    torch.manual_seed(seed)
    model = _build(_known("size", size, PARITY_MODELS), model_overrides, build)

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            x, y = _parities(batch_size, bits)
            logits = model(x, n_loops=train_loops)
            yield F.cross_entropy(logits.view(-1, model.cfg.vocab_size), y.view(-1))

    trained = _train(model, losses(), steps, lr, tell)
    x, y = _parities(rows, bits)
    printed = {T: _answers(model, x, T) == y for T in loops}
    with evaluating(model):
        quiet = {T: _answers(model, x, T) == y for T in loops}
    return {
        "accuracy": {str(T): _mean(right) for T, right in printed.items()},
        "evaluating": {str(T): _mean(right) for T, right in quiet.items()},
        "last_bit": {str(T): _mean(right[:, -1]) for T, right in quiet.items()},
        **_summary(model, x[:64], *trained, steps),
    }


def chain_script(
    seed: int,
    epochs: int = 6,
    model_overrides: Mapping[str, Any] | None = None,
    *,
    attention: str = "mla",
    train_loops: int = 3,
    lr: float = 3e-4,
    read: str = "eq",
    examples: int = 3000,
    rows: int = 400,
    loops: Sequence[int] = CHAIN_LOOPS,
    build: Callable[[dict[str, Any]], OpenMythos] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The second tutorial: sums of 2 to 5 digits modulo 7, 6 epochs of 3,000 examples in batches of 64.

    The article prints model and data, and says of the training that it took a fixed number of loops, AdamW and epochs.
    That number (3 here) and where the answer is read (at EQ here; ``read="last"``: at the last place of the padded
    row) are ours.

    Args:
        seed: the article's SEED, 42 there: of Python's and torch's generators.
        epochs: over the training examples.
        model_overrides: fields of MythosConfig over the article's own.
        attention: "mla" or "gqa", one of the article's two models.
        train_loops: T of training.
        lr: of AdamW, everything else as torch has it.
        read: "eq" or "last".
        examples: to train on.
        rows: to test on, of either sort.
        loops: T of measuring.
        build: as in :func:`parity_script`.
        tell: as in :func:`parity_script`.

    Returns:
        ``accuracy`` (new chains of 2 to 5 digits) and ``longer`` (6 to 8 digits): T → share of right answers;
        ``trained_on``: T → share on the training examples; the rest as in :func:`parity_script`.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    model = _build(_known("attention", attention, CHAIN_MODELS), model_overrides, build)
    _known("read", read, ("eq", "last"))
    length = model.cfg.max_seq_len
    x, y = _chains(examples, 2, 5, length)
    tests = {"accuracy": _chains(rows, 2, 5, length), "longer": _chains(rows, 6, 8, length)}

    def losses() -> Iterator[Tensor]:
        for _ in range(epochs):
            for chosen in torch.randperm(examples).split(64):
                logits = model(x[chosen], n_loops=train_loops)
                yield F.cross_entropy(_read(logits, x[chosen], read), y[chosen])

    steps = epochs * -(-examples // 64)
    trained = _train(model, losses(), steps, lr, tell)
    tests["trained_on"] = x[:rows], y[:rows]
    with evaluating(model):
        found = {name: _right(model, *test, read, loops) for name, test in tests.items()}
    return {**found, **_summary(model, x[:64], *trained, steps)}


SCRIPTS: dict[str, Callable[..., dict[str, Any]]] = {"parity": parity_script, "chain": chain_script}


def expert_shares(model: OpenMythos, x: Tensor, n_loops: int = 8) -> list[float]:
    """Share of each routed expert, counted as the tutorial does: from the router's own scores in a wrapped forward.

    Args:
        model: the model.
        x: ids, (B, S).
        n_loops: T.
    """
    ffn: Any = model.recurrent.block.ffn
    if not isinstance(ffn, MoEFFN):
        return []
    counts, original = torch.zeros(ffn.n_experts), ffn.forward

    def hooked(self: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        chosen = (self.router(flat) + self.router_bias).topk(self.topk, dim=-1).indices
        counts.add_(torch.bincount(chosen.flatten(), minlength=self.n_experts))
        result: Tensor = original(x)
        return result

    ffn.__dict__["forward"] = types.MethodType(hooked, ffn)
    try:
        with torch.no_grad():
            model(x, n_loops=n_loops)
    finally:
        del ffn.forward
    return [round(float(share), 4) for share in counts / counts.sum()]


def _build(
    own: Mapping[str, Any],
    overrides: Mapping[str, Any] | None,
    build: Callable[[dict[str, Any]], OpenMythos] | None,
) -> OpenMythos:
    fields = {**own, **(overrides or {})}
    return OpenMythos(MythosConfig(**fields)) if build is None else build(fields)


def _train(
    model: OpenMythos,
    losses: Iterator[Tensor],
    steps: int,
    lr: float,
    tell: Callable[[str], None] | None,
) -> tuple[Tensor, float]:
    """AdamW on one loss after the other, as both articles print it; the last loss, and seconds."""
    loss, began = torch.zeros(()), time.perf_counter()
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    for step, loss in enumerate(losses):
        opt.zero_grad()
        loss.backward()
        opt.step()
        _report(tell, step, steps, loss)
    return loss, time.perf_counter() - began


def _known(name: str, value: str, table: Any) -> Any:
    if value not in table:
        allowed = " or ".join(map(repr, table))
        raise ConfigError(f"{name} = {value!r} is not allowed: it must be {allowed}")
    return table[value] if isinstance(table, dict) else value


def _parities(count: int, bits: int) -> tuple[Tensor, Tensor]:
    """The article's batch: (count, bits) ids, and the parity so far at each of them."""
    drawn = torch.randint(0, 2, (count, bits))
    return drawn + 1, drawn.cumsum(1) % 2 + 1


def _chains(count: int, low: int, high: int, length: int) -> tuple[Tensor, Tensor]:
    """The article's examples: (count, length) ids and (count,) answers."""
    ids, answers = [], []
    for _ in range(count):
        digits = [random.randint(0, MODULUS - 1) for _ in range(random.randint(low, high))]
        tokens = [START, *(DIGIT_BASE + d for d in digits), EQ]
        ids.append(tokens + [PAD] * (length - len(tokens)))
        answers.append(DIGIT_BASE + sum(digits) % MODULUS)
    return torch.tensor(ids), torch.tensor(answers)


def _read(logits: Tensor, ids: Tensor, where: str) -> Tensor:
    """(B, S, V) → (B, V): at EQ, or at the last place."""
    if where == "last":
        return logits[:, -1]
    return logits[torch.arange(len(ids)), (ids == EQ).int().argmax(1)]


def _right(
    model: OpenMythos, ids: Tensor, wanted: Tensor, read: str, loops: Sequence[int]
) -> dict[str, float]:
    """T → share of the chains whose answer is right."""
    return {str(T): _mean(_read(_logits(model, ids, T), ids, read).argmax(-1) == wanted) for T in loops}


def _answers(model: OpenMythos, x: Tensor, n_loops: int) -> Tensor:
    return _logits(model, x, n_loops).argmax(-1)


@torch.no_grad()
def _logits(model: OpenMythos, x: Tensor, n_loops: int) -> Tensor:
    parts = [model(part, n_loops=n_loops) for part in x.split(64)]
    return torch.cat(parts)


def _mean(right: Tensor) -> float:
    return round(float(right.double().mean()), 5)


def _summary(model: OpenMythos, x: Tensor, loss: Tensor, seconds: float, steps: int) -> dict[str, Any]:
    return {
        "shares": expert_shares(model, x),
        "loss": round(float(loss.detach()), 5),
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "seconds": round(seconds, 2),
        "ms_per_step": round(1e3 * seconds / max(1, steps), 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _report(tell: Callable[[str], None] | None, step: int, steps: int, loss: Tensor) -> None:
    if tell is not None and (step + 1) % 100 == 0:
        tell(f"step {step + 1}/{steps}, loss {float(loss.detach()):.3f}")


# Many seeds and settings at once: the command line.


def _job(job: dict[str, Any]) -> dict[str, Any]:
    """One script with one setting and seed, in a fresh process of one thread."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    record = {key: job[key] for key in ("script", "arm", "seed", "settings")}
    try:
        result = SCRIPTS[job["script"]](
            job["seed"], model_overrides=job["settings"]["model"], **job["settings"]["script"]
        )
    except Exception as problem:
        # One setting that fails must not take the others with it; the table shows it.
        return {**record, "error": f"{type(problem).__name__}: {problem}"}
    return {**record, **result, "wall": round(time.perf_counter() - began, 1)}


def _settings(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``key=value`` texts, sorted by their part: "model" (the default) or "script"."""
    found: dict[str, dict[str, Any]] = {"model": {}, "script": {}}
    for text in texts:
        name, equals, value = text.partition("=")
        part, dot, key = name.strip().partition(".")
        if not dot:
            part, key = "model", part
        if not equals or not key or part not in found:
            raise ConfigError(
                f"setting {text!r} is not allowed: it must be key=value, model.key=value or script.key=value"
            )
        found[part][key] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _arms(arms: Sequence[str], common: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Name → settings. An arm is "NAME: key=value key=value"; without any there is one, of the common settings."""
    if not arms:
        return {" ".join(common) or "defaults": _settings(common)}
    found = {}
    for arm in arms:
        name, colon, rest = arm.partition(":")
        if not colon:
            name = rest = arm
        found[name.strip()] = _settings([*common, *rest.split()])
    return found


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line an arm and measure: medians over seeds, and the lowest and highest at the ends."""
    lines: list[str] = []
    arms = dict.fromkeys((r["script"], r["arm"]) for r in records)
    width = max((len(arm) for _, arm in arms), default=3)
    for script, arm in arms:
        group = [r for r in records if (r["script"], r["arm"]) == (script, arm)]
        good = [r for r in group if "error" not in r]
        problems = sorted({r["error"] for r in group if "error" in r})
        lines.extend(f"{arm:<{width}} {problem}" for problem in problems)
        if not good:
            continue
        names = ("accuracy", "evaluating") if script == "parity" else ("accuracy", "longer", "trained_on")
        for name in names:
            loops = list(good[0][name])
            values = {T: sorted(r[name][T] for r in good) for T in loops}
            cells = "  ".join(f"T{T} {statistics.median(values[T]):.3f}" for T in loops)
            ends = " ".join(f"T{T} {values[T][0]:.2f}-{values[T][-1]:.2f}" for T in ("3", loops[-1]))
            lines.append(f"{arm:<{width}} {name:<10} {cells}   range {ends}")
        least = min((min(r["shares"]) for r in good if r["shares"]), default=float("nan"))
        speed = statistics.median(r["ms_per_step"] for r in good)
        loss = statistics.median(r["loss"] for r in good)
        lines.append(
            f"{arm:<{width}} {'':<10} seeds {len(good)}  loss {loss:.3f}  least share {least:.3f}  "
            f"{speed:.0f} ms/step  {good[0]['parameters']} parameters"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m open_mythos.reproduce.articles", description=__doc__)
    parser.add_argument("--script", choices=[*SCRIPTS, "both"], default="both")
    parser.add_argument(
        "--seeds", type=int, default=6, help="0 … N-1; the second article's own 42 is --first-seed 42"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--arm", action="append", default=[], metavar='"NAME: KEY=VALUE ..."')
    parser.add_argument("--out", type=Path, help="a JSON line for each finished run, as it finishes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every script × arm × seed, a process each, and print the table."""
    options = _parser().parse_args(arguments)
    try:
        arms = _arms(options.arm, options.set)
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2
    scripts = list(SCRIPTS) if options.script == "both" else [options.script]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [
        {"script": script, "arm": arm, "seed": seed, "settings": settings}
        for seed in seeds
        for script in scripts
        for arm, settings in arms.items()
    ]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the children, before they load torch
    records = []
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(jobs)), maxtasksperchild=1) as pool:
        for record in pool.imap_unordered(_job, jobs, chunksize=1):
            records.append(record)
            line = json.dumps(record)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            print(
                f"{len(records)}/{len(jobs)} {record['script']} {record['arm']} seed {record['seed']}",
                flush=True,
            )
    records.sort(key=lambda r: (scripts.index(r["script"]), list(arms).index(r["arm"]), r["seed"]))
    print(_table(records))
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
