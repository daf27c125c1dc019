"""Processes killed with SIGKILL, and a disk with a limit: real faults of the real ``mythos train``."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from open_mythos.training.checkpoint import find_checkpoint
from open_mythos.training.config import load_config
from open_mythos.training.trainer import train

KILLS = 25

pytestmark = pytest.mark.slow


def test_25_kills_are_resumed_bit_for_bit(root: Path, tmp_path: Path):
    script = root / "benchmarks" / "kill_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), f"--kills={KILLS}", "--limit=400", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record = json.loads((tmp_path / "kill_resume.json").read_text())
    assert record["faults"] == []
    assert record["kills"] == KILLS
    assert record["inside"] >= 0.3 * KILLS
    assert record["resumes"] > KILLS / 2
    assert record["finished"] >= 1
    assert record["steps"] >= 4


def test_a_disk_that_takes_no_more_ends_training_with_an_error_and_the_last_checkpoint(
    root: Path, tmp_path: Path
):
    """The kernel refuses every file above 100 kB, and so the first shard."""
    smoke, out = root / "configs" / "smoke.toml", tmp_path / "run"
    train(load_config(smoke), out, stop_at=3)
    refused = subprocess.run(
        [sys.executable, "-m", "open_mythos.cli", "train", str(smoke), f"--out={out}", "--resume", "--quiet"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert refused.returncode != 0
    assert refused.stderr.startswith("mythos: error: cannot save ")
    assert "step-000000006: " in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert find_checkpoint(out / "checkpoints").step == 3
    train(load_config(smoke), out, resume=True)
    assert find_checkpoint(out / "checkpoints").step == 6
