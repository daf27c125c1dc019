"""For test_world_sizes.py: train, save and resume in worlds of 1, 2 and 4 processes, all forked from this one.

Writes ``results.json``: what each world saw, per pair of world sizes. A process with threads cannot be forked
safely, so start it with OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.training import checkpoint
from open_mythos.training.checkpoint import Checkpointer, CheckpointError
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.monitor import Monitor
from open_mythos.training.parallel import World, init_world, whole
from open_mythos.training.state import TrainState, counters, gather_model, state_tensors
from open_mythos.training.step import Step
from open_mythos.training.trainer import spread
from open_mythos.weights import save_pretrained

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.toml"
SIZES, STEPS = (1, 2, 4), 2
Result = dict[str, Any]


class Watched:
    """A stream that writes down the rows that it hands out."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.rows: list[list[str]] = []

    def __next__(self) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = next(self.data)
        self.rows.append([digest(row) for row in batch["ids"]])
        return batch

    def state_dict(self) -> dict[str, Any]:
        return dict(self.data.state_dict())

    def load_state_dict(self, state: Any) -> None:
        self.data.load_state_dict(state)


def digest(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + flat.numpy().tobytes()).hexdigest()


def digests(state: TrainState, rank: int) -> dict[str, str]:
    """Of every tensor, whole; collective."""
    return {name: digest(whole(value)) for name, value in state_tensors(state, rank).items()}


def config(folder: Path, *overrides: str) -> RunConfig:
    text = (f"data.source={folder / 'text.txt'}", "data.seq_len=16", "model.vocab_size=259", "eval.levels=[]")
    noise = ("model.dropout=0.1", "model.initial_state=random", "loops.kind=poisson", "loops.rate=2")
    return load_config(SMOKE, [*text, *noise, "parallel.device=cpu", "optim.kind=muon", *overrides])


def built(world: World, cfg: RunConfig) -> tuple[TrainState, Step, Watched]:
    state, objective, _ = spread(cfg, world)
    data = state.data = Watched(state.data)
    return state, Step(cfg, state, objective, world, Monitor(cfg, state.model, world)), data


def save(world: World, folder: Path) -> Result:
    """Train, save, and save once more on a disk that is full for the last process."""
    cfg = config(folder)
    state, step, data = built(world, cfg)
    for _ in range(STEPS):
        step(True)
    if world.is_main:  # of the try before
        shutil.rmtree(folder / f"of-{world.size}", ignore_errors=True)
    world.barrier()
    saver = Checkpointer(folder / f"of-{world.size}")
    saver.save(state, cfg.to_dict())
    kept = digests(state, world.rank)
    position = state.data.state_dict()
    saver.wait()
    gathered = gather_model(state.model)
    if gathered is not None:
        save_pretrained(gathered, folder / f"model-{world.size}")
    store = checkpoint._store

    def full(hidden: Path, tensors: dict[str, Tensor], ranks: Any) -> None:
        store(hidden, tensors, ranks)
        if world.rank == world.size - 1:
            raise OSError("No space left on device")

    checkpoint._store = full
    state.step += 1
    saver.save(state, cfg.to_dict())
    try:
        saver.close()
        failure = ""
    except CheckpointError as error:
        failure = str(error)
    state.step -= 1
    found = {"tensors": kept, "position": position, "rows": data.rows, "failure": failure}
    return found | {"counters": {**counters(state), "seconds": 0}}


def resume(source: int) -> Callable[[World, Path], Result]:
    def go_on(world: World, folder: Path) -> Result:
        cfg = config(folder)
        state, step, data = built(world, cfg)
        next(state.data)
        data.rows.clear()
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1)
        torch.manual_seed(99)
        with Checkpointer(folder / f"of-{source}") as loader:
            loader.load(state)
        step = Step(cfg, state, step.objective, world, step.monitor)
        found = digests(state, world.rank)
        position, numbers = state.data.state_dict(), {**counters(state), "seconds": 0}
        records = [step(True) for _ in range(STEPS)]
        losses = [record["loss"] for record in records if record is not None]
        result = {"tensors": found, "position": position, "counters": numbers, "rows": data.rows}
        return result | {"losses": losses, "end": digests(state, world.rank)}

    return go_on


def whole_run(world: World, folder: Path) -> Result:
    _, step, data = built(world, config(folder))
    records = [step(True) for _ in range(2 * STEPS)]
    losses = [record["loss"] for record in records if record is not None]
    return {"rows": data.rows, "losses": losses, "end": digests(step.state, world.rank)}


def in_world(size: int, folder: Path, work: Callable[[World, Path], Result]) -> list[Result]:
    """What ``work`` finds on each rank of a world of forked processes.

    What is tested here raises where it fails. A process that a signal ended has met a fault of the machine, of torch,
    or of our C code: such a world is tried once more, and the test prints what the process left behind.
    """
    codes = forked(size, folder, work)
    if any(code < 0 for code in codes):
        print(f"{work.__name__} in a world of {size} ended with {codes}; tried once more", file=sys.stderr)
        codes = forked(size, folder, work)
    if any(codes):
        raise SystemExit(f"{work.__name__} in a world of {size} ended with {codes}")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def forked(size: int, folder: Path, work: Callable[[World, Path], Result]) -> list[int]:
    """Exit codes of a world; below zero where a signal ended a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            code = 1
            try:
                world = init_world("cpu", timeout=120)
                result = work(world, folder)
                (folder / f"rank-{rank}.json").write_text(json.dumps(result))
                world.close()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # loads torch's compiler once, before the forks
    (folder / "text.txt").write_text("Encode once, think as long as asked, decode once. " * 60)
    os.environ["OPEN_MYTHOS_DATA"] = str(folder / "data")
    results: dict[str, Any] = {"whole": {size: in_world(size, folder, whole_run) for size in SIZES}}
    results["save"] = {size: in_world(size, folder, save) for size in SIZES}
    results["resume"] = {
        f"{source} to {size}": in_world(size, folder, resume(source)) for source in SIZES for size in SIZES
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
