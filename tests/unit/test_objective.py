"""Loop distributions against their formulas; truncated backpropagation against an independent derivation."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.training import objective
from open_mythos.training.config import LOOP_FIELDS
from open_mythos.training.objective import Fixed, LogNormalPoisson, LoopPlan, Progressive, Uniform

DRAWS = 4000


def model(**changes: object) -> OpenMythos:
    fields = dict(  # noqa: C408
        vocab_size=11, dim=16, n_heads=2, n_kv_heads=1, attn_type="gqa", prelude_layers=1, coda_layers=1,
        n_experts=4, n_experts_per_tok=2, n_shared_experts=1, expert_dim=8, lora_rank=2, max_loop_iters=4,
        max_seq_len=16,
    )  # fmt: skip
    return OpenMythos(MythosConfig(**{**fields, **changes})).train()  # type: ignore[arg-type]


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (3, 7), generator=generator)
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    targets[:, :2] = -100
    return {"ids": ids, "targets": targets}


def draw(distribution: objective.LoopDistribution, n: int = DRAWS) -> list[LoopPlan]:
    generator = torch.Generator().manual_seed(0)
    return [distribution.sample(generator) for _ in range(n)]


@pytest.mark.parametrize(
    "distribution",
    [Fixed(5), Fixed(9, backprop=4), Uniform(2, 7), Uniform(1, 9, 3), LogNormalPoisson(6), Progressive(8, 8)],
    ids=repr,
)
def test_mean_is_the_mean_of_the_draws(distribution: objective.LoopDistribution):
    totals = torch.tensor([plan.total for plan in draw(distribution)], dtype=torch.float64)
    error = float(totals.std()) / math.sqrt(DRAWS)
    assert abs(float(totals.mean()) - distribution.mean) <= 4 * error + 1e-12


def test_fixed_splits_its_loops():
    assert draw(Fixed(5), 3) == [LoopPlan(0, 5)] * 3
    assert draw(Fixed(5, backprop=2), 3) == [LoopPlan(3, 2)] * 3
    assert draw(Fixed(2, backprop=4), 3) == [LoopPlan(0, 2)] * 3


def test_uniform_reaches_both_ends_evenly():
    counts = Counter(plan.total for plan in draw(Uniform(3, 6)))
    assert set(counts) == {3, 4, 5, 6}
    assert all(abs(count - DRAWS / 4) < 5 * math.sqrt(DRAWS * 0.25 * 0.75) for count in counts.values())
    assert all(plan == LoopPlan(plan.total - 3, 3) for plan in draw(Uniform(3, 6, backprop=3), 50))


def test_progressive_draws_the_two_counts_independently():
    plans = draw(Progressive(2, 3))
    counts = Counter((plan.n_free, plan.n_grad) for plan in plans)
    assert set(counts) == {(n, k) for n in (0, 1, 2) for k in (1, 2, 3)}
    spread = math.sqrt(DRAWS * (1 / 9) * (8 / 9))
    assert all(abs(count - DRAWS / 9) < 5 * spread for count in counts.values())


def test_lognormal_poisson_has_the_formula_variance_and_truncation():
    rate, sigma, k = 6.0, 0.5, 4
    plans = draw(LogNormalPoisson(rate, sigma, k))
    totals = torch.tensor([plan.total for plan in plans], dtype=torch.float64)
    # Var[Poisson(τ)] = E[τ] + Var[τ], and Var[τ] = r²(exp(σ²) − 1) for the log-normal of mean r.
    expected = rate + rate**2 * (math.exp(sigma**2) - 1)
    assert float(totals.var()) == pytest.approx(expected, rel=0.15)
    assert int(totals.min()) >= 1
    for plan in plans:
        assert (plan.n_free, plan.n_grad) == (max(plan.total - k, 0), min(plan.total, k))


def test_draws_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = draw(LogNormalPoisson(8), 20)
    torch.manual_seed(2)
    assert draw(LogNormalPoisson(8), 20) == first
    assert len(set(first)) > 5


def test_every_kind_of_the_config_is_a_distribution():
    needed = {"loops": 3, "high": 4, "rate": 5, "free": 2, "grad": 2}
    for kind, fields in LOOP_FIELDS.items():
        options = {name: needed.get(name, default) for name, default in fields.items()}
        assert objective.loop_distribution(kind, **options).sample(torch.Generator()).n_grad >= 1
    with pytest.raises(ConfigError, match="kind = 'often' is not allowed"):
        objective.loop_distribution("often")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0), lambda: Fixed(2, backprop=0), lambda: Uniform(0, 3), lambda: Uniform(4, 3),
        lambda: LogNormalPoisson(0.0), lambda: LogNormalPoisson(4, sigma=math.inf),
        lambda: LogNormalPoisson(4, backprop=0), lambda: Progressive(-1, 2), lambda: Progressive(2, 0),
        lambda: LoopPlan(0, 0), lambda: LoopPlan(-1, 1), lambda: Fixed(True),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused(make):  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="is not allowed: it must be"):
        make()


def test_loss_without_free_loops_is_the_models_own_cross_entropy():
    net, data = model(), batch()
    twin = copy.deepcopy(net)
    expected = F.cross_entropy(twin(data["ids"], n_loops=3).flatten(0, 1), data["targets"].flatten())
    got = objective.loss(net, data, LoopPlan(0, 3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    got.backward()
    expected.backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("halting", ["off", "select"])
@pytest.mark.parametrize("initial_state", ["zero", "prelude"])
def test_truncated_gradient_is_that_of_the_last_loops(halting: str, initial_state: str):
    """A frozen copy makes the state after the free loops; the rest is plain autograd."""
    net = model(halting=halting, initial_state=initial_state).double()
    data, plan = batch(), LoopPlan(3, 2)
    frozen = copy.deepcopy(net)
    ctx = frozen.context(data["ids"])
    with torch.no_grad():
        e = frozen.prelude(data["ids"], ctx)
        start = frozen.initial_state(e)
        for t in range(3):
            start = frozen.step(start, e, t, ctx)
    reference = copy.deepcopy(net)
    e = reference.prelude(data["ids"], ctx)
    scores = reference.coda(reference.think(start, e, ctx, [3, 4]), ctx)
    F.cross_entropy(scores.flatten(0, 1), data["targets"].flatten()).backward()

    objective.loss(net, data, plan).backward()
    for (name, p), q in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        # Not to the bit: without gradients a norm sums in another order.
        assert p.grad is None or torch.allclose(p.grad, q[1].grad, rtol=1e-10, atol=1e-12), name

    full = copy.deepcopy(reference)
    full.zero_grad()
    objective.loss(full, data, LoopPlan(0, 5)).backward()
    block = "recurrent.block.attn.wq.weight"
    assert not torch.allclose(net.get_parameter(block).grad, full.get_parameter(block).grad)


def test_truncated_gradient_against_finite_differences():
    """f(θ) runs its free loops at fixed θ₀ and the rest at θ; the gradient must be df/dθ at θ₀."""
    net, data = model(halting="off", router_bias_rate=0.0).double(), batch()
    frozen = copy.deepcopy(net)
    ctx = net.context(data["ids"])
    with torch.no_grad():
        e0 = frozen.prelude(data["ids"], ctx)
        start = frozen.initial_state(e0)
        for t in range(2):
            start = frozen.step(start, e0, t, ctx)
    objective.loss(net, data, LoopPlan(2, 2)).backward()
    generator = torch.Generator().manual_seed(3)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in net.named_parameters()
        if p.grad is not None
    }
    slope = sum(float((direction[n] * p.grad).sum()) for n, p in net.named_parameters() if n in direction)

    def value(step: float) -> float:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for n, p in moved.named_parameters():
                if n in direction:
                    p += step * direction[n]
            e = moved.prelude(data["ids"], ctx)
            scores = moved.coda(moved.think(start, e, ctx, [2, 3]), ctx)
            return float(F.cross_entropy(scores.flatten(0, 1), data["targets"].flatten()))

    step = 1e-6
    assert slope == pytest.approx((value(step) - value(-step)) / (2 * step), rel=1e-5)


def test_free_loops_count_no_load_and_run_before_the_others():
    net, data = model(), batch()
    seen: list[tuple[int, bool]] = []
    step = net.step
    net.step = lambda h, e, t, ctx: (seen.append((t, torch.is_grad_enabled())), step(h, e, t, ctx))[1]  # type: ignore[method-assign]
    objective.loss(net, data, LoopPlan(2, 3))
    assert seen == [(0, False), (1, False), (2, True), (3, True), (4, True)]
    assert int(net.recurrent.block.ffn.expert_load.sum()) == 3 * data["ids"].numel() * 2


def test_router_bias_moves_in_training_only():
    net, data = model(), batch()
    objective.loss(net, data, LoopPlan(0, 1))
    bias = net.recurrent.block.ffn.router_bias
    assert not bias.any()
    objective.loss(net, data, LoopPlan(0, 1))
    assert bias.any()
    before = bias.clone()
    with torch.no_grad():
        objective.loss(net, data, LoopPlan(0, 1))
    objective.loss(net.eval(), data, LoopPlan(0, 1))
    assert torch.equal(bias, before)


def test_documents_do_not_see_each_other():
    net = model(halting="off").eval()
    data = batch()
    data["document_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(3, -1)
    first = objective.logits(net, data, LoopPlan(1, 1))
    data["ids"] = data["ids"].clone()
    data["ids"][:, :3] = (data["ids"][:, :3] + 1) % 11
    second = objective.logits(net, data, LoopPlan(1, 1))
    assert torch.equal(first[:, 3:], second[:, 3:])
    assert not torch.allclose(first[:, :3], second[:, :3])


def test_targets_of_minus_100_are_not_scored():
    net, data = model(halting="off").eval(), batch()
    scores = objective.logits(net, data, LoopPlan(0, 2)).log_softmax(-1)
    rows, columns = (data["targets"] >= 0).nonzero(as_tuple=True)
    expected = -scores[rows, columns, data["targets"][rows, columns]].mean()
    torch.testing.assert_close(objective.loss(net, data, LoopPlan(0, 2)), expected)
