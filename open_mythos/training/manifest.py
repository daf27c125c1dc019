"""The files of a checkpoint with their sizes and hashes, by which damage is found before anything is used.

The manifest holds a hash of itself and is read only as the very bytes that it was written in, so that no change
to it goes unseen either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_mythos.training.state import CheckpointError

__all__ = ["FORMAT", "entry", "is_step", "number", "read_manifest", "steps", "sync", "write_manifest"]

FORMAT = 2
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{9,})")


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Name → size and hash of the files of a checkpoint, whose names and sizes are right.

    Raises:
        CheckpointError: the manifest is missing or changed, or a file is missing, too many, or of another size.
        OSError: the folder cannot be read.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / MANIFEST} is missing") from error
    try:
        held = json.loads(text)
        body = {key: held[key] for key in ("format", "step", "files")}
        intact = _text(body) == text
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact or body["step"] != number(path):
        raise CheckpointError(f"{path / MANIFEST} is damaged: it is not what was written")
    files: dict[str, dict[str, Any]] = body["files"]
    there = {found.name for found in os.scandir(path)} - {MANIFEST}
    for name in sorted(there ^ set(files)):
        state = "is missing" if name in files else "does not belong to the checkpoint"
        raise CheckpointError(f"{path / name} {state}")
    for name, held in files.items():
        status = os.lstat(path / name)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path / name} is damaged: it is no plain file")
        if status.st_size != held["bytes"]:
            raise CheckpointError(
                f"{path / name} is damaged: it has {status.st_size} bytes, not the {held['bytes']} that were written"
            )
    return files


def write_manifest(path: Path, step: int, files: Mapping[str, Any]) -> None:
    """List these files of the checkpoint in ``path``."""
    (path / MANIFEST).write_bytes(_text({"format": FORMAT, "step": step, "files": files}))
    sync(path / MANIFEST)


def entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _text(body: Mapping[str, Any]) -> bytes:
    """The only bytes that say this, the hash of the rest among them."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def is_step(path: Path) -> bool:
    """Whether the name is that of a checkpoint."""
    return _STEP.fullmatch(path.name) is not None


def steps(folder: Path) -> list[Path]:
    """Checkpoints by name, the newest first."""
    found = [path for path in folder.iterdir() if is_step(path)] if folder.is_dir() else []
    return sorted(found, key=number, reverse=True)


def number(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
