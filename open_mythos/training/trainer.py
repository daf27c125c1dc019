"""The training loop: batches in, a run directory out, exact resume.

A run directory holds ``run.json`` (config, versions, totals), ``metrics.jsonl`` (one record per logged step),
``checkpoints/`` (the train state) and ``model/`` (weights to use).
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import ConfigError
from open_mythos.model import OpenMythos, spectral_radius
from open_mythos.training import objective, optim
from open_mythos.training.checkpoint import Checkpointer, export_checkpoint, find_checkpoint, write_json
from open_mythos.training.config import RunConfig
from open_mythos.training.progress import Progress, Silent
from open_mythos.training.sources import train_stream
from open_mythos.training.state import TrainState

__all__ = ["RUN_FILES", "TrainingError", "build", "cpu_threads", "train"]

RUN_FILES = ("run.json", "metrics.jsonl", "eval.json", "model", "records", "checkpoints")


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says at which step, and what may help."""


@dataclass
class _Record:
    """What one optimiser step adds to metrics.jsonl."""

    losses: list[float] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    load: Tensor | None = None
    grad_norm: float = 0.0


def build(config: RunConfig) -> tuple[TrainState, dict[str, Any]]:
    """A fresh train state, seeded, and an account of its data.

    Raises:
        ConfigError: the data is not there or does not fit.
    """
    data, report = train_stream(config)
    torch.manual_seed(config.train.seed)
    model = OpenMythos(config.model).train()
    loops = torch.Generator().manual_seed(config.train.seed)
    return TrainState(model, optim.build_optimizer(model, config.optim), data, loops), report


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_at: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train and write a run directory.

    Args:
        config: what to train on what, and how.
        out: the run directory; made if absent.
        resume: go on from the state in ``out``, bit for bit as if there had been no break (same machine, same
            number of threads). Only [eval] and how long, how often to log and to save may differ then.
        overwrite: replace a run that ``out`` already holds.
        stop_at: save and return after this step, before the config's last.
        progress: told about each step; silent when None.

    Returns:
        ``out``.

    Raises:
        ConfigError: the config does not fit its data, or ``out`` holds another run.
        CheckpointError: there is nothing to resume from, or it does not fit.
        TrainingError: the loss or a gradient is not finite.
    """
    out = Path(out)
    _check_out(out, config, resume, overwrite)
    with cpu_threads(config.train.threads):
        state, data_report = build(config)
        if not resume:
            _clear(out)
        with Checkpointer(out / "checkpoints") as saver:
            if resume:
                saver.load(state)
            _keep_metrics(out / "metrics.jsonl", state.step)
            last = config.train.steps if stop_at is None else min(stop_at, config.train.steps)
            _write_run(out, config, state, data_report)
            progress = Silent() if progress is None else progress
            progress.start(config.train.steps, state.step)
            try:
                _run(config, state, out, last, progress, saver)
            finally:
                progress.close()
        export_checkpoint(out / "checkpoints", out / "model")
        _write_run(out, config, state, data_report)
    return out


def _run(
    config: RunConfig, state: TrainState, out: Path, last: int, progress: Progress, saver: Checkpointer
) -> None:
    cfg = config.train
    distribution = objective.loop_distribution(config.loops.kind, **config.loops.options)
    schedule = optim.Schedule(config.optim, cfg.steps)
    began, before = time.perf_counter(), state.seconds
    mark_seconds, mark_tokens = before, state.tokens
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        while state.step < last:
            lr = schedule(state.step)
            record = _step(config, state, distribution, lr)
            state.seconds = before + time.perf_counter() - began
            row = None
            if state.step == 1 or state.step % cfg.log_every == 0 or state.step == last:
                speed = (state.tokens - mark_tokens) / max(state.seconds - mark_seconds, 1e-9)
                mark_seconds, mark_tokens = state.seconds, state.tokens
                row = _row(state, record, lr, speed)
                metrics.write(json.dumps(row, allow_nan=False) + "\n")
                metrics.flush()
            progress.update(state.step, row)
            if cfg.save_every and state.step % cfg.save_every == 0:
                saver.save(state, config.to_dict())
    saver.save(state, config.to_dict())


def _step(
    config: RunConfig, state: TrainState, distribution: objective.LoopDistribution, lr: float
) -> _Record:
    """One optimiser step: the mean gradient of ``accumulate`` batches, each with its own loop count."""
    model, record = state.model, _Record()
    state.optimizer.zero_grad(set_to_none=True)
    for _ in range(config.train.accumulate):
        batch = next(state.data)
        plan = distribution.sample(state.loops)
        loss = objective.loss(model, batch, plan)
        record.losses.append(float(loss.detach()))
        record.loops.append(plan.total)
        if not math.isfinite(record.losses[-1]):
            raise _not_finite("loss", record.losses[-1], state, plan.total, lr)
        loss.backward()
        _count_load(model, record)
        state.tokens += batch["ids"].numel()
        state.forwards += 1
        state.loops_sum += plan.total
        state.loops_max = max(state.loops_max, plan.total)
    if config.train.accumulate > 1:
        # After the fact, not on each loss: the halting head's own loss has weight one in every backward.
        torch._foreach_div_(
            [p.grad for p in model.parameters() if p.grad is not None], config.train.accumulate
        )
    record.grad_norm = float(optim.clip_gradients(model.parameters(), config.optim.clip))
    if not math.isfinite(record.grad_norm):
        raise _not_finite("gradient norm", record.grad_norm, state, record.loops[-1], lr)
    optim.set_lr(state.optimizer, lr)
    state.optimizer.step()
    state.step += 1
    return record


def _count_load(model: OpenMythos, record: _Record) -> None:
    moe: Any = model.recurrent.block.ffn
    record.load = moe.expert_load.clone() if record.load is None else record.load + moe.expert_load
    if moe.bias_rate == 0:
        moe.expert_load.zero_()  # nobody else does when the bias is frozen


def _row(state: TrainState, record: _Record, lr: float, speed: float) -> dict[str, Any]:
    load = torch.zeros(1) if record.load is None else record.load.double()
    loops = sum(record.loops) / len(record.loops)
    return {
        "step": state.step,
        "loss": sum(record.losses) / len(record.losses),
        "n_loops": int(loops) if loops.is_integer() else loops,
        "lr": lr,
        "grad_norm": record.grad_norm,
        "rho": spectral_radius(state.model),
        "tokens_per_s": speed,
        "expert_share": [round(share, 6) for share in (load / load.sum().clamp(min=1)).tolist()],
        "seconds": state.seconds,
    }


def _not_finite(what: str, value: float, state: TrainState, loops: int, lr: float) -> TrainingError:
    return TrainingError(
        f"the {what} is {value} at step {state.step + 1} ({loops} loops, lr {lr:.3g}): "
        "lower optim.lr, raise optim.warmup, or lower optim.clip, and start again"
    )


def _check_out(out: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Say why ``out`` cannot be used, before any work is done."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: go on with a run, or replace it")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a file: it must be a directory, or a name that is free")
    if resume:
        _check_same(find_checkpoint(out / "checkpoints").meta["config"], config.to_dict())
    elif not overwrite and any((out / name).exists() for name in RUN_FILES):
        ways = "continue it (--resume), replace it (--overwrite), or name another --out"
        raise ConfigError(f"{out} already holds a run: {ways}")


def _clear(out: Path) -> None:
    """An ``out`` without a run in it; other files stay."""
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_same(saved: dict[str, Any], new: dict[str, Any]) -> None:
    free = {("train", "steps"), ("train", "log_every"), ("train", "save_every")}
    for section, values in new.items():
        for key, value in values.items():
            old = saved.get(section, {}).get(key)
            if (
                section != "eval"
                and (section, key) not in free
                and old != value
                and list(_pair(old)) != list(_pair(value))
            ):
                raise ConfigError(
                    f"{section}.{key} = {value!r} is not allowed: the run to resume has {old!r}"
                )


def _pair(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def _keep_metrics(path: Path, step: int) -> None:
    """Drop records of steps that a resume will do again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _logged_step(line) <= step]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off in the middle of a write


def _write_run(out: Path, config: RunConfig, state: TrainState, data_report: dict[str, Any]) -> None:
    run = {
        "name": out.name,
        "config": config.to_dict(),
        "seed": config.train.seed,
        "versions": {
            "open_mythos": _version("open-mythos"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "data": data_report,
        "steps": state.step,
        "finished": state.step >= config.train.steps,
        "tokens": state.tokens,
        "loops": {"mean": state.loops_sum / max(1, state.forwards), "max": state.loops_max},
        "seconds": state.seconds,
    }
    write_json(out / "run.json", run)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many CPU threads inside, as before afterwards; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
