"""Rows that go on by themselves give what they give with the host's help, and follow whoever comes and goes."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from open_mythos import Engine, Request
from open_mythos.inference import device_rows
from open_mythos.inference.cycles import Cycles
from open_mythos.inference.exit_rules import Rule, StateChange
from open_mythos.inference.exits import Fixed
from open_mythos.inference.generate import generate
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.model import OpenMythos
from open_mythos.rows.plain import PlainRows
from row_kernels import build

ATTENTION = ("mla", "gqa")
PLAIN = partial(GraphRunner, rows=PlainRows())


def engine(model: OpenMythos, rows: int = 4, plain: bool = True, **options: Any) -> Engine:
    make = PLAIN if plain else GraphRunner
    return Engine(model, max_rows=rows, max_loops=9, max_context=48, page_size=4, runner=make, **options)


def requests(count: int, seed: int = 0, rules: bool = False) -> list[Request]:
    draws = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draws))

    found = []
    for i in range(count):
        rule: Rule | None = None
        if rules:
            rule = (StateChange(0.3), StateChange(0.6, min_loops=2), None, Fixed(3))[i % 4]
        prompt = [pick(0, 95) for _ in range(pick(1, 9))]
        found.append(Request(prompt, pick(1, 12), pick(1, 9), temperature=0, exit=rule))
    return found


def alone(model: OpenMythos, request: Request, policy: Any = None) -> list[int]:
    """What the simple path gives."""
    ids = torch.tensor([list(request.prompt)])
    more = {} if policy is None else {"policy": policy}
    found = generate(
        model, ids, request.max_new_tokens, request.n_loops, temperature=0, exit=request.exit,
        eos_token_id=request.eos_token_id, **more,
    )  # fmt: skip
    return found[0, ids.shape[1] :].tolist()


@pytest.fixture
def cycles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool, bool]]:
    """Count, loops, whether under rules and apart of each cycle that ran."""
    ran: list[tuple[int, int, bool, bool]] = []
    work = device_rows.DeviceRows.cycle

    def noted(self: Any, count: int, loops: int, ruled: bool) -> Any:
        ran.append((count, loops, ruled, count >= device_rows._APART))
        return work(self, count, loops, ruled)

    monkeypatch.setattr(device_rows.DeviceRows, "cycle", noted)
    return ran


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("apart", [1, 99])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_tokens_and_loops_of_all_depths_are_those_of_each_alone(
    attn_type: str, apart: int, rules: bool, cycles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rows, "_APART", apart)
    model, work = build(attn_type, torch.float64), requests(14, rules=rules)
    with engine(model) as some:
        handles = [some.submit(request) for request in work]
        results = [handle.result() for handle in handles]
        assert some.stats.free_pages == some.pool.capacity
    assert len(cycles) > 5
    with Engine(model, max_rows=1, max_loops=9, max_context=48) as other:
        for request, result in zip(work, results, strict=True):
            wanted = other.submit(request).result()
            assert (result.tokens, result.loops) == (wanted.tokens, wanted.loops)
            assert result.tokens == alone(model, request)


@pytest.mark.gpu
@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("apart", [1, 99])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_on_a_gpu_every_bit_is_that_of_rows_with_the_hosts_help(
    attn_type: str, apart: int, rules: bool, cycles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk holds one prompt only, so that rounding is the same whatever comes when."""
    monkeypatch.setattr(device_rows, "_APART", apart)
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "expert_dim": 32, "max_seq_len": 256}
    model, found = build(attn_type, torch.bfloat16, "cuda", **sizes), []
    work = [
        replace(each, prompt=[*each.prompt, *range(20)][:16], max_new_tokens=1 + 3 * each.max_new_tokens)
        for each in requests(40, rules=rules)
    ]
    for takes in (Cycles.takes, lambda self, lanes: False):
        monkeypatch.setattr(Cycles, "takes", takes)
        ran = len(cycles)
        some = Engine(model, max_rows=12, max_loops=9, max_context=64, prefill_chunk=16)
        with some:
            handles = [some.submit(request) for request in work]
            found.append([(r.tokens, r.loops, r.reason) for r in (handle.result() for handle in handles)])
        assert (len(cycles) > ran) == (len(found) == 1)
    assert found[0] == found[1]


@pytest.mark.gpu
def test_graphs_of_an_engine_that_is_gone_do_not_spoil_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected while another graph is captured, they would."""
    model = build("gqa", torch.bfloat16, "cuda", dim=64, n_heads=4, n_kv_heads=2, expert_dim=32)
    wanted = None
    before = gc.get_threshold()
    for _ in range(3):
        some = Engine(model, max_rows=2, max_loops=4, max_context=32)
        gc.set_threshold(1)
        try:
            found = [
                r.tokens
                for r in some.generate([[1, 2], [3]], max_new_tokens=6, n_loops=[2, 4], temperature=0)
            ]
        finally:
            gc.set_threshold(*before)
        wanted = found if wanted is None else wanted
        assert found == wanted
        holder: list[Any] = [some]
        holder.append(holder)  # garbage with graphs in it
        del some, holder
