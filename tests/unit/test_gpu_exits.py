"""Exits in kernels: what tokens that leave show, and rules that are asked between two loops of one graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import EveryLoop, LastLoop, OpenMythos
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.exits import ACT, Fixed, SamePrediction, Seen, StateChange
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.pages import PagePool
from open_mythos.inference.runner import Batch, PlainRunner, RowState
from open_mythos.inference.running import Late
from open_mythos.inference.speculative import Draft
from open_mythos.rows.plain import PlainRows
from row_kernels import (
    ATTENTION,
    CHANGES,
    DEPTHS,
    ROWS,
    Interpreted,
    OnPlainRows,
    apart,
    batch_of,
    build,
    feed,
    interprets,
    make,
)

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


class Asked(OnPlainRows):
    """Writes down the loops of calls that ask, and refuses to leave in a call of its own."""

    page_size = 4

    def __init__(self, model: OpenMythos, pool: PagePool, state: RowState) -> None:
        super().__init__(model, pool, state)
        self.seen: list[tuple[int, ...]] = []
        self.whole = 0

    def loops_under(self, batch: Batch, times: Any, rules: Any) -> list[int | None]:
        self.seen.append(tuple(times))
        assert any(type(rule) is StateChange for rule in rules)
        return super().loops_under(batch, times, rules)

    def token_under(self, batch: Batch, rules: Any) -> tuple[Tensor, Tensor]:
        self.whole += 1
        return super().token_under(batch, rules)

    def leave(self, batch: Batch, probed: Any, probes: Any) -> None:
        assert any(loop is not None for loop in probed), "a rule that compares states is asked in the kernels"
        super().leave(batch, probed, probes)


class Modules(PlainRunner):
    """Pages as small as those of the other."""

    page_size = 4


def thinned(runner: PlainRunner, times: list[int], rules: list[StateChange | None]) -> list[Any]:
    """So many loops of three tokens, rules asked; loops after which each has left, and what is left of them."""
    runner.prelude(feed(runner, 0))
    batch = batch_of(0, [0] * 3, [0, 1, 2])
    if isinstance(runner, GraphRunner):
        left = runner.loops_under(batch, times, rules)
    else:
        left = by_hand(runner, times, rules)
    done = [count if end is None else end for count, end in zip(times, left, strict=True)]
    pages = [tensor[1:].clone() for tensor in runner.pool.tensors.values()]
    logits = runner.coda(batch_of(0, done, [0, 1, 2])).clone()
    return [left, [logits, runner.state.h[list(ROWS)].clone(), *pages]]


def at_once(runner: PlainRunner, rules: list[StateChange], places: list[int]) -> list[Any]:
    """Loops after which whole tokens have left, and what is left of them."""
    feed(runner, 0)
    batch = batch_of(0, [0] * 3, places)
    if isinstance(runner, GraphRunner):
        logits, gone = runner.token_under(batch, rules)
        left = [end if end >= 0 else None for end in gone.tolist()]
    else:
        runner.prelude(batch)
        all_rules = [rules[places.index(i)] if i in places else None for i in range(3)]
        found = by_hand(runner, [most if i in places else 0 for i, most in enumerate(DEPTHS)], all_rules)
        left = [found[i] for i in places]
        done = [most if end is None else end for most, end in zip(DEPTHS, found, strict=True)]
        logits = runner.coda(batch_of(0, done, places))
    pages = [tensor[1:].clone() for tensor in runner.pool.tensors.values()]
    return [left, [logits.clone(), runner.state.h[[ROWS[i] for i in places]].clone(), *pages]]


def by_hand(runner: PlainRunner, times: list[int], rules: list[StateChange | None]) -> list[int | None]:
    """Loop by loop."""
    left: list[int | None] = [None] * 3
    for t in range(max(times)):
        places = [i for i in range(3) if left[i] is None and t < times[i]]
        if not places:
            break
        runner.loop(batch_of(0, [t] * 3, places))
        for i in places:
            rule, h = rules[i], runner.state.h[ROWS[i]].double()
            change = (h - runner.state.before[ROWS[i]].double()).norm() / h.norm()
            if rule and rule.min_loops <= t + 1 < DEPTHS[i] and change <= rule.tolerance:
                left[i] = t + 1
                runner.leave(batch_of(0, [t + 1] * 3, [i]), [None], [()])
    return left


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("attn_type", "changes"), [("mla", "default"), ("gqa", "norms"), ("mla", "bare")])
def test_rules_between_two_loops_of_a_call_are_those_between_two_calls(
    attn_type: str, changes: str, shared: bool
) -> None:
    """Which row is whose, who may leave when, who leaves last, and what of it deeper loops see."""
    model, found = build(attn_type, torch.float64, **CHANGES[changes]), set()
    for least in (1, 2, 4):
        for tolerance in (0.05, 0.5, 0.8, 3.0):
            rule = StateChange(tolerance, min_loops=least)
            for times in ([3, 4, 2], [1, 1, 1], [2, 5, 1]):
                kernels = make(model, PlainRows(), shared=shared)
                modules = make(model, None, plain=True, shared=shared)
                rules = [rule, rule, None] if tolerance < 1 else [None, rule, rule]
                (left, state), (wanted, exact) = (
                    thinned(runner, times, rules) for runner in (kernels, modules)
                )
                assert left == wanted
                assert apart(state, exact) < 1e-12
                found |= {(i, end) for i, end in enumerate(left)}
    assert {(1, None), (1, 1), (1, 2), (1, 4), (2, 1)} <= found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("attn_type", "changes"), [("mla", "default"), ("gqa", "norms"), ("mla", "bare")])
def test_a_whole_token_under_a_rule_is_its_loops(attn_type: str, changes: str, shared: bool) -> None:
    """The row whose states no halting of the model's chooses; with the others too where there is no such halting."""
    model, found = build(attn_type, torch.float64, **CHANGES[changes]), set()
    for places in [[1]] if model.cfg.halting == "select" else [[1], [0, 1, 2]]:
        for tolerance in (1e-9, 0.5, 0.8, 3.0):
            rules = [StateChange(tolerance, min_loops=1 + i) for i in range(len(places))]
            kernels = make(model, PlainRows(), shared=shared)
            modules = make(model, None, plain=True, shared=shared)
            (left, state), (wanted, exact) = (at_once(runner, rules, places) for runner in (kernels, modules))
            assert left == wanted
            assert apart(state, exact) < 1e-12
            found |= set(left)
    assert {None, 1, 2} <= found or {None, 1, 3} <= found


def requests(**options: Any) -> list[Request]:
    rules: list[Any] = [
        StateChange(0.5), None, StateChange(0.35, min_loops=3), StateChange(0.6, max_loops=5), StateChange(0.2),
        StateChange(1e-9), None, StateChange(0.45, min_loops=2, max_loops=9), Fixed(3),
    ]  # fmt: skip
    prompts = [[(5 * i + j) % 96 for j in range(1 + 3 * i % 8)] for i in range(len(rules))]
    return [
        Request(prompt, 7 + i % 4, 4 + 3 * i % 9, exit=rule, temperature=0.7 * (i % 2), seed=i, **options)
        for i, (prompt, rule) in enumerate(zip(prompts, rules, strict=True))
    ]


def answers(
    model: OpenMythos, runner: Any, asked: list[Request], **options: Any
) -> tuple[list[Any], Any, Any]:
    with Engine(model, max_rows=4, runner=runner, **options) as engine:
        results = [handle.result() for handle in [engine.submit(request) for request in asked]]
        return [(r.tokens, r.loops, r.prompt_loops) for r in results], engine.stats.done, engine.runner


@pytest.mark.parametrize("policy", [EveryLoop(), LastLoop()])
@pytest.mark.parametrize(("attn_type", "halting"), [("mla", "select"), ("gqa", "off"), ("gqa", "select")])
def test_requests_whose_rules_the_kernels_ask_are_answered_alike(
    attn_type: str, halting: str, policy: Any
) -> None:
    model = build(attn_type, torch.float64, halting=halting, max_loop_iters=12)
    found, stats, runner = answers(model, Asked, requests(), policy=policy)
    wanted, one_by_one, _ = answers(model, Modules, requests(), policy=policy)
    assert runner.reason is None
    assert found == wanted
    assert stats.row_loops == one_by_one.row_loops
    assert len({count for _, loops, _ in found for count in loops}) > 4
    assert {max(times) for times in runner.seen if len(times) > 1} == {1, 2, 4}
    assert any(min(times) < max(times) for times in runner.seen)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("most", [12, 20])
def test_one_request_alone_runs_whole_tokens_or_more_loops_a_call(
    most: int, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mla", torch.float64, max_loop_iters=20)
    asked = [Request([3, 4], 9, most, exit=StateChange(0.3), temperature=0.9, seed=1)]
    monkeypatch.setattr(Late, "ready", lambda late: lag == 0)
    with Engine(model, max_rows=4, runner=Asked) as engine:
        engine._scheduler._lag = lag
        result, stats, runner = engine.submit(asked[0]).result(), engine.stats.done, engine.runner
    monkeypatch.undo()
    assert [(result.tokens, result.loops, result.prompt_loops)] == answers(model, Modules, asked)[0]
    assert isinstance(runner, Asked)
    assert (runner.whole, max(runner.seen, default=None)) == ((8, None) if most == 12 else (0, (8,)))
    assert stats.row_loops == sum(result.loops)
    assert len({*result.loops}) > 2


def test_rows_that_compute_alone_are_asked_alone() -> None:
    model = build("gqa", torch.float64, max_loop_iters=12)
    found, _, runner = answers(model, Asked, requests(), deterministic=True)
    assert found == answers(model, Modules, requests(), deterministic=True)[0]
    assert {len(times) for times in runner.seen} == {1}


def test_other_rules_and_drafts_beside_them_change_nothing() -> None:
    """A rule that nobody asks in kernels lets nobody run two loops of a call."""
    model = build("mla", torch.float64, max_loop_iters=12)
    rules = [
        StateChange(0.4),
        SamePrediction(1),
        StateChange(0.3),
        ACT(0.9),
        None,
        StateChange(0.5, min_loops=2),
    ]
    asked = [
        Request([i, i + 1], 8, 5 + i, exit=rule, temperature=0, speculate=Draft(1 + i, 2) if i > 3 else None)
        for i, rule in enumerate(rules)
    ]
    found, _, runner = answers(model, Asked, asked)
    wanted, _, _ = answers(model, Modules, asked)
    assert found == wanted
    lengths = [max(times) for times in runner.seen]
    assert 1 in lengths
    assert any(len(times) > 1 for times in runner.seen)


def test_a_rule_made_from_one_that_the_kernels_know_is_asked_by_itself() -> None:
    class Patient(StateChange):
        def leaves(self, seen: Seen) -> Tensor:
            return super().leaves(seen) & (seen.loop % 2 == 0)

    model = build("gqa", torch.float64, max_loop_iters=8)
    asked = [Request([1, 2, 3], 5, 8, exit=Patient(0.6), temperature=0)]
    found, _, runner = answers(model, OnPlainRows, asked)
    assert found == answers(model, PlainRunner, asked)[0]
    assert all(count % 2 == 0 for count in found[0][1])
    assert not runner.asks(Patient(0.6))


def interpreted(attn_type: str, changes: str, shared: bool) -> float:
    """How far kernels are from modules on the CPU, with TRITON_INTERPRET set before Triton is imported."""
    torch.set_grad_enabled(False)
    model, most = build(attn_type, torch.float32, **CHANGES[changes]), 0.0
    for rules in ([StateChange(0.8), StateChange(0.5), None], [None, StateChange(3.0, min_loops=2), None]):
        runners = [make(model, rows, plain=rows is None, shared=shared) for rows in (Interpreted(), None)]
        (left, state), (wanted, exact) = (thinned(runner, [3, 4, 2], rules) for runner in runners)
        assert left == wanted
        assert left != [None] * 3
        most = max(most, apart(state, exact))
    runners = [make(model, rows, plain=rows is None, shared=shared) for rows in (Interpreted(), None)]
    (left, state), (wanted, exact) = (at_once(runner, [StateChange(0.8)], [1]) for runner in runners)
    assert left == wanted
    return max(most, apart(state, exact))


@pytest.mark.slow
@pytest.mark.skipif(not interprets(), reason="needs Triton, and numpy below 2.4, for Triton's interpreter")
@pytest.mark.parametrize(
    ("attn_type", "changes", "shared"),
    [("mla", "default", False), ("gqa", "norms", False), ("mla", "bare", True)],
)
def test_the_kernels_ask_and_leave_where_triton_interprets_them(
    attn_type: str, changes: str, shared: bool
) -> None:
    given = f"{attn_type!r}, {changes!r}, {shared!r}"
    code = (
        f"import sys; sys.path.append('..'); import {Path(__file__).stem} as t; print(t.interpreted({given}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < 1e-5


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


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_rules_are_asked_between_two_loops_of_a_graph(attn_type: str, shared: bool) -> None:
    """The same graph for other tolerances, and for others whom it asks."""
    exact_model, model = build(attn_type, torch.float64), build(attn_type, torch.float32, "cuda")
    for tolerance, least in ((0.5, 1), (0.8, 1), (0.8, 2), (3.0, 1)):
        rule = StateChange(tolerance, min_loops=least)
        for rules in ([rule, rule, None], [None, rule, rule]):
            (left, state), (wanted, exact) = (
                thinned(make(each, rows, shared=shared), [3, 4, 2], rules)
                for each, rows in ((model, None), (exact_model, PlainRows()))
            )
            assert left == wanted
            assert apart(state, exact) < 2e-5
        (left, state), (wanted, exact) = (
            at_once(make(each, rows, shared=shared), [rule], [1])
            for each, rows in ((model, None), (exact_model, PlainRows()))
        )
        assert left == wanted
        assert apart(state, exact) < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [EveryLoop(), LastLoop()])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_requests_on_a_gpu_spend_the_loops_of_the_modules(attn_type: str, policy: Any) -> None:
    model = build(attn_type, torch.float32, "cuda", max_loop_iters=12)
    found, _, runner = answers(model, None, requests(), policy=policy)
    assert isinstance(runner, GraphRunner)
    assert runner.reason is None
    assert any(name == "under" for (name, *_), _ in runner._strides)
    assert found == answers(model, PlainRunner, requests(), policy=policy)[0]
    for one in requests():
        assert (
            answers(model, None, [one], policy=policy)[0]
            == answers(model, PlainRunner, [one], policy=policy)[0]
        )
