"""What a person sees of a run: a live display on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["Bar", "Lines", "Progress", "Silent", "default_progress", "model_phrases", "speed_phrases"]

_LINES_PER_RUN = 20

Record = Mapping[str, Any]


class Progress(Protocol):
    """Told about each step of a run."""

    def start(self, steps: int, done: int) -> None:
        """A run of ``steps`` begins with ``done`` behind it."""

    def update(self, step: int, row: Record | None) -> None:
        """Step ``step`` is done; ``row`` is its record in metrics.jsonl, if it has one."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


def model_phrases(row: Record) -> list[str]:
    """How the model does, each measure in a few letters; what a record does not have is left out."""
    found = [f"loss {_number(row.get('loss'), '.4f')}"]
    if "grad_norm" in row:
        found.append(f"grad {_number(row['grad_norm'], '.3g')}")
    if "rho" in row:
        found.append(f"ρ(A) {_number(row['rho'], '.4f')}")
    if "n_loops" in row:
        found.append(f"{row['n_loops']:g} loops")
    if "halting_depth" in row:
        found.append(f"depth {_number(row['halting_depth'], '.1f')}")
    if row.get("expert_balance") is not None:
        found.append(f"experts {row['expert_balance']:.2f}")
    return found


def speed_phrases(row: Record) -> list[str]:
    """How fast it goes and what it holds."""
    found = []
    if "tokens_per_s" in row:
        found.append(f"{_count(row['tokens_per_s'])} tokens/s")
    if row.get("mfu") is not None:
        found.append(f"MFU {100 * row['mfu']:.1f} %")
    if row.get("memory_peak") is not None:
        used = row["memory_peak"] if row.get("memory") is None else row["memory"]
        found.append(f"{used / 1e9:.1f} GB, peak {row['memory_peak'] / 1e9:.1f}")
    if "lr" in row:
        found.append(f"lr {row['lr']:.1e}")
    if row.get("skipped"):
        found.append(f"{row['skipped']} skipped")
    return found


class Silent:
    """Says nothing."""

    def start(self, steps: int, done: int) -> None:
        """Nothing."""

    def update(self, step: int, row: Record | None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """About twenty plain lines a run on standard error; for logs and pipes.

    An alarm is told at once, and again when it comes back after it was quiet for two lines' time.
    """

    def __init__(self) -> None:
        self.steps, self.every, self.last = 0, 1, 0
        self.heard: dict[str, int] = {}

    def start(self, steps: int, done: int) -> None:
        """Decide how often to speak."""
        self.steps, self.every, self.last = steps, max(1, steps // _LINES_PER_RUN), done
        self.done, self.began = done, time.monotonic()

    def update(self, step: int, row: Record | None) -> None:
        """One line, if it is time and there is something to tell."""
        if row is None:
            return
        alarms = row.get("alarms", ())
        fresh = [
            name for name in alarms if step - self.heard.get(name, step - 2 * self.every) >= 2 * self.every
        ]
        self.heard |= dict.fromkeys(alarms, step)
        if fresh:
            print(f"step {step}: out of range: {', '.join(fresh)}", file=sys.stderr, flush=True)
        if step - self.last >= self.every or step == self.steps:
            self.last = step
            phrases = [
                f"step {step}/{self.steps}",
                *model_phrases(row),
                *speed_phrases(row),
                *self._left(step),
            ]
            print("  ".join(phrases), file=sys.stderr, flush=True)

    def _left(self, step: int) -> list[str]:
        seconds = (time.monotonic() - self.began) * (self.steps - step) / max(1, step - self.done)
        whole = round(seconds)
        return [f"ETA {whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"] if step < self.steps else []

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A live display by rich on standard error: a bar, and below it the last record; fits 80 columns.

    Args:
        console: a rich console; standard error by default.
    """

    def __init__(self, console: Any = None) -> None:
        from rich import progress
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self.text = Text
        columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "ETA")
        self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(compact=True))
        self.live = Live(self.bar, console=Console(stderr=True) if console is None else console)

    def start(self, steps: int, done: int) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("training", total=steps, completed=done)
        self.live.start()

    def update(self, step: int, row: Record | None) -> None:
        """Move the bar, and renew what stands below it when there is a record."""
        self.bar.update(self.task, completed=step)
        if row is not None:
            self.live.update(self._group(row))

    def _group(self, row: Record) -> Any:
        from rich.console import Group

        def line(text: str, style: str = "") -> Any:
            return self.text(text, style=style, no_wrap=True, overflow="ellipsis")

        below = [line("  ".join(model_phrases(row))), line("  ".join(speed_phrases(row)), "dim")]
        if row.get("alarms"):
            below.append(line(f"out of range: {', '.join(row['alarms'])}", "yellow"))
        return Group(self.bar, *below)

    def close(self) -> None:
        """Leave the display as it stands."""
        self.live.stop()


def default_progress(quiet: bool = False) -> Progress:
    """A live display on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


def _number(value: float | None, form: str) -> str:
    """A number, or what a record's null stands for."""
    return "not finite" if value is None else format(value, form)


def _count(value: float) -> str:
    """Three digits and a suffix: 241,300 → 241k."""
    for suffix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.0f}{suffix}" if value >= 99.5 or not suffix else f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}G"
