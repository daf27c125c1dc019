"""Where records go: metrics.jsonl always, other trackers by choice, from stand-ins and from real TensorBoard."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from open_mythos.config import ConfigError
from open_mythos.training.config import RunConfig
from open_mythos.training.trackers import JsonLines, Trackers, check_trackers, flatten, open_trackers

ROW = {
    "step": 1,
    "loss": 2.5,
    "n_loops": 3,
    "mfu": None,
    "grad_norms": {"core": 0.5, "coda": 0.25},
    "expert_share": [0.5, 0.5],
    "state_norm": [1.0, 2.0, 3.0, 4.0, 5.0],
    "alarms": ["loss"],
}
FLAT = {
    "loss": 2.5,
    "n_loops": 3.0,
    "grad_norms/core": 0.5,
    "grad_norms/coda": 0.25,
    "state_norm/loop_1": 1.0,
    "state_norm/loop_2": 2.0,
    "state_norm/loop_4": 4.0,
    "state_norm/last": 5.0,
}


def config(*trackers: str, **log: Any) -> RunConfig:
    sections = {
        "data": {"source": "parity", "length": 8},
        "loops": {"kind": "fixed", "loops": 2},
        "log": {"trackers": list(trackers), **log},
    }
    return RunConfig.from_dict(sections)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class StandIn:
    """Notes every call to a tracker's module, and fails when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.failing: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> StandIn:
            if name in self.failing:
                raise RuntimeError(f"{name} has\nno network")
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    """All three trackers, played by stand-ins."""
    found = {}
    for tracker, module in (("wandb", "wandb"), ("trackio", "trackio")):
        found[tracker] = StandIn()
        monkeypatch.setitem(sys.modules, module, found[tracker])  # type: ignore[arg-type]
    found["tensorboard"] = StandIn()
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = found["tensorboard"].SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return found


def test_records_are_whole_lines(tmp_path: Path):
    with open_trackers(config(), tmp_path) as trackers:
        trackers.log(ROW)
        assert lines(tmp_path / "metrics.jsonl") == [ROW], "readable while the run goes on"
        trackers.log({**ROW, "step": 2})
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "trackers").exists()


def test_a_resumed_run_drops_what_it_does_again_and_mends_a_cut_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0} for step in (1, 10, 20, 30)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 15, "lo', encoding="utf-8")
    with open_trackers(config(), tmp_path, step=20) as trackers:
        assert [row["step"] for row in lines(path)] == [1, 10, 20]
        trackers.log({"step": 30, "loss": 2.0})
    assert lines(path)[-1] == {"step": 30, "loss": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_number_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path):
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.log({"step": 1, "loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    log.close()
    log.close()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is closed"):
        log.log(ROW)


def test_only_rank_zero_writes(tmp_path: Path, stand_in: dict[str, StandIn]):
    with open_trackers(config("wandb"), tmp_path, rank=1) as trackers:
        trackers.log(ROW)
    assert list(tmp_path.iterdir()) == []
    assert stand_in["wandb"].calls == []


def test_flatten_keeps_numbers_only():
    assert flatten(ROW) == FLAT
    assert flatten({"step": 1, "loss": float("inf"), "state_norm": [], "nonfinite": ["loss"]}) == {}


def test_wandb_is_offline_unless_asked_and_keeps_its_run_on_resume(
    tmp_path: Path, stand_in: dict[str, StandIn]
):
    out = tmp_path / "first-run"
    out.mkdir()
    with open_trackers(config("wandb", project="depth"), out) as trackers:
        trackers.log(ROW)
    wandb = stand_in["wandb"]
    (_, begun), *_ = wandb.named("init")
    assert begun["mode"] == "offline"
    assert begun["project"] == "depth"
    assert begun["name"] == "first-run"
    assert begun["dir"] == str(out / "trackers")
    assert begun["config"]["log"]["project"] == "depth"
    assert wandb.named("log") == [((FLAT,), {"step": 1})]
    assert len(wandb.named("finish")) == 1
    with open_trackers(config("wandb", online=True), out, step=1):
        pass
    again = wandb.named("init")[1][1]
    assert again["id"] == begun["id"]
    assert again["resume"] == "allow"
    assert again["mode"] == "online"


def test_trackio_and_tensorboard_get_every_record(tmp_path: Path, stand_in: dict[str, StandIn]):
    with open_trackers(config("trackio", "tensorboard"), tmp_path, step=4) as trackers:
        trackers.log({**ROW, "step": 5})
    trackio, board = stand_in["trackio"], stand_in["tensorboard"]
    assert trackio.named("init")[0][1]["name"] == tmp_path.name
    assert trackio.named("log") == [((FLAT,), {"step": 5})]
    assert len(trackio.named("finish")) == 1
    opened = board.named("SummaryWriter")[0]
    assert opened == ((str(tmp_path / "trackers" / "tensorboard"),), {"purge_step": 5})
    assert {args[0]: args[1] for args, _ in board.named("add_scalar")} == FLAT
    assert {args[2] for args, _ in board.named("add_scalar")} == {5}
    assert len(board.named("close")) == 1


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)  # what import finds of a missing package
    with pytest.raises(ConfigError) as caught:
        check_trackers([name])
    text = str(caught.value)
    assert text.startswith(f"log.trackers = '{name}' is not allowed: it is not installed")
    assert f"pip install 'open-mythos[{name}]'" in text
    assert "\n" not in text
    with pytest.raises(ConfigError, match="is not installed"):
        open_trackers(config(name), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_is_one_clear_error(tmp_path: Path, stand_in: dict[str, StandIn]):
    stand_in["wandb"].failing.add("init")
    with pytest.raises(ConfigError, match=r"log\.trackers = 'wandb' cannot start: init has"):
        open_trackers(config("trackio", "wandb"), tmp_path)
    assert len(stand_in["trackio"].named("finish")) == 1, "what had started is closed"


def test_a_tracker_that_fails_later_does_not_end_the_run(
    tmp_path: Path, stand_in: dict[str, StandIn], capsys: pytest.CaptureFixture[str]
):
    with open_trackers(config("wandb", "trackio"), tmp_path) as trackers:
        trackers.log(ROW)
        stand_in["wandb"].failing.add("log")
        for step in (2, 3, 4):
            trackers.log({**ROW, "step": step})
        stand_in["trackio"].failing.add("finish")
    assert len(lines(tmp_path / "metrics.jsonl")) == 4
    assert len(stand_in["trackio"].named("log")) == 4
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "wandb failed and gets no further records: log has no network",
        "trackio failed and gets no further records: finish has no network",
    ]


def test_a_failure_of_metrics_jsonl_is_raised(tmp_path: Path):
    trackers = Trackers(JsonLines(tmp_path / "metrics.jsonl", 0), {})
    trackers.close()
    with pytest.raises(ValueError, match="closed"):
        trackers.log(ROW)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own dependencies
def test_tensorboard_itself_reads_what_was_written(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_trackers(config("tensorboard"), tmp_path) as trackers:
        trackers.log(ROW)
        trackers.log({**ROW, "step": 2, "loss": 2.0})
    with open_trackers(config("tensorboard"), tmp_path, step=1) as trackers:
        trackers.log({**ROW, "step": 2, "loss": 1.5})
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FLAT)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
