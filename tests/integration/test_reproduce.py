"""Every experiment of the repository, as a toy: its first arm is trained, measured, judged and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from open_mythos.reproduce import base, results, worker
from open_mythos.reproduce.pages import figure, page
from open_mythos.reproduce.plan import Settings, all_runs, is_asked
from open_mythos.reproduce.runs import write_json

EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs" / "reproduce").glob("*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_toy_of_every_experiment_runs(path: Path, tmp_path: Path) -> None:
    experiment = base.load(path)
    settings = Settings(runs=tmp_path / "runs", out=tmp_path, quick=True, device="cpu")
    runs = all_runs(experiment, settings)
    run = next(run for run in runs if is_asked(run, experiment, settings))
    run.folder.mkdir(parents=True)
    write_json(run.folder / "job.json", {"run": run.to_dict(), "split": "test", "identity": "x"})
    worker.work(run.folder / "job.json")
    record = json.loads((run.folder / "measured-test.json").read_text(encoding="utf-8"))
    result = results.build(experiment, settings, runs, [record], [])
    write_json(tmp_path / "result.json", result)
    (read,) = [found for found in results.read_all(tmp_path) if found["file"] == "result"]
    assert result["verdict"]["state"] == "unfinished"
    assert f"## {experiment.title}" in page([read], Path())
    assert figure(read).startswith(b"\x89PNG")
