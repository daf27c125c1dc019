"""A sequence with a loop count of its own computes in a batch what it computes alone, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.training.loops import Fixed, LoopPlan, Progressive, Uniform
from open_mythos.training.objective import Objective

EXACT = 1e-12


def model(**changes: object) -> OpenMythos:
    fields = dict(  # noqa: C408
        vocab_size=11, dim=16, n_heads=2, n_kv_heads=1, attn_type="gqa", prelude_layers=1, coda_layers=1,
        n_experts=4, n_experts_per_tok=2, n_shared_experts=1, expert_dim=8, lora_rank=2, max_loop_iters=3,
        max_seq_len=16, router_bias_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    net = OpenMythos(MythosConfig(**{**fields, **changes})).double().train()  # type: ignore[arg-type]
    with torch.no_grad():  # a fresh LoRA and halting head are zeros, which hide mistakes
        for p in net.recurrent.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def batch(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (rows, 7), generator=generator)
    targets = torch.randint(0, 11, (rows, 7), generator=generator)
    targets[:, :2] = -100
    return {"ids": ids, "targets": targets}


def alone(plan: LoopPlan, row: int) -> LoopPlan:
    """What the plan asks of this row, as a plan for it alone."""
    assert plan.starts is not None
    total = plan.total - plan.starts[row]
    n_grad = min(total, plan.n_grad)
    return LoopPlan(total - n_grad, n_grad)


PLANS = {
    "truncated": LoopPlan(3, 2, (0, 2, 4, 1)),
    "all with gradient": LoopPlan(0, 5, (0, 4, 2, 1)),
    "equal": Fixed(3, 2).sample_each(torch.Generator(), 4),
    "uniform": Uniform(1, 6, 2).sample_each(torch.Generator().manual_seed(3), 4),
    "progressive": Progressive(4, 3).sample_each(torch.Generator().manual_seed(4), 4),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "changes",
    [
        {"halting": "off"},
        {"halting": "select", "initial_state": "prelude"},
        {"halting": "average", "act_threshold": 0.6},
        {"halting": "off", "attn_type": "mla", "kv_lora_rank": 6, "q_lora_rank": 6, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 4, "v_head_dim": 4, "state_norm": True},
    ],
    ids=["off", "select", "average", "mla"],
)  # fmt: skip
def test_a_row_in_the_batch_is_the_row_alone(plan: LoopPlan, changes: dict[str, object]):
    net = model(**changes)
    together, rows = copy.deepcopy(net), batch(4)
    scores = Objective(net).logits(rows, plan)
    total = Objective(together)(rows, plan)
    total.backward()
    losses = []
    for row in range(4):
        one = {key: value[row : row + 1] for key, value in rows.items()}
        own = alone(plan, row)
        torch.testing.assert_close(scores[row : row + 1], Objective(net).logits(one, own), rtol=0, atol=EXACT)
        net.zero_grad()
        loss = Objective(net)(one, own)
        loss.backward()
        losses.append({name: p.grad for name, p in net.named_parameters()} | {"": loss.detach()})
    assert float((sum(loss[""] for loss in losses) / 4 - total.detach()).abs()) <= EXACT
    for name, p in together.named_parameters():
        parts = [loss[name] for loss in losses if loss[name] is not None]
        assert (p.grad is None) == (not parts), name
        if parts:
            torch.testing.assert_close(p.grad, sum(parts) / 4, rtol=0, atol=EXACT, msg=name)


def test_the_plans_differ_between_rows():
    """Or the test above would show nothing."""
    for name, plan in PLANS.items():
        assert (len(set(plan.starts or ())) > 1) == (name != "equal"), name


def test_a_sequence_that_has_not_begun_keeps_its_state():
    net = model().eval()
    rows = batch(3)
    ctx = net.context(rows["ids"])
    e = net.prelude(rows["ids"], ctx)
    h = torch.randn_like(e)
    new = net.step(h, e, torch.tensor([-1, 0, 2]), ctx)
    assert torch.equal(new[0], h[0])
    for row, t in ((1, 0), (2, 2)):
        torch.testing.assert_close(new[row], net.step(h, e, t, ctx)[row], rtol=0, atol=EXACT)
