"""Training over several processes equals training in one, to 1e-10 in float64.

Each world of two and four processes on this machine (gloo, over the loopback device) starts once, runs every
check of CHECKS and writes down what went wrong in it.
"""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import MythosConfig, OpenMythos
from open_mythos.config import ConfigError
from open_mythos.training import objective
from open_mythos.training.acceleration import lowered
from open_mythos.training.loops import LoopPlan
from open_mythos.training.parallel import World, init_world, last_of_step, parallelize, shard, whole

SIZES = {
    "vocab_size": 31,
    "dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 32,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 6,
    "n_experts_per_tok": 2,
    "n_shared_experts": 1,
    "expert_dim": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "lora_rank": 4,
    "tie_embeddings": False,
}
PLANS = {"fixed": LoopPlan(0, 3), "truncated": LoopPlan(4, 2)}
BATCH, LENGTH, STEPS, EXACT = 4, 8, 3, 1e-10


def build(attn_type: str = "gqa", seed: int = 0, **fields: Any) -> objective.Objective:
    torch.manual_seed(seed)
    fields = {"router_bias_rate": 0.1, "attn_type": attn_type, **SIZES, **fields}
    model = OpenMythos(MythosConfig(**fields)).double().train()
    with torch.no_grad():  # a fresh LoRA, halting head and scale are zeros and ones, which hide mistakes
        for parameter in model.recurrent.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return objective.Objective(model)


def batches(steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Global batches of packed rows; the rows have different numbers of targets, the last one none at all."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        ids = torch.randint(0, 31, (BATCH, LENGTH), generator=generator)
        targets = torch.randint(0, 31, (BATCH, LENGTH), generator=generator)
        for row in range(BATCH):
            targets[row, : 2 * row + 2 if row < BATCH - 1 else LENGTH] = -100
        documents = torch.arange(LENGTH).div(5, rounding_mode="floor").expand(BATCH, LENGTH).contiguous()
        found.append({"ids": ids, "targets": targets, "document_ids": documents})
    return found


def share(batch: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """This rank's rows."""
    rows = BATCH // world.size
    return {name: value[world.rank * rows : (world.rank + 1) * rows] for name, value in batch.items()}


def divisor(batch: Mapping[str, Tensor], world: World) -> Tensor:
    """What each rank divides its summed loss by, so that the mean over ranks is the mean over all targets."""
    return world.sum((batch["targets"] != -100).sum()) / world.size


def train(step: objective.Objective, world: World, plan: LoopPlan, optimizer: torch.optim.Optimizer) -> Any:
    """Three clipped AdamW steps; losses, norms and gradients of each, and what they leave."""
    found: dict[str, Any] = {"loss": [], "norm": [], "grad": []}
    for batch in batches():
        rows = share(batch, world)
        optimizer.zero_grad()
        loss = step(rows, plan, divisor(rows, world))
        loss.backward()
        found["loss"].append(world.sum(loss) / world.size)
        norm = nn.utils.clip_grad_norm_(step.model.parameters(), 0.1)
        found["norm"].append(whole(norm))
        found["grad"].append(
            {name: whole(p.grad) for name, p in step.model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
    found["weight"] = {name: whole(p.detach()) for name, p in step.model.named_parameters()}
    moe: Any = step.model.recurrent.block.ffn
    found["bias"] = moe.router_bias
    found["load"] = world.sum(moe.expert_load)
    return found


def adamw(step: objective.Objective) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in step.model.parameters() if p.requires_grad], lr=1e-2)


@cache
def reference(attn_type: str, plan: str, **fields: Any) -> Any:
    """One process, the global batch, nothing of parallel.py."""
    step = build(attn_type, **fields)
    return train(step, World(), PLANS[plan], adamw(step))


def compare(found: Any, expected: Any, path: str = "", tolerance: float = EXACT) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for name in expected:
            compare(found[name], expected[name], f"{path}.{name}", tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, value in enumerate(expected):
            compare(found[i], value, f"{path}[{i}]", tolerance)
    else:
        difference = (found.double() - expected.double()).abs().max().item()
        assert difference <= tolerance, f"{path} differs by {difference:.3g}"


# The checks. Each runs on every rank of a world.


def step_equals_one_process(world: World, attn_type: str, plan: str, **fields: Any) -> None:
    step = build(attn_type, **fields)
    parallelize(step, world)
    assert all(isinstance(p, DTensor) for p in step.model.parameters()) == (world.size > 1)
    found = train(step, world, PLANS[plan], adamw(step))
    assert found["bias"].abs().max() > 0.01, "the bias must have moved for this to mean anything"
    compare(found, reference(attn_type, plan, **fields))


def recomputed(world: World, attn_type: str, mode: str) -> None:
    step = build(attn_type)
    parallelize(step, world, recompute=mode)
    found, expected = train(step, world, PLANS["truncated"], adamw(step)), reference(attn_type, "truncated")
    # Recomputed loops count twice, which leaves every expert's share, and so the bias, as it was.
    found.pop("load")
    compare(found, {name: value for name, value in expected.items() if name != "load"})


def compiled(world: World, attn_type: str, recompute: str) -> None:
    """Recomputed, compiled and sharded; by the compiler's front end, whose code generator takes long on a CPU."""
    step = build(attn_type)
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        parallelize(step, world, compile=True, recompute=recompute)
    found, expected = train(step, world, PLANS["truncated"], adamw(step)), reference(attn_type, "truncated")
    found.pop("load")
    compare(found, {name: value for name, value in expected.items() if name != "load"})


class Collectives(TorchDispatchMode):
    """Writes down the collectives inside it: (name, elements of the larger side)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = re.match(r"c10d\.(\w+?)_?\.default", str(function))
        if name:
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.seen.append((name[1].strip("_"), max(sizes)))
        return function(*args, **(kwargs or {}))


def collectives_do_not_grow_with_loops(world: World, groups: int, recompute: str, **fields: Any) -> None:
    step = build("gqa", **fields)
    parallelize(step, world, recompute=recompute)
    (batch,) = batches(1)
    rows = share(batch, world)
    seen = []
    for plan in (LoopPlan(0, 1), LoopPlan(0, 7), LoopPlan(9, 2)):
        with Collectives() as collectives:
            step(rows, plan, torch.tensor(8.0)).backward()
        seen.append(collectives.seen)
    assert seen[0] == seen[1] == seen[2]
    names = [name for name, _ in seen[0]]
    assert names.count("allgather_base") == names.count("reduce_scatter_base") == groups
    assert names.count("allreduce") == 1, "the experts' counts"
    assert len(names) == 2 * groups + 1
    gathered = sum(numel for name, numel in seen[0] if name == "allgather_base")
    total = sum(p.numel() for p in step.model.parameters())
    assert total <= gathered < 1.4 * total, "every parameter once, and padding"
    core = max(numel for _, numel in seen[0])
    reduced = [numel for name, numel in seen[0] if name == "reduce_scatter_base"]
    assert reduced.index(core) == 1, "after the coda's and before the prelude's, whose backward hides it"


def names_and_parameters_stay(world: World) -> None:
    step, plain = build("mla"), build("mla")
    parallelize(step, world)
    assert list(step.model.state_dict()) == list(plain.model.state_dict())
    assert [name for name, _ in step.named_parameters()] == [name for name, _ in plain.named_parameters()]
    compare(
        {name: whole(p.detach()) for name, p in step.model.named_parameters()},
        {name: p.detach() for name, p in plain.model.named_parameters()},
    )
    held = sum(p.to_local().numel() for p in step.model.parameters() if isinstance(p, DTensor))
    total = sum(p.numel() for p in plain.model.parameters())
    assert abs(held / total - 1 / world.size) < 0.1


def other_ways_in(world: World) -> None:
    """Evaluation and generation between steps, with the weights that the last update left."""
    step = build("gqa")
    parallelize(step, world)
    train(step, world, PLANS["fixed"], adamw(step))
    plain = build("gqa").model
    plain.load_state_dict({name: whole(value) for name, value in step.model.state_dict().items()})
    rows = share(batches(1)[0], world)
    for model in (step.model.eval(), plain.eval()):
        assert isinstance(model, OpenMythos)
    with torch.no_grad():
        compare(step.model(rows["ids"], n_loops=5), plain(rows["ids"], n_loops=5))
        plan, count = PLANS["truncated"], divisor(rows, world)
        compare(step(rows, plan, count), objective.Objective(plain)(rows, plan, count))
    ids = rows["ids"][:, :3]
    assert torch.equal(step.model.generate(ids, 4, 2, 0.0), plain.generate(ids, 4, 2, 0.0))
    # And training goes on from there.
    again = train(step.train(), world, PLANS["fixed"], adamw(step))
    alone = objective.Objective(plain.train())
    compare(again["weight"], train(alone, World(), PLANS["fixed"], adamw(alone))["weight"])


def parts_alone_are_refused(world: World) -> None:
    step = build("gqa")
    parallelize(step, world)
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(
        RuntimeError, match=r"model.prelude of a sharded model is not allowed: call the whole"
    ):
        step.model.prelude(ids)
    with pytest.raises(RuntimeError, match=r"model.prelude of a sharded model"):
        objective.loss(step.model, {"ids": ids, "targets": ids}, PLANS["fixed"])
    assert torch.isfinite(step.model(ids, n_loops=1)).all(), "nothing is broken by it"


def only_lora_learns(world: World) -> None:
    def freeze(step: objective.Objective) -> objective.Objective:
        for name, parameter in step.model.named_parameters():
            parameter.requires_grad_("lora" in name)
        return step

    step, plain = freeze(build("gqa", halting="off")), freeze(build("gqa", halting="off"))
    parallelize(step, world)
    found = train(step, world, PLANS["fixed"], adamw(step))
    assert sorted(found["grad"][0]) == [
        f"recurrent.lora.{name}" for name in ("B", "down.weight", "scale.weight")
    ]
    compare(found, train(plain, World(), PLANS["fixed"], adamw(plain)))


def accumulated(world: World) -> None:
    """Two batches a step: reduced once, and the sum of both gradients."""
    step, plain = build("mla"), build("mla")
    parallelize(step, world)
    first, second = batches(2)
    for _ in range(2):
        counts = []
        for batch, last in ((first, False), (second, True)):
            rows = share(batch, world)
            last_of_step(step, last)
            with Collectives() as collectives:
                step(rows, PLANS["truncated"], torch.tensor(8.0 / world.size)).backward()
            counts.append([name for name, _ in collectives.seen].count("reduce_scatter_base"))
            plain(batch, PLANS["truncated"], torch.tensor(8.0)).backward()
        assert counts == [0, 4 if world.size > 1 else 0]
        for (name, p), q in zip(step.model.named_parameters(), plain.model.parameters(), strict=True):
            compare(whole(p.grad), q.grad, name)
        step.zero_grad()
        plain.zero_grad()


def bfloat16_where_it_belongs(world: World) -> None:
    step = build("gqa").float()
    plain = build("gqa").float()
    parallelize(step, world, precision="bf16")
    seen: dict[str, torch.dtype] = {}
    model: Any = step.model
    plain_forward = model.recurrent.block.ffn.forward

    def look(x: Tensor) -> Tensor:
        seen.update({name: p.dtype for name, p in model.named_parameters()})
        seen.update({name: b.dtype for name, b in model.named_buffers()})
        seen["x"] = x.dtype
        return plain_forward(x)

    model.recurrent.block.ffn.forward = look
    (batch,) = batches(1)
    rows = share(batch, world)
    loss = step(rows, PLANS["truncated"], divisor(rows, world))
    loss.backward()
    del model.recurrent.block.ffn.forward
    assert loss.dtype == torch.float32
    assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} >= {
        *(
            "x",
            "recurrent.block.ffn.w_in",
            "recurrent.block.ffn.router.weight",
            "recurrent.block.attn.wq.weight",
        )
    }
    for name, dtype in seen.items():
        if "injection" in name or "norm" in name or "router_bias" in name:
            assert dtype == torch.float32, name
    assert seen["recurrent.block.ffn.expert_load"] == torch.int64
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    with lowered(plain, torch.bfloat16):
        expected = plain(batch, PLANS["truncated"], divisor(batch, World()))
        expected.backward()
    compare(world.sum(loss) / world.size, expected.detach(), "loss", 1e-3)
    errors = {
        name: float((whole(p.grad) - q.grad).norm() / q.grad.norm())
        for (name, p), q in zip(model.named_parameters(), plain.model.parameters(), strict=True)
    }
    assert max(errors.values()) < 0.02, errors


def world_of_several(world: World) -> None:
    assert (world.rank, world.local_rank, world.size) == (int(os.environ["RANK"]), world.rank, world.size)
    assert world.is_main == (world.rank == 0)
    value = torch.tensor([1.0, world.rank])
    total = world.sum(value)
    assert total.tolist() == [world.size, sum(range(world.size))]
    assert value.tolist() == [1.0, world.rank], "the argument is left alone"
    assert world.all_agree(True)
    assert not world.all_agree(world.rank != world.size - 1)
    said = {"step": 3, "text": "größer", "none": None} if world.is_main else None
    assert world.broadcast(said) == {"step": 3, "text": "größer", "none": None}
    assert world.broadcast("" if world.is_main else "x") == ""
    world.barrier()


def replicated(world: World, replicas: int) -> None:
    """Whole copies of the parameters on some ranks: of the same mathematics."""
    again = init_world("cpu", replicas)
    assert again.mesh is not None
    assert again.mesh.shape == (replicas, world.size // replicas)
    step = build("gqa")
    parallelize(step, again)
    compare(train(step, again, PLANS["truncated"], adamw(step)), reference("gqa", "truncated"))


Check = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]
CHECKS: dict[str, Check] = {
    **{
        f"step-{attn}-{plan}": (step_equals_one_process, (attn, plan), {})
        for attn in ("gqa", "mla")
        for plan in PLANS
    },
    "step-tied": (step_equals_one_process, ("gqa", "fixed"), {"tie_embeddings": True}),
    "step-average": (step_equals_one_process, ("gqa", "fixed"), {"halting": "average"}),
    "names": (names_and_parameters_stay, (), {}),
    "collectives": (collectives_do_not_grow_with_loops, (4, "none"), {}),
    "collectives-recomputed": (collectives_do_not_grow_with_loops, (4, "loop"), {}),
    "collectives-tied": (collectives_do_not_grow_with_loops, (5, "none"), {"tie_embeddings": True}),
    "recomputed-gqa": (recomputed, ("gqa", "loop"), {}),
    "recomputed-mla": (recomputed, ("mla", "loop"), {}),
    "compiled": (compiled, ("mla", "loop"), {}),
    "other-ways-in": (other_ways_in, (), {}),
    "parts": (parts_alone_are_refused, (), {}),
    "only-lora": (only_lora_learns, (), {}),
    "accumulated": (accumulated, (), {}),
    "bfloat16": (bfloat16_where_it_belongs, (), {}),
    "world": (world_of_several, (), {}),
}
CHECKS["replicated"] = (replicated, (2,), {})
OF_FOUR = ("replicated", "step-mla-truncated", "world")  # four processes take long to start


def worker(rank: int, size: int, port: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu", timeout=180)
    results: dict[str, str] = {}
    try:
        for name in names:
            function, args, fields = CHECKS[name]
            try:
                torch.manual_seed(rank)
                function(world, *args, **fields)
                results[name] = ""
            except Exception as error:
                results[name] = traceback.format_exc()
                if not isinstance(error, AssertionError):
                    break  # the ranks may have parted
    finally:
        torch.save(results, Path(folder) / f"{rank}.pt")
        world.close()


class Ranks:
    """Worlds of processes, each started when it is first asked about."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[int, list[dict[str, str]]] = {}

    def of(self, size: int) -> list[dict[str, str]]:
        if size not in self.results:
            self.results[size] = self._run(size, list(CHECKS) if size == 2 else list(OF_FOUR))
        return self.results[size]

    def _run(self, size: int, names: list[str]) -> list[dict[str, str]]:
        folder = self.folder / str(size)
        folder.mkdir()
        context = mp.spawn(worker, args=(size, free_port(), str(folder), names), nprocs=size, join=False)
        deadline = time.monotonic() + 300
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"the {size} processes did not finish within 300 s")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "name"), [*((2, name) for name in CHECKS), *((4, name) for name in OF_FOUR)]
)
def test_several_processes(ranks: Ranks, size: int, name: str) -> None:
    for rank, results in enumerate(ranks.of(size)):
        assert name in results, f"rank {rank} stopped before, at {list(results)[-1]}"
        assert not results[name], f"rank {rank} of {size}:\n{results[name]}"


# A process alone.


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_alone_is_a_world_without_a_group(no_torchrun: pytest.MonkeyPatch) -> None:
    world = init_world("cpu")
    assert world == World()
    assert world.mesh is None
    assert world.is_main
    value = torch.ones(2)
    assert world.sum(value).equal(value)
    assert world.all_agree(True)
    assert not world.all_agree(False)
    assert world.broadcast({"a": [1, None]}) == {"a": [1, None]}
    world.barrier()
    world.close()
    assert not torch.distributed.is_initialized()


def test_alone_nothing_is_sharded() -> None:
    step = build()
    before = dict(step.model.named_parameters())
    parallelize(step, World())
    last_of_step(step, True)
    assert {name: id(p) for name, p in step.model.named_parameters()} == {k: id(p) for k, p in before.items()}
    compare(train(step, World(), PLANS["fixed"], adamw(step)), reference("gqa", "fixed"))


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, {"device": "tpu"}, "device = 'tpu' is not allowed: it must be 'auto', 'cuda' or 'cpu'"),
        (
            {"WORLD_SIZE": "4"},
            {"replicas": 3},
            "replicas = 3 is not allowed: it must be a whole number of at least 1",
        ),
        ({}, {"replicas": 2}, "that divides the world size, 1"),
        ({}, {"replicas": True}, "replicas = True is not allowed"),
        ({"RANK": "first"}, {}, "RANK = 'first' is not allowed: torchrun sets it to a whole number"),
    ],
)
def test_a_world_that_cannot_be_is_refused(
    no_torchrun: pytest.MonkeyPatch, environment: dict[str, str], arguments: dict[str, Any], message: str
) -> None:
    for name, value in environment.items():
        no_torchrun.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        init_world(**{"device": "cpu", **arguments})


def test_cuda_is_refused_where_there_is_none(no_torchrun: pytest.MonkeyPatch) -> None:
    no_torchrun.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device = 'cuda' is not allowed: torch sees no CUDA device"):
        init_world("cuda")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision = 'fp16' is not allowed: it must be 'fp32' or 'bf16'"):
        shard(build(), World(), precision="fp16")
