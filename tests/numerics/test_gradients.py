"""Gradients of every module, of its parameters and its inputs, against float64 finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from open_mythos import (
    ACTHalting,
    Expert,
    GQAttention,
    KVCache,
    LoRAAdapter,
    LTIInjection,
    MLAttention,
    MoEFFN,
    MythosConfig,
    OpenMythos,
    RMSNorm,
    apply_rope,
    loop_index_embedding,
)
from open_mythos.model.attention import SequenceContext
from open_mythos.model.layers import rope_table
from open_mythos.model.recurrence import HaltingWeights, attach_loss, convergence_loss

F64 = torch.float64
D = 8


def config(**changes: Any) -> MythosConfig:
    sizes = {
        "vocab_size": 5, "dim": D, "n_heads": 2, "n_kv_heads": 2, "max_seq_len": 16, "max_loop_iters": 2,
        "prelude_layers": 1, "coda_layers": 1, "kv_lora_rank": 4, "q_lora_rank": 3, "qk_rope_head_dim": 2,
        "qk_nope_head_dim": 3, "v_head_dim": 2, "n_experts": 3, "n_shared_experts": 1, "n_experts_per_tok": 2,
        "expert_dim": 3, "lora_rank": 2, "ffn_dim": 4,
    }  # fmt: skip
    return MythosConfig(**{**sizes, **changes})


def randomise(module: nn.Module) -> nn.Module:
    """Float64, evaluation mode, and no weight at a special value such as zero or one."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return module


def check(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor, fast: bool = False) -> None:
    """``function(*inputs)`` differentiated with respect to the inputs and every parameter of the module.

    Each parameter must matter, so that a gradient which is zero on both sides cannot pass.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def call(*values: Tensor) -> Tensor:
        return function(*values[: len(inputs)])

    assert gradcheck(call, (*leaves, *parameters), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=fast)
    out = call(*leaves)
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, [*leaves, *parameters], direction, allow_unused=True)
    names = [f"input {i}" for i in range(len(inputs))] + [name for name, _ in module.named_parameters()]
    for name, grad in zip(names, grads, strict=True):
        assert grad is not None, name
        assert grad.abs().max() > 1e-8, name


def along_directions(model: nn.Module, function: Callable[[], Tensor]) -> None:
    """Each parameter moved along two random directions; a whole Jacobian would take minutes."""
    with torch.no_grad():
        model.recurrent.injection.log_A.uniform_(-2, 1)  # type: ignore[union-attr,operator]
        model.recurrent.act.halt.bias.fill_(-1.5)  # type: ignore[union-attr,operator]
    weights = torch.randn_like(function())
    model.zero_grad()
    (function() * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-8, name
        for _ in range(2):
            direction, ends = torch.randn_like(parameter), []
            with torch.no_grad():
                for shift in (1e-6, -2e-6):
                    parameter.add_(shift * direction)
                    ends.append(float((function() * weights).sum()))
                parameter.add_(1e-6 * direction)
            exact = float((parameter.grad * direction).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - exact) < 1e-6 + 1e-5 * abs(exact), name


def test_rms_norm() -> None:
    norm = randomise(RMSNorm(D))
    check(norm, norm, torch.randn(2, 3, D, dtype=F64))
    check(norm, norm, 1e-3 * torch.randn(2, D, dtype=F64))


def test_apply_rope() -> None:
    table = rope_table(torch.tensor([[0, 1, 2], [5, 4, 900]]), 6, 100.0, F64)
    check(nn.Identity(), lambda x: apply_rope(x, table), torch.randn(2, 3, 2, 6, dtype=F64))


def test_expert() -> None:
    expert = randomise(Expert(D, 5))
    check(expert, expert, torch.randn(2, 3, D, dtype=F64))


def context(length: int, width: int, past: int = 0, cache: KVCache | None = None) -> SequenceContext:
    rope = rope_table(torch.arange(past, past + length).unsqueeze(0), width, 100.0, F64)
    columns = torch.arange(past + length)
    mask = (columns <= columns[past:, None]).view(1, 1, length, past + length) if past else None
    return SequenceContext(rope, mask, cache)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_gq_attention(n_kv_heads: int, qk_norm: bool) -> None:
    attn = randomise(GQAttention(config(attn_type="gqa", n_heads=4, n_kv_heads=n_kv_heads, qk_norm=qk_norm)))
    check(attn, lambda x: attn(x, context(4, 2), ""), torch.randn(2, 4, D, dtype=F64))


def test_ml_attention_expanded() -> None:
    attn = randomise(MLAttention(config()))
    check(attn, lambda x: attn(x, context(4, 2), ""), torch.randn(2, 4, D, dtype=F64))


@pytest.mark.parametrize("core", ["_attend_absorbed", "_attend_expanded"])
@pytest.mark.parametrize("new", [1, 3])
def test_ml_attention_behind_a_cache(monkeypatch: pytest.MonkeyPatch, core: str, new: int) -> None:
    attn = randomise(MLAttention(config()))
    monkeypatch.setattr(attn, "_absorbing_pays", lambda *_: core == "_attend_absorbed")
    latent = torch.randn(2, 3, 6, dtype=F64)

    def behind(x: Tensor) -> Tensor:
        cache = KVCache()
        cache.write("slot", {"latent": latent})
        cache.commit(3, None)
        return attn(x, context(new, 2, 3, cache), "slot")

    check(attn, behind, torch.randn(2, new, D, dtype=F64))


@pytest.mark.parametrize(("experts", "active", "shared"), [(3, 2, 1), (5, 1, 1), (2, 2, 0), (7, 3, 2)])
def test_moe_ffn(experts: int, active: int, shared: int) -> None:
    """The choice of experts stays fixed: no token stands within the perturbation of a tie."""
    cfg = config(n_experts=experts, n_experts_per_tok=active, n_shared_experts=shared)
    moe = randomise(MoEFFN(cfg))
    moe.router_bias.normal_(std=0.05)  # type: ignore[operator,union-attr]
    x = torch.randn(2, 4 * experts, D, dtype=F64) / 2
    ranked = (moe.router(x) + moe.router_bias).sort(-1, descending=True).values  # type: ignore[operator]
    if active < experts:
        assert (ranked[..., active - 1] - ranked[..., active]).min() > 2e-5
    out = moe(x)
    used = moe.route(x.flatten(0, 1))[0].unique()  # type: ignore[operator]
    assert len(used) == experts, "every expert should have a token here"
    if active > 1:
        check(moe, moe, x)
    else:
        # One expert has weight one whatever its logit: the router gets no gradient, on purpose.
        moe.router.requires_grad_(False)  # type: ignore[union-attr]
        moe.train(False)
        parameters = [p for p in moe.parameters() if p.requires_grad]
        assert gradcheck(lambda x, *_: moe(x), (x.requires_grad_(), *parameters), atol=1e-7)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("log_dt", [-0.7, 0.0, 0.6])
def test_lti_injection_inside(log_dt: float) -> None:
    injection = LTIInjection(D).double()
    with torch.no_grad():
        injection.log_A.copy_(torch.linspace(-6, 1.5, D))
        injection.log_dt.fill_(log_dt)
        injection.B.normal_()
    check(injection, injection, *(torch.randn(2, 3, D, dtype=F64) for _ in range(3)))


@pytest.mark.parametrize("s", [-1e30, -100.0, -15.0, -14.9, -12.0, 3.0, 4.39, 4.4, 10.0, 1e30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_lti_gradient_leads_inward_wherever_the_parameter_is(s: float, sign: float) -> None:
    """Near and past the ends the slope is not the true one but at least 1e-4, and never leads further out."""
    injection = LTIInjection(1).double()
    with torch.no_grad():
        injection.log_A.fill_(s)
    (sign * injection.get_A()).sum().backward()
    assert injection.log_A.grad is not None
    step = -float(injection.log_A.grad)  # descent
    wanted = sign  # raising s lowers A, so a loss of +A wants a larger s
    at_low, at_high = s <= LTIInjection.LOW, s >= LTIInjection.HIGH
    if (at_low and wanted < 0) or (at_high and wanted > 0):
        assert step == 0
    else:
        assert step * wanted >= 1e-4
    assert injection.log_dt.grad is not None
    assert float(injection.log_dt.grad) == float(injection.log_A.grad)


@pytest.mark.parametrize("loop_t", [0, 1, 7, torch.tensor(1)])
def test_lora_adapter(loop_t: int | Tensor) -> None:
    lora = randomise(LoRAAdapter(D, 3, 2))
    check(lora, lambda x: lora(x, loop_t), torch.randn(2, 3, D, dtype=F64))


def test_loop_index_embedding() -> None:
    check(nn.Identity(), lambda h: loop_index_embedding(h, 3, 4), torch.randn(2, 3, D, dtype=F64))


def test_act_halting() -> None:
    act = randomise(ACTHalting(D))
    check(act, act, torch.randn(2, 3, D, dtype=F64))


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0, 5.0])
@pytest.mark.parametrize("mode", ["average", "upstream"])
def test_averaged_halting(mode: str, threshold: float) -> None:
    """Through the remainder, too: the weighted sum of states, with respect to states and probabilities."""
    cfg = config(halting=mode, act_threshold=threshold)

    def mix(logits: Tensor, states: Tensor) -> Tensor:
        weights, out = HaltingWeights(cfg), torch.zeros_like(states[0])
        for t, (p, h) in enumerate(zip(logits.sigmoid(), states, strict=True)):
            out = out + weights.next(p, t == 4).unsqueeze(-1) * h
        return out

    check(nn.Identity(), mix, torch.randn(5, 2, 3, dtype=F64) - 1, torch.randn(5, 2, 3, D, dtype=F64))


@pytest.mark.parametrize("settled", [True, False])
def test_the_halting_loss(settled: bool) -> None:
    """Analytic: d/d logit of the cross entropy; nothing flows to the states."""
    final = torch.randn(2, 3, D, dtype=F64, requires_grad=True)
    h = (final if settled else -final).detach().requires_grad_()
    logit = torch.randn(2, 3, dtype=F64, requires_grad=True)
    loss = convergence_loss(logit.sigmoid(), h, final, 0.05).sum()
    grads = torch.autograd.grad(loss, [logit, h, final], allow_unused=True)
    torch.testing.assert_close(grads[0], logit.sigmoid().detach() - int(settled), rtol=0, atol=1e-12)
    assert grads[1] is None
    assert grads[2] is None


def test_an_attached_loss_is_descended_and_the_value_is_not_changed() -> None:
    x, w = torch.randn(3, dtype=F64, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = attach_loss(x, w**2)
    assert torch.equal(out, x)
    (out * 5).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 5.0, dtype=F64))  # type: ignore[arg-type]
    assert w.grad is not None
    assert float(w.grad) == 4.0


@pytest.mark.parametrize(
    "changes",
    [
        {"halting": "off"},
        {"halting": "average", "act_threshold": 0.6},
        {
            "halting": "upstream",
            "act_threshold": 0.6,
            "loop_embedding": True,
            "block_output": "state",
            "initial_state": "prelude",
            "qk_norm": False,
            "input_norm": False,
        },
        {"state_norm": True, "tie_embeddings": False, "halting": "off"},
    ],
    ids=lambda c: f"{c['halting']}-{len(c)}",
)
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_whole_model(attn_type: str, changes: dict[str, Any]) -> None:
    model = randomise(OpenMythos(config(attn_type=attn_type, **changes)))
    ids = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])

    along_directions(model, lambda: model(ids, 3, attention_mask=mask)[mask == 1])


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_whole_model_with_selected_states(attn_type: str) -> None:
    """Selection is constant under a small change; the halting head itself is taught by its own loss only."""
    model = randomise(OpenMythos(config(attn_type=attn_type, halting="select", act_threshold=0.6)))
    model.recurrent.act.requires_grad_(False)  # type: ignore[union-attr]
    ids = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    along_directions(model, lambda: model(ids, 3))


def test_gradients_through_a_prefilled_cache() -> None:
    """New tokens behind a constant past; both attention cores of MLA take part."""
    for attn_type in ("mla", "gqa"):
        model = randomise(OpenMythos(config(attn_type=attn_type, halting="average", act_threshold=0.6)))
        cache = KVCache()
        with torch.no_grad():
            model(torch.tensor([[0, 1, 2], [4, 4, 0]]), 3, cache)
        past = cache.snapshot()

        def logits(model: nn.Module = model, cache: KVCache = cache, past: Any = past) -> Tensor:
            cache.restore(past)
            return model(torch.tensor([[3], [1]]), 3, cache)

        along_directions(model, logits)
