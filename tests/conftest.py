"""Shared by every test: a fixed seed, and the tests that this machine cannot run skipped with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without CUDA and `upstream` tests without a copy of upstream."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and torch sees none"
    if not os.environ.get("OPEN_MYTHOS_UPSTREAM"):
        reasons["upstream"] = "needs a copy of upstream OpenMythos, and OPEN_MYTHOS_UPSTREAM is not set"
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


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def upstream_dir() -> Path:
    """The folder that holds upstream's `open_mythos` package; for tests marked `upstream`."""
    folder = Path(os.environ["OPEN_MYTHOS_UPSTREAM"])
    if not (folder / "open_mythos" / "main.py").is_file():
        pytest.fail(f"OPEN_MYTHOS_UPSTREAM={folder} has no open_mythos/main.py")
    return folder
