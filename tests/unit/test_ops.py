"""Fast paths of ops.py and expert_ops.py against their references, those against plain loops: outputs and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import expert_ops, ops
from open_mythos.kernels_gpu import gate_backward

F64 = torch.float64


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output, and the gradient of a fixed random projection of it to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def qkv(heads: int, groups: int, new: int, context: int, width: int, value_width: int) -> list[Tensor]:
    return [
        torch.randn(2, heads, new, width, dtype=F64),
        torch.randn(2, groups, context, width, dtype=F64),
        torch.randn(2, groups, context, value_width, dtype=F64),
    ]


def visible(new: int, context: int) -> Tensor:
    """A random mask in which every query sees itself, (2, 1, S, C)."""
    mask = torch.rand(2, 1, new, context) < 0.4
    mask[..., torch.arange(new), context - new + torch.arange(new)] = True
    return mask


@pytest.mark.parametrize(("heads", "groups"), [(h, g) for h in (1, 4, 6) for g in range(1, h + 1)])
def test_the_attention_reference_is_attention(heads: int, groups: int) -> None:
    """Query head h reads key/value head floor(h G / H); written as loops."""
    q, k, v = qkv(heads, groups, 3, 5, 4, 2)
    mask = visible(3, 5)
    got = ops.attention_reference(q, k, v, scale=0.3, mask=mask)
    for b, h, s in itertools.product(range(2), range(heads), range(3)):
        g = math.floor(h * groups / heads)
        scores = {c: math.exp(0.3 * float(q[b, h, s] @ k[b, g, c])) for c in range(5) if mask[b, 0, s, c]}
        expected = sum(weight * v[b, g, c] for c, weight in scores.items()) / sum(scores.values())
        torch.testing.assert_close(got[b, h, s], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["causal", "masked", "all", "one"])
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (4, 3), (4, 4), (5, 2), (1, 1)])
def test_attention_equals_its_reference(
    heads: int, groups: int, width: int, value_width: int, kind: str
) -> None:
    new, context = (6, 6) if kind == "causal" else (1, 7) if kind == "one" else (4, 7)
    inputs = qkv(heads, groups, new, context, width, value_width)
    settings: dict[str, Any] = {"scale": 0.37, "causal": kind == "causal"}
    if kind == "masked":
        settings["mask"] = visible(new, context)
    fast = with_gradients(lambda *x: ops.attention(*x, **settings), *inputs)
    slow = with_gradients(lambda *x: ops.attention_reference(*x, **settings), *inputs)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_in_low_precision_is_near_its_reference(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in qkv(4, 3, 6, 6, 8, 6)]
    fast = ops.attention(*inputs, scale=0.3, causal=True)
    slow = ops.attention_reference(*[x.double() for x in inputs], scale=0.3, causal=True)
    assert fast.dtype == dtype
    atol = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(fast.double(), slow, rtol=0, atol=atol)


def test_attention_dropout_acts_on_the_weights() -> None:
    q, k, v = qkv(2, 2, 3, 3, 4, 4)
    plain = ops.attention(q, k, v, scale=0.5)
    dropped = torch.stack([ops.attention(q, k, v, scale=0.5, dropout=0.5) for _ in range(4000)])
    assert not torch.equal(dropped[0], plain)
    torch.testing.assert_close(dropped.mean(0), plain, rtol=0, atol=0.15)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_latent_attention_is_attention_over_one_shared_head(new: int, masked: bool) -> None:
    q, latent = torch.randn(2, new, 4, 7, dtype=F64), torch.randn(2, 9, 7, dtype=F64)
    mask = visible(new, 9) if masked else None

    def slow(q: Tensor, latent: Tensor) -> Tensor:
        shared = latent.unsqueeze(1)
        out = ops.attention_reference(q.transpose(1, 2), shared, shared[..., :5], scale=0.4, mask=mask)
        return out.transpose(1, 2)

    fast = with_gradients(lambda *x: ops.latent_attention(*x, 5, scale=0.4, mask=mask), q, latent)
    torch.testing.assert_close(fast, with_gradients(slow, q, latent), rtol=0, atol=1e-12)


# Experts.

COUNTS = {
    "even": [4, 4, 4, 4],
    "empty": [0, 9, 0, 7],
    "first": [16, 0, 0, 0],
    "last": [0, 0, 0, 16],
    "one each": [1, 13, 1, 1],
}
SERVED = [(torch.float32, 16, 8), (torch.bfloat16, 16, 8), (torch.float16, 16, 8)]
NOT_SERVED = [
    (torch.float32, 7, 5),
    (torch.float32, 16, 5),
    (torch.float32, 341, 8),
    (torch.bfloat16, 12, 8),
    (torch.bfloat16, 341, 6),
    (torch.float64, 16, 8),
]


def naive_grouped(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    return torch.stack([row @ weight[e] for row, e in zip(x, expert, strict=True)])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("dtype", "width", "hidden"), SERVED + NOT_SERVED)
def test_grouped_linear_equals_a_loop_over_rows(
    dtype: torch.dtype, width: int, hidden: int, counts: list[int]
) -> None:
    x = torch.randn(16, width).to(dtype)
    weight = (torch.randn(4, width, hidden) / width**0.5).to(dtype)
    tensor = torch.tensor(counts)
    exact = with_gradients(lambda *a: naive_grouped(*a, counts), x.double(), weight.double())
    atol = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]
    for function in (expert_ops.grouped_linear, expert_ops.grouped_linear_reference):
        got = with_gradients(lambda *a, f=function: f(*a, tensor), x, weight)
        assert {t.dtype for t in got} == {dtype}
        for mine, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=atol)
        for e, count in enumerate(counts):
            assert count or not got[2][e].any(), "an expert without tokens has a gradient of exactly zero"


def test_which_shapes_the_grouped_product_serves() -> None:
    for cases, expected in ((SERVED, True), (NOT_SERVED, False)):
        for dtype, width, hidden in cases:
            x, weight = torch.empty(3, width, dtype=dtype), torch.empty(2, width, hidden, dtype=dtype)
            assert expert_ops._grouped_mm_serves(x, weight) is expected, (dtype, width, hidden)
    mixed = torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(2, 16, 8)
    assert not expert_ops._grouped_mm_serves(*mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_linear_takes_odd_strides(dtype: torch.dtype) -> None:
    """A transposed input and an expanded gradient, which the grouped product itself refuses."""
    x = torch.randn(16, 6).to(dtype).t()[:, :].contiguous().t().requires_grad_()
    wide = torch.randn(6, 32).to(dtype)[:, ::2].requires_grad_()
    weight = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    for rows in (x.t(), wide):
        out = expert_ops.grouped_linear(rows, weight, torch.tensor([2, 4]))
        out.sum().backward()
        expected = torch.cat((rows[:2] @ weight[0], rows[2:] @ weight[1]))
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_dispatch_and_combine_equal_indexing(k: int, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ops, "_COUNTED_EXPERTS", 128 if counted else 0)
    tokens, n_experts = 9, 5
    x, weights = torch.randn(tokens, 4, dtype=F64), torch.rand(tokens, k, dtype=F64)
    experts = torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)])
    order, inverse, counts = expert_ops.expert_offsets(experts, n_experts)
    flat = experts.flatten()
    assert torch.equal(counts, torch.bincount(flat, minlength=n_experts))
    assert torch.equal(flat[order], flat.sort().values)
    assert torch.equal(inverse[order], torch.arange(tokens * k))
    assert all(t.dtype == torch.int64 for t in (order, inverse, counts))
    assert torch.equal(order, torch.tensor(sorted(range(tokens * k), key=lambda i: (int(flat[i]), i))))

    def fast(x: Tensor, weights: Tensor) -> Tensor:
        rows = expert_ops.dispatch(x, order, inverse, k)
        assert torch.equal(rows, x[order // k])
        rows = rows * (weights.flatten() * (1 + flat))[order].unsqueeze(1)
        return expert_ops.combine(rows, order, inverse, k)

    def slow(x: Tensor, weights: Tensor) -> Tensor:
        return torch.stack(
            [sum(weights[n, j] * x[n] * (1 + experts[n, j]) for j in range(k)) for n in range(tokens)]
        )

    torch.testing.assert_close(
        with_gradients(fast, x, weights), with_gradients(slow, x, weights), rtol=0, atol=1e-12
    )


def test_combine_gives_the_same_bits_at_every_run() -> None:
    experts = torch.stack([torch.randperm(8)[:4] for _ in range(64)])
    order, inverse, _ = expert_ops.expert_offsets(experts, 8)
    rows = expert_ops.dispatch(torch.randn(64, 32), order, inverse, 4)
    runs = [with_gradients(lambda rows: expert_ops.combine(rows, order, inverse, 4), rows) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_the_gates_backward_equals_autograd() -> None:
    hidden, weight, grad = (
        torch.randn(7, 12, dtype=F64),
        torch.rand(7, dtype=F64),
        torch.randn(7, 6, dtype=F64),
    )
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    y = ops.gate_reference(*inputs)
    d_hidden, d_weight = torch.autograd.grad(y, inputs, grad)
    for got, wanted in zip(
        gate_backward(hidden, weight, grad), (d_hidden, d_weight, y.detach()), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    torch.library.opcheck(gate_backward, (hidden, weight, grad))


def test_experts_with_their_own_backward_equal_the_plain_ones() -> None:
    """What a compiler on a GPU gets; here its plain operators in float32."""
    counts = torch.tensor([3, 0, 5])
    inputs = torch.randn(8, 16), torch.randn(3, 16, 24), torch.randn(3, 12, 16), torch.rand(8)

    def own(*inputs: Tensor) -> Tensor:
        return expert_ops._Experts.apply(*inputs, counts.cumsum(0).to(torch.int32))

    def plain(*inputs: Tensor) -> Tensor:
        return expert_ops.expert_mlps_reference(*inputs, counts)

    torch.testing.assert_close(
        with_gradients(own, *inputs), with_gradients(plain, *inputs), rtol=1e-5, atol=1e-4
    )


def test_weights_in_expert_order_and_their_gradient() -> None:
    weights = torch.rand(6, 2, dtype=F64)
    order = torch.randperm(12)
    inverse = order.argsort()
    got = with_gradients(lambda w: expert_ops.sorted_weights(w, order, inverse), weights)
    wanted = with_gradients(lambda w: w.flatten()[order], weights)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_experts_chosen_in_rounds_differ_whatever_the_scores(bad: float) -> None:
    """Else a step that overflowed would end the run by an index out of bounds and not be left out."""
    scores = torch.randn(64, 6)
    torch.testing.assert_close(expert_ops._rounds(scores, 3), scores.topk(3).indices, rtol=0, atol=0)
    scores[torch.rand(64, 6) < 0.7] = bad
    scores[0], scores[1, 0] = bad, float("nan")
    chosen = expert_ops._rounds(scores, 4).sort(-1).values
    assert (chosen.diff(dim=-1) > 0).all()


@pytest.mark.parametrize(("width", "serves"), [(12, False), (16, True)])
def test_experts_whose_second_product_is_not_aligned_are_not_grouped(width: int, serves: bool) -> None:
    rows, w_in, w_out = torch.zeros(4, 16), torch.zeros(2, 16, 2 * width), torch.zeros(2, width, 16)
    low = [x.bfloat16() for x in (rows, w_in, w_out)]
    assert expert_ops._grouped_mm_serves(low[0], low[1])
    assert expert_ops.products_are_grouped(*low) == serves
