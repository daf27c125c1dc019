"""Where a run's records go: metrics.jsonl always, and TensorBoard, W&B or trackio by choice.

The third parties are imported when they are asked for. What they keep lies under ``trackers/`` in the run
directory, but for trackio's, which keeps its own place.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from open_mythos.config import ConfigError
from open_mythos.training.config import RunConfig

__all__ = ["JsonLines", "Tracker", "Trackers", "check_trackers", "flatten", "open_trackers"]

Record = Mapping[str, Any]

# Tracker → its module, imported. The pip extra has the tracker's name.
_MODULES: dict[str, Callable[[], Any]] = {
    "tensorboard": lambda: importlib.import_module("torch.utils.tensorboard"),
    "trackio": lambda: importlib.import_module("trackio"),
    "wandb": lambda: importlib.import_module("wandb"),
}


class Tracker(Protocol):
    """Takes the records of a run."""

    def log(self, record: Record) -> None:
        """One record, as metrics.jsonl holds it; ``record["step"]`` is its step."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


class JsonLines:
    """metrics.jsonl: one record a line, each line written at once, so that a reader never sees half of one.

    Args:
        path: made if absent. Records of steps after ``step`` are dropped, and so is a line cut off by a crash:
            a resumed run does those steps again.
        step: the step that the run goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(part, path)
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND)

    def log(self, record: Record) -> None:
        """Append one line, by one write.

        Raises:
            ValueError: the record holds a number that is not finite.
            OSError: the line could not be written.
        """
        if self._file is None:
            raise ValueError("metrics.jsonl is closed")
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise OSError(f"metrics.jsonl took only a part of the record of step {record.get('step')}")

    def close(self) -> None:
        """Close the file; more than once is fine."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _TensorBoard:
    """Event files in ``folder``; records after ``step`` are hidden, as they will come again."""

    def __init__(self, module: Any, config: RunConfig, folder: Path, name: str, step: int) -> None:
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", f"```json\n{json.dumps(config.to_dict(), indent=2)}\n```", step)

    def log(self, record: Record) -> None:
        step = record["step"]
        for name, value in flatten(record).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """A W&B run: in ``folder`` until ``wandb sync`` sends it, or sent as it goes with ``log.online``."""

    def __init__(self, module: Any, config: RunConfig, folder: Path, name: str, step: int) -> None:
        mark = folder / "wandb-id"
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        self.run = module.init(
            project=config.log.project,
            name=name,
            id=mark.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            mode="online" if config.log.online else "offline",
            config=config.to_dict(),
        )

    def log(self, record: Record) -> None:
        self.run.log(flatten(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A trackio run: a local database, shown by ``trackio show``."""

    def __init__(self, module: Any, config: RunConfig, folder: Path, name: str, step: int) -> None:
        self.module = module
        module.init(project=config.log.project, name=name, resume="allow", config=config.to_dict())

    def log(self, record: Record) -> None:
        self.module.log(flatten(record), step=record["step"])

    def close(self) -> None:
        self.module.finish()


_KINDS: dict[str, Callable[[Any, RunConfig, Path, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


class Trackers:
    """All trackers of a run as one; a context manager.

    metrics.jsonl is the record of a run, so a failure to write it ends the run. A tracker by choice that fails
    (its server, its disk) is said once on standard error and then left out.

    Args:
        lines: metrics.jsonl; None on ranks other than 0, which log nothing.
        chosen: name → tracker.
    """

    def __init__(self, lines: JsonLines | None, chosen: Mapping[str, Tracker]) -> None:
        self.lines = lines
        self.chosen = dict(chosen)

    def log(self, record: Record) -> None:
        """Hand the record to each."""
        if self.lines is not None:
            self.lines.log(record)
        for name, tracker in list(self.chosen.items()):
            try:
                tracker.log(record)
            except Exception as error:
                _give_up(name, error)
                del self.chosen[name]

    def close(self) -> None:
        """Close each; more than once is fine."""
        for name, tracker in self.chosen.items():
            try:
                tracker.close()
            except Exception as error:
                _give_up(name, error)
        self.chosen.clear()
        if self.lines is not None:
            self.lines.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_trackers(names: Iterable[str]) -> dict[str, Any]:
    """The modules of these trackers, imported: name → module.

    Raises:
        ConfigError: one is not installed; the message names the pip extra.
    """
    modules = {}
    for name in names:
        try:
            modules[name] = _MODULES[name]()
        except ImportError as error:
            raise ConfigError(
                f"log.trackers = {name!r} is not allowed: it is not installed ({error}); "
                f"run pip install 'open-mythos[{name}]', or leave it out"
            ) from error
    return modules


def open_trackers(config: RunConfig, out: Path, *, step: int = 0, rank: int = 0) -> Trackers:
    """metrics.jsonl in ``out``, and the trackers that [log] names.

    Args:
        config: the run's config.
        out: the run directory, which is there; its name is the run's name.
        step: the step that the run goes on from.
        rank: of this process; all but rank 0 get trackers that do nothing.

    Raises:
        ConfigError: a tracker is not installed, or cannot start.
    """
    if rank != 0:
        return Trackers(None, {})
    modules = check_trackers(config.log.trackers)
    chosen: dict[str, Tracker] = {}
    for name, module in modules.items():
        folder = out / "trackers"
        folder.mkdir(exist_ok=True)
        try:
            chosen[name] = _KINDS[name](module, config, folder, out.resolve().name, step)
        except Exception as error:
            for other in chosen.values():
                other.close()
            raise ConfigError(f"log.trackers = {name!r} cannot start: {error}") from error
    return Trackers(JsonLines(out / "metrics.jsonl", step), chosen)


def flatten(record: Record) -> dict[str, float]:
    """The numbers of a record under slash-separated names, for trackers that know only numbers.

    A list by loop gives its entries at loops 1, 2, 4, 8 ... and the last: a run with many loops would draw
    hundreds of curves. Shares of single experts are left out; their least, largest and balance are there.

    Example:
        >>> flatten({"step": 3, "loss": 0.5, "grad_norms": {"core": 1.0}, "state_norm": [2.0, 3.0, 4.0]})
        {'loss': 0.5, 'grad_norms/core': 1.0, 'state_norm/loop_1': 2.0, 'state_norm/loop_2': 3.0,
         'state_norm/last': 4.0}
    """
    return {
        name: float(value)
        for name, value in _leaves(record)
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _leaves(record: Record) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if name in ("step", "expert_share"):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", part) for key, part in value.items())
        elif isinstance(value, list):
            for loop, part in enumerate(value, 1):
                if loop & (loop - 1) == 0:
                    yield f"{name}/loop_{loop}", part
            if value:
                yield f"{name}/last", value[-1]
        else:
            yield name, value


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off in the middle of a write


def _give_up(name: str, error: Exception) -> None:
    what = re.sub(r"\s+", " ", str(error)) or type(error).__name__
    print(f"{name} failed and gets no further records: {what}", file=sys.stderr, flush=True)
