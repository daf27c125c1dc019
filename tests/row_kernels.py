"""Models and runners for tests of decoding in kernels."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.pages import Layers, PagePool
from open_mythos.inference.requests import Depth
from open_mythos.inference.runner import Batch, Chunk, PlainRunner, RowState
from open_mythos.rows.launch import TritonRows, _tuning
from open_mythos.rows.plain import PlainRows

__all__ = [
    "ATTENTION",
    "CHANGES",
    "DEPTHS",
    "LENGTHS",
    "ROWS",
    "Interpreted",
    "OnPlainRows",
    "apart",
    "batch_of",
    "build",
    "feed",
    "interprets",
    "make",
]

ATTENTION = ("mla", "gqa")
# Everything the kernels take a branch for, spread over few models.
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "norms": {"update_norm": True, "state_norm": True, "loop_embedding": True, "initial_state": "prelude"},
    "bare": {
        "halting": "off", "lora_rank": 0, "block_output": "state", "qk_norm": False, "input_norm": False,
        "n_shared_experts": 0, "init": "upstream", "tie_embeddings": False,
    },
    "all_experts": {"n_experts": 2, "prelude_layers": 0, "coda_layers": 0},
}  # fmt: skip
DEPTHS, LENGTHS, ROWS = (3, 5, 2), (5, 9, 2), (0, 2, 3)


@torch.no_grad()
def build(attn_type: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> OpenMythos:
    """Sizes of which few are powers of two, heads that do not share keys evenly, no weight that is zero or one."""
    sizes: dict[str, Any] = {
        "vocab_size": 96, "dim": 60, "n_heads": 6, "n_kv_heads": 4, "max_seq_len": 64, "max_loop_iters": 3,
        "prelude_layers": 1, "coda_layers": 2, "attn_type": attn_type, "kv_lora_rank": 24, "q_lora_rank": 40,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20, "n_experts": 6, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 24, "lora_rank": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = OpenMythos(MythosConfig(**{**sizes, **changes}))
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    model.recurrent.block.ffn.router_bias.normal_(std=0.1)
    model.recurrent.act.halt.bias.fill_(-0.7)  # halts within the loops of these tests
    return model.to(device, dtype).eval()


def make(
    model: OpenMythos, rows: PlainRows | TritonRows | None, plain: bool = False, shared: bool = False
) -> PlainRunner:
    cfg, weight = model.cfg, model.embed.weight
    layers = Layers(cfg.prelude_layers, 5, cfg.coda_layers, shared)
    pool = PagePool(
        cfg, layers, rows=4, pages=200, page_size=4, max_context=20, dtype=weight.dtype, device=weight.device
    )
    state = RowState(model, 4)
    runner = PlainRunner(model, pool, state) if plain else GraphRunner(model, pool, state, rows)
    generator = torch.Generator().manual_seed(1)
    for row, length, depth in zip(ROWS, LENGTHS, DEPTHS, strict=True):
        pool.take(row, layers.needed(depth), length + 4)
        ids = torch.randint(0, cfg.vocab_size, (1, length), generator=generator)
        runner.prefill(Chunk((row,), (0,), ids, Depth(depth, None), True))
    return runner


def batch_of(step: int, done: list[int], places: list[int]) -> Batch:
    picked = [
        (ROWS[i], LENGTHS[i] + step, done[i], DEPTHS[i], i == 1) for i in places
    ]  # the second is under an exit rule
    return Batch(*zip(*picked, strict=True))


def feed(runner: PlainRunner, step: int) -> Batch:
    ids = torch.randint(0, 96, (len(ROWS),), generator=torch.Generator().manual_seed(10 + step))
    runner.state.ids[list(ROWS)] = ids.to(runner.state.ids.device)
    return batch_of(step, [0, 0, 0], [0, 1, 2])


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted)
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, wanted, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def interprets() -> bool:
    """Whether Triton's interpreter is there; it takes arrays of one element for numbers, which numpy 2.4 refuses."""
    numpy_version = tuple(map(int, np.__version__.split(".")[:2]))
    return find_spec("triton") is not None and numpy_version < (2, 4)


class Interpreted(TritonRows, PlainRows):
    """The kernels themselves, without graphs, in small tiles: the interpreter takes a while for each."""

    def __init__(self) -> None:
        small = ("BLOCK_N", "BLOCK_K", "BLOCK_R", "BLOCK_C", "BLOCK_V")
        tuning = {
            name: options | dict.fromkeys(small & options.keys(), 16) for name, options in _tuning().items()
        }
        tuning["attend"]["SPLITS"] = 4
        super().__init__(tuning=tuning)


class OnPlainRows(GraphRunner):
    """With the kernels' plain versions."""

    def __init__(self, model: OpenMythos, pool: PagePool, state: RowState) -> None:
        super().__init__(model, pool, state, PlainRows())
