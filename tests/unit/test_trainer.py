"""A step that is not finite changes nothing; gradients are means; a run goes on from wherever it was broken off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_mythos.config import ConfigError
from open_mythos.model import MoEFFN
from open_mythos.reproduce.experts import watch
from open_mythos.training import optim
from open_mythos.training.checkpoint import CheckpointError, find_checkpoint
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.loops import LoopPlan
from open_mythos.training.monitor import Monitor
from open_mythos.training.objective import Objective, loss
from open_mythos.training.parallel import World
from open_mythos.training.sources import evaluation_batches
from open_mythos.training.state import state_tensors
from open_mythos.training.step import Step, TrainingError
from open_mythos.training.trainer import spread, train
from open_mythos.weights import from_pretrained


def config(root: Path, *overrides: str) -> RunConfig:
    few = ("train.save_every=0", "train.log_every=1")
    return load_config(root / "configs" / "smoke.toml", [*few, *overrides])


def stepper(cfg: RunConfig) -> Step:
    state, objective, _ = spread(cfg, World())
    return Step(cfg, state, objective, World(), Monitor(cfg, state.model, World()))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss ("loss", of this value) or the gradients of these forward passes not finite."""

    def install(what: str, passes: set[int], value: float = math.nan) -> None:
        whole, calls = Objective.forward, []

        def forward(self: Objective, *args: Any) -> torch.Tensor:
            calls.append(1)
            out = whole(self, *args)
            if len(calls) not in passes:
                return out
            return out * value if what == "loss" else Poison.apply(out)

        monkeypatch.setattr(Objective, "forward", forward)

    return install


def test_the_router_bias_comes_to_rest_over_the_last_tenth(root: Path):
    cfg = config(root, "train.steps=40", "model.router_bias_rate=0.1", "loops.kind=fixed", "loops.loops=2")
    step = stepper(cfg)
    (moe,) = (module for module in step.state.model.modules() if isinstance(module, MoEFFN))
    for number, share in ((20, 1.0), (36, 1.0), (37, 0.75), (39, 0.25)):
        step.state.step = number
        moe.expert_load.copy_(torch.tensor([0, 10, 10, 20]))
        before = moe.router_bias.clone()
        step(read=False)
        moved = moe.router_bias - before
        # Shares of 0 and 1, each with the 0.05 of the logarithm.
        assert float(moved[0] - moved[1]) == pytest.approx(share * 0.1 * math.log(1.05 / 0.05), abs=1e-5)
    assert [optim.router_pace(number, 1000) for number in (0, 900, 950, 999)] == [1, 1, 0.5, 0.05]
    assert not any("pace" in name for name in state_tensors(step.state, 0))


def test_balance_moves_nothing_but_the_bias_and_evens_the_loads_at_the_depth_of_use(
    root: Path, tmp_path: Path
):
    few = ("train.steps=3", "train.threads=1", "model.router_bias_rate=0.1")
    plain = train(config(root, *few), tmp_path / "plain")
    even = train(config(root, *few, "train.balance=200"), tmp_path / "even")
    before, after = (load_file(out / "model" / "model.safetensors") for out in (plain, even))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"recurrent.block.ffn.{name}" for name in ("router_bias", "expert_load")}
    assert (plain / "metrics.jsonl").read_text().count("\n") == (even / "metrics.jsonl").read_text().count(
        "\n"
    )
    cfg = load_config(root / "configs" / "smoke.toml", ["eval.examples=64"])
    batches = list(evaluation_batches(cfg, "validation"))
    assert [round(optim.balance_pace(batch, 3), 4) for batch in range(3)] == [1.0, 0.1826, 0.0333]
    loads = []
    for out in (plain, even):
        model = from_pretrained(out / "model").eval()
        found = watch(model, batches, model.cfg.max_loop_iters, padded=True)["loads"]
        loads.append(min(found) * len(found) / sum(found))
    assert loads[0] < 0.5 < 0.6 < loads[1]


def test_a_run_broken_off_while_it_balances_goes_on_and_a_longer_one_balances_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few = ("train.steps=4", "train.threads=1", "train.balance=20", "train.save_every=2")
    whole = train(config(root, *few), tmp_path / "whole")
    look, calls = Step._look, []

    def stopped(self: Step) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        look(self)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_look", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config(root, *few), tmp_path / "broken")
    assert json.loads((tmp_path / "broken/run.json").read_text())["finished"] is False
    for again in range(2):  # the second finds nothing left to do
        broken = train(config(root, *few), tmp_path / "broken", resume=True)
        one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, broken))
        assert all(torch.equal(one[name], other[name]) for name in one), again
    assert json.loads((broken / "run.json").read_text())["finished"] is True
    longer = train(config(root, *few[1:], "train.steps=6"), broken, resume=True)
    assert find_checkpoint(longer / "checkpoints").meta["counters"]["balanced"] == 20
    assert json.loads((longer / "run.json").read_text())["steps"] == 6


@pytest.mark.parametrize("fixed", ["model.router_bias_rate=0.0", "adapt.kind=lora"])
def test_a_bias_that_stays_cannot_be_balanced(root: Path, fixed: str):
    with pytest.raises(
        ConfigError, match=r"train.balance = 50 is not allowed: it must be 0 where the routers' bias"
    ):
        config(root, "train.balance=50", "adapt.start=somewhere" if "lora" in fixed else fixed, fixed)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_position(
    root: Path, poison: Callable[..., None], what: str, value: float, accumulate: int, kind: str
):
    cfg = config(root, f"train.accumulate={accumulate}", f"optim.kind={kind}", "model.router_bias_rate=0.1")
    step = stepper(cfg)
    poison(what, {2 * accumulate + 1}, value)
    for _ in range(2):
        step(read=False)
    before = {name: v.clone() for name, v in state_tensors(step.state, 0).items() if "rng" not in name}
    assert any(name.endswith("router_bias") and v.any() for name, v in before.items())
    row = step(read=True)
    after = state_tensors(step.state, 0)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert step.state.data.state_dict()["step"] == 3 * accumulate
    step.check()
    assert (step.state.skips, step.state.skips_in_row, step.state.step) == (1, 1, 3)
    assert row is not None
    assert row["skipped"] == 1
    assert (row["loss"] is None) == (what == "loss")
    step(read=False)
    step.check()
    assert (step.state.skips, step.state.skips_in_row) == (1, 0)
    later = state_tensors(step.state, 0)
    assert any(not torch.equal(later[name], tensor) for name, tensor in before.items())
    assert all(value.isfinite().all() for value in later.values())


def test_a_poisoned_batch_is_as_if_it_had_not_been(root: Path, tmp_path: Path, poison: Callable[..., None]):
    """The run that skips batch 3 ends where the run ends whose data never had it."""
    cfg = config(root, "loops.kind=fixed", "loops.loops=2", "optim.schedule=constant", "optim.warmup=0")
    clean = stepper(cfg)
    clean(read=False)
    next(clean.state.data)
    clean(read=False)
    poison("loss", {2})
    poisoned = stepper(cfg)
    for _ in range(3):
        poisoned(read=False)
    one, other = state_tensors(clean.state, 0), state_tensors(poisoned.state, 0)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_too_many_skips_in_a_row_end_the_run_and_leave_its_checkpoints(
    root: Path, tmp_path: Path, poison: Callable[..., None]
):
    poison("loss", {2, 4, 5, 6})
    cfg = config(root, "train.steps=9", "train.save_every=1", "train.max_skips=2", "train.log_every=4")
    with pytest.raises(
        TrainingError, match=r"in 3 steps in a row, up to step 6, and train.max_skips is 2.*lower"
    ):
        train(cfg, tmp_path / "run")
    found = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step == 5
    assert (found.meta["counters"]["skips"], found.meta["counters"]["skips_in_row"]) == (3, 2)
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


def test_a_row_of_skips_goes_on_after_a_resume(root: Path, tmp_path: Path, poison: Callable[..., None]):
    poison("loss", {3, 4, 5})
    cfg = config(root, "train.max_skips=2")
    out = train(cfg, tmp_path / "run", stop_at=4)
    with pytest.raises(TrainingError, match="in 3 steps in a row, up to step 5"):
        train(cfg, out, resume=True)
    resumed = train(config(root, "train.max_skips=3"), out, resume=True)
    run = json.loads((resumed / "run.json").read_text())
    assert (run["skipped"], run["finished"]) == (2, True)
    assert [row["skipped"] for row in rows(resumed)] == [0, 0, 1, 2, 2, 2]


def test_accumulated_gradients_are_the_mean_over_batches(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Also for the halting head, whose own loss reaches it in every backward with weight one."""
    fixed = ("optim.clip=0", "loops.kind=fixed", "loops.loops=3", "model.router_bias_rate=0.0")
    cfg = config(root, "train.accumulate=3", *fixed)
    step, (twin, _, _) = stepper(cfg), spread(cfg, World())
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in step.state.model.named_parameters()})

    monkeypatch.setattr(step.state.optimizer, "step", keep)
    step(read=False)
    total: dict[str, torch.Tensor] = {}
    for _ in range(3):
        twin.model.zero_grad()
        loss(twin.model, next(twin.data), LoopPlan(0, 3)).backward()
        for name, p in twin.model.named_parameters():
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad / 3
    assert float(total["recurrent.act.halt.bias"].abs()) > 0
    for name, value in total.items():
        torch.testing.assert_close(gradients[name], value, msg=name)


def test_loops_per_sequence_train_and_count_their_mean(root: Path, tmp_path: Path):
    cfg = config(root, "loops.per=sequence", "loops.kind=uniform", "loops.low=1", "loops.high=6")
    out = train(cfg, tmp_path / "run")
    run = json.loads((out / "run.json").read_text())
    assert run["loops"]["max"] == 6
    assert 2 < run["loops"]["mean"] < 5
    assert any(row["n_loops"] != int(row["n_loops"]) for row in rows(out))


def test_bf16_rounds_the_products_and_not_the_parameters(root: Path):
    wide, narrow = stepper(config(root)), stepper(config(root, "parallel.precision=bf16"))
    first, second = wide(read=True), narrow(read=True)
    assert first is not None
    assert second is not None
    assert second["loss"] == pytest.approx(first["loss"], rel=0.02)
    assert second["loss"] != first["loss"]
    assert {p.dtype for p in narrow.state.model.parameters()} == {torch.float32}
    assert {v.dtype for s in narrow.state.optimizer.state.values() for v in s.values()} == {torch.float32}


def test_a_run_broken_off_before_its_first_checkpoint_begins_again(root: Path, tmp_path: Path):
    cfg, out = config(root), tmp_path / "run"
    whole = train(cfg, tmp_path / "whole")
    train(cfg, out, stop_at=2)
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(ConfigError, match=r"optim.lr = 0.5 .* the run to resume has"):
        train(config(root, "optim.lr=0.5"), out, resume=True)
    train(cfg, out, resume=True)
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(whole)]
    (out / "run.json").write_text("{")
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(cfg, tmp_path / "none", resume=True)


def test_processes_that_torchrun_restarted_resume_unasked(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg, out = config(root), tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(cfg, out, stop_at=2)  # died before it wrote anything: from the beginning
    train(cfg, out, overwrite=True)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "run.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.graphs=true", "parallel.graphs = True is not allowed: it needs a CUDA device"),
        ("parallel.compile=true", "parallel.compile = True is not allowed: it needs a CUDA device"),
        ("parallel.recompute=selective", "recompute = 'selective' is not allowed: it needs compile = true"),
        ("parallel.replicas=2", "replicas = 2 is not allowed"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(root: Path, tmp_path: Path, override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        train(config(root, "parallel.device=cpu", override), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "it needs parallel.precision = 'bf16'"),
        (
            ("parallel.precision=bf16", "model.expert_dim=12"),
            "it needs model.expert_dim = 12 to be a multiple of 8",
        ),
        (("parallel.precision=bf16", "train.accumulate=2"), "it needs train.accumulate = 1"),
    ],
)
def test_what_no_graph_can_hold_is_refused(root: Path, overrides: tuple[str, ...], words: str):
    world = World(size=2, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=f"parallel.graphs = True is not allowed: .*{words}"):
        spread(config(root, "parallel.graphs=true", *overrides), world)


@pytest.mark.parametrize(
    "overrides",
    [("optim.kind=muon", "loops.per=sequence"), ("parallel.precision=bf16", "parallel.recompute=loop")],
    ids=["muon", "bf16"],
)
def test_every_way_to_train_resumes_bit_for_bit(root: Path, tmp_path: Path, overrides: tuple[str, ...]):
    cfg = config(root, *overrides)
    whole = train(cfg, tmp_path / "whole")
    half = train(cfg, tmp_path / "half", stop_at=3)
    train(cfg, half, resume=True)
    one, other = (find_checkpoint(out / "checkpoints").path.glob("*.safetensors") for out in (whole, half))
    first, second = load_file(next(one)), load_file(next(other))
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert any("momentum_buffer" in name for name in first) == ("optim.kind=muon" in overrides)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_on_a_gpu_waits_for_nothing_and_skips_alike(root: Path, kind: str):
    gpu = World(device=torch.device("cuda", 0))
    cfg = config(root, f"optim.kind={kind}", "parallel.precision=bf16", "loops.per=sequence")
    state, objective, _ = spread(cfg, gpu)
    step = Step(cfg, state, objective, gpu, Monitor(cfg, state.model, gpu))
    for _ in range(3):
        step(read=False)
    before = {name: v.clone() for name, v in state_tensors(state, 0).items() if "rng" not in name}
    plain = objective.forward
    objective.forward = lambda *args: plain(*args) * math.nan  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(read=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = state_tensors(state, 0)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    step.check()
    assert (state.skips, state.step) == (1, 4)
