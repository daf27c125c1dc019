"""A run broken off and resumed is, bit for bit, the unbroken run; damage is refused in one line."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from open_mythos.config import ConfigError
from open_mythos.training import checkpoint, manifest, trainer
from open_mythos.training.checkpoint import Checkpointer, CheckpointError, export_checkpoint, find_checkpoint
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.monitor import Monitor
from open_mythos.training.parallel import World
from open_mythos.training.state import TrainState, counters, gather_model, state_tensors
from open_mythos.training.step import Step
from open_mythos.training.trainer import TrainingError, build, train
from open_mythos.weights import from_pretrained

STEPS = 3


def config(root: Path, *overrides: str) -> RunConfig:
    few = (f"train.steps={2 * STEPS}", "train.save_every=0", "train.log_every=1")
    return load_config(root / "configs" / "smoke.toml", [*few, *overrides])


def records(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the operating system decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "tokens_per_s", "mfu", "memory", "memory_peak")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    (shard,) = find_checkpoint(out / "checkpoints").path.glob("*.safetensors")
    return load_file(shard)


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    meta = [find_checkpoint(out / "checkpoints").meta for out in (one, other)]
    assert meta[0]["data"] == meta[1]["data"]
    assert {**meta[0]["counters"], "seconds": 0} == {**meta[1]["counters"], "seconds": 0}


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
    assert find_checkpoint(half / "checkpoints").step == STEPS
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


def stepped(root: Path, *overrides: str, steps: int = 2) -> tuple[RunConfig, TrainState]:
    """A state that has trained a little, so that no part of it is as it was built."""
    cfg = config(root, *overrides)
    state, _ = build(cfg)
    plans = trainer.objective.loop_distribution("uniform", low=1, high=3, backprop=2)
    for _ in range(steps):
        trainer.objective.loss(state.model, next(state.data), plans.sample(state.loops)).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.seconds += 0.5
    return cfg, state


def same(one: TrainState, other: TrainState) -> None:
    first, second = state_tensors(one, 0), state_tensors(other, 0)
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.dtype == second[name].dtype, name
    assert counters(one) == counters(other)
    assert one.data.state_dict() == other.data.state_dict()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_survives_a_round_trip(root: Path, tmp_path: Path, asynchronous: bool):
    cfg, state = stepped(root)
    with Checkpointer(tmp_path, asynchronous=asynchronous) as saver:
        saver.save(state, cfg.to_dict())
        drawn = torch.rand(())
    other, _ = build(config(root, "train.seed=5"))
    with Checkpointer(tmp_path) as loader:
        found = loader.load(other)
    assert torch.equal(torch.rand(()), drawn)
    assert (found.step, found.meta["config"]) == (2, cfg.to_dict())
    assert found.meta["world_size"] == 1
    torch.set_rng_state(load_file(next(found.path.glob("*.safetensors")))["rng.torch.00000"])
    with Checkpointer(tmp_path) as loader:
        loader.load(state)
    same(state, other)


@pytest.mark.gpu
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_on_a_gpu_survives_a_round_trip(root: Path, tmp_path: Path, asynchronous: bool):
    world, cfg = World(device=torch.device("cuda")), config(root, "model.dropout=0.1")

    def stepped_there() -> TrainState:
        state, objective, _ = trainer.spread(cfg, world)
        step = Step(cfg, state, objective, world, Monitor(cfg, state.model, world))
        step(True)
        return state

    state = stepped_there()
    with Checkpointer(tmp_path, asynchronous=asynchronous) as saver:
        saver.save(state, cfg.to_dict())
        kept = {name: value.clone() for name, value in state_tensors(state, 0).items()}
        drawn = torch.rand(3, device="cuda")
        with torch.no_grad():
            for value in state.model.state_dict().values():
                value.zero_()
    assert "rng.cuda.00000" in kept
    other = stepped_there()
    with Checkpointer(tmp_path) as loader:
        loader.load(other)
    found = state_tensors(other, 0)
    for name, value in kept.items():
        assert torch.equal(found[name], value), name
        assert found[name].device == value.device, name
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    trainer.optim.set_lr(other.optimizer, 1e-3)
    for parameter in other.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.optimizer.step()


def test_a_state_is_named_without_wrappers_and_independent_of_parameter_groups(root: Path, tmp_path: Path):
    cfg, state = stepped(root)
    with Checkpointer(tmp_path) as saver:
        saver.save(state, cfg.to_dict())
    other, _ = build(config(root, "train.seed=5"))
    other.optimizer = torch.optim.AdamW(list(other.model.parameters())[::-1], fused=True)
    wrapped = nn.ModuleDict({"_orig_mod": other.model})
    other.model = wrapped  # type: ignore[assignment]
    with Checkpointer(tmp_path) as loader:
        loader.load(other)
    same(state, other)


def test_training_goes_on_while_a_save_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And what is written is the state at the call, not what training made of it since."""
    cfg, state = stepped(root)
    before = {name: value.clone() for name, value in state_tensors(state, 0).items()}
    let_go, store = threading.Event(), checkpoint._store

    def held_up(*args: Any) -> None:
        assert let_go.wait(60)
        store(*args)

    monkeypatch.setattr(checkpoint, "_store", held_up)
    with Checkpointer(tmp_path) as saver:
        saver.save(state, cfg.to_dict())
        with torch.no_grad():
            for value in state_tensors(state, 0).values():
                value.zero_()
        assert not list(tmp_path.glob("step-*"))
        let_go.set()
        saver.wait()
        saved = load_file(next(tmp_path.glob("step-000000002/*.safetensors")))
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_the_newest_checkpoints_are_kept_and_leftovers_of_killed_saves_removed(root: Path, tmp_path: Path):
    cfg, state = stepped(root)
    for leftover in (".saving-step-000000009", ".removing-step-000000001"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "state.json").write_text("{")
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path, keep=2) as saver:
        for step in (2, 4, 7, 7, 11):
            state.step = step
            saver.save(state, cfg.to_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000000007", "step-000000011"]


def test_a_save_of_the_step_that_was_loaded_does_nothing(root: Path, tmp_path: Path):
    cfg, state = stepped(root)
    with Checkpointer(tmp_path) as saver:
        saver.save(state, cfg.to_dict())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Checkpointer(tmp_path) as saver:
        saver.load(state)
        saver.save(state, cfg.to_dict())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_checkpoints_of_a_run_that_was_not_loaded_are_not_replaced(root: Path, tmp_path: Path):
    cfg, state = stepped(root)
    with Checkpointer(tmp_path) as saver:
        saver.save(state, cfg.to_dict())
    with Checkpointer(tmp_path) as other:
        other.save(state, cfg.to_dict())
        with pytest.raises(
            CheckpointError, match="step-000000002 is there already, of a run that was not loaded"
        ):
            other.wait()


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_keep_must_be_a_whole_number_of_at_least_one(tmp_path: Path, keep: Any):
    with pytest.raises(
        ConfigError, match=r"keep = .* is not allowed: it must be a whole number of at least 1"
    ):
        Checkpointer(tmp_path, keep=keep)


@pytest.mark.parametrize("call", ["wait", "save", "close"])
def test_a_failed_save_in_the_background_is_told_at_the_next_call(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    cfg, state = stepped(root)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    saver = Checkpointer(tmp_path)
    saver.save(state, cfg.to_dict())
    saver.wait()
    monkeypatch.setattr(checkpoint, "_store", full)
    state.step = 3
    saver.save(state, cfg.to_dict())
    arguments = (state, cfg.to_dict()) if call == "save" else ()
    with pytest.raises(CheckpointError, match=r"^cannot save .*step-000000003: No space left on device$"):
        getattr(saver, call)(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]
    monkeypatch.undo()
    with Checkpointer(tmp_path) as again:
        again.load(state)
        state.step = 3
        again.save(state, cfg.to_dict())
    assert find_checkpoint(tmp_path).step == 3


def test_processes_that_do_not_share_the_folder_are_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg, state = stepped(root)
    monkeypatch.setattr(checkpoint, "_settle", lambda *_: {"shard-00002.safetensors": {}})
    saver = Checkpointer(tmp_path, asynchronous=False)
    with pytest.raises(
        CheckpointError, match=r"shard-00002\.safetensors is on another disk; all processes must"
    ):
        saver.save(state, cfg.to_dict())
    assert not list(tmp_path.iterdir())


def _save_and_fail(folder: Path, state: TrainState) -> None:
    with Checkpointer(folder) as saver:
        saver.save(state, {})
        raise TrainingError("went wrong")


def test_an_error_under_way_is_not_hidden_by_the_save_that_fails_beside_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    _, state = stepped(root)
    monkeypatch.setattr(checkpoint, "_store", lambda *_: 1 / 0)
    with pytest.raises(TrainingError, match="went wrong"):
        _save_and_fail(tmp_path, state)
    assert "cannot save" in caplog.text
    assert "division by zero" in caplog.text


def _refit(change: Any) -> Any:
    """A checkpoint with other tensors, its manifest in order: a checkpoint of another model."""

    def apply(folder: Path) -> None:
        shard = next(folder.glob("*.safetensors"))
        held = load_file(shard)
        change(held)
        offsets = {name: {"saved_offsets": [0] * value.dim()} for name, value in held.items()}
        save_file(held, shard, metadata={"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
        files = {name: manifest.entry(folder / name) for name in (shard.name, "state.json")}
        manifest.write_manifest(folder, 2, files)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda held: held.pop("rng.loops"), "lacks rng.loops"),
        (
            lambda held: held.update({"model.norm.weight": torch.zeros(3)}),
            "model.norm.weight is torch.float32",
        ),
        (
            lambda held: held.update({"model.norm.weight": held["model.norm.weight"].half()}),
            "is torch.float16",
        ),
        (lambda held: held.update({"model.extra": torch.zeros(3)}), "holds model.extra"),
        (lambda held: held.update({"optim.gone.exp_avg": torch.zeros(3)}), "holds optim.gone.exp_avg"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_this_one_untouched(
    root: Path, tmp_path: Path, change: Any, message: str
):
    cfg, state = stepped(root)
    with Checkpointer(tmp_path) as saver:
        saver.save(state, cfg.to_dict())
    _refit(change)(tmp_path / "step-000000002")
    fresh, _ = build(config(root, "train.seed=5"))
    before = [p.detach().clone() for p in fresh.model.parameters()]
    with pytest.raises(CheckpointError, match=f"does not fit this run: .*{message}") as caught:
        Checkpointer(tmp_path).load(fresh)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, q) for p, q in zip(before, fresh.model.parameters(), strict=True))


def test_an_export_holds_the_weights_of_the_newest_checkpoint_or_of_the_one_named(root: Path, tmp_path: Path):
    cfg, state = stepped(root, "model.tie_embeddings=true")
    saver = Checkpointer(tmp_path / "checkpoints")
    saver.save(state, cfg.to_dict())
    saver.wait()
    older = {name: value.clone() for name, value in state.model.state_dict().items()}
    with torch.no_grad():
        state.model.embed.weight.add_(1)
    state.step = 5
    saver.save(state, cfg.to_dict())
    saver.close()
    assert export_checkpoint(tmp_path / "checkpoints", tmp_path / "new").step == 5
    assert export_checkpoint(tmp_path / "checkpoints" / "step-000000002", tmp_path / "old").step == 2
    for out, wanted in (("new", state.model.state_dict()), ("old", older)):
        exported = from_pretrained(tmp_path / out)
        assert exported.cfg == state.model.cfg
        assert all(torch.equal(value, wanted[name]) for name, value in exported.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_checkpoint(tmp_path / "new", tmp_path / "other")


def test_a_gathered_model_is_a_copy(root: Path):
    _, state = stepped(root)
    copy = gather_model(state.model)
    assert copy is not None
    assert copy.training
    for (name, one), (other, two) in zip(
        state.model.named_parameters(), copy.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()


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
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(cfg, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    train(cfg, out, overwrite=True, stop_at=2)
    assert [row["step"] for row in records(out)] == [1, 2]
    assert (out / "mine.txt").read_text() == "kept"
