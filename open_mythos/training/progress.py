"""What a person sees of a run: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
from typing import Any, Protocol

__all__ = ["Bar", "Lines", "Progress", "Silent", "default_progress"]

_LINES_PER_RUN = 20


class Progress(Protocol):
    """Told about each logged step of a run."""

    def start(self, steps: int, done: int) -> None:
        """A run of ``steps`` begins with ``done`` behind it."""

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Step ``step`` is done; ``row`` is its record in metrics.jsonl, if it has one."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


def describe(row: dict[str, Any]) -> str:
    """A record in one short phrase."""
    return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"


class Silent:
    """Says nothing."""

    def start(self, steps: int, done: int) -> None:
        """Nothing."""

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """About twenty plain lines a run on standard error; for logs and pipes."""

    def __init__(self) -> None:
        self.steps, self.every, self.last = 0, 1, 0

    def start(self, steps: int, done: int) -> None:
        """Decide how often to speak."""
        self.steps, self.every, self.last = steps, max(1, steps // _LINES_PER_RUN), done

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """One line, if it is time and there is something to tell."""
        if row is not None and (step - self.last >= self.every or step == self.steps):
            self.last = step
            print(f"step {step}/{self.steps}  {describe(row)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A rich progress bar on standard error."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn())
        rest = (progress.TimeRemainingColumn(), "{task.fields[note]}")
        self.bar = progress.Progress(*columns, *rest, console=Console(stderr=True))

    def start(self, steps: int, done: int) -> None:
        """Show the bar."""
        self.bar.start()
        self.task = self.bar.add_task("training", total=steps, completed=done, note="")

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Move the bar, and its note when there is a record."""
        self.bar.update(self.task, completed=step)
        if row is not None:
            self.bar.update(self.task, note=describe(row))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()


def default_progress(quiet: bool = False) -> Progress:
    """A bar on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
