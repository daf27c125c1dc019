"""Everything that a resume needs, declared in one place, and as named tensors and JSON.

Names: ``model.<parameter or buffer>``, ``optim.<parameter>.<part>``, ``rng.loops``, and per process
``rng.<kind>.<rank>``. Wrappers of compile and recompute are left out of the names and parameters are named, not
numbered, so a state fits however the model is wrapped, sharded or grouped for its optimiser.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_mythos.model import OpenMythos
from open_mythos.weights.pretrained import WRAPPERS, assemble, skeleton

__all__ = [
    "CheckpointError",
    "Saved",
    "Stream",
    "TrainState",
    "adopt",
    "counters",
    "gather_model",
    "room_for",
    "state_tensors",
]

Saved = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name → dtype and full shape of the tensors of a checkpoint."""

COUNTS = ".expert_load"
"""Buffers in which each rank counts its own tokens, until the router's bias has followed their sum."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is missing or damaged, or belongs to another run."""


class Stream(Protocol):
    """Batches that can say where they are, in words that do not depend on the number of processes."""

    def __next__(self) -> dict[str, Tensor]:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Position, as JSON values; the same on every process."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


@dataclass
class TrainState:
    """Everything that a training step reads and changes, and so everything that a resume needs.

    The learning rate is a function of ``step`` alone. Noise inside the model (dropout, random initial states)
    comes from the default generators of each process, which are saved as well. A field that has a number as
    its default is a counter: declaring one is all it takes to have it saved and resumed.

    Attributes:
        model: weights, router biases and the loads they still have to follow; sharded or not.
        optimizer: its state of each parameter, in tensors.
        data: where in the data the run is.
        loops: the generator that loop counts are drawn from; the same on every process.
        step: optimiser steps done.
        tokens: input tokens seen.
        loops_sum: loops of all forward passes together; a pass counts with the mean over its sequences.
        loops_max: most loops of one forward pass.
        forwards: forward passes done.
        seconds: time spent training, earlier sessions included.
        skips: steps whose update was left out, because a loss or a gradient was not finite.
        skips_in_row: those of them that nothing has followed.
        balanced: ``train.balance``, once that was done after the last step.
    """

    model: OpenMythos
    optimizer: torch.optim.Optimizer
    data: Stream
    loops: torch.Generator
    step: int = 0
    tokens: int = 0
    loops_sum: float = 0
    loops_max: int = 0
    forwards: int = 0
    seconds: float = 0.0
    skips: int = 0
    skips_in_row: int = 0
    balanced: int = 0


def counters(state: TrainState) -> dict[str, int | float]:
    """The counters of a state, by name."""
    return {f.name: getattr(state, f.name) for f in fields(state) if f.default is not MISSING}


def state_tensors(state: TrainState, rank: int) -> dict[str, Tensor]:
    """Name → tensor of all that is not JSON: the live tensors of model and optimiser, and this rank's noise.

    Every rank must call it.

    Raises:
        CheckpointError: the optimiser has state of a tensor that is not the model's, so it would be lost.
    """
    tensors = _counted_together(_model_tensors(state.model))
    held = {id(parameter): parts for parameter, parts in state.optimizer.state.items() if parts}
    for name, parameter in _parameters(state.model).items():
        for part, value in held.pop(id(parameter), {}).items():
            tensors[f"optim.{name}.{part}"] = value.detach()
    if held:
        raise CheckpointError(
            f"the optimizer has state of {len(held)} tensors that are not the model's parameters"
        )
    tensors["rng.loops"] = state.loops.get_state()
    return tensors | {f"rng.{kind}.{rank:05d}": value for kind, value in _noise().items()}


def room_for(state: TrainState, saved: Saved, rank: int, ranks: int) -> dict[str, Tensor]:
    """Tensors to read a checkpoint into: the model's own, new ones for the rest. :func:`adopt` takes them over.

    Args:
        state: built from the config of the saved run.
        saved: what the checkpoint holds.
        rank: of this process.
        ranks: how many processes saved.

    Raises:
        CheckpointError: the checkpoint does not fit; the message names the tensor.
    """
    model, parameters = _model_tensors(state.model), _parameters(state.model)
    own = rank if rank < ranks else 0
    room = model | {"rng.loops": state.loops.get_state(), f"rng.torch.{own:05d}": torch.get_rng_state()}
    _check_fit(saved, room)
    settings = {id(p): group for group in state.optimizer.param_groups for p in group["params"]}
    for key, (dtype, shape) in saved.items():
        kind, _, rest = key.partition(".")
        if kind == "optim":
            name = rest.rpartition(".")[0]
            if name not in parameters or id(parameters[name]) not in settings:
                raise CheckpointError(f"it does not fit this run: it holds {key}, which this run has not")
            room[key] = _moment(parameters[name], settings[id(parameters[name])], dtype, shape)
        elif rest == f"cuda.{own:05d}":
            room[key] = torch.empty(shape, dtype=dtype)
    return room


def adopt(
    state: TrainState, room: Mapping[str, Tensor], numbers: Mapping[str, Any], rank: int, ranks: int
) -> None:
    """Take over what was read into :func:`room_for`; the model's tensors are in place by then.

    A rank that the saved run did not have gets noise of its own, derived from rank 0's.
    """
    for name, parameter in _parameters(state.model).items():
        prefix = f"optim.{name}."
        parts = {key.removeprefix(prefix): value for key, value in room.items() if key.startswith(prefix)}
        state.optimizer.state.pop(parameter, None)
        if parts:
            state.optimizer.state[parameter] = parts
    for key, value in room.items():
        if key.endswith(COUNTS) and rank:
            value.zero_()  # rank 0 holds what all had counted
    state.loops.set_state(room["rng.loops"])
    own = f".{rank if rank < ranks else 0:05d}"
    noise = {key[4 : -len(own)]: v for key, v in room.items() if key.startswith("rng.") and key.endswith(own)}
    if rank < ranks:
        _set_noise(noise)
    else:
        digest = hashlib.sha256(noise["torch"].numpy().tobytes() + str(rank).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
    for key, value in numbers.items():
        setattr(state, key, value)


def gather_model(model: OpenMythos) -> OpenMythos | None:
    """A whole copy of a sharded model on the CPU of rank 0, and None on the others. Every rank must call it.

    One tensor at a time is gathered, so no other device needs room for the whole model.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for key, tensor in _counted_together(_model_tensors(model)).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            state[key.removeprefix("model.")] = whole.to("cpu", copy=True)
    return assemble(skeleton(model.cfg), state).train(model.training) if first else None


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by the model's own name, a tied head once."""
    return {WRAPPERS.sub("", name): parameter for name, parameter in model.named_parameters()}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, a tied head once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {f"model.{WRAPPERS.sub('', name)}": value.detach() for name, value in named}


def _counted_together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with what each rank has counted for itself summed over the ranks."""
    if not dist.is_initialized():
        return tensors
    sums = {key: value.clone() for key, value in tensors.items() if key.endswith(COUNTS)}
    for value in sums.values():
        dist.all_reduce(value)
    return tensors | sums


def _check_fit(saved: Saved, wanted: Mapping[str, Tensor]) -> None:
    for key, value in wanted.items():
        if key not in saved:
            raise CheckpointError(f"it does not fit this run: it lacks {key}")
        if saved[key] != (value.dtype, tuple(value.shape)):
            dtype, shape = saved[key]
            raise CheckpointError(
                f"it does not fit this run: {key} is {dtype} {shape}, not {value.dtype} {tuple(value.shape)}"
            )
    for key in saved:
        if key not in wanted and not key.startswith(("optim.", "rng.")):
            raise CheckpointError(f"it does not fit this run: it holds {key}, which this model does not have")


def _moment(
    parameter: Tensor, settings: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """An empty tensor of the optimiser's state, where the optimiser would have put it."""
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    # Step counts: torch.optim keeps them on the CPU unless its kernel reads them on the device.
    on_device = settings.get("fused") or settings.get("capturable")
    return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _noise() -> dict[str, Tensor]:
    """The default generators of this process that training draws from: torch's, and CUDA's once it is in use."""
    noise = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        noise["cuda"] = torch.cuda.get_rng_state()
    return noise


def _set_noise(noise: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(noise["torch"])
    if "cuda" in noise and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(noise["cuda"])
