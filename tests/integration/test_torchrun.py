"""Two processes that torchrun starts on this machine (gloo) train as one does, and survive the loss of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from open_mythos.training.config import load_config
from open_mythos.training.trainer import train

OVERRIDES = ("train.log_every=1", "parallel.device=cpu")
WORKER = Path(__file__).with_name("torchrun_worker.py")
CHECKS = (
    "gradient", "gradient per sequence", "gradient accumulated", "adamw", "muon", "loss", "gradient norm",
    "noise", "trouble",
)  # fmt: skip


class Done(NamedTuple):
    """What came of the two processes: their checks, and the run in which one of them was killed."""

    checks: list[dict[str, str]]
    run: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("torchrun")
    restarts = ("--max-restarts", "1", "--monitor-interval", "0.2")
    mythos = ("train", str(root / "configs" / "smoke.toml"), *OVERRIDES, "--out", "run", "--stop-at", "5")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *restarts,
    ]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    ended = subprocess.run(
        [*command, str(WORKER), str(folder), *mythos],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    checks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return Done(checks, folder / "run", ended.stdout, ended.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(done: Done, check: str):
    assert set(done.checks[0]) == set(CHECKS)
    for rank, results in enumerate(done.checks):
        assert not results[check], f"on rank {rank}:\n{results[check]}"


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_was_killed_and_then_on_one_process(
    done: Done, root: Path, tmp_path: Path
):
    """Rank 1 is killed in step 4; torchrun starts both again, and they resume from the checkpoint of step 3."""
    assert done.stdout.split() == ["run"]
    assert done.stderr.count("device: 2 × CPU, 1 threads, fp32") == 2  # once for each start
    run = json.loads((done.run / "run.json").read_text())
    assert (run["processes"], run["steps"], run["finished"]) == (2, 5, False)

    settings = load_config(root / "configs" / "smoke.toml", OVERRIDES)
    train(settings, done.run, resume=True)
    whole = train(settings, tmp_path / "whole")
    got, wanted = ((run / "metrics.jsonl").read_text().splitlines() for run in (done.run, whole))
    rows = [(json.loads(one), json.loads(other)) for one, other in zip(got, wanted, strict=True)]
    assert [one["step"] for one, _ in rows] == [1, 2, 3, 4, 5, 6]
    for one, other in rows:
        assert one["n_loops"] == other["n_loops"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
