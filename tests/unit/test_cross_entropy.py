"""The sliced cross entropy against the plain one: values, gradients, ignored targets, slices of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_mythos.training import cross_entropy
from open_mythos.training.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

V, D = 13, 8


def problem(dtype: torch.dtype, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (tokens,), generator=generator)
    targets[::4] = -100
    return x, weight, targets, torch.tensor(5.0)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_slices_equal_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_SLICE", rows * V)
    x, weight, targets, divisor = problem(torch.float64)
    got = 3 * linear_cross_entropy(x, weight, targets, divisor)
    wanted = 3 * linear_cross_entropy_reference(x, weight, targets, divisor)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(loss, [x, weight]) for loss in (got, wanted)), strict=True)
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_near_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_SLICE", 4 * V)
    x, weight, targets, divisor = problem(dtype)
    loss = linear_cross_entropy(x, weight, targets, divisor)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, [x, weight])
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = linear_cross_entropy_reference(exact[0], exact[1], targets, divisor)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss.item() - wanted.item()) < bound
    for ours, plain in zip(grads, torch.autograd.grad(wanted, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - plain).norm() < bound * plain.norm()


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    x, weight, targets, divisor = problem(torch.float64)
    loss = linear_cross_entropy(x, weight, targets.fill_(-100), divisor)
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, [x, weight]))


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets, divisor = problem(torch.float64)
    monkeypatch.setattr(cross_entropy, "_add_product", None)  # calling it would raise
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, divisor)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(x, weight, targets, divisor).detach())
    frozen = linear_cross_entropy(x, weight.detach(), targets, divisor)
    assert torch.autograd.grad(frozen, x)[0].any()


def test_asking_for_a_second_derivative_is_refused() -> None:
    x, weight, targets, divisor = problem(torch.float64)
    (grad,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, divisor), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_a_target_out_of_the_vocabulary_is_refused() -> None:
    x, weight, targets, divisor = problem(torch.float64)
    targets[1] = V
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(x, weight, targets, divisor)


def test_under_autocast_it_is_the_linear_layers_product_in_low_precision() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, torch.tensor(5))
        wanted = linear_cross_entropy_reference(x, weight, targets, torch.tensor(5))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    got = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (x, weight)), rtol=0, atol=1e-2)
    assert [grad.dtype for grad in got] == [torch.float32] * 2
