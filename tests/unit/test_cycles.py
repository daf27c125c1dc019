"""Rows that go on by themselves give what they give with the host's help, and follow whoever comes and goes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from open_mythos import Engine, Request
from open_mythos.inference import device_rows
from open_mythos.inference.cycles import Cycles
from open_mythos.inference.exit_rules import Rule, SamePrediction, StateChange
from open_mythos.inference.exits import Fixed
from open_mythos.inference.generate import generate
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.graph_tables import Asking, entries_of
from open_mythos.inference.requests import Draft, RequestError
from open_mythos.inference.running import Late, Numbers
from open_mythos.model import EveryLoop, LastLoop, OpenMythos
from open_mythos.rows.plain import PlainRows
from open_mythos.rows.turns import NONE, PlainTurns, TritonTurns, Turns
from row_kernels import CHANGES, build

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
def cycles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, bool, bool]]]:
    """Count, loops, whether under rules and apart of each cycle that ran; none of them may fail."""
    ran: list[tuple[int, int, bool, bool]] = []
    errors: list[Exception] = []
    work, give_up = device_rows.DeviceRows.ready, Cycles.give_up

    def noted(self: Any, count: int, loops: int, ruled: bool) -> Any:
        ran.append((count, loops, ruled, count >= device_rows._APART))
        return work(self, count, loops, ruled)

    def failed(self: Any, error: Exception) -> None:
        errors.append(error)
        give_up(self, error)

    monkeypatch.setattr(device_rows.DeviceRows, "ready", noted)
    monkeypatch.setattr(Cycles, "give_up", failed)
    yield ran
    assert not errors


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


def both(
    model: OpenMythos, work: list[Request], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Any]:
    """Results with cycles, then with the host's help."""
    found = []
    for takes in (Cycles.takes, lambda self, lanes: False):
        with monkeypatch.context() as patch:
            patch.setattr(Cycles, "takes", takes)
            with engine(model, **options) as some:
                handles = [some.submit(request) for request in work]
                for handle in handles:
                    handle.wait()
                found.append([(r.state.tokens, r.state.loops, r.state.reason) for r in handles])
                assert some.stats.free_pages == some.pool.capacity
                found.append(some.stats.done)
    return found


@pytest.mark.parametrize("changes", ["norms", "bare"])
@pytest.mark.parametrize("policy", [EveryLoop(), LastLoop()])
def test_who_draws_or_drafts_comes_and_goes_among_them(
    changes: str, policy: Any, cycles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cycles are left in the middle of tokens, and entered again."""
    model, work = build("gqa", torch.float64, **CHANGES[changes]), requests(12, 1, rules=True)
    work[4] = replace(work[4], temperature=0.8, seed=3)
    if isinstance(policy, EveryLoop):
        work[7] = replace(work[7], exit=None, n_loops=6, max_new_tokens=9, speculate=Draft(2, 2))
    work[9] = replace(work[9], exit=SamePrediction())
    with_cycles, stats, without, others = both(model, work, monkeypatch, rows=3, policy=policy)
    assert with_cycles == without
    assert len(cycles) > 5
    assert (stats.tokens, stats.row_loops) == (others.tokens, others.row_loops)


def test_an_end_token_or_no_finite_number_ends_a_row(
    cycles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = build("mla", torch.float64, tie_embeddings=False), requests(8, 2)
    long = [replace(each, max_new_tokens=12) for each in work]
    (answers, *_) = both(model, long, monkeypatch)
    ended = [
        replace(each, eos_token_id=tokens[3]) for each, (tokens, _, _) in zip(long, answers, strict=True)
    ]
    found, _, wanted, _ = both(model, ended, monkeypatch)
    assert found == wanted
    assert any(reason == "eos" and len(tokens) < 12 for tokens, _, reason in found)

    # One row's token has an embedding that is not finite: it fails alone.
    bad = next(tokens[2] for tokens, _, _ in answers if tokens[2] not in {t for r in work for t in r.prompt})
    with torch.no_grad():
        model.embed.weight[bad] = torch.nan
    found, _, wanted, _ = both(model, long, monkeypatch)
    assert found == wanted
    assert {"failed", "length"} == {reason for _, _, reason in found}
    assert len(cycles) > 10


def test_who_is_cancelled_or_whose_callback_raises_goes_alone(cycles: list[Any]) -> None:
    model = build("gqa", torch.float64)
    work, handles = [replace(each, max_new_tokens=12) for each in requests(9, 3)], []
    seen: list[int] = []

    def cancels(token: int) -> None:
        seen.append(token)
        if len(seen) == 5:
            handles[2].cancel()

    def raises(token: int) -> None:
        if len(seen) > 3:
            raise OSError("no more")

    work[0], work[1] = replace(work[0], on_token=cancels), replace(work[1], on_token=raises)
    with engine(model) as some:
        handles += [some.submit(request) for request in work]
        results = []
        for handle in handles:
            with suppress(RequestError, OSError):
                handle.result()
            results.append(handle.state)
        assert some.stats.free_pages == some.pool.capacity
    assert [results[i].reason for i in (1, 2)] == ["failed", "cancelled"]
    for i in (0, *range(3, 9)):
        assert results[i].tokens == alone(model, work[i])
    assert len(cycles) > 5


def test_a_model_that_changes_in_the_middle_is_computed_as_it_is(
    cycles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs and what they hold are made anew; rows in the middle of a token go on."""
    found = []
    for takes in (Cycles.takes, lambda self, lanes: False):
        model, count = build("gqa", torch.float64), 0
        with monkeypatch.context() as patch:
            patch.setattr(Cycles, "takes", takes)
            with engine(model) as some:
                handles = [some.submit(request) for request in requests(4, 4)]
                while some.step():
                    count += 1
                    if count == 12:
                        model.head.weight = torch.nn.Parameter(model.head.weight.detach().roll(1, 0))
                assert all(handle.state.reason == "length" for handle in handles)
                found.append([len(handle.state.tokens) for handle in handles])
    assert found[0] == found[1]
    assert cycles


def test_where_a_cycle_fails_the_host_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work, count = build("mla", torch.float64), requests(8, 5, rules=True), [0]
    run = device_rows.DeviceRows.ready

    def fails(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 6:
            raise RuntimeError("out of memory")
        return run(self, *args)

    monkeypatch.setattr(device_rows.DeviceRows, "ready", fails)
    with engine(model) as some:
        results = [handle.result() for handle in [some.submit(request) for request in work]]
    assert count == [6]
    assert "out of memory" in caplog.text
    for request, result in zip(work, results, strict=True):
        assert result.tokens == alone(model, request)


def test_where_there_is_no_memory_for_them_the_host_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, runner: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(device_rows.DeviceRows, "__init__", fails)
    model, work = build("gqa", torch.float64), requests(5, 6)
    with engine(model) as some:
        results = [handle.result() for handle in [some.submit(request) for request in work]]
    assert "no room" in caplog.text
    assert [result.tokens for result in results] == [alone(model, request) for request in work]


@pytest.mark.parametrize("part", ["do_prelude", "do_loop", "do_coda"])
def test_who_is_in_a_cycle_that_breaks_has_failed_and_others_go_on(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows how far those rows are, so no token may come of them."""
    model, work, inside = build("mla", torch.float64), requests(8, 5), [0]
    run, do = Cycles.run, getattr(GraphRunner, part)

    def running(self: Any, cycle: Any) -> None:
        inside[0] += 1
        try:
            run(self, cycle)
        finally:
            inside[0] += 1

    def fails(self: Any, *args: Any) -> Any:
        if inside[0] == 7:
            inside[0] += 2
            raise RuntimeError("broken")
        return do(self, *args)

    monkeypatch.setattr(Cycles, "run", running)
    monkeypatch.setattr(GraphRunner, part, fails)
    with engine(model) as some:
        handles = [some.submit(request) for request in work]
        for handle in handles:
            handle.wait()
        assert some.stats.free_pages == some.pool.capacity
    reasons = {handle.state.reason for handle in handles}
    assert reasons == {"failed", "length"}
    for request, handle in zip(work, handles, strict=True):
        wanted = alone(model, request)
        assert handle.state.tokens == wanted[: len(handle.state.tokens)]
        assert (handle.state.reason == "length") == (handle.state.tokens == wanted)


def test_tokens_that_come_late_come_in_order_and_none_after_the_last(
    cycles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what cycles tell is there before what was drawn earlier by the host has been read."""
    model, draws = build("gqa", torch.float64, **CHANGES["bare"]), torch.Generator().manual_seed(0)
    work = requests(10, 7, rules=True)
    firsts = [alone(model, each)[0] for each in work]
    work[3], work[8] = replace(work[3], eos_token_id=firsts[3]), replace(work[8], eos_token_id=firsts[8])
    work[5] = replace(work[5], temperature=0.8, seed=3, max_new_tokens=5)
    wanted = both(model, work, monkeypatch)[2]
    monkeypatch.setattr(Late, "ready", lambda _: bool(torch.rand((), generator=draws) < 0.1))
    monkeypatch.setattr(Numbers, "ready", lambda _: bool(torch.rand((), generator=draws) < 0.5))
    with engine(model) as some:
        monkeypatch.setattr(some._scheduler, "_lag", 3)
        handles = [some.submit(request) for request in work]
        found = [(r.tokens, r.loops, r.reason) for r in (handle.result() for handle in handles)]
    assert found == wanted
    assert {"eos", "length"} == {reason for _, _, reason in found}
    assert cycles


def test_no_cycle_is_longer_than_it_may_be(cycles: list[Any]) -> None:
    """Nor than the deepest token; and the context may be full at the end."""
    model = build("mla", torch.float64)
    work = [Request([5] * 36, 12, loops, temperature=0) for loops in (1, 2, 3)]
    with engine(model, coda_every=64) as some:
        results = [handle.result() for handle in [some.submit(request) for request in work]]
        assert {loops for _, loops, *_ in cycles} == {4}
        del cycles[:]
        some.submit(Request([1], 12, 9, temperature=0))
        some.submit(Request([2], 12, 8, temperature=0)).result()
        assert {loops for _, loops, *_ in cycles} == {8}
    assert [len(result.tokens) for result in results] == [12] * 3


def turned(ops: Any, seed: int, device: str) -> list[torch.Tensor]:
    """What the operations of a cycle leave behind, from numbers drawn with the seed."""
    draws = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draws, dtype=torch.int32)

    rows, loops = int(numbers(3, 70, 1)), 1 + seed % 8
    count = rows + seed % 3
    width, vocabulary = max(count, 4), (96, 5000, 4096)[seed % 3]
    state = torch.stack([numbers(low, high, rows) for low, high in
                         ((0, 4), (0, 50), (0, 5), (0, 2), (5, 9), (0, 2), (0, 3), (0, 9), (-1, 5))])  # fmt: skip
    state[2] = torch.where(state[3] > 0, state[4], state[2])
    logits = torch.randn(count, vocabulary, generator=draws)
    logits[:, 7] = logits[:, 3] = 9.0  # of two that are equally likely it is the first
    logits[0, 5], logits[-1, 6] = torch.nan, -torch.inf
    table, blocks = numbers(0, 9, 4, count), numbers(0, 9, 4, (loops + 1) * width)
    turns = Turns(
        state.to(device), torch.rand(rows, generator=draws).to(device), numbers(0, 9, 2, rows).to(device)
    )
    table, blocks, logits = table.to(device), blocks.to(device), logits.to(device)
    ids, entries = torch.zeros(rows, dtype=torch.int64, device=device), entries_of(table)
    asks = Asking(count, torch.float32, torch.device(device)).of(count)
    found: list[torch.Tensor] = []

    def keep(columns: torch.Tensor) -> None:
        """Of entries that are fill only that they are."""
        found.extend([columns[0].clone(), torch.where(columns[0] >= 0, columns[1:], 0)])

    ops.ends(turns, entries)
    keep(table)
    ops.pick(turns, entries, logits, ids)
    keep(table[:2])
    ops.begins(turns, blocks, loops, width, count, asks)
    for i in range(loops + 1):
        keep(blocks[:, i * width : i * width + count])
    gone = entries_of(torch.full((4, count), -1, dtype=torch.int32, device=device))
    gone.rows[1], gone.loop[1] = 2, 5
    ops.leaves(turns, gone)
    told = torch.where(turns.told[0] == NONE, 0, turns.told[1])
    found += [ids, asks.tolerance, asks.first, asks.until, turns.numbers, turns.told[0], told]
    return [tensor.cpu() for tensor in found]


def test_what_the_host_would_do_the_turns_do() -> None:
    """One row of each kind, by hand."""
    device = torch.device("cpu")
    turns = Turns.empty(6, torch.float32, device)
    #                        left pos done rest most ruled first until eos
    fields = [(0, 9, 9, 1, 9, 0, 0, 0, -1), (3, 4, 5, 1, 5, 1, 0, 0, -1), (2, 7, 3, 0, 9, 0, 2, 9, -1),
              (1, 8, 2, 1, 2, 0, 0, 0, -1), (4, 6, 1, 1, 4, 0, 0, 0, 3), (2, 5, 8, 0, 9, 0, 0, 0, -1)]  # fmt: skip
    turns.numbers.copy_(torch.tensor(fields).T)
    table, logits = torch.zeros(4, 6, dtype=torch.int32), torch.zeros(6, 8)
    logits[:, 3] = 1.0
    entries, ids, ops = entries_of(table), torch.zeros(6, dtype=torch.int64), PlainTurns()
    ops.ends(turns, entries)
    assert table[:, :4].tolist() == [[1, 3, 4, -1], [4, 8, 6, 0], [5, 2, 1, 0], [1, 0, 0, 0]]
    ops.pick(turns, entries, logits, ids)
    assert turns.told[0].tolist() == [NONE, 3, NONE, 3, 3, NONE]
    assert [turns.told[1, row].item() for row in (1, 3, 4)] == [5, 2, 1]
    # Row 3 has no more to come, and row 4 has drawn its last.
    assert entries.rows.tolist() == [1, -1, -1, -1, -1, -1]
    assert turns.numbers[0].tolist() == [0, 2, 2, 0, 0, 2]
    asks, blocks = Asking(6, torch.float32, device).of(6), torch.zeros(4, 18, dtype=torch.int32)
    ops.begins(turns, blocks, 2, 6, 6, asks)
    assert blocks[0].tolist() == [1, 2, 5, -1, -1, -1, 1, 2, -1, -1, -1, -1] + [-1] * 6
    assert blocks[2, :3].tolist() == [0, 3, 8]
    assert asks.until[:3].tolist() == [0, 9, 0]
    assert (turns.numbers[2, [1, 2, 5]].tolist(), turns.numbers[3, [1, 2, 5]].tolist()) == (
        [2, 5, 9],
        [0, 0, 1],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_kernels_of_turns_are_their_meaning(seed: int) -> None:
    pairs = zip(turned(TritonTurns(), seed, "cuda"), turned(PlainTurns(), seed, "cpu"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


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
