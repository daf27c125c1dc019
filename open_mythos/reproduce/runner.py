"""Many runs side by side, each in a process of its own; what is finished is kept, whatever happens to the rest."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from open_mythos.config import ConfigError
from open_mythos.reproduce import results
from open_mythos.reproduce.base import Experiment
from open_mythos.reproduce.plan import Settings, all_runs, is_asked
from open_mythos.reproduce.runs import Run, difference, read_json, write_json
from open_mythos.reproduce.targets import Record
from open_mythos.training.metricsfile import last_record

__all__ = ["Outcome", "reproduce"]

_POLL_S = 0.05
_LINE_EVERY_S = 60.0
_SHOWN = 4
Tell = Callable[[str], None]


@dataclass
class Outcome:
    """What became of one experiment.

    Attributes:
        experiment: which.
        runs: all that it has.
        records: of the finished ones, by (arm, seed).
        failed: arm, seed and error of those that failed now.
        result: as written; None while nothing has finished.
    """

    experiment: Experiment
    runs: list[Run]
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    failed: list[Record] = field(default_factory=list)
    result: Record | None = None

    def write(self, settings: Settings) -> None:
        """Put down what there is so far."""
        if not self.records:
            return
        records = list(self.records.values())
        self.result = results.build(self.experiment, settings, self.runs, records, self.failed)
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(results.path_of(self.experiment.name, settings), self.result)


@dataclass
class _Job:
    """One run to be done, and its process once it has one."""

    run: Run
    outcome: Outcome
    identity: str
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0

    @property
    def kind(self) -> str:
        return str(self.run.sections.get("parallel", {}).get("device", "cpu"))

    def start(self, slot: int, settings: Settings, environment: dict[str, str]) -> None:
        """Start it, its output going to the run's log."""
        folder = self.run.folder
        if settings.overwrite and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if settings.remeasure:
            for pattern in self.outcome.experiment.KEPT:
                for path in folder.glob(pattern):
                    path.unlink()
        job = {"run": self.run.to_dict(), "split": settings.split, "identity": self.identity}
        write_json(folder / "job.json", job)
        self.slot = slot
        command = [sys.executable, "-m", "open_mythos.reproduce.worker", str(folder / "job.json")]
        with (folder / "log.txt").open("wb") as log:
            # Standard input is a pipe that nobody writes to: the child sees its end when this process dies.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **environment}
            )

    def note(self) -> str:
        """How far it is, if its trainer says."""
        row = last_record(self.run.home / "metrics.jsonl")
        steps = self.run.sections.get("train", {}).get("steps")
        return f"{self.run}: step {row['step']} of {steps}" if row else f"{self.run}: running"

    def stop(self) -> None:
        """End it, if it runs."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def reproduce(experiments: Sequence[Experiment], settings: Settings, tell: Tell) -> list[Outcome]:
    """Do the runs that are missing, and write the results.

    Args:
        experiments: which; their runs share the cores and GPUs.
        settings: what is asked.
        tell: called with a line now and then.

    Returns:
        What became of each. Their result files are written whenever a run finishes.

    Raises:
        ConfigError: a config is not right, or a run directory holds another run. Nothing has been done then.
    """
    _check_writable("out", settings.out)
    _check_writable("runs", settings.runs)
    outcomes = [Outcome(experiment, all_runs(experiment, settings)) for experiment in experiments]
    jobs = [job for outcome in outcomes for job in _missing(outcome, settings)]
    for outcome in outcomes:
        outcome.write(settings)
    kept = sum(len(outcome.records) for outcome in outcomes)
    if kept:
        tell(f"{_count(kept)} finished before; {len(jobs)} to do")
    pool = _Pool(settings, tell)
    before = signal.signal(signal.SIGTERM, pool.end)
    try:
        if any(job.kind == "cpu" and job.outcome.experiment.CONFIGURED for job in jobs):
            _build_kernels()
        pool.work(jobs)
    finally:
        signal.signal(signal.SIGTERM, before)
    for outcome in outcomes:
        outcome.write(settings)
    return outcomes


def _build_kernels() -> None:
    """Once, where each of many processes would compile them for itself."""
    from open_mythos import kernels

    kernels.status()


def _count(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"


def _missing(outcome: Outcome, settings: Settings) -> list[_Job]:
    """Take the records that are there already; the jobs for the others that are asked for."""
    code = outcome.experiment.code
    records = results.previous(outcome.experiment.name, settings)
    # With the arm, since two arms may have the same config.
    old = {(record.get("arm"), record.get("identity")): record for record in records}
    jobs = []
    for run in outcome.runs:
        identity = run.identity(settings.split, code)
        asked = is_asked(run, outcome.experiment, settings)
        again = asked and (settings.overwrite or settings.remeasure)
        record = None if again else old.get((run.arm, identity)) or _measured(run, identity, settings.split)
        if record is not None:
            outcome.records[run.arm, run.seed] = record
        elif asked:
            _check_folders(run, settings)
            jobs.append(_Job(run, outcome, identity))
    return jobs


def _measured(run: Run, identity: str, split: str) -> Record | None:
    """The record that the run's own process wrote, if it is of the same config."""
    record = read_json(run.folder / f"measured-{split}.json")
    return record if record is not None and record.get("identity") == identity else None


def _check_writable(name: str, folder: Path) -> None:
    """Refuse now a folder that could not take what hours of work have made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} = {str(folder)!r} is not allowed: it must be a folder that can be written")


def _check_folders(run: Run, settings: Settings) -> None:
    """Refuse a run directory, or that of the run it takes its model from, which holds another run."""
    if run.origin is not None:
        _check_folders(run.origin, settings)
    job = read_json(run.folder / "job.json") if run.quick else None
    if job is not None and not job.get("run", {}).get("quick"):
        raise ConfigError(f"{run.folder} holds a real run, which --quick never replaces: name another --runs")
    saved = read_json(run.folder / "run.json")
    if saved is None or (settings.overwrite and run.origin is None):
        return
    if changed := difference(saved.get("config", {}), run.sections):
        ways = "replace it (--overwrite), or name another --runs"
        raise ConfigError(f"{run.folder} holds another run: {changed}; {ways}")


class _Pool:
    """Starts jobs as cores and GPUs come free."""

    def __init__(self, settings: Settings, tell: Tell) -> None:
        self.settings = settings
        self.tell = tell
        self.began = self.spoken = time.monotonic()
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus: list[str] = []
        self.free: dict[str, list[int]] = {}
        self.ended = False

    def end(self, *_: object) -> None:
        """Handle SIGTERM, which would leave the children running: the next look at them ends them and exits.

        To exit here could leave a lock held that waiting for a child takes, if it interrupts a look at that child.
        """
        self.ended = True

    def work(self, jobs: Sequence[_Job]) -> None:
        """All of them, unless the time is over."""
        for kind in sorted({job.kind for job in jobs}):
            if kind == "cuda":
                self.gpus = _visible_gpus()
            slots = self.settings.jobs or (len(self.gpus) if kind == "cuda" else self.cores)
            self.free[kind] = list(range(slots))
        waiting, total, done = list(jobs), len(jobs), 0
        running: list[_Job] = []
        try:
            self._start(waiting, running)
            while running:
                if self.ended:
                    sys.exit(143)
                finished = [job for job in running if job.process and job.process.poll() is not None]
                for job in finished:
                    running.remove(job)
                    self.free[job.kind].append(job.slot)
                    done += 1
                    self._end(job, f"{done} of {total}")
                if finished:
                    self._start(waiting, running)
                else:
                    self._show(running)
                    time.sleep(_POLL_S)
        finally:
            for job in running:
                job.stop()
        if waiting:
            self.tell(f"time is over: {_count(len(waiting))} not started; the same command goes on")

    def _show(self, running: Sequence[_Job]) -> None:
        """A sign of life now and then."""
        if time.monotonic() - self.spoken < _LINE_EVERY_S:
            return
        self.spoken = time.monotonic()
        more = f"; and {len(running) - _SHOWN} more" if len(running) > _SHOWN else ""
        self.tell("; ".join(job.note() for job in running[:_SHOWN]) + more)

    def _late(self, waiting: Sequence[_Job]) -> bool:
        limit = self.settings.time_limit
        return bool(waiting) and limit is not None and time.monotonic() - self.began > limit

    def _start(self, waiting: list[_Job], running: list[_Job]) -> None:
        if self._late(waiting):
            return
        # Two runs that take the model of the same third must not both train it.
        busy = {job.run.home for job in running if not job.run.trained}
        for job in list(waiting):
            slots = self.free[job.kind]
            if not slots or job.run.home in busy:
                continue
            waiting.remove(job)
            slot = slots.pop(0)
            job.start(slot, self.settings, self._environment(job.kind, slot))
            running.append(job)
            if not job.run.trained:
                busy.add(job.run.home)

    def _environment(self, kind: str, slot: int) -> dict[str, str]:
        if kind == "cuda":
            threads = max(1, self.cores // (self.settings.jobs or len(self.gpus)))
            return {
                "CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)],
                "OMP_NUM_THREADS": str(min(8, threads)),
            }
        # One OpenMP thread: with more, the threads of several processes wait for each other by spinning.
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def _end(self, job: _Job, progress: str) -> None:
        """Take what a process left: a record, or its last words."""
        run, outcome = job.run, job.outcome
        job.stop()
        code = job.process.returncode if job.process else 1
        record = _measured(run, job.identity, self.settings.split) if code == 0 else None
        if record is None:
            error = last_line(run.folder / "log.txt") if code >= 0 else f"killed by signal {-code}"
            outcome.failed.append({"arm": run.arm, "seed": run.seed, "error": error})
            words = f"failed ({progress}): {error}; see {run.folder / 'log.txt'}"
        else:
            outcome.records[run.arm, run.seed] = record
            words = f"done in {record['wall_seconds']:.0f} s ({progress})"
        try:
            outcome.write(self.settings)
        except Exception as problem:  # records are safe in the run directories; the last write raises
            words += f"; no result yet: {type(problem).__name__}: {problem}"
        self.tell(f"{run}: {words}")


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that may be used.

    Raises:
        ConfigError: there is none.
    """
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("parallel.device = 'cuda' is not allowed here: torch finds no CUDA device")
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def last_line(path: Path) -> str:
    """The last words of a log, without what they may tell of this machine's folders."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    words = lines[-1] if lines else "no message"
    return words.replace(str(Path.cwd()) + os.sep, "")
