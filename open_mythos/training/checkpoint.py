"""Checkpoints: the train state on disk, sharded, whole or not there at all, and checked before it is used.

A checkpoint is a folder ``step-000000123`` of safetensors shards (torch's distributed checkpoint, DCP, in its
safetensors format), ``state.json`` and ``manifest.json``. It is written under a hidden name, every file is
flushed to disk, and the folder is then renamed: what bears a step's name is complete. The manifest holds the
size and SHA-256 of every file, and of itself. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.training.manifest import (
    FORMAT,
    entry,
    is_step,
    number,
    read_manifest,
    steps,
    sync,
    write_manifest,
)
from open_mythos.training.state import (
    CheckpointError,
    Saved,
    TrainState,
    adopt,
    counters,
    room_for,
    state_tensors,
)
from open_mythos.weights import save_pretrained
from open_mythos.weights.pretrained import assemble, skeleton

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "export_checkpoint",
    "find_checkpoint",
    "write_json",
]

STATE = "state.json"
_META = {"format", "world_size", "counters", "data", "config"}
_HIDDEN = (".saving-", ".removing-")
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been checked.

    Attributes:
        path: its folder.
        step: optimiser steps done.
        meta: ``config``, ``data`` (position), ``world_size`` (processes that saved) and ``counters``.
    """

    path: Path
    step: int
    meta: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every process calls every method, at the same point.

    Make it after the process group, if there is one. Leftovers of saves that were killed are removed here; no
    other run may be writing to the folder.

    Args:
        folder: holds the checkpoints; made by the first save.
        keep: how many to keep, the newest; at least 1.
        asynchronous: copy the state to host memory and write it beside the training. At most one save is in
            flight, and its error is raised by the next call.

    Raises:
        ConfigError: ``keep`` is not allowed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, asynchronous: bool = True) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"keep = {keep!r} is not allowed: it must be a whole number of at least 1")
        self.folder = Path(folder)
        self.keep = keep
        self._ranks = _Ranks.all()
        self._pool = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._at: int | None = None  # the step that this run last loaded or saved
        self._ranks.each(f"cannot clean {self.folder}", partial(_clean, self.folder), only_first=True)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as trouble:
            if error is None:
                raise
            _log.error("%s", trouble)  # the error that is under way matters more

    def save(self, state: TrainState, config: Mapping[str, Any]) -> None:
        """Save ``state`` as the checkpoint of its step, and remove the oldest beyond ``keep``.

        A checkpoint of a later step is removed too: it was found damaged, and the run went back to before it.

        Args:
            state: what to save. It may change as soon as this returns.
            config: the run's config, JSON-ready, kept so that a resume can compare it.

        Raises:
            CheckpointError: this save, or the one before when that was asynchronous, could not be written. The
                checkpoints before it are intact.
        """
        self.wait()
        if state.step == self._at:
            return
        tensors = state_tensors(state, self._ranks.rank)
        meta = {
            "format": FORMAT,
            "world_size": self._ranks.size,
            "counters": counters(state),
            "data": state.data.state_dict(),
            "config": dict(config),
        }
        if self._pool is None:
            self._write(state.step, tensors, meta)
        else:
            staged = BlockingAsyncStager().stage(tensors)
            self._pending = self._pool.submit(self._write, state.step, staged, meta)

    def wait(self) -> None:
        """Until the save in flight is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """:meth:`wait`, and end the writing thread."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def latest(self) -> Checkpoint:
        """The newest good checkpoint. One that is damaged is told of in a warning, with the file, and passed over.

        Raises:
            CheckpointError: there is none.
        """
        return _latest(self.folder, self._ranks)

    def load(self, state: TrainState, checkpoint: Checkpoint | None = None) -> Checkpoint:
        """Put a checkpoint into ``state``, whose parts were built from the same config, on any number of ranks.

        Args:
            state: where to.
            checkpoint: from :meth:`latest`; asked for when None.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: there is none, or it does not fit. The model is untouched then.
            ValueError: the data is not the data of the saved run.
        """
        found = self.latest() if checkpoint is None else checkpoint
        rank, ranks, numbers = self._ranks.rank, found.meta["world_size"], found.meta["counters"]
        if set(numbers) != set(counters(state)):
            raise CheckpointError(
                f"{found.path / STATE} counts {sorted(numbers)}, not {sorted(counters(state))}"
            )
        try:
            room = room_for(state, _contents(found.path), rank, ranks)
        except CheckpointError as error:
            raise CheckpointError(f"{found.path}: {error}") from error
        state.data.load_state_dict(found.meta["data"])
        _read(found.path, room, self._ranks)
        adopt(state, room, numbers, rank, ranks)
        self._at = found.step
        return found

    def _write(self, step: int, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> None:
        name, ranks = f"step-{step:09d}", self._ranks
        hidden, trouble = self.folder / f".saving-{name}", f"cannot save {self.folder / name}"
        try:
            ranks.each(trouble, partial(_begin, hidden, self._at is None), only_first=True)
            ranks.each(trouble, partial(_store, hidden, tensors, ranks))
            files = ranks.each(trouble, partial(_settle, hidden, f"shard-{ranks.rank + 1:05d}-"))
            listed = dict(named for part in files for named in part.items())
            ranks.each(trouble, partial(_commit, hidden, step, listed, meta), only_first=True)
        except CheckpointError:
            if ranks.rank == 0:  # room for the next attempt; what stays is removed when the run starts again
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        removal = partial(_retain, self.folder, step, self.keep)
        ranks.each(f"cannot remove old checkpoints of {self.folder}", removal, only_first=True)
        self._at = step


def find_checkpoint(folder: str | os.PathLike[str], *, tensors: bool = True) -> Checkpoint:
    """:meth:`Checkpointer.latest` for one process alone, which writes nothing.

    Args:
        folder: holds the checkpoints.
        tensors: False only wants the config and counters, and hashes no tensors: soon done at any size.

    Raises:
        CheckpointError: there is no good checkpoint.
    """
    return _latest(Path(folder), _Ranks(), tensors)


def export_checkpoint(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Checkpoint:
    """Write the weights of a checkpoint as ``config.json`` and safetensors. Only the weights are read.

    Args:
        source: one checkpoint, or a folder of checkpoints, whose newest good one is taken.
        directory: for :func:`~open_mythos.weights.save_pretrained`.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(source)
    found = _verify(path, _Ranks()) if is_step(path) else find_checkpoint(path)
    model = skeleton(MythosConfig.from_dict(found.meta["config"]["model"]))
    room = {
        name: torch.empty(shape, dtype=dtype)
        for name, (dtype, shape) in _contents(found.path).items()
        if name.startswith("model.")
    }
    _read(found.path, room, _Ranks())
    state = {name.removeprefix("model."): tensor for name, tensor in room.items()}
    save_pretrained(assemble(model, state), directory)
    return found


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by this value in one step; a reader sees the old file or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(part)
    os.replace(part, path)


@dataclass(frozen=True)
class _Ranks:
    """The processes that save and load together; by default one alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def all(cls) -> _Ranks:
        """All of the job, with a group of their own: a save in the background must not meet training's calls."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def each(self, trouble: str, work: Callable[[], _T], only_first: bool = False) -> list[_T]:
        """What ``work`` returns on every rank, or one error on all ranks when it fails on any.

        Args:
            trouble: begins the message.
            work: done by every rank.
            only_first: by rank 0 only.
        """
        done: list[_T] = []
        failed = ""
        cause: BaseException | None = None
        try:
            if self.rank == 0 or not only_first:
                done.append(work())
        except (Exception, dcp.CheckpointException) as error:
            failed, cause = _reason(error), error
        outcomes = self.gather((failed, done))
        where = "" if self.size == 1 else "rank {}: "
        reasons = [where.format(rank) + reason for rank, (reason, _) in enumerate(outcomes) if reason]
        if reasons:
            raise CheckpointError(f"{trouble}: {'; '.join(reasons)}") from cause
        return [value for _, values in outcomes for value in values]

    def gather(self, value: _T) -> list[_T]:
        """Every rank's value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _reason(error: BaseException) -> str:
    """One line on what went wrong."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(sorted({str(first) for first, _ in error.failures.values()}))
    return " ".join((str(error) or type(error).__name__).split())


def _begin(hidden: Path, fresh: bool) -> None:
    """A hidden folder to write to."""
    if fresh and (held := steps(hidden.parent)):
        raise CheckpointError(
            f"{held[0].name} is there already, of a run that was not loaded; clear the folder"
        )
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)


def _store(hidden: Path, tensors: dict[str, Tensor], ranks: _Ranks) -> None:
    """This rank's shard, by DCP."""
    _expect_one_process()
    writer = HuggingFaceStorageWriter(str(hidden), save_distributed=True)
    # Or a thread in the background would synchronise a CUDA device whose work training may be capturing.
    writer.per_thread_copy_ahead = 0
    dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.group is None)


def _settle(hidden: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Name → size and hash of this rank's files, once they are on disk."""
    entries = {}
    for path in sorted(hidden.glob(f"{prefix}*")):
        sync(path)
        entries[path.name] = entry(path)
    return entries


def _commit(hidden: Path, step: int, files: dict[str, dict[str, Any]], meta: Mapping[str, Any]) -> None:
    """State, manifest, and the name that says that all is there."""
    if away := [name for name in files if not (hidden / name).is_file()]:
        raise CheckpointError(f"{away[0]} is on another disk; all processes must save to the same folder")
    (hidden / STATE).write_text(json.dumps(meta, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync(hidden / STATE)
    files = {**files, STATE: entry(hidden / STATE)}
    write_manifest(hidden, step, files)
    sync(hidden)
    final = hidden.with_name(hidden.name.removeprefix(".saving-"))
    if final.exists():  # damaged: the run went back to before it
        _remove(final)
    os.rename(hidden, final)
    sync(hidden.parent)


def _retain(folder: Path, step: int, keep: int) -> None:
    held = steps(folder)
    past = [path for path in held if number(path) <= step]
    for path in [*(path for path in held if number(path) > step), *past[keep:]]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, so that no half of it ever bears its name."""
    gone = path.with_name(f".removing-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone)


def _clean(folder: Path) -> None:
    """Remove what killed saves and removals left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(_HIDDEN):
            shutil.rmtree(path)


def _latest(folder: Path, ranks: _Ranks, tensors: bool = True) -> Checkpoint:
    complaints = []
    for path in steps(folder):
        try:
            return _verify(path, ranks, tensors)
        except CheckpointError as error:
            complaints.append(str(error))
            _log.warning("%s; going back to the checkpoint before it", error)
    if not complaints:
        raise CheckpointError(f"{folder} holds no checkpoint")
    raise CheckpointError(f"{folder} holds no good checkpoint: {'; '.join(complaints)}")


def _verify(path: Path, ranks: _Ranks, tensors: bool = True) -> Checkpoint:
    """The checkpoint, if every file is what the manifest says. Each rank reads its share of the files."""
    reason, meta = "", {}
    try:
        files = read_manifest(path)
        for name in sorted(files)[ranks.rank :: ranks.size] if tensors else [STATE]:
            if entry(path / name) != files[name]:
                raise CheckpointError(f"{path / name} is damaged: it is not what was written")
        meta = json.loads((path / STATE).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or set(meta) != _META:
            raise CheckpointError(f"{path / STATE} is of another version of this library")
    except CheckpointError as error:
        reason = str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} cannot be read: {_reason(error)}"
    reasons = [other for other in ranks.gather(reason) if other]
    if reasons:
        raise CheckpointError(reasons[0])
    return Checkpoint(path, number(path), meta)


def _contents(path: Path) -> Saved:
    """Dtypes and shapes, from the headers of the shards."""
    held: Any  # of tensors; the type that DCP gives allows for pickles too
    try:
        held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} holds a shard that is no safetensors file: {error}") from error
    return {name: (item.properties.dtype, tuple(item.size)) for name, item in held.items()}


def _read(path: Path, room: dict[str, Tensor], ranks: _Ranks) -> None:
    _expect_one_process()
    try:
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(room, storage_reader=reader, process_group=ranks.group, no_dist=ranks.group is None)
    except (dcp.CheckpointException, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def _expect_one_process() -> None:
    """DCP warns when there is no process group, and that is how one process saves."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
