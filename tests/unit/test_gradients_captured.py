"""What is captured for a GPU, run on the CPU by a stand-in for CUDA graphs: the same numbers as the plain step.

The stand-in runs the work again at each replay and writes into the tensors of the first run, as a graph does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.training import gradients as module
from open_mythos.training.gradients import Gradients
from open_mythos.training.objective import LoopPlan, Objective


class _Graph:
    def __init__(self, work: Callable[[], tuple[Any, ...]]) -> None:
        self.work, self.held = work, work()

    def replay(self) -> None:
        _overwrite(self.held, self.work())


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        with torch.no_grad():
            old.copy_(new)
    elif isinstance(old, (tuple, list)):
        for a, b in zip(old, new, strict=True):
            _overwrite(a, b)


class Emulated(Gradients):
    recorded = 0

    def _captures(self, batch: Mapping[str, Tensor]) -> bool:
        return True

    def _record(self, inputs: dict[str, Tensor], work: Callable[[dict[str, Tensor]], tuple[Any, ...]]) -> Any:
        self.recorded += 1
        buffers = [*self.objective.buffers(), *inputs.values()]
        before = [buffer.clone() for buffer in buffers]
        graph: Any = _Graph(lambda: work(inputs))
        torch._foreach_copy_(buffers, before)
        held = graph.held
        return module._Captured(graph, held[0] if isinstance(held[0], Tensor) else None, held)


def build(**changes: Any) -> Objective:
    fields: dict[str, Any] = {
        "vocab_size": 17, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "attn_type": "gqa", "prelude_layers": 1,
        "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "n_shared_experts": 1, "expert_dim": 8,
        "lora_rank": 2, "max_loop_iters": 4, "max_seq_len": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    return Objective(OpenMythos(MythosConfig(**{**fields, **changes}))).double().train()


def batch(seed: int, documents: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(0, 17, (2, 12), generator=torch.Generator().manual_seed(seed))
    made = {"ids": ids, "targets": ids.roll(-1, 1)}
    if documents:
        made["document_ids"] = (torch.arange(12) // 5).expand(2, -1).contiguous()
    return made


PLANS = [
    LoopPlan(0, 2),
    LoopPlan(3, 2),
    LoopPlan(1, 3),
    LoopPlan(0, 2),
    LoopPlan(2, 2, starts=(0, 2)),
    LoopPlan(0, 1),
]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_replays_give_the_plain_gradients(sharded: bool, documents: bool) -> None:
    plain = build()
    fast = copy.deepcopy(plain)
    sides = Gradients(plain), Emulated(fast, capture=True, sharded=sharded)
    for seed, plan in enumerate([*PLANS, *PLANS]):
        for objective in (plain, fast):
            objective.zero_grad(set_to_none=True)
        losses = [side(batch(seed, documents), plan) for side in sides]
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
        for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(q.grad, wanted, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        for (name, a), b in zip(plain.named_buffers(), fast.buffers(), strict=True):
            assert torch.equal(a, b), name
    # Sharded, a graph for each plan but the one with starts; else the free loops' two parts, once for indices
    # of one loop and once for those of each sequence, and one for each count with gradient, begun or not.
    assert sides[1].recorded == (4 if sharded else 9)


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_add_up_over_batches(sharded: bool) -> None:
    plain = build()
    fast = copy.deepcopy(plain)
    sides = Gradients(plain), Emulated(fast, capture=True, sharded=sharded)
    for seed in range(3):
        for side in sides:
            side(batch(seed), LoopPlan(1, 2))
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-12)


def test_lowered_gradients_are_written_straight_into_their_place() -> None:
    plain = build().float()
    fast = copy.deepcopy(plain)
    sides = Gradients(plain, torch.bfloat16), Emulated(fast, torch.bfloat16, capture=True)
    for seed in range(2):
        for objective in (plain, fast):
            objective.zero_grad(set_to_none=True)
        for side in sides:
            side(batch(seed), LoopPlan(1, 2))
        for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_moved_parameters_discard_the_graphs() -> None:
    objective = build()
    gradients = Emulated(objective, capture=True)
    gradients(batch(0), LoopPlan(0, 1))
    objective.float()
    gradients(batch(0), LoopPlan(0, 1))
    assert gradients.recorded == 2


def test_further_graphs_than_are_kept_run_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 1)
    gradients = Emulated(build(), capture=True)
    for n in (1, 2, 3):
        gradients(batch(0), LoopPlan(0, n))
    assert gradients.recorded == 1
    assert all(p.grad is not None for p in gradients.objective.parameters())


def test_noise_is_drawn_once_captured_or_not() -> None:
    """A step that runs uncaptured, for a look at the states, must not shift the noise of those after it."""
    plain = build(initial_state="random")
    fast = copy.deepcopy(plain)
    sides = Gradients(plain), Emulated(fast, capture=True)
    for plan in (LoopPlan(2, 2), LoopPlan(0, 2)):
        sides[1](batch(0), plan)  # records, which draws
        drawn = []
        for side in sides:
            side.objective.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            drawn.append((side(batch(0), plan), torch.rand(1)))
        torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-12)


def test_what_a_loss_does_not_reach_gets_zeros_and_nothing_stale() -> None:
    objective = build(halting="select")
    gradients = Emulated(objective, capture=True)
    halt = objective.model.recurrent.act.halt
    gradients(batch(0), LoopPlan(0, 3))
    assert halt.weight.grad is not None
    assert halt.weight.grad.abs().sum() > 0
    objective.eval()  # then nothing teaches the halting head
    for _ in range(2):
        objective.zero_grad(set_to_none=True)
        gradients(batch(0), LoopPlan(0, 3))
        assert halt.weight.grad.abs().sum() == 0
        halt.weight.grad.fill_(torch.nan)


def test_evaluated_routers_keep_their_bias() -> None:
    objective = build()
    gradients = Emulated(objective, capture=True)
    gradients(batch(0), LoopPlan(1, 1))
    objective.eval()
    before = [buffer.clone() for buffer in objective.buffers()]
    gradients(batch(0), LoopPlan(1, 1))
    for buffer, kept in zip(objective.buffers(), before, strict=True):
        assert torch.equal(buffer, kept)


def test_a_share_of_targets_after_a_whole_count_is_not_rounded() -> None:
    gradients = Emulated(build(), capture=True)
    gradients.objective.eval()  # the bias stays, so the loss is the same but for the divisor
    whole = gradients(batch(0), LoopPlan(0, 1), 2)
    torch.testing.assert_close(gradients(batch(0), LoopPlan(0, 1), 2.5) * 2.5, whole * 2, rtol=1e-12, atol=0)
