"""Several processes show what one shows: each measure is of all ranks together."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from open_mythos import OpenMythos
from open_mythos.training.config import RunConfig
from open_mythos.training.loops import LoopPlan
from open_mythos.training.monitor import Monitor, gradient_norms
from open_mythos.training.objective import Objective
from open_mythos.training.parallel import World, init_world, parallelize

CONFIG = RunConfig.from_dict(
    {
        "model": {
            "vocab_size": 31, "dim": 24, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 32,
            "max_loop_iters": 4, "prelude_layers": 1, "coda_layers": 1, "n_experts": 6, "n_shared_experts": 1,
            "n_experts_per_tok": 2, "expert_dim": 16, "lora_rank": 4, "initial_state": "prelude",
        },
        "data": {"source": "parity", "length": 8},
        "loops": {"kind": "fixed", "loops": 3},
        "train": {"log_every": 2},
        "log": {"monitor_every": 2},
    }
)  # fmt: skip


def sharded(world: World, folder: Path) -> None:
    """The rows of two ranks' halves, which the test compares with those of one process."""
    torch.manual_seed(0)
    model = OpenMythos(CONFIG.model).train()
    objective = Objective(model)
    parallelize(objective, world)
    monitor = Monitor(CONFIG, model, world)
    rows = []
    for step in (1, 2):
        model.zero_grad()
        generator = torch.Generator().manual_seed(step)
        data = {name: torch.randint(0, 31, (4, 8), generator=generator) for name in ("ids", "targets")}
        half = 4 // world.size
        mine = {k: v[world.rank * half : (world.rank + 1) * half] for k, v in data.items()}
        monitor.begin(step, read=step == 2)
        with monitor.watching():
            loss = objective(mine, LoopPlan(1, 2))
        loss.backward()
        monitor.passed(loss, LoopPlan(1, 2), 32, 8)
        norms = gradient_norms(model, world)
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        total = total.full_tensor() if hasattr(total, "full_tensor") else total
        torch.testing.assert_close(norms.norm(), total, rtol=1e-4, atol=1e-5)
        rows.append(monitor.end(1e-3, norms))
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(rows[-1]), encoding="utf-8")


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu", timeout=60)
    try:
        sharded(world, Path(folder))
    finally:
        world.close()


@pytest.mark.slow
def test_two_processes_show_what_one_shows(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two processes did not finish within 240 s")
    sharded(World(), tmp_path)
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    own = ("tokens_per_s", "memory", "memory_peak", "mfu")  # of each process's own clock and memory
    for name in one.keys() - set(own):
        assert first[name] == second[name], name
        assert numbers(first[name]) == pytest.approx(numbers(one[name]), rel=1e-3, abs=1e-5), name


def numbers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]
