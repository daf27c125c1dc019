"""Several ticks in one call: the same tokens, and as many ticks, as one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos, kernels
from open_mythos.inference.engine import Engine
from open_mythos.inference.exits import StateChange
from open_mythos.inference.kernel_runner import KernelRunner
from open_mythos.inference.pages import PagePool
from open_mythos.inference.runner import Batch, PlainRunner, RowState

pytestmark = pytest.mark.skipif("are on" not in kernels.status(), reason=kernels.status())


class Single(KernelRunner):
    """A loop a call."""

    @property
    def stride(self) -> int:
        return 1


class Counted(KernelRunner):
    """Writes down how many loops each call has run."""

    def __init__(self, model: OpenMythos, pool: PagePool, state: RowState) -> None:
        super().__init__(model, pool, state)
        self.seen: list[tuple[int, ...]] = []

    def loop(self, batch: Batch) -> None:
        self.seen.append((1,) * len(batch.rows))
        super().loop(batch)

    def loops(self, batch: Batch, times: Any) -> None:
        self.seen.append(tuple(times))
        super().loops(batch, times)


def build(attn_type: str, halting: str) -> OpenMythos:
    torch.manual_seed(0)
    model = OpenMythos(
        MythosConfig(
            vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=12, prelude_layers=1,
            coda_layers=1, attn_type=attn_type, kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8, n_experts=4, n_experts_per_tok=2, expert_dim=16, halting=halting,
        )
    ).eval()  # fmt: skip
    model.recurrent.act.halt.bias.data.fill_(-1.5)  # halts within these loops, at different ones
    return model


def run(model: OpenMythos, runner: Any, **options: Any) -> tuple[list[list[int]], Any, Any]:
    prompts = [torch.arange(2 + i % 5) + i for i in range(12)]
    depths = [2 + 7 * i % 11 for i in range(12)]
    with Engine(model, max_rows=5, runner=runner, **options) as engine:
        results = engine.generate(prompts, 9, depths, temperature=0.9, seed=3)
        return [result.tokens for result in results], engine.stats.done, engine.runner


@pytest.mark.parametrize("coda_every", [1, 4, 9])
@pytest.mark.parametrize(("attn_type", "halting"), [("mla", "select"), ("gqa", "off")])
def test_the_same_tokens_as_loop_by_loop(attn_type: str, halting: str, coda_every: int) -> None:
    model = build(attn_type, halting)
    found, stats, runner = run(model, Counted, coda_every=coda_every)
    wanted, one_by_one, _ = run(model, Single, coda_every=coda_every)
    assert found == wanted
    assert stats.row_loops == one_by_one.row_loops
    lengths = {max(times) for times in runner.seen}
    assert lengths == {1, 2, 4}
    assert any(min(times) < max(times) for times in runner.seen) == (coda_every > 1)  # some wait for others
    assert len(runner.seen) < one_by_one.ticks


def test_rows_under_a_rule_are_asked_after_every_loop() -> None:
    model = build("mla", "off")
    with Engine(model, max_rows=3, runner=Counted) as engine:
        runner: Any = engine.runner
        engine.generate([[1, 2], [3]], 4, 8, temperature=0, exit=StateChange(0.5))
        assert runner.seen
        assert all(set(times) == {1} for times in runner.seen)


def test_deterministic_rows_are_alone_in_each_call() -> None:
    model = build("gqa", "off")
    found, _, runner = run(model, Counted, deterministic=True)
    assert all(len(times) == 1 for times in runner.seen)
    assert found == run(model, PlainRunner)[0]
