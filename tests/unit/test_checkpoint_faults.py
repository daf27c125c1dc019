"""What damage and failing disks do to checkpoints: it is found before a weight is used, and nothing old is lost."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.training import checkpoint, manifest
from open_mythos.training.checkpoint import Checkpointer, CheckpointError, export_checkpoint, find_checkpoint
from open_mythos.training.config import RunConfig, load_config
from open_mythos.training.state import TrainState, state_tensors
from open_mythos.training.trainer import build

NEW, OLD = "step-000000002", "step-000000001"
DAMAGES = 500


@pytest.fixture(scope="module")
def built(root: Path) -> tuple[RunConfig, TrainState]:
    cfg = load_config(root / "configs" / "smoke.toml")
    return cfg, build(cfg)[0]


@pytest.fixture
def folder(built: tuple[RunConfig, TrainState], tmp_path: Path) -> Path:
    """Two checkpoints whose files have the same names and sizes."""
    cfg, state = built
    with Checkpointer(tmp_path) as saver:
        for state.step in (1, 2):
            with torch.no_grad():
                state.model.norm.weight.fill_(state.step)
            saver.save(state, cfg.to_dict())
    return tmp_path


def flip(path: Path, chance: random.Random) -> None:
    held = bytearray(path.read_bytes())
    held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
    path.write_bytes(held)


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def lose(path: Path, chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, chance: random.Random) -> None:
    """With the file of the same name in the other checkpoint."""
    shutil.copyfile(path.parent.with_name(OLD) / path.name, path)


def test_500_damages_are_found_before_a_weight_is_used(
    built: tuple[RunConfig, TrainState],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    _, state = built
    chance, read = random.Random(0), []
    whole = checkpoint._read

    def watched(path: Path, *args: Any) -> None:
        read.append(path.name)
        whole(path, *args)

    monkeypatch.setattr(checkpoint, "_read", watched)
    caplog.set_level(logging.WARNING)
    files = sorted((folder / NEW).iterdir())
    assert len(files) == 3
    kinds: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, lose, swap)
    found = 0
    for turn in range(DAMAGES):
        path, damage = chance.choice(files), kinds[turn % len(kinds)]
        before = path.read_bytes()
        damage(path, chance)
        caplog.clear()
        if turn % 10:
            step, intact = find_checkpoint(folder).step, True
        else:
            state.model.norm.weight.data.zero_()
            step = Checkpointer(folder, asynchronous=False).load(state).step
            intact = read == [OLD] and bool((state.model.norm.weight == 1).all())
        told = [message for message in caplog.messages if str(path) in message and "going back" in message]
        found += step == 1 and intact and len(told) == 1
        path.write_bytes(before)
        read.clear()
    assert found == DAMAGES
    assert find_checkpoint(folder).step == 2


def test_files_that_do_not_belong_are_found(built: tuple[RunConfig, TrainState], folder: Path):
    extra = folder / NEW / ".metadata"
    extra.write_bytes(pickle.dumps("a pickle of another program"))
    with pytest.raises(CheckpointError, match=r"\.metadata does not belong to the checkpoint"):
        export_checkpoint(folder / NEW, folder / "out")
    extra.unlink()
    shard = next((folder / NEW).glob("*.safetensors"))
    shard.rename(folder / "elsewhere")
    shard.symlink_to(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="is no plain file"):
        export_checkpoint(folder / NEW, folder / "out")
    assert not (folder / "out").exists()
    shutil.rmtree(folder / NEW)
    shutil.copytree(folder / OLD, folder / NEW)  # an old state would pass for a new one
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        export_checkpoint(folder / NEW, folder / "out")


def test_every_byte_of_the_manifest_counts(folder: Path):
    manifest = folder / NEW / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        held = bytearray(whole)
        held[place] ^= 1 << place % 8
        manifest.write_bytes(held)
        assert find_checkpoint(folder).step == 1, place
    manifest.write_bytes(json.dumps(json.loads(whole)).encode())
    assert find_checkpoint(folder).step == 1


def test_the_config_is_found_without_reading_tensors(folder: Path):
    (shard,) = (folder / NEW).glob("*.safetensors")
    before = shard.read_bytes()
    flip(shard, random.Random(0))
    assert find_checkpoint(folder, tensors=False).step == 2
    assert find_checkpoint(folder).step == 1
    shard.write_bytes(before[:-1])
    assert find_checkpoint(folder, tensors=False).step == 1
    shard.write_bytes(before)
    flip(folder / NEW / "state.json", random.Random(0))
    assert find_checkpoint(folder, tensors=False).step == 1


def test_a_checkpoint_of_another_version_is_refused(folder: Path):
    state = folder / NEW / "state.json"
    for change in ({"format": 1}, {"more": 1}):
        state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
        names = [path.name for path in (folder / NEW).iterdir() if path.name != "manifest.json"]
        manifest.write_manifest(
            folder / NEW, 2, {name: manifest.entry(folder / NEW / name) for name in names}
        )
        with pytest.raises(CheckpointError, match="is of another version of this library"):
            export_checkpoint(folder / NEW, folder / "out")


def test_without_a_good_checkpoint_all_that_is_wrong_is_told(
    built: tuple[RunConfig, TrainState], folder: Path
):
    _, state = built
    (folder / NEW / "state.json").write_text("{}")
    (folder / OLD / "manifest.json").unlink()
    state.model.norm.weight.data.fill_(7)
    with pytest.raises(
        CheckpointError, match=r"holds no good checkpoint: .*state\.json is damaged.*; .*missing"
    ) as caught:
        Checkpointer(folder).load(state)
    assert "\n" not in str(caught.value)
    assert bool((state.model.norm.weight == 7).all())


def test_a_run_that_went_back_replaces_the_damaged_checkpoint(
    built: tuple[RunConfig, TrainState], folder: Path
):
    cfg, state = built
    (folder / NEW / "state.json").write_text("{}")
    shutil.copytree(folder / NEW, folder / "step-000000009")
    with Checkpointer(folder, keep=2) as saver:
        assert saver.load(state).step == 1
        state.step = 2
        saver.save(state, cfg.to_dict())
    assert sorted(path.name for path in folder.iterdir()) == [OLD, NEW]
    assert find_checkpoint(folder).step == 2


class FullDisk:
    """Counts every call that writes, and fails at one of them; a write then gets only half through."""

    def __init__(self, at: int, number: int = errno.ENOSPC) -> None:
        self.at, self.number, self.calls = at, number, 0

    def fails(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.at

    def error(self) -> OSError:
        return OSError(self.number, os.strerror(self.number))

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.fails():
                raise self.error()
            return call(*args, **kwargs)

        return guarded

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            if self.fails():
                raise self.error()
            return FullFile(self.plain_open(file, mode, *args, **kwargs), self)
        return self.plain_open(file, mode, *args, **kwargs)

    def make_folder(self, path: Any, *args: Any) -> None:
        if not os.path.isdir(path) and self.fails():  # one that is there takes no write
            raise self.error()
        self.plain_mkdir(path, *args)

    @contextmanager
    def in_place(self) -> Iterator[FullDisk]:
        self.plain_open, self.plain_mkdir = io.open, os.mkdir
        with pytest.MonkeyPatch.context() as patch:
            for module in (io, builtins):
                patch.setattr(module, "open", self.open)
            for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, self.guard(getattr(os, name)))
            patch.setattr(os, "mkdir", self.make_folder)
            yield self


class FullFile:
    def __init__(self, file: Any, disk: FullDisk) -> None:
        self.file, self.disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if self.disk.fails():
            self.file.write(data[: len(data) // 2])
            raise self.disk.error()
        return int(self.file.write(data))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fails_at_any_write_of_a_save_costs_nothing_old(
    built: tuple[RunConfig, TrainState],
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    asynchronous: bool,
):
    cfg, state = built

    def save(home: Path, disk: FullDisk) -> None:
        saver = Checkpointer(home, keep=2, asynchronous=asynchronous)
        saver.load(state)
        state.step = 3
        with disk.in_place(), saver:
            saver.save(state, cfg.to_dict())

    def copy(name: str) -> Path:
        home = tmp_path_factory.mktemp("disk") / name
        shutil.copytree(folder, home)
        return home

    clean = FullDisk(-1)
    save(copy("clean"), clean)
    assert clean.calls >= 15  # a folder, three files, their flushes and their folders', a rename, a removal
    late = 0
    for at in range(clean.calls):
        number = (errno.ENOSPC, errno.EIO)[at % 2]
        home = copy(str(at))
        with pytest.raises(
            CheckpointError, match=r"^cannot (save|remove old) .*" + os.strerror(number)
        ) as caught:
            save(home, FullDisk(at, number))
        assert "\n" not in str(caught.value)
        newest = find_checkpoint(home).step
        late += newest == 3  # the save was whole, and only its flush or the removal of old ones failed
        assert newest in (2, 3)
        assert checkpoint._verify(home / NEW, checkpoint._Ranks()).step == 2
        with Checkpointer(home, keep=2) as saver:
            saver.load(state)
            state.step = 4
            saver.save(state, cfg.to_dict())
        assert find_checkpoint(home).step == 4
        assert len(list(home.iterdir())) == 2
    assert late < clean.calls / 2


def test_nothing_is_pickled(
    built: tuple[RunConfig, TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg, state = built

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for owner, names in (
        (pickle, ("load", "loads", "dump", "dumps", "Unpickler")),
        (torch, ("load", "save")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        saver.save(state, cfg.to_dict())
        saver.wait()
        saver.load(state)
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "model")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_state_of_tensors_that_are_not_the_models_is_refused(built: tuple[RunConfig, TrainState]):
    _, state = built
    stray = torch.nn.Parameter(torch.zeros(2))
    other = TrainState(state.model, torch.optim.SGD([stray], momentum=0.9), state.data, state.loops)
    stray.grad = torch.ones(2)
    other.optimizer.step()
    with pytest.raises(
        CheckpointError, match="the optimizer has state of 1 tensors that are not the model's"
    ):
        state_tensors(other, 0)
