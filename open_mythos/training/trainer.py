"""The training loop: batches in, a run directory out, exact resume, on one process or many.

A run directory holds ``run.json`` (config, versions, totals), ``metrics.jsonl`` (one record per logged step),
``checkpoints/`` (the train state), ``model/`` (weights to use) and, of an adapted model, ``adapter/``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from open_mythos.config import ConfigError
from open_mythos.training import adapt, objective, optim, rundir
from open_mythos.training.checkpoint import Checkpointer, CheckpointError, export_checkpoint
from open_mythos.training.config import RunConfig
from open_mythos.training.monitor import Monitor
from open_mythos.training.parallel import World, init_world, parallelize
from open_mythos.training.progress import Progress, Silent
from open_mythos.training.rundir import RUN_FILES
from open_mythos.training.sources import train_stream
from open_mythos.training.state import Stream, TrainState
from open_mythos.training.step import Step, TrainingError
from open_mythos.training.trackers import Trackers, check_trackers, open_trackers
from open_mythos.weights import from_pretrained

__all__ = ["RUN_FILES", "TrainingError", "build", "cpu_threads", "objective", "train"]

Tell = Callable[[str], None]


def build(config: RunConfig) -> tuple[TrainState, dict[str, Any]]:
    """A fresh train state on one process, seeded, and an account of its data.

    Raises:
        ConfigError: the data is not there or does not fit.
    """
    state, _, report = spread(config, World())
    return state, report


def spread(
    config: RunConfig, world: World, fresh: bool = True
) -> tuple[TrainState, objective.Objective, dict[str, Any]]:
    """:func:`build` on many processes, each of which calls it: the model is spread as [parallel] says.

    Parameters are drawn alike on every process. The noise that the model draws later differs between them.

    Args:
        config: the run's, resolved by :func:`~open_mythos.training.adapt.resolve`.
        world: the processes.
        fresh: False when a checkpoint is about to be loaded.

    Returns:
        The state; its model with the loss; an account of the data.

    Raises:
        ConfigError: the data is not there or does not fit, or [parallel] does not fit the world.
    """
    how = config.parallel
    _check_device(config, world)
    data, report = train_stream(config, world.rank, world.size)
    _check_same_data(data, world)
    torch.manual_seed(config.train.seed)
    model = adapt.first_model(config, fresh).train()
    if world.rank:
        torch.manual_seed(int(torch.randint(2**62, ())) + world.rank)
    loops = torch.Generator().manual_seed(config.train.seed)
    descended = objective.Objective(model)
    parallelize(
        descended,
        world,
        recompute=how.recompute,
        compile=how.compile,
        precision=how.precision,
        reshard=how.reshard,
    )
    state = TrainState(model, optim.build_optimizer(model, config.optim), data, loops)
    return state, descended, report


def _check_device(config: RunConfig, world: World) -> None:
    how, model = config.parallel, config.model
    for name in ("compile", "graphs"):
        if getattr(how, name) and world.device.type != "cuda":
            raise ConfigError(f"parallel.{name} = True is not allowed: it needs a CUDA device")
    if not how.graphs:
        return
    refused = "parallel.graphs = True is not allowed: "
    if world.size > 1 and config.train.accumulate > 1:
        raise ConfigError(refused + "on several processes it needs train.accumulate = 1")
    # Otherwise the experts are multiplied one by one, for which the host has to know how many tokens each got.
    if how.precision != "bf16":
        raise ConfigError(refused + "it needs parallel.precision = 'bf16'")
    for name in ("dim", "expert_dim"):
        if getattr(model, name) % 8:
            raise ConfigError(
                refused + f"it needs model.{name} = {getattr(model, name)} to be a multiple of 8"
            )


def _check_same_data(data: Stream, world: World) -> None:
    """Each machine may have prepared the text for itself, from files that only seem to be the same."""
    own = data.state_dict()
    if not world.all_agree(own == world.broadcast(own)):
        raise ConfigError(
            "data.source is not the same text on all machines: prepare it once (mythos prepare), and name that folder"
        )


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_at: int | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Path:
    """Train and write a run directory. Under torchrun every process calls this, and they train together.

    Args:
        config: what to train on what, and how.
        out: the run directory; made if absent.
        resume: go on from the newest good checkpoint in ``out``, bit for bit as if there had been no break (same
            device, number of threads and of processes). Only how long, how often to log and to save, [eval],
            [log], [checkpoint] and where it runs may differ then. A run that was broken off before its first
            checkpoint begins again. Processes that torchrun has restarted do this unasked.
        overwrite: replace a run that ``out`` already holds.
        stop_at: save and return after this step, before the config's last.
        progress: told about each step; silent when None.
        tell: called with a sentence on the device and on what is trained, by the first process.

    Returns:
        ``out``.

    Raises:
        ConfigError: the config does not fit its data or this machine, or ``out`` holds another run.
        CheckpointError: there is nothing to resume from, it does not fit, or a save failed.
        TrainingError: the run diverged, or its loss or gradient was not finite too many times.
    """
    out = Path(out)
    check_trackers(config.log.trackers)
    world = init_world(config.parallel.device, config.parallel.replicas)
    main = world.is_main
    config, resume = _claim(config, out, world, resume, overwrite)
    with cpu_threads(config.train.threads):
        state, descended, report = spread(config, world, fresh=not resume)
        if not resume:
            _by_first(world, lambda: rundir.clear(out))
        kept = config.checkpoint
        with Checkpointer(out / "checkpoints", keep=kept.keep, asynchronous=kept.asynchronous) as saver:
            if resume:
                saver.load(state)
            monitor = Monitor(config, state.model, world, state.skips)
            step = Step(config, state, descended, world, monitor)
            facts = {"processes": world.size, **monitor.facts()}
            if tell is not None and main:
                tell(_summary(config, state, world))
            if main:
                rundir.write_run(out, config, state, report, facts)
            last = config.train.steps if stop_at is None else min(stop_at, config.train.steps)
            _watched(config, out, step, last, saver, progress if progress is not None and main else Silent())
        _by_first(world, lambda: _finish(out, config, state, report, facts))
    world.close()
    return out


def _claim(
    config: RunConfig, out: Path, world: World, resume: bool, overwrite: bool
) -> tuple[RunConfig, bool]:
    """The config, resolved with that of the run in ``out`` if there is one to go on with, and whether there is."""
    if _by_first(world, lambda: rundir.restarted(out)):
        resume, overwrite = True, False
    saved = None
    if resume:
        saved, resume = _by_first(world, lambda: rundir.find_run(out))
    config = adapt.resolve(config, saved)
    _by_first(world, lambda: rundir.check_free(out, config, saved, overwrite))
    return config, resume


def _watched(
    config: RunConfig, out: Path, step: Step, last: int, saver: Checkpointer, progress: Progress
) -> None:
    """:func:`_run` with trackers and progress, which are closed whatever happens."""
    progress.start(config.train.steps, step.state.step)
    try:
        with open_trackers(config, out, step=step.state.step, rank=step.world.rank) as trackers:
            _run(config, step, last, saver, trackers, progress)
    finally:
        progress.close()


def _run(
    config: RunConfig, step: Step, last: int, saver: Checkpointer, trackers: Trackers, progress: Progress
) -> None:
    """Steps until ``last``, with their records and checkpoints."""
    state, every, save_every = step.state, config.train.log_every, config.train.save_every
    began, before = time.perf_counter(), state.seconds
    # Reading costs nothing where the host is the device.
    eager = step.world.device.type == "cpu"
    while state.step < last:
        number = state.step + 1
        read = number == 1 or number % every == 0 or number == last
        row = step(read)
        state.seconds = before + time.perf_counter() - began
        # A checkpoint has the number of its step, and what is saved after the last one is balanced.
        balancing = state.step == config.train.steps and config.train.balance
        saving = bool(save_every) and state.step % save_every == 0 and not balancing
        if row is not None:
            row["seconds"] = state.seconds
            trackers.log(row)
        progress.update(state.step, row)
        if read or saving or eager:
            step.check()
        if row is not None and (why := step.monitor.verdict()):
            raise TrainingError(why)
        if saving:
            with step.monitor.paused():
                saver.save(state, config.to_dict())
    if state.step >= config.train.steps and state.balanced < config.train.balance:
        step.balance()
        state.seconds = before + time.perf_counter() - began
    saver.save(state, config.to_dict())


def _finish(
    out: Path, config: RunConfig, state: TrainState, report: dict[str, Any], facts: dict[str, Any]
) -> None:
    """What the run leaves to use: weights, the adapter, the totals."""
    export_checkpoint(out / "checkpoints", out / "model")
    if config.adapt.kind == "lora":
        adapt.save_adapter(from_pretrained(out / "model"), out / "adapter")
    rundir.write_run(out, config, state, report, facts)


def _by_first(world: World, work: Callable[[], Any]) -> Any:
    """What ``work``, done by the first process, returns as JSON has it, or its error: on every process."""
    result, trouble = None, None
    cause: Exception | None = None
    if world.is_main:
        try:
            result = work()
        except Exception as error:
            cause, trouble = error, [type(error).__name__, str(error)]
    result, trouble = world.broadcast([result, trouble])
    if cause is not None:
        raise cause
    if trouble is not None:
        name, text = trouble
        kinds = {"ConfigError": ConfigError, "CheckpointError": CheckpointError}
        raise kinds[name](text) if name in kinds else RuntimeError(f"process 0 failed: {name}: {text}")
    return result


def _device(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return "CPU"


def _summary(config: RunConfig, state: TrainState, world: World) -> str:
    how = config.parallel
    place = _device(world) if world.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    many = f"{world.size} × {place}" if world.size > 1 else place
    extras = [
        name
        for name, on in (("compiled", how.compile), (f"recompute {how.recompute}", how.recompute != "none"))
        if on
    ]
    return f"device: {', '.join((many, how.precision, *extras))}; {adapt.account(state.model)}"


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
