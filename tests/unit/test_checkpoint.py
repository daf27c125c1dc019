"""A run broken off and resumed is, bit for bit, the unbroken run; damage is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos.config import ConfigError
from open_mythos.training import trainer
from open_mythos.training.checkpoint import CheckpointError, load_state, read_meta, save_state
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.trainer import TrainingError, build, train
from open_mythos.weights import from_pretrained

STEPS = 3


def config(root: Path, *overrides: str) -> RunConfig:
    few = (f"train.steps={2 * STEPS}", "train.save_every=0", "train.log_every=1")
    return load_config(root / "configs" / "smoke.toml", [*few, *overrides])


def records(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "resume" / read_meta(out / "resume")["tensors"])


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    meta = [read_meta(out / "resume") for out in (one, other)]
    for key in ("step", "tokens", "loops_sum", "loops_max", "forwards", "data"):
        assert meta[0][key] == meta[1][key], key


TEXT = ("data.source={text}", "data.seq_len=16", "model.vocab_size=259", "eval.levels=[]")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "model.initial_state=random",
            "model.dropout=0.1",
            "train.accumulate=2",
            "loops.kind=poisson",
            "loops.rate=2",
        ),
        ("optim.schedule=wsd", "model.router_bias_rate=0.0", "loops.kind=uniform", "loops.high=3", *TEXT),
    ],
    ids=["task", "noise", "text"],
)
def test_a_resumed_run_is_the_unbroken_run(root: Path, tmp_path: Path, overrides: tuple[str, ...]):
    text = tmp_path / "notes.txt"
    text.write_text("Encode once, think as long as asked, decode once. " * 40)
    cfg = config(root, *(part.format(text=text) for part in overrides))
    whole = train(cfg, tmp_path / "whole")
    half = train(cfg, tmp_path / "half", stop_at=STEPS)
    assert read_meta(half / "resume")["step"] == STEPS
    assert not json.loads((half / "run.json").read_text())["finished"]
    torch.manual_seed(99)  # a new process would not have this one's generator either
    assert_same_run(whole, train(cfg, half, resume=True))
    run = json.loads((half / "run.json").read_text())
    assert run["finished"]
    assert run["steps"] == 2 * STEPS


def test_saving_on_the_way_changes_nothing_and_records_after_the_save_are_redone(root: Path, tmp_path: Path):
    whole = train(config(root), tmp_path / "whole")
    cfg = config(root, "train.save_every=2")
    broken = train(cfg, tmp_path / "broken", stop_at=2)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')
    assert_same_run(whole, train(cfg, broken, resume=True))


def test_the_saved_model_is_the_trained_model(root: Path, tmp_path: Path):
    out = train(config(root), tmp_path / "run")
    saved = dict(from_pretrained(out / "model").named_parameters())
    state = tensors(out)
    for name, value in saved.items():
        assert torch.equal(value, state[f"model.{name}"]), name


def test_state_survives_a_round_trip_and_leaves_one_tensor_file(root: Path, tmp_path: Path):
    cfg = config(root)
    state, _ = build(cfg)
    for step in (1, 2):
        state.step = step
        save_state(tmp_path, state, cfg.to_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "step-000000002.safetensors"]
    other, _ = build(config(root, "train.seed=5"))
    load_state(tmp_path, other)
    assert other.step == 2
    for p, q in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(state.loops.get_state(), other.loops.get_state())


def test_a_save_that_is_cut_short_leaves_the_last_state(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = config(root)
    state, _ = build(cfg)
    save_state(tmp_path, state, cfg.to_dict())

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("open_mythos.training.checkpoint.save_file", full_disk)
    state.step = 7
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path, state, cfg.to_dict())
    load_state(tmp_path, state)
    assert state.step == 0


def _cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def _edit(change: dict[str, Any]):  # type: ignore[no-untyped-def]
    def apply(folder: Path) -> None:
        meta = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**meta, **change}))

    return apply


def _tensor(change) -> Any:  # type: ignore[no-untyped-def]
    def apply(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        held = load_file(path)
        change(held)
        save_file(held, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "state.json").unlink(), "holds no resume state"),
        (lambda folder: (folder / "state.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "state.json").write_text("[]"), "is not a resume state"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "missing or damaged"),
        (_cut, "missing or damaged"),
        (_edit({"format": 9}), "has format 9; this version reads 1"),
        (_edit({"tensors": "../elsewhere.safetensors"}), "must be a file beside it"),
        (_tensor(lambda held: held.pop("model.norm.weight")), "lacks model.norm.weight"),
        (_tensor(lambda held: held.update({"model.norm.weight": torch.zeros(3)})), "model.norm.weight is"),
        (_tensor(lambda held: held.update({"model.extra": torch.zeros(3)})), "holds model.extra"),
    ],
)
def test_a_damaged_state_is_refused_and_the_model_untouched(
    root: Path, tmp_path: Path, damage: Any, message: str
):
    cfg = config(root)
    state, _ = build(cfg)
    save_state(tmp_path, state, cfg.to_dict())
    damage(tmp_path)
    fresh, _ = build(config(root, "train.seed=5"))
    before = [p.detach().clone() for p in fresh.model.parameters()]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state(tmp_path, fresh)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, q) for p, q in zip(before, fresh.model.parameters(), strict=True))


def test_another_config_is_refused_but_more_steps_are_not(root: Path, tmp_path: Path):
    out = train(config(root), tmp_path / "run")
    for override in ("optim.lr=0.5", "train.seed=3", "loops.grad=4", "data.length=9", "model.expert_dim=24"):
        with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} = .* the run to resume has"):
            train(config(root, override), out, resume=True)
    longer = train(config(root, "train.steps=8", "eval.loops=[1]", "train.save_every=4"), out, resume=True)
    assert [row["step"] for row in records(longer)] == list(range(1, 9))


def test_a_run_is_replaced_only_when_asked(root: Path, tmp_path: Path):
    cfg = config(root)
    out = train(cfg, tmp_path / "run", stop_at=1)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="already holds a run"):
        train(cfg, out)
    with pytest.raises(ConfigError, match="exclude each other"):
        train(cfg, out, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        train(cfg, out / "mine.txt")
    with pytest.raises(CheckpointError, match="holds no resume state"):
        train(cfg, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    train(cfg, out, overwrite=True, stop_at=2)
    assert [row["step"] for row in records(out)] == [1, 2]
    assert (out / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_stops_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    cfg = config(root, "train.save_every=1")
    whole = trainer.objective.loss
    calls: list[int] = []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * math.nan

    def loss(*args: Any) -> torch.Tensor:
        calls.append(1)
        value = whole(*args)
        if len(calls) < 3:
            return value
        return value * math.nan if what == "loss" else Poison.apply(value)

    monkeypatch.setattr(trainer.objective, "loss", loss)
    with pytest.raises(TrainingError, match=rf"the {what} is nan at step 3 .*lower optim\.lr"):
        train(cfg, tmp_path / "run")
    assert read_meta(tmp_path / "run" / "resume")["step"] == 2
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2]


def test_accumulated_gradients_are_the_mean_over_batches(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Also for the halting head, whose own loss reaches it in every backward with weight one."""
    from open_mythos.training.objective import LoopPlan, loop_distribution, loss

    overrides = (
        "train.accumulate=3",
        "optim.clip=0",
        "loops.kind=fixed",
        "loops.loops=3",
        "model.router_bias_rate=0.0",
    )
    cfg = config(root, *overrides)
    state, _ = build(cfg)
    twin, _ = build(cfg)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in state.model.named_parameters()})

    monkeypatch.setattr(state.optimizer, "step", keep)
    trainer._step(cfg, state, loop_distribution("fixed", loops=3), 1e-3)
    total: dict[str, torch.Tensor] = {}
    for _ in range(3):
        twin.model.zero_grad()
        loss(twin.model, next(twin.data), LoopPlan(0, 3)).backward()
        for name, p in twin.model.named_parameters():
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad / 3
    assert float(total["recurrent.act.halt.bias"].abs()) > 0
    for name, value in total.items():
        torch.testing.assert_close(gradients[name], value, msg=name)
