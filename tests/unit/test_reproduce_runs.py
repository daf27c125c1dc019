"""Runs in processes of their own: what is kept, what goes on, what a failure does; and one with the real trainer."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from open_mythos import cli
from open_mythos.config import ConfigError
from open_mythos.reproduce import base, runner, worker
from open_mythos.reproduce.plan import Settings, all_runs
from open_mythos.reproduce.runs import Run, read_json, write_json
from open_mythos.training.trainer import train

TOY = (Path(__file__).parent / "toy_experiment.toml").read_text(encoding="utf-8")

# An experiment whose runs train nothing and load no torch: each leaves a mark, and fails, hangs or answers as asked.
CODE = """
import time
from open_mythos.reproduce.base import Experiment

class Light(Experiment):
    CONFIGURED = False
    KEPT = ("part-*.json",)
    OPTIONS = {"fail": [], "hang": False, "gain": 0.1, "slow": 0.0}

    def perform(self, run, split):
        with open("marks.txt", "a") as marks:
            marks.write(f"{run.arm} {run.seed} {split}\\n")
        if run.options["slow"]:
            time.sleep(run.options["slow"])
            with open("marks.txt", "a") as marks:
                marks.write("end\\n")
        if run.options["hang"]:
            print("hanging", flush=True)
            time.sleep(600)
        if run.seed in run.options["fail"]:
            raise ValueError(f"seed {run.seed} does not want to")
        values = [0.5, 0.5 + run.options["gain"] + 0.01 * run.seed, float("nan")]
        return {"metric": "accuracy", "better": "higher", "unit": "bits", "trained": "8", "loops": [1, 2, 4],
                "curves": {"trained": values}}

    def summary(self, records):
        cells = [len(records), None, "words"]
        return {"columns": ["a", "b", "c"], "format": "plain", "rows": [{"arm": "ours", "title": "x", "cells": cells}]}
"""
LIGHT = """
[experiment]
title = "Light"
claim = "Two loops give at least 0.6."
target = "≥ 60 %"
seeds = 2
code = "light_toys.one:Light"
[experiment.options]
gain = 0.2
[[experiment.targets]]
loops = 2
at_least = 0.6
[parallel]
device = "cpu"
[arms.ours]
[arms.less]
options = {gain = 0.0}
"""


def written(folder: Path, text: str = TOY, name: str = "toy") -> base.Experiment:
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return base.load(folder / f"{name}.toml")


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"runs": folder / "runs", "out": folder / "results", **changes})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the experiment `light` and the class that it names."""
    (tmp_path / "light_toys").mkdir()
    (tmp_path / "light_toys/__init__.py").touch()
    (tmp_path / "light_toys/one.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "light.toml").write_text(LIGHT, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def marks(place: Path) -> list[str]:
    path = place / "marks.txt"
    found = sorted(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def go(place: Path, **changes: Any) -> tuple[runner.Outcome, list[str]]:
    told: list[str] = []
    experiment = base.named("light", place)
    (outcome,) = runner.reproduce([experiment], settings(place, jobs=4, **changes), told.append)
    return outcome, told


def test_runs_are_done_once_and_their_records_are_enough_to_go_on(place: Path) -> None:
    outcome, _ = go(place, arms=("ours",))
    assert marks(place) == ["ours 0 test", "ours 1 test"]
    assert outcome.result is not None
    assert outcome.result["verdict"]["state"] == "unfinished"
    outcome, told = go(place)
    assert marks(place) == ["less 0 test", "less 1 test"]
    assert told[0] == "2 runs finished before; 2 to do"
    result = read_json(place / "results/light.json")
    assert result == outcome.result
    assert result is not None
    assert [(r["arm"], r["seed"]) for r in result["runs"]] == [
        ("ours", 0),
        ("ours", 1),
        ("less", 0),
        ("less", 1),
    ]
    assert result["runs"][1]["measured"]["curves"]["trained"] == [0.5, 0.71, None]
    assert {r["python"] for r in result["runs"]} == {platform.python_version()}
    assert result["verdict"]["state"] == "met"
    assert result["verdict"]["figures"][0]["shown"] == "70.5 % (70 % to 71 %)"
    assert (result["command"], result["devices"]) == ("mythos reproduce light", ["CPU"])
    assert str(place) not in json.dumps(result)
    # A machine that has the result file alone.
    (place / "runs").rename(place / "gone")
    outcome, told = go(place)
    assert (told, marks(place), outcome.result["runs"]) == (
        ["4 runs finished before; 0 to do"],
        [],
        result["runs"],
    )
    go(place, remeasure=True, arms=("less",), seeds=1)
    assert marks(place) == ["less 0 test"]


def test_measuring_anew_begins_without_what_was_kept(place: Path) -> None:
    go(place, seeds=1, arms=("ours",))
    folder = place / "runs/light/ours-seed0"
    for name in ("part-1.json", "model.json"):
        (folder / name).touch()
    go(place, seeds=1, arms=("ours",))
    assert (folder / "part-1.json").exists()
    go(place, seeds=1, arms=("ours",), remeasure=True)
    assert [(folder / name).exists() for name in ("part-1.json", "model.json")] == [False, True]


def test_arms_of_the_same_config_keep_their_records_apart(place: Path) -> None:
    (place / "light.toml").write_text(LIGHT.replace("gain = 0.0", "gain = 0.2"), encoding="utf-8")
    go(place, seeds=1)
    (place / "runs").rename(place / "gone")
    outcome, _ = go(place, seeds=1)
    assert outcome.result is not None
    assert [record["arm"] for record in outcome.result["runs"]] == ["ours", "less"]


def test_another_config_or_split_is_another_run(place: Path) -> None:
    go(place, seeds=1)
    marks(place)
    go(place, seeds=1, split="validation")
    assert marks(place) == ["less 0 validation", "ours 0 validation"]
    assert (place / "results/light-validation.json").is_file()
    go(place, seeds=1, changes=(("optim", "lr", 1.0),))
    assert marks(place) == ["less 0 test", "ours 0 test"]


def test_a_failure_is_told_and_tried_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = LIGHT.replace("gain = 0.0", "fail = [1]")
    (place / "light.toml").write_text(bad, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "light", "--configs", ".", "--jobs", "4"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out.startswith("light: unfinished. 1 of 1 targets met. ")
    assert "light less seed 1: failed" in err
    result = read_json(place / "runs/reproduce-trial-results/light.json")
    assert result is not None
    said = "ValueError: seed 1 does not want to"
    assert result["failed"] == [{"arm": "less", "seed": 1, "error": said}]
    assert len(result["runs"]) == 3
    page = (place / "runs/reproduce-trial-results/results.md").read_text(encoding="utf-8")
    assert said in page
    assert "3 of 4 runs have finished" in page
    assert (place / "runs/reproduce-trial-results/light.png").read_bytes().startswith(b"\x89PNG")
    marks(place)
    # The identity of arm `ours` does not follow what the other arm is given.
    (place / "light.toml").write_text(LIGHT, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "light", "--configs", ".", "--jobs", "4"])
    assert not stop.value.code
    assert marks(place) == ["less 0 test", "less 1 test"]


def test_two_runs_never_train_the_same_model_at_once(place: Path) -> None:
    text = LIGHT.replace("gain = 0.2", "slow = 0.3").replace("seeds = 2", 'seeds = 1\nuses = "source/ours"')
    (place / "source.toml").write_text(LIGHT, encoding="utf-8")
    (place / "light.toml").write_text(text, encoding="utf-8")
    go(place)
    lines = (place / "marks.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["ours 0 test", "end", "less 0 test", "end"]


def test_nothing_is_started_when_the_time_is_over(place: Path) -> None:
    outcome, told = go(place, time_limit=1e-9)
    assert (marks(place), outcome.result) == ([], None)
    assert told == ["time is over: 4 runs not started; the same command goes on"]


def test_a_toy_never_replaces_a_run(place: Path) -> None:
    go(place)
    with pytest.raises(ConfigError, match="ours-seed0 holds a real run, which --quick never replaces"):
        go(place, quick=True, overwrite=True, out=place / "elsewhere")
    assert (place / "runs/light/ours-seed0/measured-test.json").is_file()


@pytest.mark.parametrize("name", ["out", "runs"])
def test_a_folder_that_takes_nothing_is_refused_before_any_work(place: Path, name: str) -> None:
    (place / "file").touch()
    for folder in (place / "file", place / "file" / "inside"):
        with pytest.raises(ConfigError, match=f"{name} = .* must be a folder that can be written"):
            go(place, **{name: folder})
    assert marks(place) == []


def test_a_toy_never_replaces_a_result(place: Path) -> None:
    outcome, _ = go(place, quick=True)
    assert marks(place) == ["less 0 test", "ours 0 test"]
    assert outcome.result is not None
    assert outcome.result["verdict"]["state"] == "unfinished"
    go(place, overwrite=True)
    marks(place)
    with pytest.raises(ConfigError, match=r"light.json holds a real result, which --quick never replaces"):
        go(place, quick=True)
    assert marks(place) == []
    (place / "results/light.json").write_text('{"runs": 3}')
    with pytest.raises(ConfigError, match=r"light.json is damaged: it holds no runs"):
        go(place)


def test_a_child_ends_with_whoever_started_it(place: Path) -> None:
    (place / "light.toml").write_text(LIGHT.replace("gain = 0.2", "hang = true"), encoding="utf-8")
    run = all_runs(base.named("light", place), settings(place))[0]
    run.folder.mkdir(parents=True)
    write_json(run.folder / "job.json", {"run": run.to_dict(), "split": "test", "identity": "x"})
    command = [sys.executable, "-m", "open_mythos.reproduce.worker", str(run.folder / "job.json")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"hanging\n"
    child.stdin.close()
    assert child.wait(timeout=60) == 1
    child.stdout.close()


def test_a_command_that_is_ended_has_written_what_was_finished(place: Path) -> None:
    (place / "light.toml").write_text(LIGHT.replace("gain = 0.0", "hang = true"), encoding="utf-8")
    command = [sys.executable, "-m", "open_mythos.cli", "reproduce", "light", "--configs", ".", "--jobs", "4"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert parent.stderr is not None
        said = [parent.stderr.readline(), parent.stderr.readline()]
        assert [line.split(":")[0] for line in sorted(said)] == ["light ours seed 0", "light ours seed 1"]
        parent.send_signal(signal.SIGTERM)
        parent.communicate(timeout=60)
        assert parent.returncode == 143
    finally:
        parent.kill()
        parent.communicate()
    result = read_json(place / "runs/reproduce-trial-results/light.json")
    assert result is not None
    assert [(r["arm"], r["seed"]) for r in result["runs"]] == [("ours", 0), ("ours", 1)]


def test_a_sign_of_life(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LINE_EVERY_S", 0.0)
    (place / "light.toml").write_text(LIGHT.replace("gain = 0.2", "slow = 0.3"), encoding="utf-8")
    folder = place / "runs/light/ours-seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"st', encoding="utf-8")
    _, told = go(place, seeds=1, changes=(("train", "steps", 9),))
    assert "light ours seed 0: step 4 of 9; light less seed 0: running" in told


def test_gpus_are_shared_evenly_and_cpu_runs_see_none(tmp_path: Path) -> None:
    pool = runner._Pool(settings(tmp_path, jobs=5), print)
    pool.gpus = ["2", "GPU-x"]
    seen = [pool._environment("cuda", slot)["CUDA_VISIBLE_DEVICES"] for slot in range(5)]
    assert seen == ["2", "GPU-x", "2", "GPU-x", "2"]
    assert pool._environment("cpu", 0) == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


# With the real trainer, in this process, which saves importing torch.


def work(run: Run, split: str = "test") -> dict[str, Any]:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "job.json", {"run": run.to_dict(), "split": split, "identity": "x"})
    worker.work(run.folder / "job.json")
    return json.loads((run.folder / f"measured-{split}.json").read_text(encoding="utf-8"))


def test_a_run_trains_and_is_measured_at_every_difficulty_and_loop_count(tmp_path: Path) -> None:
    toy = written(tmp_path)
    ours, once = all_runs(toy, settings(tmp_path))[:2]
    record, flat = work(ours), work(once)
    assert (record["steps"], record["seed"], record["device"]) == (4, 0, "CPU")
    assert record["parameters"] > 0
    assert record["loops"]["max"] <= 2
    measured = record["measured"]
    assert {name: len(curve) for name, curve in measured["curves"].items()} == {
        "trained": 3,
        "12": 3,
        "16": 3,
    }
    assert (measured["metric"], measured["better"], measured["unit"]) == ("accuracy", "higher", "bits")
    assert flat["measured"]["loops"] == [1]
    assert toy.judge([record, flat]).figures[0]["n"] == 1
    table = toy.summary([record, flat])
    assert [row["title"] for row in table["rows"]] == ["ours"] * 3 + ["one loop"] * 3
    assert all(len(row["cells"]) == len(table["columns"]) == len(table["format"]) for row in table["rows"])
    kept = (ours.folder / "run.json").read_bytes()
    assert work(ours, "validation")["measured"]["curves"] != measured["curves"]
    assert (ours.folder / "run.json").read_bytes() == kept  # not trained again


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    (run, *_) = all_runs(written(tmp_path), settings(tmp_path))
    train(run.config, run.folder, stop_at=2)
    assert not run.trained
    assert work(run)["steps"] == 4
    whole = all_runs(written(tmp_path), settings(tmp_path / "other"))[0]
    assert work(whole)["measured"] == work(run)["measured"]


def test_a_folder_that_holds_another_training_is_refused(tmp_path: Path) -> None:
    toy = written(tmp_path)
    run = all_runs(toy, settings(tmp_path))[0]
    train(run.config, run.folder)
    changed = settings(tmp_path, changes=(("optim", "lr", 0.5),))
    with pytest.raises(
        ConfigError, match=r"ours-seed0 holds another run: optim.lr was 0.001 and is 0.5 now; .*--overwrite"
    ):
        runner.reproduce([toy], changed, print)


def test_a_borrowed_model_is_trained_where_it_belongs(tmp_path: Path) -> None:
    written(tmp_path)
    head = TOY.partition("[[")[0]
    user = written(
        tmp_path, head + "uses = 'toy/ours'\n[eval]\nloops = [3]\nlevels = [9]\n[arms.rule]\n", "user"
    )
    record = work(run := all_runs(user, settings(tmp_path))[0])
    assert record["measured"]["loops"] == [3]
    assert list(record["measured"]["curves"]) == ["trained", "9"]
    assert record["steps"] == 4
    assert (tmp_path / "runs/toy/ours-seed0/model").is_dir()
    assert not (run.folder / "model").exists()


def test_a_record_names_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        author = ("-c", "user.name=Toy", "-c", "user.email=toy@example.org")
        return subprocess.check_output(["git", *author, *words], cwd=tmp_path, text=True).strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert worker.code_version(package) == worker.__version__, "no repository"
    git("init", "-q")
    assert worker.code_version(package) == worker.__version__, "a repository that does not hold it"
    git("add", "package")
    git("commit", "-q", "-m", "Begin")
    commit = git("rev-parse", "--short", "HEAD")
    assert worker.code_version(package) == f"{worker.__version__}+g{commit}"
    (tmp_path / "other.txt").write_text("no part of the package")
    assert worker.code_version(package) == f"{worker.__version__}+g{commit}"
    (package / "__init__.py").write_text("changed = True")
    assert worker.code_version(package) == f"{worker.__version__}+g{commit}.dirty"
    monkeypatch.setenv("PATH", "")
    assert worker.code_version(package) == worker.__version__, "no git"
