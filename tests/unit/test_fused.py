"""The CPU's training kernels against PyTorch's operators, outputs and gradients; the whole model with and without."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos import MythosConfig, OpenMythos, expert_ops, fused, kernels, ops
from open_mythos.model.layers import rope_table

pytestmark = pytest.mark.skipif("are off" in kernels.status(), reason="no CPU kernels here")


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels called from here on."""
    names: list[str] = []
    call = kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *a: names.append(name) or call(name, *a))
    return names


def differentiated(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Outputs, then the gradients of all inputs along fixed directions."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    directions = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) for y in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, directions)]


def compare(fast: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor) -> None:
    """Against the reference in float64: largest error relative to the largest value of each result."""
    wanted = differentiated(reference, *(x.double() for x in inputs))
    for actual, expected in zip(differentiated(fast, *inputs), wanted, strict=True):
        actual, expected = actual.detach(), expected.detach()
        assert actual.shape == expected.shape
        assert float((actual.double() - expected).abs().max() / expected.abs().max()) < 3e-6


def rope_of(length: int, width: int, batch: int = 1) -> Tensor:
    return rope_table(torch.randint(0, 500, (batch, length)), width, 1e4)


CASES: dict[str, Callable[[], tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]] = {
    "norm": lambda: (
        lambda x, w: ops.rms_norm(x, w, 1e-6),
        lambda x, w: ops.rms_norm_reference(x, w, 1e-6),
        (torch.randn(3, 7, 33), torch.randn(33)),
    ),
    "norm of a slice": lambda: (
        lambda x, w: ops.rms_norm(x[..., :16], w, 1e-5),
        lambda x, w: ops.rms_norm_reference(x[..., :16], w, 1e-5),
        (torch.randn(5, 20), torch.randn(16)),
    ),
    "gate": lambda: (ops.gate, ops.gate_reference, (4 * torch.randn(9, 2 * 37),)),
    "weighted gate": lambda: (ops.gate, ops.gate_reference, (torch.randn(9, 2 * 16), torch.rand(9))),
}


def _turning(nope: int, batch: int) -> Any:
    rope = rope_of(5, 6, batch)
    return (
        lambda x: ops.turn_heads(x, rope),
        lambda x: ops.turn_heads_reference(x, rope.double()),
        (torch.randn(2, 5, 3, nope + 6),),
    )


def _keys(value: int) -> Any:
    return (
        lambda kv, shared: ops.latent_keys(kv, shared[..., 1:], 7),
        lambda kv, shared: ops.latent_keys_reference(kv, shared[..., 1:], 7),
        (torch.randn(2, 5, 3, 7 + value), torch.randn(2, 5, 5)),
    )


def _attention(length: int, width: int, value: int) -> Any:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return ops.attention_reference(*heads_first, scale=0.3, causal=True).transpose(1, 2)

    sizes = ((2, length, 3, width), (2, length, 3, width), (2, length, 3, value))
    return (
        lambda q, k, v: ops.causal_attention(q, k, v, scale=0.3),
        reference,
        tuple(torch.randn(size) for size in sizes),
    )


def _moved(k: int) -> Any:
    experts = torch.rand(11, 5).topk(k).indices

    def move(x: Tensor) -> Tensor:
        order, inverse, _ = expert_ops.expert_offsets(experts, 5)
        rows = expert_ops.dispatch(x, order, inverse, k)
        return expert_ops.combine(rows * torch.arange(1, 1 + len(rows)).unsqueeze(1), order, inverse, k)

    return move, move, (torch.randn(11, 19),)


CASES |= {
    "heads": lambda: _turning(4, 2),
    "whole heads": lambda: _turning(0, 1),
    "keys": lambda: _keys(5),
    "attention": lambda: _attention(70, 48, 32),
    "attention of one block": lambda: _attention(32, 16, 48),
    "attention of a short sequence": lambda: _attention(3, 32, 16),
    "slots": lambda: _moved(3),
    "one slot": lambda: _moved(1),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_their_reference(case: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names = called(monkeypatch)
    fast, reference, inputs = CASES[case]()
    compare(fast, reference, *inputs)
    assert len(set(names)) >= (1 if "heads" in case or "slot" in case else 2), names


@pytest.mark.parametrize("case", [name for name in CASES if "slot" not in name])
def test_gradients_of_gradients_are_those_of_the_reference(case: str) -> None:
    torch.manual_seed(1)
    fast, reference, inputs = CASES[case]()

    def penalty(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        total = sum((y**3).sum() for y in outs)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))

    wanted = penalty(reference, *(x.double() for x in inputs))
    for actual, expected in zip(penalty(fast, *inputs), wanted, strict=True):
        assert float((actual.double() - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_second_gradient_where_one_input_was_made_from_another() -> None:
    weight = (1 + torch.rand(16)).requires_grad_()

    def penalty(norm: Callable[..., Tensor]) -> Tensor:
        x = norm(torch.linspace(-1, 2, 64).view(4, 16), weight, 1e-6)
        (first,) = torch.autograd.grad(norm(x.sin(), weight, 1e-6).pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(ops.rms_norm), penalty(ops.rms_norm_reference), rtol=1e-3, atol=1e-2)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    fused.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    y = fused.gate(torch.randn(3, 8), torch.rand(3, requires_grad=True))
    (first,) = torch.autograd.grad(y.sum(), [y.grad_fn.next_functions[1][0].variable], create_graph=True)
    assert first.shape == (3,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    x = torch.randn(2, 8)
    x[1, 3] = value
    assert not torch.isfinite(fused.rms_norm(x, torch.ones(8), 1e-6)[1]).all()
    torch.testing.assert_close(fused.gate(x), ops.gate_reference(x), equal_nan=True, rtol=1e-5, atol=1e-6)


def test_the_kernels_declare_as_many_arguments_as_they_take() -> None:
    """An argument too many is passed on by ctypes as a C int, and cuts a pointer in two."""
    source = kernels.SOURCE.with_name("kernels_train.c").read_text(encoding="utf-8")
    entries = re.findall(r"^(?:void|int) (om_\w+)\(([^)]*)\)", source, flags=re.MULTILINE)
    assert len(entries) >= 8
    kinds = {"float *": kernels._P, "i64 *": kernels._P, "i64": kernels._N, "float": kernels._F}
    for name, arguments in entries:
        found = []
        for argument in arguments.replace("\n", " ").split(","):
            kind = argument.replace("const", "").strip()
            star = "*" in kind
            base = kind.replace("*", "").split()[0]
            found.append(kinds[f"{base} *" if star else base])
        assert kernels._SIGNATURES[name] == found, name


CFG = {
    "vocab_size": 61,
    "dim": 24,
    "n_heads": 3,
    "n_kv_heads": 1,
    "max_seq_len": 32,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 5,
    "n_experts_per_tok": 2,
    "n_shared_experts": 1,
    "expert_dim": 12,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "lora_rank": 2,
}


def model_of(**changes: Any) -> OpenMythos:
    torch.manual_seed(3)
    return OpenMythos(MythosConfig(**(CFG | changes)))


def gradients(model: nn.Module, ids: Tensor, run: Callable[[], Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    logits = run() if run is not None else model(ids[:, :-1], n_loops=3)
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("changes", [{}, {"v_head_dim": 14}, {"attn_type": "gqa"}], ids=str)
def test_a_models_gradients_equal_those_of_the_operators(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(**changes), torch.randint(0, 61, (2, 9))
    with kernels.disabled():
        wanted = gradients(model, ids)
    names = called(monkeypatch)
    found = gradients(model, ids)
    entries = {"om_norm", "om_norm_back", "om_gate", "om_gate_back", "om_gather_sum", "om_turn_heads"}
    if "attn_type" not in changes:
        entries |= {"om_keys", "om_keys_back"}
    if not changes:
        entries |= {"om_causal_room", "om_causal", "om_causal_back"}
    assert entries == set(names)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max() + 1e-3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_a_step_gives_the_same_gradients(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, ids = model_of(), torch.randint(0, 61, (2, 9))
    model.update_router_bias()
    wanted = gradients(model, ids)
    step = model.step
    model.step = lambda h, e, t, ctx: checkpoint(step, h, e, t, ctx, use_reentrant=reentrant)  # type: ignore[method-assign]
    for a, b in zip(gradients(model, ids), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float64", "vmap", "meta", "off"])
def test_where_the_operators_stay(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = called(monkeypatch)
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(16)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            ops.rms_norm(x, weight, 1e-6), ops.gate(x)
    elif how == "vmap":
        torch.func.vmap(lambda row: ops.gate(row))(x)
    elif how == "off":
        with kernels.disabled():
            ops.rms_norm(x, weight, 1e-6), ops.gate(x)
    elif how == "meta":
        ops.gate(x.to("meta"))
    else:
        kind = getattr(torch, how)
        ops.rms_norm(x.to(kind), weight.to(kind), 1e-6), ops.gate(x.to(kind))
    assert names == []


def test_compiling_sees_operators_only(monkeypatch: pytest.MonkeyPatch) -> None:
    names = called(monkeypatch)
    x = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(16)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(lambda x: ops.gate(ops.rms_norm(x, weight, 1e-6)), backend=backend, fullgraph=True)(x)
    assert names == []
    assert any("silu" in name for name in seen)


def many_uses(weight: Tensor, x: Tensor, counts: Tensor, times: int = 3) -> Tensor:
    for _ in range(times):
        x = x + expert_ops.grouped_linear(x, weight, counts).tanh()
    return x


def uses_by_the_reference(weight: Tensor, x: Tensor, counts: Tensor, times: int = 3) -> Tensor:
    for _ in range(times):
        x = x + expert_ops.grouped_linear_reference(x, weight, counts).tanh()
    return x


@pytest.fixture
def used() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    weight = nn.Parameter(torch.randn(4, 8, 8) / 3)
    return weight, torch.randn(9, 8, requires_grad=True), torch.tensor([2, 0, 6, 1])


def near(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_of_many_uses_gets_the_sum_of_their_gradients(used: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, _counts = used
    wanted = torch.autograd.grad(uses_by_the_reference(*used).square().sum(), (weight, x))
    loss = many_uses(*used).square().sum()
    for _ in range(2):  # the second pass starts from nothing again
        for found, expected in zip(
            torch.autograd.grad(loss, (weight, x), retain_graph=True), wanted, strict=True
        ):
            near(found, expected)
    loss.backward()
    near(weight.grad, wanted[0])


def test_a_pass_that_stops_before_the_weight_leaves_nothing_behind(
    used: tuple[Tensor, Tensor, Tensor],
) -> None:
    weight, x, _counts = used
    wanted = torch.autograd.grad(uses_by_the_reference(*used).sum(), (weight, x))
    loss = many_uses(*used).sum()
    (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    near(found, wanted[1])
    assert all(not tally.sums for _, _, tally in fused._uses.values())
    loss.backward()
    near(weight.grad, wanted[0])


def test_two_losses_of_one_weight_stay_apart(used: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, counts = used
    first, second = many_uses(*used).sum(), many_uses(weight, 2 * x, counts).square().sum()
    one = torch.autograd.grad(uses_by_the_reference(*used).sum(), weight)[0]
    two = torch.autograd.grad(uses_by_the_reference(weight, 2 * x, counts).square().sum(), weight)[0]
    second.backward()
    near(weight.grad, two)
    first.backward()
    near(weight.grad, one + two)


def test_a_weight_whose_memory_was_changed_is_read_anew(used: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, _x, _counts = used
    held = many_uses(*used)  # its graph lives on
    weight.data = torch.randn(4, 8, 8)
    near(many_uses(*used), uses_by_the_reference(*used))
    assert held.grad_fn is not None


def test_hooks_see_one_gradient_and_a_second_gradient_is_right(used: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, _x, _counts = used
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    many_uses(*used).sum().backward()
    assert len(seen) == 1
    near(seen[0], weight.grad)

    def penalty(function: Callable[..., Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(function(*used).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    near(penalty(many_uses) / 100, penalty(uses_by_the_reference) / 100)


def test_nothing_keeps_a_weight_alive() -> None:
    before = len(fused._uses)
    weight = nn.Parameter(torch.randn(4, 8, 8))
    many_uses(weight, torch.randn(9, 8), torch.tensor([2, 0, 6, 1])).sum().backward()
    assert len(fused._uses) == before + 1
    del weight
    assert len(fused._uses) == before
