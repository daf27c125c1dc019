"""The train state, and its way to disk and back: safetensors and JSON, nothing pickled.

A saved state is ``state.json`` and the tensor file that it names. The tensor file is written first, under a
name of its own, and ``state.json`` is then replaced in one step of the file system: whenever a run is
stopped, the folder holds the last complete state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.model import OpenMythos

__all__ = ["CheckpointError", "Stream", "TrainState", "load_state", "read_meta", "save_state", "write_json"]

FORMAT = 1


class CheckpointError(ValueError):
    """A resume state that is missing, damaged, or belongs to another run."""


class Stream(Protocol):
    """Batches that can say where they are; ``PackedDataset`` and ``TaskStream`` are two."""

    def __next__(self) -> dict[str, Tensor]:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Position, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


@dataclass
class TrainState:
    """Everything that a training step reads and changes, and so everything that a resume needs.

    The learning rate is a function of ``step`` alone. Noise inside the model (dropout, random initial states)
    comes from torch's default generator, whose state is saved as well.

    Attributes:
        model: weights, router biases and the loads they still have to follow.
        optimizer: moments.
        data: where in the data the run is.
        loops: the generator that loop counts are drawn from.
        step: optimiser steps done.
        tokens: input tokens seen.
        loops_sum: loops of all forward passes together.
        loops_max: most loops of one forward pass.
        forwards: forward passes done.
        seconds: time spent training, earlier sessions included.
    """

    model: OpenMythos
    optimizer: torch.optim.Optimizer
    data: Stream
    loops: torch.Generator
    step: int = 0
    tokens: int = 0
    loops_sum: int = 0
    loops_max: int = 0
    forwards: int = 0
    seconds: float = 0.0


_COUNTERS = ("step", "tokens", "loops_sum", "loops_max", "forwards", "seconds")


def save_state(folder: Path, state: TrainState, config: Mapping[str, Any]) -> None:
    """Write ``state`` to ``folder``, replacing an earlier one only when the new one is complete.

    Args:
        folder: made if absent.
        state: what to save.
        config: the run's config, JSON-ready, kept so that a resume can compare it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state.step:09d}.safetensors"
    save_file(_tensors(state), folder / f"{name}.part")
    _settle(folder / f"{name}.part", folder / name)
    counters = {key: getattr(state, key) for key in _COUNTERS}
    meta = {
        "format": FORMAT,
        "tensors": name,
        "data": state.data.state_dict(),
        "config": dict(config),
        **counters,
    }
    write_json(folder / "state.json", meta)
    for old in folder.glob("step-*.safetensors*"):
        if old.name != name:
            old.unlink()


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON side of a saved state: counters, data position, config.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / "state.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no resume state: {path.name} is not there") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    wanted = {"format", "tensors", "data", "config", *_COUNTERS}
    if not isinstance(meta, dict) or set(meta) != wanted:
        raise CheckpointError(f"{path} is not a resume state: it must have exactly the keys {sorted(wanted)}")
    if meta["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {meta['format']!r}; this version reads {FORMAT}")
    return meta


def load_state(folder: Path, state: TrainState) -> None:
    """Put a saved state into ``state``, whose model, optimiser and data were built from the same config.

    Raises:
        CheckpointError: the state is missing, damaged, or does not fit. The model is untouched then.
        ValueError: the data is not the data of the saved run.
    """
    meta = read_meta(folder)
    name = meta["tensors"]
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(
            f"{folder}/state.json names the tensor file {name!r}; it must be a file beside it"
        )
    try:
        tensors = load_file(folder / name)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name} is missing or damaged: {error}") from error
    _check_fit(folder / name, tensors, state)
    state.data.load_state_dict(meta["data"])
    with torch.no_grad():
        for key, value in _model_tensors(state.model).items():
            value.copy_(tensors[key])
    for key, parameter in state.model.named_parameters():
        prefix = f"optim.{key}."
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if moments:
            state.optimizer.state[parameter] = moments
    torch.set_rng_state(tensors["rng.torch"])
    state.loops.set_state(tensors["rng.loops"])
    for key in _COUNTERS:
        setattr(state, key, meta[key])


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by this value in one step; a reader sees the old file or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _settle(part, path)


def _settle(part: Path, path: Path) -> None:
    """Make sure the bytes are on disk, then give the file its name."""
    with part.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _model_tensors(model: OpenMythos) -> dict[str, Tensor]:
    """Parameters and buffers, a tied head once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {f"model.{key}": value.detach() for key, value in named}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = _model_tensors(state.model)
    for key, parameter in state.model.named_parameters():
        for part, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{key}.{part}"] = value
    tensors["rng.torch"] = torch.get_rng_state()
    tensors["rng.loops"] = state.loops.get_state()
    return {key: value.contiguous() for key, value in tensors.items()}


def _check_fit(path: Path, tensors: Mapping[str, Tensor], state: TrainState) -> None:
    wanted = {
        **_model_tensors(state.model),
        "rng.torch": torch.get_rng_state(),
        "rng.loops": state.loops.get_state(),
    }
    for key, value in wanted.items():
        if key not in tensors:
            raise CheckpointError(f"{path} does not fit this run: it lacks {key}")
        if (tensors[key].shape, tensors[key].dtype) != (value.shape, value.dtype):
            got = f"{tensors[key].dtype} {tuple(tensors[key].shape)}"
            raise CheckpointError(
                f"{path} does not fit this run: {key} is {got}, not {value.dtype} {tuple(value.shape)}"
            )
    names = {key for key, _ in state.model.named_parameters()}
    for key in tensors:
        if key not in wanted and not (key.startswith("optim.") and key[6:].rpartition(".")[0] in names):
            raise CheckpointError(
                f"{path} does not fit this run: it holds {key}, which this model does not have"
            )
