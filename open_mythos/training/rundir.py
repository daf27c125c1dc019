"""The run directory: ``run.json`` (config, versions, totals), what else belongs to a run, and who may use it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from open_mythos.config import ConfigError
from open_mythos.training import dataconfig
from open_mythos.training.checkpoint import CheckpointError, find_checkpoint, write_json
from open_mythos.training.config import RunConfig
from open_mythos.training.state import TrainState

__all__ = ["RUN_FILES", "check_free", "check_same", "clear", "find_run", "restarted", "write_run"]

RUN_FILES = (
    "run.json", "metrics.jsonl", "eval.json", "model", "adapter", "records", "trackers", "checkpoints",
)  # fmt: skip

# What may differ when a run goes on: none of it decides what the run computes, to the bit on the same device, but for
# train.steps, which the learning rate's schedule ends with.
_FREE = {"eval", "log", "checkpoint"}
_FREE_KEYS = {("train", name) for name in ("steps", "log_every", "save_every", "max_skips")}
_FREE_KEYS |= {("data", name) for name in dataconfig.FREE}
# These do decide, by their rounding, but a machine may have been lost; so they are free as well.
_FREE_KEYS |= {
    ("parallel", name) for name in ("device", "compile", "graphs", "recompute", "replicas", "reshard")
}


def find_run(out: Path) -> tuple[dict[str, Any], bool]:
    """The config of the run in ``out``, JSON-ready, and whether it has a checkpoint to go on from.

    Raises:
        CheckpointError: there is no run, or no checkpoint of it is good.
    """
    checkpoints = out / "checkpoints"
    if not any(checkpoints.glob("step-*")) and (out / "run.json").is_file():
        try:
            return json.loads((out / "run.json").read_text(encoding="utf-8"))["config"], False
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{out / 'run.json'} is damaged: {error}") from error
    return find_checkpoint(checkpoints, tensors=False).meta["config"], True


def restarted(out: Path) -> bool:
    """Whether torchrun has started these processes again after a failure, and ``out`` holds what they began."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (out / "run.json").is_file()


def check_free(out: Path, config: RunConfig, saved: dict[str, Any] | None, overwrite: bool) -> None:
    """Say why ``out`` cannot be used, before any work is done.

    Args:
        out: the run directory.
        config: the run's.
        saved: the config of the run that goes on, if one does.
        overwrite: whether a run may be replaced.

    Raises:
        ConfigError: it holds another run, or is no directory.
    """
    if saved is not None and overwrite:
        raise ConfigError("resume and overwrite exclude each other: go on with a run, or replace it")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a file: it must be a directory, or a name that is free")
    if saved is not None:
        check_same(saved, config.to_dict())
    elif not overwrite and any((out / name).exists() for name in RUN_FILES):
        ways = "continue it (--resume), replace it (--overwrite), or name another --out"
        raise ConfigError(f"{out} already holds a run: {ways}")


def check_same(saved: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with a run whose config differs in what decides its numbers."""
    for section, values in new.items():
        for key, value in values.items() if section not in _FREE else ():
            old = saved.get(section, {}).get(key)
            if (section, key) not in _FREE_KEYS and old != value and list(_pair(old)) != list(_pair(value)):
                raise ConfigError(
                    f"{section}.{key} = {value!r} is not allowed: the run to resume has {old!r}"
                )


def _pair(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def clear(out: Path) -> None:
    """An ``out`` without a run in it; other files stay."""
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_run(
    out: Path, config: RunConfig, state: TrainState, data: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write run.json.

    Args:
        out: the run directory.
        config: the run's.
        state: for the totals.
        data: an account of the data.
        facts: further entries, such as the device.
    """
    parameters = list(state.model.parameters())
    run = {
        "name": out.name,
        "config": config.to_dict(),
        "seed": config.train.seed,
        "versions": {
            "open_mythos": _version("open-mythos"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        **facts,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "data": data,
        "steps": state.step,
        "skipped": state.skips,
        "finished": state.step >= config.train.steps and state.balanced >= config.train.balance,
        "tokens": state.tokens,
        "loops": {"mean": state.loops_sum / max(1, state.forwards), "max": state.loops_max},
        "seconds": state.seconds,
    }
    write_json(out / "run.json", run)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
