"""What torchrun starts for test_torchrun.py: checks on two processes, then ``mythos`` with a process that dies.

Both at once, since starting processes takes longer than all that they do here.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import cli
from open_mythos.config import ConfigError
from open_mythos.training import optim
from open_mythos.training.checkpoint import CheckpointError
from open_mythos.training.config import load_config
from open_mythos.training.monitor import Monitor
from open_mythos.training.parallel import World, init_world, whole
from open_mythos.training.state import state_tensors
from open_mythos.training.step import Step
from open_mythos.training.trainer import spread, train

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.toml"
EXACT = 1e-10


class Uneven:
    """A stream whose rows ask for different numbers of targets, the first ones for none at all."""

    def __init__(self, data: Any, first: int) -> None:
        self.data, self.first = data, first

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self.data)
        for row, targets in enumerate(batch["targets"]):
            targets[max(0, self.first + row - 4) :] = -100
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()


def stepper(world: World, *overrides: str) -> Step:
    cfg = load_config(SMOKE, [*overrides, "parallel.device=cpu", "model.router_bias_rate=0.1"])
    state, objective, _ = spread(cfg, world)
    state.data = Uneven(state.data, world.rank * cfg.train.batch_size // world.size)
    return Step(cfg, state, objective, world, Monitor(cfg, state.model, world))


def gradients(step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All of every gradient that the optimiser is given in one step, and the step's record."""
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, p in step.state.model.named_parameters():
            if p.grad is not None:
                found[name] = whole(p.grad).clone()

    step.state.optimizer.step = keep  # type: ignore[method-assign]
    row = step(read=True)
    assert row is not None
    return found, row


def gradient_is_that_of_one_process(world: World, *overrides: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        got, row = gradients(stepper(world, *overrides))
        wanted, reference = gradients(stepper(World(), *overrides))
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert value.dtype == torch.float64, name
        assert float((got[name] - value).abs().max()) <= EXACT * max(1.0, float(value.abs().max())), name
    for name in ("loss", "grad_norm", "n_loops"):
        assert math.isclose(row[name], reference[name], rel_tol=1e-6), name
    assert any(float(value.abs().max()) > 1e-3 for value in wanted.values())


def steps_equal_those_of_one_process(world: World, kind: str, tolerance: float) -> None:
    """Three whole updates and a balanced bias; Muon turns in bfloat16, so that only its own rounding may differ."""
    torch.set_default_dtype(torch.float64)
    try:
        few = (f"optim.kind={kind}", "optim.eps=1e-3", "train.balance=20")
        steps = [stepper(w, *few) for w in (world, World())]
        for step in steps:
            for _ in range(3):
                step(read=False)
            before = dict(step.state.model.named_buffers())["recurrent.block.ffn.router_bias"].clone()
            step.balance()
            assert not torch.equal(
                dict(step.state.model.named_buffers())["recurrent.block.ffn.router_bias"], before
            )
    finally:
        torch.set_default_dtype(torch.float32)
    got, wanted = (dict(step.state.model.named_parameters()) for step in steps)
    for name, value in wanted.items():
        assert float((whole(got[name]) - value).abs().max()) <= tolerance, name
    buffers = [dict(step.state.model.named_buffers()) for step in steps]
    for name, value in buffers[1].items():
        if name.endswith("router_bias"):
            assert value.any()
            assert torch.allclose(buffers[0][name], value), name


def one_process_not_finite_skips_on_all(world: World, what: str, kind: str) -> None:
    step = stepper(world, f"optim.kind={kind}")
    plain = step.objective.forward  # the sharded way in
    step(read=False)
    before = {name: whole(v).clone() for name, v in state_tensors(step.state, world.rank).items()}

    step.objective.forward = lambda *args: _poison(plain(*args), world, what)  # type: ignore[method-assign]
    row = step(read=True)
    step.objective.forward = plain  # type: ignore[method-assign]
    assert row is not None
    assert row["skipped"] == 1
    after = state_tensors(step.state, world.rank)
    for name, value in before.items():
        assert "rng" in name or torch.equal(whole(after[name]), value), name
    step(read=False)
    step.check()
    assert (step.state.skips, step.state.skips_in_row, step.state.step) == (1, 0, 3)
    assert all(whole(value).isfinite().all() for value in state_tensors(step.state, world.rank).values())


def _poison(loss: Tensor, world: World, what: str) -> Tensor:
    if world.rank != 1:
        return loss
    return loss * math.nan if what == "loss" else _Bad.apply(loss)


class _Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


def noise_differs_between_processes(world: World) -> None:
    stepper(world)
    drawn = torch.rand(4)
    total = world.sum(drawn)
    assert not torch.allclose(total, drawn * world.size)


def trouble_is_everyones_and_told_once(world: World, folder: Path) -> None:
    cfg = load_config(SMOKE, ["parallel.device=cpu"])
    busy = folder / "busy"
    if world.is_main:
        busy.write_text("a file")
    world.barrier()
    for make, error, words in (
        (lambda: train(cfg, busy), ConfigError, "is a file"),
        (lambda: train(cfg, folder / "none", resume=True), CheckpointError, "holds no checkpoint"),
    ):
        with pytest.raises(error, match=words):
            make()
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit, match="2"):
        cli.main(["train", str(SMOKE), "optim.lr=0"])
    assert ("optim.lr = 0 is not allowed" in told.getvalue()) == world.is_main
    assert world.is_main or not told.getvalue()


def checks(folder: Path) -> None:
    world = init_world("cpu", timeout=120)
    uneven = ("loops.per=sequence", "loops.kind=uniform", "loops.low=1", "loops.high=5")
    every: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "gradient": (gradient_is_that_of_one_process, ("optim.clip=0",)),
        "gradient per sequence": (gradient_is_that_of_one_process, ("optim.clip=0", *uneven)),
        "gradient accumulated": (gradient_is_that_of_one_process, ("optim.clip=0.1", "train.accumulate=2")),
        "adamw": (steps_equal_those_of_one_process, ("adamw", 1e-9)),
        "muon": (steps_equal_those_of_one_process, ("muon", 2e-3)),
        "loss": (one_process_not_finite_skips_on_all, ("loss", "adamw")),
        "gradient norm": (one_process_not_finite_skips_on_all, ("gradient", "muon")),
        "noise": (noise_differs_between_processes, ()),
        "trouble": (trouble_is_everyones_and_told_once, (folder,)),
    }
    results = {}
    for name, (check, args) in every.items():
        try:
            check(world, *args)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    (folder / f"{world.rank}.json").write_text(json.dumps(results))


def dying(rank: int, step: int, args: list[str]) -> None:
    """``mythos`` with these arguments, where this rank is killed in the middle of this step."""
    plain, calls = optim.skip_when, []

    def fatal(*given: Any) -> None:
        calls.append(1)
        if os.environ["RANK"] == str(rank) and len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*given)

    optim.skip_when = fatal
    cli.main(args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        checks(Path(sys.argv[1]))
        dying(1, 4, sys.argv[2:])
    cli.main(sys.argv[2:])
