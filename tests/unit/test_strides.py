"""Several ticks in one call: the same tokens, and as many loops of rows, as one by one."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos, kernels
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.exits import StateChange
from open_mythos.inference.kernel_runner import KernelRunner
from open_mythos.inference.pages import Layers, PagePool
from open_mythos.inference.runner import Batch, PlainRunner, RowState
from open_mythos.inference.speculative import Draft
from open_mythos.model.paged import MAX_TOKENS

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
    assert lengths == ({1, 2, 4, 8} if coda_every == 9 else {1, 2, 4})
    assert any(min(times) < max(times) for times in runner.seen) == (coda_every > 1)  # some wait for others
    assert len(runner.seen) < one_by_one.ticks


@pytest.mark.parametrize("halting", ["select", "off"])
def test_drafts_and_rules_among_them_change_nothing(halting: str) -> None:
    model = build("mla", halting)
    requests = [
        Request(
            [i, i + 1],
            7,
            4 + 5 * i % 9,
            temperature=0.8 * (i % 2),
            seed=i,
            exit=StateChange(0.5) if i % 5 == 4 else None,
            speculate=Draft(1 + i % 3, 1 + i % 4) if i % 3 else None,
        )
        for i in range(12)
    ]
    found = []
    for runner in (Counted, Single):
        with Engine(model, max_rows=8, runner=runner) as engine:
            results = [handle.result() for handle in [engine.submit(request) for request in requests]]
            found.append([(r.tokens, r.loops, r.prompt_loops) for r in results])
    assert found[0] == found[1]


@pytest.mark.parametrize("work", ["loop", "loops"])
def test_where_a_second_kernel_has_no_room_no_row_has_moved(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gqa", "off")
    layers, rows, device = Layers(1, 4, 1), MAX_TOKENS + 6, torch.device("cpu")
    pool = PagePool(model.cfg, layers, rows=rows, pages=8 * rows, page_size=16, max_context=64,
                    dtype=torch.float32, device=device)  # fmt: skip
    for row in range(rows):
        pool.take(row, layers.needed(4), 1 if row < MAX_TOKENS else 17)
    positions = tuple(0 if row < MAX_TOKENS else 16 for row in range(rows))
    batch = Batch(tuple(range(rows)), positions, (0,) * rows, (4,) * rows, (False,) * rows)
    with torch.inference_mode():
        runner = KernelRunner(model, pool, RowState(model, rows))
        runner.refresh()
        assert runner.reason is None
        runner.prelude(batch.pick(range(MAX_TOKENS)))
        before, decoder = runner.state.h.clone(), cast("Any", runner._decoder)
        decoder._size = decoder._size[0], 1  # the longer context of the second kernel needs more

        def full(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(decoder, "_grow", full)
        with pytest.raises(MemoryError):
            runner.loop(batch) if work == "loop" else runner.loops(batch, [2] * rows)
    assert torch.equal(runner.state.h, before)


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
