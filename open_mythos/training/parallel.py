"""One run on many devices: who this process is, and FSDP2 put around the model from outside.

The process group, the meshes, the sharding and the collectives are torch's own; see docs/scaling.md.

Shape letters: B batch, S sequence, D model width.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from open_mythos.config import ConfigError
from open_mythos.training.acceleration import accelerate
from open_mythos.training.objective import Objective

__all__ = ["World", "init_world", "last_of_step", "parallelize", "shard", "whole"]

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class World:
    """This process among those that train together. A process alone is a world of one, without a group.

    Attributes:
        rank: of this process, from 0.
        local_rank: the same among the processes of this machine; its device's number.
        size: all processes.
        device: where this process computes.
        mesh: how the processes hold the parameters: sharded along the last dimension, and along the first of
            two in whole copies. None for a process alone.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes what only one may write."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """A new tensor, summed over all ranks, on the device of ``value``; the host does not wait for it."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def all_agree(self, flag: bool) -> bool:
        """Whether every rank says True. The host waits for the slowest rank, the device does not."""
        if self.size == 1:
            return bool(flag)
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-ready value on every rank; what the others pass is not read."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor(len(text))
        dist.broadcast(length, src=0)
        letters = torch.frombuffer(bytearray(text or int(length) * b" "), dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        return json.loads(bytes(letters.tolist()))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_agree(True)

    def close(self) -> None:
        """Leave the process group, once no rank will talk any more."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def init_world(device: str = "auto", replicas: int = 1, timeout: float = 600.0) -> World:
    """Join the processes that torchrun started; a process started otherwise is alone.

    A process group that is there already is used as it is.

    Args:
        device: "auto" (CUDA where there is one), "cuda" or "cpu".
        replicas: whole copies of the parameters, each sharded over size / replicas neighbouring ranks
            (HSDP). 1 shards over all ranks, the world size shards nothing (as DDP does).
        timeout: seconds after which a collective that waits for a lost rank fails.

    Raises:
        ConfigError: the device is not there, ``replicas`` does not divide the world size, or torchrun's
            variables are not all set.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device = {device!r} is not allowed: it must be 'auto', 'cuda' or 'cpu'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda' is not allowed: torch sees no CUDA device; it must be 'cpu'")
    rank, local_rank, size = (_environment(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    size = max(1, size)
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1 or size % replicas:
        allowed = "a whole number of at least 1 that divides the world size"
        raise ConfigError(f"replicas = {replicas!r} is not allowed: it must be {allowed}, {size}")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"LOCAL_RANK = {local_rank} is not allowed: this machine has {count} CUDA devices")
    place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        return World(0, local_rank, 1, place, None)
    if not dist.is_initialized():
        # What torchrun restarts finds the store of the first attempt, with the addresses of the dead in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=place if kind == "cuda" else None,
        )
    if replicas == 1:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    return World(rank, local_rank, size, place, mesh)


def _environment(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdigit():
        raise ConfigError(
            f"{name} = {text!r} is not allowed: torchrun sets it to a whole number of at least 0"
        )
    return int(text)


class _Unit(nn.Module):
    """What is gathered and reduced together, and the one call in which it is used.

    FSDP2's hooks sit on units and not on the model's modules: a hook on the looped block would reduce its
    gradient once a loop. A unit's forward runs any function, and all calls inside it find plain parameters.

    Args:
        held: modules whose parameters the unit may hold.
    """

    def __init__(self, *held: nn.Module) -> None:
        super().__init__()
        self.held = nn.ModuleList(held)
        self.running = False

    def forward(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(*tensors)``; the parameters are reduced once gradients of all ``tensors`` are known."""
        self.running = True
        try:
            out = function(*tensors)
        finally:
            self.running = False
        # FSDP2 hangs its backward on the output, and warns of views, on which hooks can be lost.
        return out.clone() if isinstance(out, Tensor) and out._base is not None else out

    def enter_by(self, owner: nn.Module, name: str, root: _Unit | None = None) -> None:
        """Let calls of the owner's method go through this unit, which works only within ``root``."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def through(*args: Any, **kwargs: Any) -> Any:
            # A graph task means that a backward runs this again, to recompute: the unit is gathered then.
            if self.running or torch._C._current_graph_task_id() != -1:
                return plain(*args, **kwargs)
            if root is not None and not root.running:
                raise RuntimeError(f"model.{name} of a sharded model is not allowed: call the whole model")
            count = next((i for i, arg in enumerate(args) if not isinstance(arg, Tensor)), len(args))
            rest = args[count:]
            out = self(lambda *tensors: plain(*tensors, *rest, **kwargs), *args[:count])
            if root is None and not torch.is_grad_enabled():
                _free(self)
            return out

        setattr(owner, name, through)


def shard(objective: Objective, world: World, *, precision: str = "fp32", reshard: bool = False) -> None:
    """Shard parameters, gradients and, with them, optimiser state over the world (FSDP2), in place.

    Afterwards ``objective(...)``, ``model(...)`` and ``model.generate(...)`` work as before, on every rank at
    once, and gradients are means over the ranks. Parameters become DTensors of the same names. In one step,
    whatever the number of loops, prelude, looped core and coda are gathered once and reduced once each, and
    so is what is left over. The core's gradient is reduced while the prelude runs backward.

    Args:
        objective: holds the model.
        world: nothing is done when it is one process.
        precision: "bf16" computes with matrices cast when they are gathered, and reduces gradients in
            float32. Vectors (norms, biases, the injection's A, Δ and B) and all buffers (router bias and counts)
            stay as they are. "fp32" casts nothing.
        reshard: free the prelude between forward and backward and gather it again: a little memory for a
            little communication.

    Raises:
        ConfigError: ``precision`` is none of these.
    """
    if precision not in PRECISIONS:
        allowed = " or ".join(map(repr, PRECISIONS))
        raise ConfigError(f"precision = {precision!r} is not allowed: it must be {allowed}")
    if world.mesh is None:
        return
    model = objective.model
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = narrow if precision == "bf16" else plain
    prelude = _Unit(model.embed, model.prelude_layers, model.input_norm)
    core = _Unit(model.recurrent)
    coda = _Unit(model.coda_layers, model.norm, model.head)
    # A tied table is used by both ends, so it is gathered around them.
    tables = [_Unit(model.embed, model.head)] if model.cfg.tie_embeddings else []
    for unit in (*tables, prelude, core, coda):
        taken = {p for p in model.parameters() if p.dim() < 2 or isinstance(p, DTensor)}
        free = reshard and unit is prelude
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=free, ignored_params=taken)
    root = _Unit(objective, *tables, prelude, core, coda)
    taken = {p for p in model.parameters() if isinstance(p, DTensor)}
    fully_shard(root, mesh=world.mesh, mp_policy=plain, reshard_after_forward=False, ignored_params=taken)
    ways = {"prelude": prelude, "step": core, "think": core, "features": coda, "coda": coda}
    for name, unit in ways.items():
        unit.enter_by(model, name, root)
    for owner, name in ((model, "forward"), (objective, "forward"), (objective, "logits")):
        for unit in (*tables, root):
            unit.enter_by(owner, name, None if unit is root else root)
    object.__setattr__(objective, "_root", root)  # not as a submodule: the root holds the objective


def parallelize(
    objective: Objective,
    world: World,
    *,
    recompute: str = "none",
    compile: bool = False,
    precision: str = "fp32",
    reshard: bool = False,
) -> None:
    """Move to the world's device, recompute activations, compile, shard: in this order, in place.

    Call it before the optimiser is made: sharding replaces the parameters.

    Args:
        objective: holds the model.
        world: from :func:`init_world`.
        recompute: as for :func:`~open_mythos.training.acceleration.accelerate`.
        compile: the same.
        precision: as for :func:`shard`; a process alone casts by
            :func:`~open_mythos.training.acceleration.lowered` instead.
        reshard: as for :func:`shard`.

    Raises:
        ConfigError: an argument is not allowed.
    """
    objective.to(world.device)
    accelerate(objective, compile=compile, recompute=recompute)
    shard(objective, world, precision=precision, reshard=reshard)


def last_of_step(objective: Objective, last: bool) -> None:
    """Say whether the next backward is the step's last: only then are gradients reduced.

    Until then they are summed on each rank, unsharded and in float32, and parameters stay gathered. Without
    sharding nothing needs to be said.
    """
    root = cast("FSDPModule | None", getattr(objective, "_root", None))
    if root is not None:
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        root.set_reshard_after_backward(last)


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _free(root: nn.Module) -> None:
    """Drop the gathered parameters, which no backward will."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
