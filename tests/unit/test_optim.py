"""Which parameters decay, Muon against torch's, skipped updates, the learning rate of each step, clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.training.config import OptimConfig
from open_mythos.training.optim import (
    MuonAdamW,
    Schedule,
    build_optimizer,
    clip_gradients,
    orthogonalized,
    parameter_groups,
    set_lr,
    skip_when,
)


def model(**changes: object) -> OpenMythos:
    fields = dict(  # noqa: C408
        vocab_size=9, dim=16, n_heads=2, prelude_layers=1, coda_layers=1, n_experts=4, n_experts_per_tok=2,
        expert_dim=8, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        lora_rank=2, max_loop_iters=4, max_seq_len=16,
    )  # fmt: skip
    return OpenMythos(MythosConfig(**{**fields, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"attn_type": "gqa", "n_kv_heads": 1}, {"tie_embeddings": False}])
def test_matrices_decay_and_the_rest_does_not(changes: dict[str, object]):
    net = model(**changes)
    decayed, plain = parameter_groups(net, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    heavy = {names[id(p)] for p in decayed["params"]}
    light = {names[id(p)] for p in plain["params"]}
    assert heavy | light == set(names.values())
    assert not heavy & light
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    for name in ("log_A", "log_dt", "B"):
        assert f"recurrent.injection.{name}" in light
    assert {"embed.weight", "recurrent.lora.scale.weight", "recurrent.act.halt.bias", "norm.weight"} <= light
    assert {"recurrent.block.ffn.w_in", "recurrent.block.ffn.router.weight", "recurrent.lora.B"} <= heavy
    assert ("head.weight" in heavy) == (not net.cfg.tie_embeddings)


def test_decay_shrinks_matrices_alone():
    net = model()
    optimizer = build_optimizer(net, OptimConfig(lr=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    heavy = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, p in net.named_parameters():
        factor = 1 - 0.5 * 0.1 if id(p) in heavy else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_injection_learns_at_its_own_rate_and_all_else_as_before(kind: str):
    net = model()
    groups = build_optimizer(net, OptimConfig(kind=kind, lr=0.01)).param_groups
    optimizer = build_optimizer(net, OptimConfig(kind=kind, lr=0.01, injection_scale=0.1))
    assert len(optimizer.param_groups) == len(groups) + 1
    set_lr(optimizer, 0.02)
    apart = optimizer.param_groups[-1]
    own = {id(p) for p in net.recurrent.injection.parameters()}
    assert {id(p) for p in apart["params"]} == own
    assert (apart["lr"], apart["weight_decay"]) == (pytest.approx(0.002), 0.0)
    for before, after in zip(groups, optimizer.param_groups, strict=False):
        assert [id(p) for p in after["params"]] == [id(p) for p in before["params"] if id(p) not in own]
        assert after["weight_decay"] == before["weight_decay"]


def test_adamw_is_the_textbook_update():
    net = model()
    cfg = OptimConfig(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(net, cfg)
    p = net.recurrent.block.ffn.w_in
    expected, m, v = p.detach().double(), 0.0, 0.0
    for step, lr in enumerate((0.01, 0.02), start=1):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        p.grad = grad.clone()
        set_lr(optimizer, lr)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad.double(), 0.9 * v + 0.1 * grad.double() ** 2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        expected = expected * (1 - lr * 0.1) - lr * update
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(kind: str):
    schedule = Schedule(OptimConfig(lr=2.0, schedule=kind, warmup=4, floor=0.1), steps=20)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    later = [schedule(step) for step in range(4, 20)]
    assert later == sorted(later, reverse=True)
    assert schedule(19) == pytest.approx(2.0 if kind == "constant" else 0.2)


def test_cosine_is_half_way_down_in_the_middle():
    schedule = Schedule(OptimConfig(lr=1.0, warmup=0, floor=0.2), steps=10)
    assert schedule(4) == pytest.approx(0.6)
    assert schedule(0) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 10)))


def test_wsd_holds_and_then_falls_linearly():
    schedule = Schedule(OptimConfig(lr=1.0, schedule="wsd", warmup=2, decay=0.4, floor=0.0), steps=10)
    assert [schedule(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_warmup_longer_than_the_run_never_passes_the_peak():
    schedule = Schedule(OptimConfig(lr=1.0, warmup=100), steps=3)
    assert [schedule(step) for step in range(3)] == pytest.approx([0.01, 0.02, 0.03])


@pytest.mark.parametrize(("limit", "left"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_clipping_scales_to_the_limit(limit: float, left: list[float]):
    ps = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    ps[0].grad, ps[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_gradients(ps, limit, torch.tensor(5.0))
    assert [float(p.grad) for p in ps] == pytest.approx(left, rel=1e-5)


def test_muon_takes_the_matrices_of_the_blocks():
    net = model()
    groups = parameter_groups(net, 0.1, muon=True)
    names = {id(p): name for name, p in net.named_parameters()}
    turned, decayed, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert turned | decayed | plain == set(names.values())
    assert len(turned) + len(decayed) + len(plain) == len(names)
    assert {"recurrent.block.ffn.w_in", "recurrent.block.ffn.w_out", "coda_layers.0.attn.wo.weight"} <= turned
    kept = {"recurrent.block.ffn.router.weight", "recurrent.lora.down.weight", "recurrent.lora.B"}
    assert decayed == kept | {"recurrent.act.halt.weight"}
    assert plain == {names[id(p)] for p in parameter_groups(net, 0.1)[1]["params"]}


def gradients(net: OpenMythos, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None


def test_muon_is_torchs_on_every_matrix_and_expert():
    """torch's takes 2-D parameters: experts go to it one by one, turned to (out, in) as its scale expects."""
    net = model()
    cfg = OptimConfig(kind="muon", lr=0.01, muon_lr=0.05, muon_momentum=0.9, weight_decay=0.1)
    optimizer = build_optimizer(net, cfg)
    twins: dict[str, list[torch.nn.Parameter]] = {}
    for name, p in net.named_parameters():
        if any(p is q for q in optimizer.param_groups[0]["params"]):
            parts = [p] if p.dim() == 2 else [expert.mT for expert in p]
            twins[name] = [torch.nn.Parameter(part.detach().clone()) for part in parts]
    assert {len(parts) for parts in twins.values()} == {1, 4}
    reference = torch.optim.Muon(
        [q for parts in twins.values() for q in parts], momentum=0.9, weight_decay=0.1
    )
    others = copy.deepcopy(net)
    adamw = build_optimizer(others, OptimConfig(lr=0.01, weight_decay=0.1))
    for step, lr in enumerate((0.01, 0.003)):
        gradients(net, step)
        gradients(others, step)
        for name, parts in twins.items():
            grad = net.get_parameter(name).grad
            for part, g in zip(parts, [grad] if grad.dim() == 2 else [g.mT for g in grad], strict=True):
                part.grad = g.contiguous()
        set_lr(optimizer, lr)
        set_lr(adamw, lr)
        reference.param_groups[0]["lr"] = lr * 5
        for each in (optimizer, reference, adamw):
            each.step()
    for name, p in net.named_parameters():
        if name in twins:
            got = [p] if p.dim() == 2 else [expert.mT for expert in p]
            for part, expected in zip(got, twins[name], strict=True):
                torch.testing.assert_close(part.detach(), expected.detach(), rtol=0, atol=2e-3, msg=name)
        else:
            assert torch.equal(p, others.get_parameter(name)), name


def test_orthogonalized_has_singular_values_near_one():
    stack = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(stack).float())
    assert 0.5 < float(values.min()) < float(values.max()) < 1.4
    for one, many in zip(stack, orthogonalized(stack), strict=True):
        assert torch.equal(orthogonalized(one), many)
        torch.testing.assert_close(orthogonalized(one.mT), many.mT, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_update_changes_nothing(kind: str):
    net = model()
    optimizer = build_optimizer(net, OptimConfig(kind=kind))
    twin = copy.deepcopy(net)
    reference = build_optimizer(twin, OptimConfig(kind=kind))
    for bad, poison in ((False, False), (True, True), (True, False), (False, False)):
        gradients(net, 0)
        if poison:
            for p in net.parameters():
                p.grad.fill_(math.nan)
        skip_when(optimizer, torch.tensor(bad))
        optimizer.step()
        if not bad:
            gradients(twin, 0)
            reference.step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        for part, value in optimizer.state[p].items():
            assert torch.equal(value, reference.state[q][part]), (name, part)


def test_a_poisoned_first_step_leaves_muon_as_if_new():
    net = model()
    before = copy.deepcopy(net.state_dict())
    optimizer = build_optimizer(net, OptimConfig(kind="muon"))
    for p in net.parameters():
        p.grad = torch.full_like(p, math.inf)
    skip_when(optimizer, torch.tensor(True))
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_muons_state_dict_resumes_it():
    nets = [model() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (build_optimizer(net, OptimConfig(kind="muon")) for net in nets)
    gradients(nets[0], 0)
    first.step()
    nets[1].load_state_dict(nets[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in zip(nets, (first, second), strict=True):
        assert isinstance(optimizer, MuonAdamW)
        gradients(net, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
