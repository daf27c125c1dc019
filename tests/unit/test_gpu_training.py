"""The training step on a GPU: captured, compiled and fused against the plain one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos, expert_ops
from open_mythos.kernels_gpu import gate_backward, gate_backward_reference
from open_mythos.training.acceleration import accelerate
from open_mythos.training.gradients import Gradients
from open_mythos.training.objective import LoopPlan, Objective

# The compiler warns, of its own deprecated parts and of what could be faster.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
SIZES: dict[str, Any] = {
    "vocab_size": 512, "dim": 128, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128, "max_loop_iters": 4,
    "prelude_layers": 1, "coda_layers": 1, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "n_experts": 8, "n_shared_experts": 1, "n_experts_per_tok": 2,
    "expert_dim": 64, "lora_rank": 4,
}  # fmt: skip


def build(attn_type: str, **changes: Any) -> Objective:
    torch.manual_seed(0)
    return Objective(OpenMythos(MythosConfig(**{**SIZES, "attn_type": attn_type, **changes})).cuda()).train()


def batch(seed: int = 0, rows: int = 4, documents: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(0, 512, (rows, 97), generator=torch.Generator().manual_seed(seed)).cuda()
    made = {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    if documents:
        made["document_ids"] = (torch.arange(96, device="cuda") // 40).expand(rows, -1).contiguous()
    return made


def run(
    objective: Objective, gradients: Gradients, data: dict[str, Tensor], plan: LoopPlan
) -> dict[str, Tensor]:
    objective.zero_grad(set_to_none=True)
    loss = gradients(data, plan)
    moe = objective.model.recurrent.block.ffn
    made = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss, "bias": moe.router_bias.clone(), "load": moe.expert_load.clone(), **made}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_captured_gradients_are_the_plain_ones(attn_type: str, documents: bool) -> None:
    """Any loop counts, the second time from the same graphs, and biases and counts move alike.

    Every expert sees every token, and no state counts as settled: a choice and a threshold may fall either way
    in low precision.
    """
    plain = build(attn_type, n_experts_per_tok=8, halt_tolerance=1e-9)
    fast = copy.deepcopy(plain)
    sides = Gradients(plain, torch.bfloat16), Gradients(fast, torch.bfloat16, capture=True)
    plans = [LoopPlan(0, 2), LoopPlan(3, 2), LoopPlan(1, 3), LoopPlan(0, 2), LoopPlan(7, 2)]
    plans.append(LoopPlan(2, 2, starts=(0, 1, 3, 2)))
    for seed, plan in enumerate(plans):
        data = batch(seed, documents=documents)
        wanted, got = run(plain, sides[0], data, plan), run(fast, sides[1], data, plan)
        for name, value in wanted.items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert torch.equal(wanted["load"], got["load"])


def test_captured_gradients_add_up_over_batches() -> None:
    objective = build("gqa")
    gradients = Gradients(objective, torch.bfloat16, capture=True)
    alone = [run(objective, gradients, batch(seed), LoopPlan(0, 2)) for seed in range(3)]
    objective.zero_grad(set_to_none=True)
    for seed in range(3):
        gradients(batch(seed), LoopPlan(0, 2))
    name, weight = "model.recurrent.block.ffn.w_in", objective.model.recurrent.block.ffn.w_in
    # The router's bias moved meanwhile, so some slots have other experts.
    total = sum(one[name] for one in alone)
    assert isinstance(total, Tensor)
    assert (weight.grad - total).norm() < 0.3 * total.norm()


@pytest.mark.parametrize(
    ("attn_type", "recompute"), [("mla", "none"), ("gqa", "none"), ("mla", "selective"), ("gqa", "loop")]
)
def test_a_compiled_captured_step_is_near_float32(attn_type: str, recompute: str) -> None:
    """With all experts for every token: a choice may fall either way in low precision."""
    torch._dynamo.reset()
    everyone = {"n_experts_per_tok": 8}
    exact = build(attn_type, **everyone)
    fast = copy.deepcopy(exact)
    accelerate(fast, compile=True, recompute=recompute)
    plan = LoopPlan(2, 3)
    wanted = run(exact, Gradients(exact), batch(), plan)
    got = run(fast, Gradients(fast, torch.bfloat16, capture=True), batch(), plan)
    assert abs(got["loss"] - wanted["loss"]) < 0.02
    ours, theirs = (
        torch.cat([v.flatten() for n, v in r.items() if "." in n]).double() for r in (got, wanted)
    )
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_two_compilations_for_any_number_of_loops() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    objective = build("mla")
    accelerate(objective, compile=True)
    gradients = Gradients(objective, torch.bfloat16)
    gradients(batch(), LoopPlan(1, 2))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for plan in (LoopPlan(0, 1), LoopPlan(0, 8), LoopPlan(33, 2), LoopPlan(60, 4)):
        gradients(batch(), plan)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    # The step with and without gradients, halting, one prelude and one coda layer, the loss's softmax.
    assert graphs == 6, torch._dynamo.utils.counters["stats"]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 192, 768, 1920])
def test_the_gates_backward_in_one_pass(width: int, dtype: torch.dtype) -> None:
    hidden, grad = (
        torch.randn(33, 2 * width, device="cuda", dtype=dtype),
        torch.randn(33, width, device="cuda", dtype=dtype),
    )
    weight = torch.rand(33, device="cuda", dtype=dtype)
    exact = gate_backward_reference(hidden.double(), weight.double(), grad.double())
    for got, wanted in zip(gate_backward(hidden, weight, grad), exact, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert (got.double() - wanted).norm() < bound * wanted.norm()


def test_the_compiled_choice_of_experts_is_top_k() -> None:
    torch._dynamo.reset()
    scores = torch.randn(1000, 24, device="cuda")
    compiled = torch.compile(expert_ops.top_k, fullgraph=True)
    for k in (1, 4, 16):
        assert torch.equal(compiled(scores, k), scores.topk(k, -1).indices)
