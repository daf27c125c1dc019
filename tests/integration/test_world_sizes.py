"""A checkpoint of 1, 2 or 4 processes is resumed on 1, 2 or 4 (gloo): the same state, the same order of samples."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_mythos.training.checkpoint import CheckpointError, export_checkpoint, find_checkpoint
from open_mythos.weights import from_pretrained

WORKER = Path(__file__).with_name("world_sizes_worker.py")
SIZES, STEPS, BATCH = (1, 2, 4), 2, 8
PAIRS = list(itertools.product(SIZES, SIZES))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    home = tmp_path_factory.mktemp("worlds")
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(home)],
        env=clean | single,
        capture_output=True,
        text=True,
        timeout=500,
    )
    # Of what went wrong the first lines say most, and they are not the last.
    assert done.returncode == 0, f"{done.stderr[:4000]}\n[…]\n{done.stderr[-2000:]}"
    if "tried once more" in done.stderr:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{done.stderr}")
    return home


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def order(ranks: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of each global batch: rank after rank."""
    return [list(itertools.chain(*batch)) for batch in zip(*(rank["rows"] for rank in ranks), strict=True)]


def shared(tensors: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in tensors.items() if not name.startswith("rng.torch.")}


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_samples_does_not_depend_on_the_number_of_processes(results: dict[str, Any], size: int):
    rows = order(results["whole"][str(size)])
    assert rows == order(results["whole"]["1"])
    assert [len(batch) for batch in rows] == [BATCH] * 2 * STEPS
    assert len({row for batch in rows for row in batch}) > BATCH


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_resume_has_the_saved_state_and_the_next_samples(results: dict[str, Any], source: int, target: int):
    saved, resumed = results["save"][str(source)], results["resume"][f"{source} to {target}"]
    for rank in resumed:
        assert shared(rank["tensors"]) == shared(saved[0]["tensors"])
        assert rank["position"] == saved[0]["position"]
        assert rank["counters"] == saved[0]["counters"]
    assert {name.partition(".")[0] for name in shared(saved[0]["tensors"])} == {"model", "optim", "rng"}
    assert order(saved) + order(resumed) == order(results["whole"]["1"])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_each_rank_has_its_own_noise(results: dict[str, Any], source: int, target: int):
    """That of the saved run where it had the rank, and another for every rank that it did not have."""
    saved, resumed = results["save"][str(source)], results["resume"][f"{source} to {target}"]
    noise = [rank["tensors"][f"rng.torch.{i:05d}"] for i, rank in enumerate(resumed)]
    kept = [rank["tensors"][f"rng.torch.{i:05d}"] for i, rank in enumerate(saved)]
    assert len(set(noise)) == target
    assert noise[:source] == kept[:target]


@pytest.mark.parametrize("size", SIZES)
def test_on_the_same_number_of_processes_the_resumed_run_is_the_unbroken_run(
    results: dict[str, Any], size: int
):
    whole, resumed = results["whole"][str(size)], results["resume"][f"{size} to {size}"]
    for one, other in zip(whole, resumed, strict=True):
        assert one["losses"][STEPS:] == other["losses"]
        assert one["end"] == other["end"]


@pytest.mark.parametrize("size", SIZES)
def test_a_sharded_model_is_exported_from_memory_and_from_the_checkpoint(
    folder: Path, tmp_path: Path, size: int
):
    assert export_checkpoint(folder / f"of-{size}", tmp_path / "model").step == STEPS
    shards = sorted((folder / f"of-{size}" / f"step-{STEPS:09d}").glob("*.safetensors"))
    assert len(shards) == size
    one, other = (from_pretrained(path) for path in (tmp_path / "model", folder / f"model-{size}"))
    assert one.cfg == other.cfg
    for (name, value), (same, second) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(value, second), name
    if size > 1:
        held = [load_file(path)["model.recurrent.block.ffn.w_in"].shape[0] for path in shards]
        assert held == [one.cfg.n_experts // size] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_disk_that_is_full_for_one_process_fails_the_save_of_all(
    results: dict[str, Any], folder: Path, size: int
):
    where = "" if size == 1 else f"rank {size - 1}: "
    for rank in results["save"][str(size)]:
        path = folder / f"of-{size}" / f"step-{STEPS + 1:09d}"
        assert rank["failure"] == f"cannot save {path}: {where}No space left on device"
    assert [path.name for path in (folder / f"of-{size}").iterdir()] == [f"step-{STEPS:09d}"]


@pytest.mark.parametrize("size", [2, 4])
def test_shards_that_changed_places_are_found(folder: Path, tmp_path: Path, size: int):
    shutil.copytree(folder / f"of-{size}", tmp_path / "of")
    shards = sorted((tmp_path / "of").rglob("*.safetensors"))
    chance = random.Random(size)
    for _ in range(3):
        one, other = chance.sample(shards, 2)
        before = {path: path.read_bytes() for path in (one, other)}
        one.write_bytes(before[other])
        other.write_bytes(before[one])
        first = min(one, other)
        with pytest.raises(CheckpointError, match=f"{first.name} is damaged"):
            find_checkpoint(tmp_path / "of")
        for path, held in before.items():
            path.write_bytes(held)
    assert find_checkpoint(tmp_path / "of").meta["world_size"] == size
