"""Shared by every test: a fixed seed, and the tests that this machine cannot run skipped with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

UPSTREAM = "open-mythos==0.5.0"
UPSTREAM_HASH = "sha256:5498d64acc8a8098ffdb067b0872be045448c157a89c3acda5db5896f4d0f686"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without CUDA. `upstream` tests skip in their fixture, when upstream cannot be had."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and torch sees none"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure() -> None:
    """One thread: tensors of tests are small, and waiting for a second thread costs more than the work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _prepared_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokens that tests prepare go to a folder of this session, and those of processes that they start too."""
    os.environ["OPEN_MYTHOS_DATA"] = str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """That many threads for operators and kernels of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """Logits that each request's tokens are drawn from in an engine, by the number of the request's sampler."""
    from open_mythos.inference import running

    seen: dict[int, list[Tensor]] = {}
    plain = running.draw

    def draw(samplers: Any, logits: Tensor) -> Tensor:
        for sampler, row in zip(samplers, logits, strict=True):
            seen.setdefault(sampler.number, []).append(row.clone())
        return plain(samplers, logits)

    monkeypatch.setattr(running, "draw", draw)
    return seen


@pytest.fixture(scope="session")
def upstream_dir() -> Path:
    """The folder that holds upstream's `open_mythos` package; for tests marked `upstream`.

    OPEN_MYTHOS_UPSTREAM names it, or else pip fetches the release, once, into the environment's own folder.
    """
    named = os.environ.get("OPEN_MYTHOS_UPSTREAM")
    folder = Path(named) if named else Path(sys.prefix) / "peers" / UPSTREAM.replace("==", "-")
    if not named and not folder.is_dir() and (trouble := _fetch_upstream(folder)):
        pytest.skip(
            f"NOT COMPARED WITH UPSTREAM: pip could not fetch {UPSTREAM} ({trouble}). Run `pip download "
            f"{UPSTREAM} --no-deps`, unzip the wheel into a folder, and name that in OPEN_MYTHOS_UPSTREAM"
        )
    if not (folder / "open_mythos" / "main.py").is_file():
        pytest.fail(f"{folder} has no open_mythos/main.py: see OPEN_MYTHOS_UPSTREAM in CONTRIBUTING.md")
    return folder


def _fetch_upstream(folder: Path) -> str:
    """Download and unpack the release, its bytes checked; what went wrong, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(f"{UPSTREAM} --hash={UPSTREAM_HASH}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1", "--timeout=20"]
        command += ["--dest", temporary, "-r", str(wanted)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            return (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(Path(temporary) / "unpacked")
        if not folder.is_dir():  # another run may have been quicker
            (Path(temporary) / "unpacked").rename(folder)
    return ""
