"""One run in a process of its own: ``python -m open_mythos.reproduce.worker JOB.json``; the runner starts it."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from open_mythos import __version__
from open_mythos.reproduce.base import load
from open_mythos.reproduce.runs import Run, read_json, write_json

__all__ = ["code_version", "main", "work"]


def main(path: Path) -> int:
    """Do the job, and return the exit code; the last line of an error says what it was."""
    try:
        work(path)
    except Exception as error:
        traceback.print_exc()
        print(" ".join(f"{type(error).__name__}: {error}".split()), file=sys.stderr, flush=True)
        return 1
    return 0


def work(path: Path) -> None:
    """Perform the run of a job file, and write what was measured beside it."""
    job = read_json(path)
    if job is None:
        raise FileNotFoundError(f"{path} is not there")
    run, split, code = Run.from_dict(job["run"]), job["split"], code_version()
    experiment = load(run.source)
    if experiment.CONFIGURED:
        _prepare(run)
    began = time.perf_counter()
    measured = _finite(experiment.perform(run, split))
    trained = run.record
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "identity": job["identity"],
        "measured": measured,
        **{key: trained.get(key) for key in ("parameters", "tokens", "steps", "seconds", "loops")},
        "wall_seconds": round(time.perf_counter() - began, 3),
        "device": _device(run),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),  # whose own text some experiments train on
        "open_mythos": code,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_json(run.folder / f"measured-{split}.json", record)


def code_version(package: Path = Path(__file__).parents[1]) -> str:
    """The package's version, and of a checkout the commit: "1.2.0+gabc1234", with ".dirty" if its files are others."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        # Without a lock: somebody may be committing meanwhile.
        asked = ["git", "-C", str(package), "--no-optional-locks", *words]
        return subprocess.run(asked, capture_output=True, text=True, timeout=60)

    try:
        # A package that was installed into somebody's repository is not part of it.
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return __version__
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        dirty = git("diff", "--quiet", "HEAD", "--", ".").returncode
    except (OSError, subprocess.SubprocessError):  # no git
        return __version__
    return f"{__version__}+g{commit}{'.dirty' if dirty else ''}"


def _prepare(run: Run) -> None:
    import torch

    if run.device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(run.seed)


def _device(run: Run) -> str:
    if run.sections.get("parallel", {}).get("device") != "cuda":
        return "CPU"
    import torch

    return torch.cuda.get_device_name()


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _end_with_parent() -> None:
    """Whoever started this holds the other end of standard input: when it dies, so does this."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(Path(sys.argv[1])))
