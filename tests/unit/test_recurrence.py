"""Stability of the injection for every parameter value, and halting that selects, sums to one and learns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import (
    ACTHalting,
    LoRAAdapter,
    LTIInjection,
    MythosConfig,
    OpenMythos,
    loop_index_embedding,
    rescale_spectral_radius,
    spectral_radius,
)
from open_mythos.config import ConfigError
from open_mythos.model.recurrence import HaltingWeights, convergence_loss

EXTREMES = (-3e38, -1e30, -1e4, -20.0, -15.0, -1.0, -1e-38, 0.0, 1e-38, 1.0, 4.4, 20.0, 1e4, 1e30, 3e38)


def config(**changes: Any) -> MythosConfig:
    sizes = {
        "vocab_size": 31, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32, "max_loop_iters": 4,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": "gqa", "n_experts": 4, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2,
    }  # fmt: skip
    return MythosConfig(**{**sizes, **changes})


def build(seed: int = 0, **changes: Any) -> OpenMythos:
    torch.manual_seed(seed)
    return OpenMythos(config(**changes))


@torch.no_grad()
def longest_state(model: OpenMythos, loops: int) -> tuple[float, float]:
    """The longest state of any position after any loop, and the bound that a normalised update gives it."""
    e = model.prelude(torch.arange(24).view(2, 12))
    h, longest = torch.zeros_like(e), 0.0
    for t in range(loops):
        h = model.step(h, e, t)
        longest = max(longest, float(h.norm(dim=-1).max()))
    injection, norm = model.recurrent.injection, model.recurrent.update_norm
    gain = 1.0 if norm is None else float(norm.weight.abs().max())
    driven = float((injection.B * e).norm(dim=-1).max()) + gain * model.cfg.dim**0.5
    return longest, driven / (1 - spectral_radius(model))


def test_a_normalised_update_bounds_the_state_whatever_the_weights() -> None:
    lengths = {}
    for normalised in (True, False):
        model = build(update_norm=normalised)
        with torch.no_grad():
            for parameter in model.recurrent.block.parameters():
                parameter.mul_(30)
        lengths[normalised], bound = longest_state(model, 50)
        assert (lengths[normalised] <= bound * (1 + 1e-5)) == normalised
    assert lengths[False] > 100 * lengths[True]


def strictly_inside(a: Tensor) -> None:
    assert a.dim() == 1
    assert a.dtype in (torch.float32, torch.float64)
    assert bool(((a > 0) & (a < 1)).all()), (a.min(), a.max())
    assert bool((a >= torch.finfo(a.dtype).tiny).all()), "no denormal, which a device may flush to zero"


# The decay A.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_decay_is_strictly_inside_for_any_finite_parameter(dtype: torch.dtype) -> None:
    injection = LTIInjection(len(EXTREMES)).to(dtype)
    for log_dt in EXTREMES:
        with torch.no_grad():
            injection.log_A.copy_(torch.tensor(EXTREMES))
            injection.log_dt.fill_(log_dt)
        assert injection.log_A.isfinite().all()
        strictly_inside(injection.get_A())
        h = torch.ones(1, 2, len(EXTREMES), dtype=dtype)
        assert injection(h, h, h).isfinite().all()


def test_the_decay_is_strictly_inside_at_random_bit_patterns() -> None:
    """Every kind of finite float32, denormals and the largest included."""
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 20_000), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    finite = values.isfinite().all(0)
    injection = LTIInjection(int(finite.sum()))
    with torch.no_grad():
        injection.log_A.copy_(values[0, finite])
        for log_dt in (0.0, float(values[1, finite][0]), 3e38, -3e38):
            injection.log_dt.fill_(log_dt)
            strictly_inside(injection.get_A())


def test_half_precision_parameters() -> None:
    injection = LTIInjection(4).half()
    with torch.no_grad():
        injection.log_A.copy_(torch.tensor([-65504.0, -6e-8, 3.0, 65504.0]))
    strictly_inside(injection.get_A())


@pytest.mark.parametrize("loss_of", ["random", "largest A", "smallest A"])
def test_the_decay_stays_inside_after_adam_at_learning_rate_one(loss_of: str) -> None:
    model = build()
    optimiser = torch.optim.Adam(model.parameters(), lr=1.0)
    for _ in range(50):
        ids = torch.randint(0, 31, (2, 8))
        logits = model(ids, n_loops=2)
        a = model.recurrent.injection.get_A()
        loss = {
            "random": (logits * torch.randn_like(logits)).mean(),
            "largest A": -a.sum(),
            "smallest A": a.sum(),
        }
        optimiser.zero_grad()
        loss[loss_of].backward()
        optimiser.step()
        strictly_inside(model.recurrent.injection.get_A())
    model.bfloat16()
    strictly_inside(model.recurrent.injection.get_A())


@pytest.mark.parametrize(
    ("thrown", "target"),
    [(-100.0, 0.9), (-100.0, 0.5), (-15.0, 0.9), (3.6, 0.1), (4.4, 0.5), (100.0, 0.1), (100.0, 0.5)],
)
def test_a_parameter_thrown_outside_comes_back_when_the_loss_asks(thrown: float, target: float) -> None:
    injection = LTIInjection(3)
    with torch.no_grad():
        injection.log_A.fill_(thrown)
    optimiser = torch.optim.Adam(injection.parameters(), lr=0.1)
    for _ in range(1500):
        loss = (injection.get_A() - target).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (injection.get_A() - target).abs().max() < 0.02, injection.log_A


def test_the_update_is_the_equation() -> None:
    injection = LTIInjection(3)
    with torch.no_grad():
        injection.log_A.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        injection.log_dt.fill_(0.3)
        injection.B.copy_(torch.tensor([0.1, 0.2, 0.3]))
    h, e, u = torch.randn(3, 2, 5, 3)
    for i, s in enumerate((-0.7, 0.3, 1.3)):
        expected = math.exp(-math.exp(s)) * h[..., i] + 0.1 * (i + 1) * e[..., i] + u[..., i]
        torch.testing.assert_close(injection(h, e, u)[..., i], expected)
    low = injection.bfloat16()(h.bfloat16(), e.bfloat16(), u.bfloat16())
    assert low.dtype == torch.bfloat16


def test_spectral_radius_is_the_largest_decay() -> None:
    model = build()
    with torch.no_grad():
        model.recurrent.injection.log_A.copy_(torch.linspace(-3, 1, 16))
    assert spectral_radius(model) == pytest.approx(math.exp(-math.exp(-3)), abs=1e-7)
    assert spectral_radius(model) == float(
        torch.diag(model.recurrent.injection.get_A()).detach().norm(2, -1).max()
    )


@pytest.mark.parametrize("limit", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("log_dt", [-4.0, 0.0, 0.5, 30.0])
def test_rescaling_multiplies_every_decay_by_the_same_factor(limit: float, log_dt: float) -> None:
    model = build()
    injection = model.recurrent.injection
    with torch.no_grad():
        injection.log_A.copy_(torch.linspace(-7, 1, 16) - log_dt)
        injection.log_dt.fill_(log_dt)
    before = injection.get_A().detach().clone()
    radius = spectral_radius(model)
    got = rescale_spectral_radius(model, limit)
    assert got == spectral_radius(model)
    # float32 keeps s = log A + log dt to about 1e-6, and a change of s moves A by at most 0.37 of it.
    torch.testing.assert_close(injection.get_A().detach(), before * (limit / radius), rtol=2e-6, atol=2e-6)
    assert got == pytest.approx(limit, rel=1e-6)


def test_rescaling_below_the_limit_changes_nothing() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert rescale_spectral_radius(model) == spectral_radius(model) < 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rescaling_from_the_ends_of_the_range() -> None:
    model = build()
    with torch.no_grad():
        model.recurrent.injection.log_A.copy_(torch.tensor((*EXTREMES, 0.0)))
        model.recurrent.injection.log_dt.fill_(-3e38)
    assert rescale_spectral_radius(model, 0.9) == pytest.approx(0.9, rel=1e-6)
    strictly_inside(model.recurrent.injection.get_A())


@pytest.mark.parametrize("limit", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf, "0.9", None])
def test_rescaling_refuses_other_limits(limit: Any) -> None:
    model = build()
    before = model.recurrent.injection.log_A.detach().clone()
    with pytest.raises(ConfigError, match=r"limit = .* is not allowed: it must be .*above 0 and below 1"):
        rescale_spectral_radius(model, limit)
    assert torch.equal(model.recurrent.injection.log_A, before)


# Loop embedding and LoRA beyond the loops of training.


@pytest.mark.parametrize("loop_dim", [1, 2, 3, 8])
def test_the_loop_embedding_is_defined_for_any_loop(loop_dim: int) -> None:
    h = torch.zeros(1, 1, 16)
    seen = [loop_index_embedding(h, t, loop_dim)[0, 0] for t in (0, 1, 5, 1000)]
    assert all(torch.equal(row[loop_dim:], torch.zeros(16 - loop_dim)) for row in seen)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    half = [math.sin(5 * 10000 ** (-i / loop_dim)) for i in range(0, loop_dim, 2)]
    torch.testing.assert_close(seen[2][: len(half)], torch.tensor(half))


def test_the_loop_embedding_keeps_loops_apart_in_low_precision() -> None:
    """Angles are computed in float32: bfloat16 cannot tell 257 from 256."""
    h = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    wide = loop_index_embedding(h.float(), 257, 4)
    torch.testing.assert_close(loop_index_embedding(h, 257, 4), wide.bfloat16(), rtol=0, atol=0)


def test_lora_beyond_its_table_uses_the_last_row() -> None:
    lora = LoRAAdapter(8, 2, 3)
    torch.nn.init.normal_(lora.B)
    torch.nn.init.normal_(lora.scale.weight)
    x = torch.randn(1, 2, 8)
    assert torch.equal(lora(x, 2), lora(x, 99))
    assert torch.equal(lora(x, torch.tensor(99)), lora(x, 2))
    assert not torch.equal(lora(x, 1), lora(x, 2))
    torch.testing.assert_close(lora(x, 1), ((x @ lora.down.weight.T) * lora.scale.weight[1]) @ lora.B)


def test_lora_changes_nothing_at_initialisation() -> None:
    lora = build().recurrent.lora
    assert lora is not None
    assert not lora(torch.randn(1, 2, 16), 0).any()


# Halting weights.


def weights_of(mode: str, threshold: float, p: Tensor) -> Tensor:
    """(T, B, S) halting probabilities → (T, B, S) weights."""
    weights = HaltingWeights(config(halting=mode, act_threshold=threshold))
    return torch.stack([weights.next(row, t == len(p) - 1) for t, row in enumerate(p)])


@pytest.mark.parametrize("threshold", [1e-30, 1e-3, 0.5, 0.99, 1.0, 1.0 + 1e-9, 2.0, 1e30])
@pytest.mark.parametrize("n_loops", [1, 2, 3, 7, 16, 64])
def test_weights_sum_to_one(n_loops: int, threshold: float) -> None:
    p = torch.rand(n_loops, 4, 50) ** torch.tensor([1.0, 4.0, 0.2, 30.0])[:, None]
    p[:, 0, 0], p[:, 0, 1], p[:, 0, 2] = 0.0, 1.0, 1e-30
    selected = weights_of("select", threshold, p)
    assert torch.equal(selected.sum(0), torch.ones(4, 50))
    assert set(selected.unique().tolist()) <= {0.0, 1.0}
    averaged = weights_of("average", threshold, p)
    assert (averaged.sum(0) - 1).abs().max() <= 1e-6
    assert averaged.min() >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_sum_to_one_in_other_dtypes(dtype: torch.dtype) -> None:
    p = torch.rand(16, 4, 50).to(dtype)
    for mode in ("select", "average"):
        weights = weights_of(mode, 0.99, p)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (weights.sum(0) - 1).abs().max() <= 1e-6


def test_select_takes_the_first_loop_whose_cumulative_probability_reaches_the_threshold() -> None:
    p = torch.tensor([[0.5, 0.9, 0.0, 0.1], [0.5, 0.0, 0.0, 0.1], [0.5, 0.9, 0.0, 0.1]]).unsqueeze(1)
    chosen = weights_of("select", 0.75, p).argmax(0)[0]
    assert chosen.tolist() == [1, 0, 2, 2]


def test_average_gives_the_remainder_to_the_loop_that_crosses() -> None:
    p = torch.tensor([0.5, 0.3, 0.4, 0.9]).view(4, 1, 1)
    torch.testing.assert_close(weights_of("average", 0.99, p).flatten(), torch.tensor([0.5, 0.3, 0.2, 0.0]))
    torch.testing.assert_close(weights_of("average", 0.99, p[:2]).flatten(), torch.tensor([0.5, 0.5]))
    assert float(weights_of("upstream", 0.99, p[:2]).sum()) == pytest.approx(0.8), (
        "as the public release does"
    )


# Halting in the model.


def states_and_output(model: OpenMythos, ids: Tensor, n_loops: int) -> tuple[Tensor, Tensor]:
    ctx = model.context(ids)
    e = model.prelude(ids, ctx)
    h, states = model.initial_state(e), []
    for t in range(n_loops):
        h = model.step(h, e, t, ctx)
        states.append(h)
    return torch.stack(states), model.think(model.initial_state(e), e, ctx, range(n_loops))


@pytest.mark.parametrize("n_loops", [1, 4, 16])
@torch.no_grad()
def test_nothing_halts_before_the_last_loop_at_initialisation(n_loops: int) -> None:
    model = build().eval()
    states, out = states_and_output(model, torch.randint(0, 31, (2, 8)), n_loops)
    assert torch.equal(out, states[-1])
    assert len({tuple(state.flatten().tolist()) for state in states}) == n_loops


@torch.no_grad()
def test_select_hands_over_a_state_that_existed() -> None:
    model = build(act_threshold=0.7).eval()
    model.recurrent.act.halt.weight.normal_(std=0.5)
    states, out = states_and_output(model, torch.randint(0, 31, (4, 8)), 12)
    matches = (states == out).all(-1)
    assert matches.any(0).all()
    assert len(matches.long().argmax(0).unique()) >= 3


@torch.no_grad()
def test_off_asks_no_head_and_hands_over_the_last_state() -> None:
    model = build(halting="off").eval()
    model.recurrent.act.forward = lambda h: pytest.fail("asked")  # type: ignore[method-assign]
    states, out = states_and_output(model, torch.randint(0, 31, (2, 8)), 5)
    assert torch.equal(out, states[-1])
    assert not model.recurrent.act.halt.weight.requires_grad


def test_no_loops_at_all_hand_back_the_state_given() -> None:
    for mode in ("select", "average", "off"):
        model = build(halting=mode)
        ids = torch.randint(0, 31, (2, 8))
        e = model.prelude(ids)
        assert torch.equal(model.think(e, e, model.context(ids), []), e)


def test_the_halting_head_is_a_probability_per_position() -> None:
    act = ACTHalting(16)
    p = act(torch.randn(2, 5, 16))
    assert p.shape == (2, 5)
    assert bool(((p > 0) & (p < 1)).all())
    assert torch.allclose(ACTHalting(16, -3.0).halt.bias * 0 - 3, build().recurrent.act.halt.bias)


@pytest.mark.parametrize("n_loops", [1, 2, 5])
def test_the_halting_loss_leaves_the_trunk_alone(n_loops: int) -> None:
    """With a threshold out of reach the last state is selected: same gradients as with halting off."""
    ids, grads = torch.randint(0, 31, (4, 8)), {}
    for mode in ("select", "off"):
        model = build(halting=mode, act_threshold=2.0)
        with torch.no_grad():
            model.recurrent.act.halt.weight.normal_(std=0.3)
        model(ids, n_loops).square().mean().backward()
        grads[mode] = {name: p.grad for name, p in model.named_parameters() if ".act." not in name}
        head = [p.grad for p in model.recurrent.act.parameters()]
        if mode == "off":
            assert head == [None, None]
        else:
            assert all(g is not None and bool(g.any()) == (n_loops > 1) for g in head)
    for name, grad in grads["select"].items():
        assert grad is not None, name
        assert torch.equal(grad, grads["off"][name]), name


def test_the_head_learns_in_a_plain_loop_where_the_state_has_settled() -> None:
    """Where the state settles at once the probability rises; where it keeps moving it stays low."""
    ids, ends = torch.randint(0, 31, (4, 8)), {}
    for settles in (True, False):
        model = build(seed=1, halt_bias_init=-3.0)
        with torch.no_grad():
            model.recurrent.injection.log_A.fill_(2.0 if settles else -4.0)
            model.recurrent.block.attn.wo.weight.zero_()
            model.recurrent.block.ffn.w_out.zero_()
            model.recurrent.block.ffn.shared.down.weight.zero_()  # type: ignore[union-attr]
        frozen = {id(p) for p in model.recurrent.act.parameters()}
        optimiser = torch.optim.AdamW([p for p in model.parameters() if id(p) in frozen], lr=0.1)
        for _ in range(30):
            loss = model(ids, n_loops=6).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            states, _ = states_and_output(model.eval(), ids, 6)
            ends[settles] = model.recurrent.act(states[:-1].flatten(0, 1)).mean()
    assert ends[True] > 0.5
    assert ends[False] < 0.1


def test_the_halting_loss_of_states_that_have_settled_and_have_not() -> None:
    h, p = torch.randn(2, 3, 4), torch.rand(2, 3, requires_grad=True)
    settled = convergence_loss(p, h, h * 1.04, 0.05)
    torch.testing.assert_close(settled, -p.clamp(1e-6, 1 - 1e-6).log())
    moving = convergence_loss(p, h, h * 1.06, 0.05)
    torch.testing.assert_close(moving, -(1 - p.clamp(1e-6, 1 - 1e-6)).log())
    certain = torch.ones(2, 3, requires_grad=True)
    assert convergence_loss(certain, h, -h, 0.05).isfinite().all()


def test_a_single_loop_teaches_the_halting_head_nothing() -> None:
    model = build()
    model.train()(torch.randint(0, 16, (2, 5)), n_loops=1).sum().backward()
    assert not model.recurrent.act.halt.weight.grad.any()
    assert model.recurrent.act.halt.bias.grad == 0


def test_training_under_autocast_works_with_the_halting_loss() -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randint(0, 31, (2, 8)), n_loops=3)
    out.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
