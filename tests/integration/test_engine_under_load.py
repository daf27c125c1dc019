"""The engine under load: a thousand cancellations and failures leave nothing behind, and nobody else notices them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.inference import exits
from open_mythos.inference.engine import Engine, Handle, QueueFull, Request, RequestError
from open_mythos.inference.exit_rules import Rule, Seen
from open_mythos.inference.generate import generate
from open_mythos.inference.runner import PlainRunner
from open_mythos.inference.speculative import Draft
from tiny_models import TINY

SIZES = TINY | {"vocab_size": 24, "max_seq_len": 32}
REFUSED, BROKEN = 22, 23  # prompts that begin with these fail, by an exception or by NaN
ENDS = (
    "live",
    "at once",
    "later",
    "by its reader",
    "reader fails",
    "rule fails",
    "odd answer",
    "refused",
    "broken",
)


class UnluckyError(Exception):
    """What tests throw."""


def build(attn_type: str = "mla", dtype: torch.dtype = torch.float64) -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**SIZES, attn_type=attn_type)).to(dtype).eval().requires_grad_(False)


def faulty_prompts(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    """A forward hook of the embedding: a prompt that is refused, and one whose states are NaN."""
    ids = args[0]
    if ids.shape[1] == 1:
        return out
    if bool((ids[:, 0] == REFUSED).any()):
        raise UnluckyError("this prompt is refused")
    return out.masked_fill((ids[:, 0] == BROKEN).view(-1, 1, 1), torch.nan)


class Unlucky(Rule):
    """A rule of somebody's own that lets tokens leave at the second loop, until it fails."""

    def __init__(self, odd: bool, lasts: int) -> None:
        super().__init__()
        object.__setattr__(self, "odd", odd)
        object.__setattr__(self, "left", [lasts])

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def leaves(self, seen: Seen) -> Tensor:
        self.left[0] -= 1  # type: ignore[attr-defined]
        if self.left[0] < 0:  # type: ignore[attr-defined]
            if self.odd:  # type: ignore[attr-defined]
                return torch.zeros(3, 7)
            raise UnluckyError("the rule has failed")
        return seen.nobody() | (seen.loop >= 2)


@dataclass
class Case:
    """A request, how it is to end, and when."""

    request: Request
    end: str
    when: int
    handle: Handle | None = None

    def read(self, token: int) -> None:
        assert self.handle is not None
        if len(self.handle.tokens) < self.when:
            return
        if self.end == "reader fails":
            raise UnluckyError("the reader has failed")
        self.handle.cancel()


KINDS: list[dict[str, Any]] = [
    {"n_loops": 1, "temperature": 0},
    {"n_loops": 4, "temperature": 0.7, "seed": 5},
    {"n_loops": 3, "exit": exits.StateChange(0.3), "temperature": 0},
    {"n_loops": 4, "exit": exits.SamePrediction(1), "temperature": 0},
    {"n_loops": 2, "temperature": 1.0, "top_k": 4, "seed": 2},
    {"n_loops": 4, "temperature": 0, "speculate": Draft(2, 2)},
    {"n_loops": 3, "temperature": 0, "speculate": Draft(1, 3), "exit": exits.StateChange(0.3)},
]


def draw_case(chance: random.Random, ends: tuple[str, ...]) -> Case:
    end = chance.choice(ends)
    when = chance.randint(1, 3)
    kind = dict(chance.choice(KINDS))
    prompt = [chance.randrange(22) for _ in range(chance.choice((2, 4, 7)))]
    if end in ("refused", "broken"):
        prompt[0] = REFUSED if end == "refused" else BROKEN
    if end in ("rule fails", "odd answer"):
        kind |= {"exit": Unlucky(end == "odd answer", when * 2), "n_loops": 4}
    case = Case(Request(prompt), end, when)
    kind["on_token"] = case.read if end in ("by its reader", "reader fails") else None
    case.request = Request(prompt, max_new_tokens=4, **kind)
    return case


def expected(model: OpenMythos, request: Request) -> list[int]:
    """What the simple path gives for it, alone; greedy drafts change nothing."""
    ids = torch.tensor([request.prompt])
    keys = ("n_loops", "temperature", "top_k", "top_p", "seed", "exit")
    settings = {key: getattr(request, key) for key in keys}
    return generate(model, ids, request.max_new_tokens, **settings)[0, ids.shape[1] :].tolist()


def nothing_left(engine: Engine) -> None:
    stats = engine.stats
    assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)
    assert not engine.step()
    assert int(engine.pool.host.abs().sum()) == 0
    assert all(not bool(tensor[1:].any()) for tensor in engine.pool.tensors.values()), "pages are emptied"


def run_all(engine: Engine, cases: list[Case], chance: random.Random) -> None:
    """Submit them as there is room, cancel some on the way, and run to the end, in a bounded number of turns."""
    todo, later = list(reversed(cases)), []
    for turn in range(200 * len(cases)):
        while todo and chance.random() < 0.7:
            case = todo.pop()
            try:
                case.handle = engine.submit(case.request)
            except QueueFull:
                todo.append(case)
                break
            if case.end == "at once":
                case.handle.cancel()
            if case.end == "later":
                later.append((turn + chance.randint(1, 30), case.handle))
        for due, handle in later:
            if due == turn:
                handle.cancel()
        if not engine.step() and not todo:
            return
    raise AssertionError("the engine did not come to an end")


@pytest.mark.slow
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_a_thousand_cancellations_and_failures_leave_nothing_behind(attn_type: str) -> None:
    model, chance = build(attn_type), random.Random(1)
    alone = build(attn_type)
    model.embed.register_forward_hook(faulty_prompts)
    engine = Engine(model, max_rows=7, page_size=4, prefill_chunk=4, queue=20, cache_bytes=150_000)
    cases = [draw_case(chance, ENDS) for _ in range(620)]
    run_all(engine, cases, chance)
    nothing_left(engine)
    reasons = Counter()
    known: dict[Any, list[int]] = {}
    for case in cases:
        assert case.handle is not None
        result = case.handle.wait()
        reasons[result.reason] += 1
        if case.end in ("reader fails", "rule fails", "odd answer", "refused", "broken"):
            # Who is drawn to fail after its last token is not asked for it.
            assert result.reason == "failed" or (case.end in ("rule fails", "odd answer") and case.when > 1)
            assert (result.error is None) == (result.reason != "failed")
        elif case.end == "live":
            assert result.reason == "length"
        else:
            assert result.reason in ("cancelled", "length")
        if case.end not in ("refused", "broken", "rule fails", "odd answer"):
            key = repr((case.request.prompt, case.request.n_loops, case.request.exit, case.request.seed))
            if key not in known and (case.end == "live" or len(known) < 60):
                known[key] = expected(alone, case.request)
            assert result.tokens == known.get(key, result.tokens)[: len(result.tokens)]
    assert engine.stats.done.finished == reasons
    assert reasons["cancelled"] + reasons["failed"] >= 500, "with either attention"
    assert min(reasons.values()) >= 50
    with pytest.raises(RequestError, match="the request failed"):
        next(case.handle for case in cases if case.end == "refused").result()  # type: ignore[union-attr]


def test_float32_on_the_fastest_runner_leaves_nothing_behind() -> None:
    chance = random.Random(2)
    engine = Engine(build(dtype=torch.float32), max_rows=8, prefill_chunk=8, queue=8, cache_bytes=400_000)
    cases = [draw_case(chance, ENDS[:-2]) for _ in range(120)]
    run_all(engine, cases, chance)
    nothing_left(engine)
    assert all(case.handle is not None and case.handle.done for case in cases)


def test_closing_ends_everybody() -> None:
    engine = Engine(build(), max_rows=2, page_size=4)
    handles = [engine.submit(Request([1, 2, 3], max_new_tokens=6)) for _ in range(9)]
    for _ in range(7):
        engine.step()
    engine.close()
    nothing_left(engine)
    assert {handle.wait().reason for handle in handles} <= {"cancelled", "length"}
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request([1], max_new_tokens=2))


def test_an_interrupt_ends_everybody_and_the_engine_goes_on() -> None:
    engine = Engine(build(), max_rows=3, page_size=4)

    def interrupt(token: int) -> None:
        raise KeyboardInterrupt

    handles = [engine.submit(Request([1, 2, 3], max_new_tokens=6)) for _ in range(5)]
    handles.append(engine.submit(Request([4, 5], max_new_tokens=6, on_token=interrupt)))
    with pytest.raises(KeyboardInterrupt):
        handles[-1].wait()
    nothing_left(engine)
    assert all(handle.done for handle in handles)
    assert engine.submit(Request([1, 2], max_new_tokens=2)).result().reason == "length"


@pytest.mark.parametrize("threads", [4])
def test_threads_share_the_engine(threads: int) -> None:
    model = build()
    engine, prompts = Engine(model, max_rows=4, page_size=4, queue=100), [[1, 2], [3, 4, 5], [6]]
    right = [expected(model, Request(p, max_new_tokens=4, temperature=0)) for p in prompts]
    wrong: list[object] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            for _ in range(12):
                which = chance.randrange(3)
                handle = engine.submit(Request(prompts[which], max_new_tokens=4, temperature=0))
                stop = chance.choice((None, None, 0, 2))
                found = []
                for token in handle:
                    found.append(token)
                    if len(found) == stop:
                        handle.cancel()
                        break
                if found != right[which][: len(found)] or (stop is None and len(found) != 4):
                    wrong.append((which, found))
        except BaseException as error:
            wrong.append(error)

    pool = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(120)
    assert not any(thread.is_alive() for thread in pool), "somebody waits for ever"
    assert not wrong
    while engine.step():
        pass
    nothing_left(engine)


def test_streams_that_are_left_early_free_their_pages() -> None:
    model = build()
    engine = Engine(model, max_rows=4, page_size=4)
    right = expected(model, Request([1, 2, 3], max_new_tokens=6, temperature=0))

    async def read(most: int) -> list[int]:
        found: list[int] = []
        stream = engine.stream(Request([1, 2, 3], max_new_tokens=6, temperature=0))
        async for token in stream:
            found.append(token)
            if len(found) == most:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return found

    async def everybody() -> list[list[int]]:
        readers = [asyncio.ensure_future(read(1 + i % 7)) for i in range(20)]
        given_up = [asyncio.ensure_future(read(7)) for _ in range(6)]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        answers = await asyncio.gather(*readers)
        await asyncio.gather(*given_up, return_exceptions=True)
        return answers

    answers = asyncio.run(everybody())
    assert answers == [right[: min(1 + i % 7, 6)] for i in range(20)]
    while engine.step():
        pass
    nothing_left(engine)
    engine.close()


# One output.


@pytest.mark.parametrize("runner", [None, PlainRunner])
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_deterministic_logits_are_the_same_bits_in_any_batch(
    attn_type: str, runner: Any, drawn: dict[int, list[Tensor]]
) -> None:
    model = build(attn_type, torch.float32)
    prompt, first = [3, 1, 4, 1, 5], None
    for count in (1, 5, 64):
        drawn.clear()
        options = {"max_rows": 64, "page_size": 4, "prefill_chunk": 4, "runner": runner}
        engine = Engine(model, deterministic=True, **options)
        # Neighbours of other lengths and depths, on both sides of those that are looked at.
        prompts = [prompt if i % 2 == 0 else prompt[: 1 + i % 4] for i in range(count)]
        engine.generate(prompts, 3, [3 if i % 2 == 0 else 1 + i % 4 for i in range(count)], 0)
        for i in range(0, count, 2):
            bits = torch.stack(drawn[i])
            assert len(bits) == 3
            first = bits if first is None else first
            assert torch.equal(bits, first), (count, i)


@pytest.mark.slow
def test_a_thousand_runs_at_temperature_zero_under_load_give_one_output() -> None:
    model, chance = build(dtype=torch.float32), random.Random(3)
    engine = Engine(model, max_rows=24, page_size=4, prefill_chunk=4, deterministic=True, queue=10_000)
    asked: list[Handle] = []
    others = 0
    while len(asked) < 1000:
        if chance.random() < 0.1:
            others += 1
            engine.submit(draw_case(chance, ("live",)).request)
        else:
            asked.append(engine.submit(Request([7, 7, 2], max_new_tokens=2, n_loops=2, temperature=0)))
    outputs = {tuple(handle.result().tokens) for handle in asked}
    assert len(outputs) == 1
    assert others > 50
