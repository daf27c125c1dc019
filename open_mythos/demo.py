"""The demo: two trainings side by side, two sweeps over loops, one report.

Each training is a `mythos` process with one CPU thread of its own. Small models gain little from a second
thread, so two runs on two cores take about as long as one, and the numbers do not depend on the number of
cores. Progress is read from the run directories.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from open_mythos.config import ConfigError
from open_mythos.training.config import load_config
from open_mythos.training.metricsfile import last_record

__all__ = ["DemoError", "run"]

_RUNS = ("parity", "lm")
_POLL_S = 0.5
_LINE_EVERY_S = 20.0


class DemoError(RuntimeError):
    """A step of the demo failed; the message is that step's last words."""


@dataclass
class _Job:
    """One `mythos` command in a process of its own."""

    name: str
    out: Path
    steps: int
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, its output going to the log."""
        # One OpenMP thread: with more, the threads of several processes wait for each other by spinning.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        full = [sys.executable, "-m", "open_mythos.cli", *self.command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                full, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def running(self) -> bool:
        """Whether it still runs.

        Raises:
            DemoError: it has failed.
        """
        code = None if self.process is None else self.process.poll()
        if code:
            raise DemoError(f"{self.name} failed: {_last_line(self.log)}")
        return code is None

    def stop(self) -> None:
        """End it if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def note(self) -> tuple[int, str]:
        """Steps done, and what is going on."""
        row = last_record(self.out / "metrics.jsonl")
        step = int(row.get("step", 0))
        if (self.out / "eval.json").exists():
            return step, "done"
        if step == self.steps:
            return step, "trying more loops than trained"
        return step, f"loss {row['loss']:.3f}" if row else "starting"


def run(out: Path, overrides: Sequence[str] = ()) -> Path:
    """Train, sweep and report into ``out``.

    Args:
        out: receives ``parity/``, ``lm/`` (run directories, replaced if there) and ``report.html``.
        overrides: section.key=value for both runs.

    Returns:
        The path of the report.

    Raises:
        ConfigError: the demo's configs are not there, or an override is not allowed.
        DemoError: a run failed.
    """
    began = time.monotonic()
    console = Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [_job(name, out, overrides) for name in _RUNS]
    console.print(
        f"Training side by side, into {out}: cumulative parity, and the bytes of Python's own text."
    )
    report = out / "report.html"
    last = _Job("report", out, 0, _report_command(jobs, report), out / "report.log")
    ended: list[int] = []
    # A plain kill, such as that of `timeout`, would leave the trainings running. The handler only notes it: to exit
    # from there could leave a lock held that waiting for a child takes.
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        for job in jobs:
            job.start()
        _watch(jobs, console, ended)
        last.start()
        while last.running():
            _pause(ended)
    finally:
        for job in (*jobs, last):
            job.stop()
        signal.signal(signal.SIGTERM, before)
    console.print(f"Done in {(time.monotonic() - began) / 60:.1f} minutes.")
    return report


def _pause(ended: Sequence[int]) -> None:
    if ended:
        sys.exit(128 + ended[0])
    time.sleep(_POLL_S)


def configs_folder() -> Path:
    """Where the demo's configs are: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        ConfigError: they are in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        if all((folder / f"demo-{name}.toml").is_file() for name in _RUNS):
            return folder
    raise ConfigError(
        "the demo's configs are not installed: run `mythos demo` from a checkout of the repository"
    )


def _job(name: str, out: Path, overrides: Sequence[str]) -> _Job:
    path = configs_folder() / f"demo-{name}.toml"
    config = load_config(path, overrides)
    if config.data.is_task:
        config.data.task()  # refused before the other run begins
    folder, log = out / name, out / f"{name}.log"
    for stale in ("metrics.jsonl", "eval.json"):
        (folder / stale).unlink(missing_ok=True)  # progress is read from these
    train = ["train", str(path), *overrides, "--out", str(folder), "--overwrite", "--eval"]
    return _Job(name, folder, config.train.steps, train, log)


def _report_command(jobs: Sequence[_Job], report: Path) -> list[str]:
    return ["report", *(str(job.out) for job in jobs), "--out", str(report)]


def _watch(jobs: list[_Job], console: Console, ended: Sequence[int]) -> None:
    """Drive the jobs to their end: two bars on a terminal, a line now and then elsewhere."""
    columns = (TextColumn("{task.description:<7}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(
        *columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal
    )
    spoken = time.monotonic()
    with bars:
        tasks = [bars.add_task(job.name, total=job.steps, note="") for job in jobs]
        while True:
            running = [job.running() for job in jobs]
            notes = [job.note() for job in jobs]
            for task, (step, note) in zip(tasks, notes, strict=True):
                bars.update(task, completed=step, note=note)
            if not console.is_terminal and time.monotonic() - spoken >= _LINE_EVERY_S:
                spoken = time.monotonic()
                for job, (step, note) in zip(jobs, notes, strict=True):
                    console.print(f"{job.name}: step {step}/{job.steps}  {note}")
            if not any(running):
                return
            _pause(ended)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].removeprefix("mythos: error: ") if lines else "no message"
