"""Kill ``mythos train`` at random moments and resume it, again and again; every resume must be exact.

One run is never killed; all its checkpoints are kept. Other runs of the same config are killed with
SIGKILL, many of them inside a save, and resumed until they finish. After each kill the newest checkpoint must
be whole, and every checkpoint and every finished run must equal the run that was never killed, bit for bit:
loss of each step, parameters, optimiser, random generators, position in the data.

To repeat, which takes minutes, by how busy the machine is::

    .venv/bin/python benchmarks/kill_resume.py --kills 200

The result goes to docs/results/kill_resume.json and .md. The exit code is 0 if nothing went wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

# ruff: noqa: E402
# Before NumPy and torch are imported: a process with threads cannot be forked safely.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import torch
from safetensors.torch import load_file

from open_mythos import cli
from open_mythos.training import manifest, trainer  # noqa: F401 (loaded once, before the forks)
from open_mythos.training.checkpoint import CheckpointError, find_checkpoint

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 20, 2
# Everything random is in it: dropout, random first states, drawn loop counts, shuffled text read ahead.
CONFIG = [
    *("data.source={text}", "data.seq_len=16", "model.vocab_size=259", "eval.levels=[]"),
    *("model.dropout=0.1", "model.initial_state=random", "loops.kind=poisson", "loops.rate=2"),
    *(f"train.steps={STEPS}", f"train.save_every={EVERY}", "train.log_every=1", "train.threads=1"),
]
TIMING = ("seconds", "tokens_per_s", "mfu", "memory", "memory_peak")
LONGEST = 120.0  # seconds of one process


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    inside: int = 0
    before_first: int = 0
    resumes: int = 0
    finished: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    steps: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """The run that was never killed."""

    tensors: dict[int, dict[str, str]]
    meta: dict[int, dict[str, Any]]
    rows: list[dict[str, Any]]
    model: dict[str, torch.Tensor]
    seconds: float


class Trial:
    """Trains at toy size in forked processes, which share the imports of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = folder / "text.txt"
        text.write_text("Encode once, think as long as asked, decode once. " * 60)
        self.config = [part.format(text=text) for part in CONFIG]
        torch.optim.AdamW([torch.zeros(1)])  # loads torch's compiler, which takes longer than a toy run

    def start(self, out: Path, *overrides: str) -> int:
        """``mythos train``, resuming if there is a run already; the process's id."""
        args = ["train", str(ROOT / "configs" / "smoke.toml"), *self.config, *overrides]
        args += ["--out", str(out), "--quiet"]
        args += ["--resume"] if (out / "run.json").exists() else []
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            with Path(f"{out}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ["OPEN_MYTHOS_DATA"] = f"{out}.data"
            cli.main(args)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reference(self) -> Reference:
        """Train without a kill."""
        out, began = self.folder / "reference", time.monotonic()
        code = wait(self.start(out, f"checkpoint.keep={STEPS}"), LONGEST)
        if code != 0:
            raise SystemExit(f"the run without kills ended with {code}: {log_of(out)}")
        held = {manifest.number(path): path for path in steps_on_disk(out)}
        return Reference(
            {step: tensors(path) for step, path in held.items()},
            {step: timeless(json.loads((path / "state.json").read_text())) for step, path in held.items()},
            rows(out),
            load_file(out / "model" / "model.safetensors"),
            time.monotonic() - began,
        )


def kill_one(trial: Trial, out: Path, reference: Reference, chance: random.Random, tally: Tally) -> bool:
    """Start or resume the run and kill it; whether it is still to be finished.

    The moment is drawn in steps, so that it does not depend on how fast this machine is just now: in the save
    after some step, or a little after some step, or, once in ten, while the process starts.
    """
    held = steps_on_disk(out)
    done = manifest.number(held[0]) if held else 0
    overrides = [f"checkpoint.asynchronous={str(chance.random() < 0.5).lower()}"]
    process = trial.start(out, *overrides)
    tally.resumes += bool(held)
    target, way, wait_a_little = done + chance.randint(1, 3 * EVERY), chance.random(), chance.random()
    if way < 0.1:
        ended = wait_until(process, time.monotonic() + wait_a_little * reference.seconds / 3)
    else:
        ended = until(process, lambda: (saving if way < 0.6 else logged)(out) >= target)
        if ended is None:
            ended = wait_until(process, time.monotonic() + wait_a_little * reference.seconds / STEPS / 2)
    if ended is None:
        os.kill(process, signal.SIGKILL)
        ended = wait(process, LONGEST)
    if ended != -signal.SIGKILL:  # it came to its end before
        compare_end(out, ended, reference, tally)
        return False
    tally.kills += 1
    left = {path.name.partition("-")[0].removeprefix(".") for path in hidden(out / "checkpoints")}
    tally.inside += "saving" in left
    tally.kinds[" and ".join(sorted(left)) or "nothing"] += 1
    compare_newest(out, reference, tally)
    return True


def compare_newest(out: Path, reference: Reference, tally: Tally) -> None:
    """The newest checkpoint after a kill: whole, and that of the run without kills."""
    held = steps_on_disk(out)
    if not held:
        tally.before_first += 1
        return
    try:
        found = find_checkpoint(out / "checkpoints")
    except CheckpointError as error:
        tally.faults.append(f"kill {tally.kills}: unusable: {error}")
        return
    step = found.step
    tally.steps.add(step)
    if found.path != held[0]:
        tally.faults.append(f"kill {tally.kills}: the newest checkpoint {held[0].name} is damaged")
    now, then = tensors(found.path), reference.tensors[step]
    if now != then:
        names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        tally.faults.append(f"kill {tally.kills}: {len(names)} tensors of step {step} differ: {names[:4]}")
    if timeless(found.meta) != reference.meta[step]:
        tally.faults.append(f"kill {tally.kills}: counters, data or config of step {step} differ")


def compare_end(out: Path, code: int, reference: Reference, tally: Tally) -> None:
    """A run that came to its end: its losses, its last checkpoint and its model."""
    tally.finished += 1
    if code != 0:
        tally.faults.append(f"run {out.name} ended with {code}: {log_of(out)}")
        return
    compare_newest(out, reference, tally)
    nothing: dict[str, Any] = {}
    differing = {
        key
        for mine, other in zip_longest(rows(out), reference.rows, fillvalue=nothing)
        for key in mine.keys() | other.keys()
        if mine.get(key) != other.get(key)
    }
    if differing:
        tally.faults.append(f"run {out.name}: the records of its steps differ in {sorted(differing)}")
    model = load_file(out / "model" / "model.safetensors")
    same = model.keys() == reference.model.keys()
    if not same or not all(torch.equal(value, reference.model[name]) for name, value in model.items()):
        tally.faults.append(f"run {out.name}: the model differs")


def saving(out: Path) -> int:
    """The step whose save is under way, or 0."""
    names = [path.name.rpartition("-")[2] for path in hidden(out / "checkpoints") if "saving" in path.name]
    return max(map(int, names), default=0)


def logged(out: Path) -> int:
    """The last step in the records."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(process: int, reached: Callable[[], bool]) -> int | None:
    """Wait for that; the exit code if the process ends before."""
    limit = time.monotonic() + LONGEST
    while not reached() and time.monotonic() < limit:
        if (code := wait_until(process, 0)) is not None:
            return code
        time.sleep(0.0003)
    return None


def wait_until(process: int, moment: float) -> int | None:
    """Sleep till then; the exit code if the process ends before."""
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= moment:
            return None
        time.sleep(0.001)


def wait(process: int, seconds: float) -> int:
    """The exit code; a process that takes longer is killed."""
    code = wait_until(process, time.monotonic() + seconds)
    if code is None:
        os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code


def hidden(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(".")]
    except FileNotFoundError:
        return []


def steps_on_disk(out: Path) -> list[Path]:
    return manifest.steps(out / "checkpoints")


def tensors(path: Path) -> dict[str, str]:
    """Hash of each tensor. Not of the files: safetensors writes its header in no fixed order."""
    held = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name: digest(value) for name, value in held.items()}


def digest(value: torch.Tensor) -> str:
    whole = (
        f"{value.dtype} {tuple(value.shape)}".encode()
        + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )
    return hashlib.sha256(whole).hexdigest()


def timeless(meta: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock decides, and without how checkpoints are kept."""
    config = {name: section for name, section in meta["config"].items() if name != "checkpoint"}
    return {**meta, "config": config, "counters": {**meta["counters"], "seconds": 0}}


def rows(out: Path) -> list[dict[str, Any]]:
    held = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in held]


def log_of(out: Path) -> str:
    return " ".join(Path(f"{out}.log").read_text().split())[-300:]


def run(kills: int, seed: int, limit: float) -> dict[str, Any]:
    """Kill until ``kills`` is reached, a fault is found, or the time is up."""
    began, tally, chance, count = time.monotonic(), Tally(), random.Random(seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        trial = Trial(Path(temporary))
        reference = trial.reference()
        while tally.kills < kills and not tally.faults and time.monotonic() - began < limit:
            out, count = trial.folder / f"run-{count}", count + 1
            while kill_one(trial, out, reference, chance, tally) and not tally.faults:
                if tally.kills >= kills or time.monotonic() - began > limit:
                    break
            if tally.kills >= kills and not tally.faults and (out / "checkpoints").is_dir():
                code = wait(trial.start(out), LONGEST)  # the last kill is resumed to the end as well
                compare_end(out, code, reference, tally)
            for path in trial.folder.glob(f"{out.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if tally.kills < kills and not tally.faults:
        tally.faults.append(f"only {tally.kills} of {kills} kills in {limit:.0f} s")
    if tally.inside < 0.3 * tally.kills:
        tally.faults.append(f"only {tally.inside} of {tally.kills} kills were inside a save")
    record = asdict(tally) | {"steps": len(tally.steps), "kinds": dict(sorted(tally.kinds.items()))}
    return record | {"seed": seed, "seconds": round(time.monotonic() - began, 1)}


def report(record: dict[str, Any]) -> str:
    kinds = "\n".join(f"| {name} | {count} |" for name, count in record["kinds"].items())
    faults = "\n".join(f"- {fault}" for fault in record["faults"]) or "None."
    return f"""# Kills and resumes

`{record["command"]}`
(torch {record["versions"]["torch"]}, Python {record["versions"]["python"]}, {record["seconds"]} s)

A toy run of `mythos train` of {STEPS} steps that saves after every {EVERY}, killed with SIGKILL and resumed until it
finishes, then the next. What is compared with a run that was never killed, bit for bit: the tensors of the newest
checkpoint after every kill (parameters, optimiser, random generators), its counters and position in the data, and of
every finished run the record of each step and the model.

| | |
|---|---|
| kills | {record["kills"]} |
| inside a save (its hidden folder was there after the death) | {record["inside"]} |
| before the first checkpoint | {record["before_first"]} |
| resumes | {record["resumes"]} |
| runs finished | {record["finished"]} |
| different steps that a kill went back to | {record["steps"]} |

| hidden folders that the kill left | kills |
|---|---|
{kinds}

Differences and unusable directories:

{faults}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which to give up")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = run(options.kills, options.seed, options.limit)
    record["command"] = f"python benchmarks/kill_resume.py --kills {options.kills} --seed {options.seed}"
    record["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kill_resume.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "kill_resume.md").write_text(report(record))
    print(json.dumps(record))
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
