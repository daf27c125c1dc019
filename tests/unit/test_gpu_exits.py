"""Exits in kernels: what tokens that leave show, and rules that are asked between two loops of one graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from open_mythos.inference.runner import PlainRunner
from open_mythos.rows.plain import PlainRows
from row_kernels import ATTENTION, CHANGES, DEPTHS, ROWS, apart, batch_of, build, feed, make

LEFT = [1, 3, 1]  # loops of three tokens that leave, two deeper ones behind them or one


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def leave(runner: PlainRunner, done: list[int]) -> list[Tensor]:
    """What is left of tokens that leave after so many loops."""
    runner.prelude(feed(runner, 0))
    for t in range(max(done)):
        runner.loop(batch_of(0, [t] * 3, [i for i, count in enumerate(done) if t < count]))
    runner.leave(batch_of(0, done, [0, 1, 2]), [None] * 3, [()] * 3)
    logits = runner.coda(batch_of(0, done, [0, 1, 2])).clone()
    pages = [tensor[1:].clone() for tensor in runner.pool.tensors.values()]
    return [logits, runner.state.h[list(ROWS)].clone(), *pages]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("changes", list(CHANGES))
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_tokens_that_leave_show_what_they_do_in_the_modules(
    attn_type: str, changes: str, shared: bool
) -> None:
    model = build(attn_type, torch.float64, **CHANGES[changes])
    assert all(done < most for done, most in zip(LEFT, DEPTHS, strict=True))
    kernels, modules = make(model, PlainRows(), shared=shared), make(model, None, plain=True, shared=shared)
    assert kernels.reason is None
    assert apart(leave(kernels, LEFT), leave(modules, LEFT)) < 1e-12


def test_a_token_that_the_modules_began_leaves_in_the_kernels() -> None:
    model = build("mla", torch.float64)
    mixed, plain = make(model, PlainRows()), make(model, None, plain=True)
    for runner in (mixed, plain):
        PlainRunner.prelude(runner, feed(runner, 0))
        PlainRunner.loop(runner, batch_of(0, [0] * 3, [0, 1, 2]))
        runner.leave(batch_of(0, [1] * 3, [0, 1, 2]), [None] * 3, [()] * 3)
    pages = [[tensor[1:] for tensor in runner.pool.tensors.values()] for runner in (mixed, plain)]
    assert apart(*pages) < 1e-12


def test_a_rule_that_decoded_leaves_in_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probes are copied there."""
    runner, called = make(build("gqa", torch.float64), PlainRows()), []
    monkeypatch.setattr(PlainRunner, "leave", lambda *given: called.append(given[2:]))
    runner.prelude(feed(runner, 0))
    runner.loop(batch_of(0, [0] * 3, [0, 1, 2]))
    batch, probes = batch_of(0, [1] * 3, [0, 1, 2]), [(), (0, 2), ()]
    runner.leave(batch, [None, 0, None], probes)
    assert called == [([None, 0, None], probes)]
    runner.leave(batch, [None] * 3, [()] * 3)
    assert len(called) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_tokens_that_leave_on_a_gpu_show_what_they_do_in_the_modules(attn_type: str, shared: bool) -> None:
    exact = leave(
        make(build(attn_type, torch.float64, n_experts_per_tok=6), PlainRows(), shared=shared), LEFT
    )
    for dtype, close in ((torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        runner = make(build(attn_type, dtype, "cuda", n_experts_per_tok=6), None, shared=shared)
        assert runner.reason is None
        assert apart(leave(runner, LEFT), exact) < close
