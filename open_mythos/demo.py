"""The demo: two trainings side by side, two sweeps over loops, one report.

Each training is a `mythos` process with one CPU thread of its own. Small models gain little from a second
thread, so two runs on two cores take about as long as one, and the numbers do not depend on the number of
cores. Progress is read from the run directories.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from open_mythos.config import ConfigError
from open_mythos.training.config import load_config

__all__ = ["DemoError", "run"]

_RUNS = ("parity", "lm")
_POLL_S = 0.5
_LINE_EVERY_S = 20.0


class DemoError(RuntimeError):
    """A step of the demo failed; the message is that step's last words."""


@dataclass
class _Job:
    """One training and its sweep, run one after the other in processes of their own."""

    name: str
    out: Path
    steps: int
    commands: list[list[str]]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    stage: str = ""
    began: float = field(default_factory=time.monotonic)

    def advance(self) -> bool:
        """Start the next command when the last has ended well; False when there is none left."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            if code != 0:
                raise DemoError(f"{self.stage} of {self.name} failed: {_last_line(self.log)}")
            self.process = None
        if not self.commands:
            return False
        command = self.commands.pop(0)
        self.stage = command[0]
        with self.log.open("ab") as log:
            full = [sys.executable, "-m", "open_mythos.cli", *command]
            self.process = subprocess.Popen(full, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return True

    def note(self) -> tuple[int, str]:
        """Steps done, and what is going on."""
        row = _last_record(self.out / "metrics.jsonl")
        step = int(row.get("step", 0))
        text = f"loss {row['loss']:.3f}" if row else "starting"
        return step, text if self.stage == "train" else "more loops than trained"


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
    try:
        _watch(jobs, console)
        report = out / "report.html"
        folders = [str(job.out) for job in jobs]
        last = _Job("the report", out, 0, [["report", *folders, "--out", str(report)]], out / "report.log")
        last.log.unlink(missing_ok=True)
        while last.advance():
            time.sleep(0.1)
    finally:
        for job in jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
                job.process.wait()
    console.print(f"Done in {(time.monotonic() - began) / 60:.1f} minutes.")
    return report


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
    steps = load_config(path, overrides).train.steps
    folder, log = out / name, out / f"{name}.log"
    log.unlink(missing_ok=True)
    train = ["train", str(path), *overrides, "--out", str(folder), "--overwrite"]
    return _Job(name, folder, steps, [train, ["eval", str(folder)]], log)


def _watch(jobs: list[_Job], console: Console) -> None:
    """Drive the jobs to their end: two bars on a terminal, a line now and then elsewhere."""
    columns = (TextColumn("{task.description:<7}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(
        *columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal
    )
    spoken = time.monotonic()
    with bars:
        tasks = [bars.add_task(job.name, total=job.steps, note="") for job in jobs]
        running = True
        while running:
            states = [job.advance() for job in jobs]  # each job, not only up to the first that runs
            running = any(states)
            speak = not console.is_terminal and time.monotonic() - spoken >= _LINE_EVERY_S
            for job, task in zip(jobs, tasks, strict=True):
                step, note = job.note()
                bars.update(task, completed=step, note=note if job.process else "done")
                if speak:
                    console.print(f"{job.name}: step {step}/{job.steps}  {note if job.process else 'done'}")
            if speak:
                spoken = time.monotonic()
            time.sleep(_POLL_S if running else 0)


def _last_record(path: Path) -> dict[str, float]:
    """The newest whole record of a metrics file, or nothing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            record: dict[str, float] = json.loads(line)
            return record
        except json.JSONDecodeError:
            continue
    return {}


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no message"
