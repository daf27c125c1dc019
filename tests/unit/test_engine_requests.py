"""Requests come, fail, are cancelled and refused one by one; nobody else notices, and no page is lost."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import open_mythos
from open_mythos import LastLoop, MythosConfig, OpenMythos
from open_mythos.inference import exits
from open_mythos.inference.engine import Engine, QueueFull, Request, RequestError
from open_mythos.inference.generate import generate
from open_mythos.inference.pages import Layers
from open_mythos.inference.runner import PlainRunner
from open_mythos.inference.running import Late
from tiny_models import TINY

FEWER_PARTS = {"n_experts": 2, "n_experts_per_tok": 1, "n_shared_experts": 0, "lora_rank": 0}
SIZES = TINY | FEWER_PARTS | {"vocab_size": 19, "attn_type": "gqa"}
PROMPT = [3, 1, 4, 1, 5]


def build(**changes: Any) -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**(SIZES | changes))).double().eval()


def engine_of(model: OpenMythos, **changes: Any) -> Engine:
    return Engine(model, **({"max_rows": 2, "page_size": 4, "prefill_chunk": 4} | changes))


def alone(model: OpenMythos, prompt: list[int], new: int, **how: Any) -> list[int]:
    return generate(model, torch.tensor([prompt]), new, **how)[0, len(prompt) :].tolist()


def empty(engine: Engine) -> bool:
    stats = engine.stats
    return (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)


@pytest.mark.parametrize(
    "how",
    [{"top_k": None}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "top_k": None, "top_p": 0.8}],
)
def test_draws_are_those_of_generate_with_the_same_seed(how: dict[str, Any]) -> None:
    model = build()
    prompts = [PROMPT, PROMPT[:2], PROMPT, [7]]
    others = engine_of(model, max_rows=3)
    greedy = [others.submit(Request(PROMPT[:3], 6, 2, temperature=0)) for _ in range(2)]
    results = others.generate(prompts, 8, [2, 4, 3, 1], seed=[5, 5, 6, 2**62], **how)
    for prompt, n, seed, result in zip(prompts, (2, 4, 3, 1), (5, 5, 6, 2**62), results, strict=True):
        assert result.tokens == alone(model, prompt, 8, n_loops=n, seed=seed, **how)
    assert {tuple(handle.result().tokens) for handle in greedy} == {
        tuple(alone(model, PROMPT[:3], 6, n_loops=2, temperature=0))
    }


def test_without_a_seed_torchs_own_generator_decides() -> None:
    engine = engine_of(build())
    torch.manual_seed(3)
    first = engine.generate([PROMPT, PROMPT], 8)
    torch.manual_seed(3)
    one_by_one = [engine.submit(Request(PROMPT, 8)) for _ in range(2)]
    assert [handle.result().tokens for handle in one_by_one] == [r.tokens for r in first]
    assert first[0].tokens != first[1].tokens
    assert [r.tokens for r in engine.generate([PROMPT, PROMPT], 8)] != [r.tokens for r in first]


def test_an_answer_ends_with_its_own_eos() -> None:
    model, engine = build(), engine_of(build())
    whole = alone(model, PROMPT, 12, temperature=0)
    stop = whole[5]
    handles = [
        engine.submit(Request(PROMPT, 12, temperature=0, eos_token_id=stop)),
        engine.submit(Request(PROMPT, 12, temperature=0)),
    ]
    ended, other = (handle.result() for handle in handles)
    assert (ended.tokens, ended.reason) == (whole[: whole.index(stop) + 1], "eos")
    assert (other.tokens, other.reason) == (whole, "length")
    assert empty(engine)


def test_what_a_row_computes_before_its_end_is_read_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule = build(), exits.StateChange(0.3, min_loops=2)
    whole = alone(model, PROMPT, 12, temperature=0, exit=rule)
    request = Request(PROMPT, 12, temperature=0, exit=rule, eos_token_id=whole[4])
    wanted = engine_of(model).submit(request).result()
    monkeypatch.setattr(Late, "ready", lambda _: False)
    late = engine_of(model)
    late._scheduler._lag = 2  # as on a GPU
    found = late.submit(request).result()
    assert (found.tokens, found.loops, found.reason) == (wanted.tokens, wanted.loops, "eos")
    assert late.stats.done.codas > len(found.tokens) - 1, "nothing was computed in vain"


@dataclass(frozen=True)
class Raising(exits.Rule):
    """A rule with a fault."""

    at: int = 3

    def leaves(self, seen: exits.Seen) -> Tensor:
        if seen.loop == self.at:
            raise ZeroDivisionError("a rule failed")
        return seen.nobody()


class Poisoned(PlainRunner):
    """Gives NaN to rows that feed token 13, and raises for any batch with token 17."""

    def coda(self, batch: Any) -> Tensor:
        logits = super().coda(batch)
        fed = self.state.ids[list(batch.rows)]
        if bool((fed == 17).any()):
            raise RuntimeError("this token breaks the coda")
        return logits.masked_fill((fed == 13).unsqueeze(1), torch.nan)


def stops_at(count: int) -> Callable[[int], None]:
    def on_token(token: int) -> None:
        nonlocal count
        count -= 1
        if not count:
            raise KeyError("enough")

    return on_token


def test_a_request_fails_alone() -> None:
    model = build()
    engine = engine_of(model, max_rows=4)
    good = Request(PROMPT, 8, 4, exit=exits.StateChange(0.3), temperature=0)
    bad = [
        Request(PROMPT, 8, 4, exit=Raising(), temperature=0),
        Request(PROMPT, 8, temperature=0, on_token=stops_at(3)),
    ]
    handles = [engine.submit(request) for request in (good, bad[0], good, bad[1], good)]
    results = [handle.wait() for handle in handles]
    wanted = alone(model, PROMPT, 8, n_loops=4, temperature=0, exit=exits.StateChange(0.3))
    assert [results[i].tokens for i in (0, 2, 4)] == [wanted] * 3
    assert [results[i].reason for i in (1, 3)] == ["failed"] * 2
    assert len(results[3].tokens) == 3
    with pytest.raises(RequestError, match="a rule failed") as error:
        handles[1].result()
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(RequestError, match="enough"):
        list(handles[3])
    assert empty(engine)


def test_logits_that_are_not_finite_and_a_batch_that_raises_cost_one_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build()
    engine = engine_of(model, max_rows=3, runner=Poisoned)
    handles = [engine.submit(Request([i, 2], 12, 3, seed=i, top_k=None)) for i in range(9)]
    reasons = set()
    for i, handle in enumerate(handles):
        result, wanted = handle.wait(), alone(model, [i, 2], 12, n_loops=3, seed=i, top_k=None)
        assert result.tokens == wanted[: len(result.tokens)]
        bad = [token for token in wanted[:-1] if token in (13, 17)]
        if bad:
            assert result.tokens[-1] == bad[0]
            assert ("not finite" if bad[0] == 13 else "breaks the coda") in str(result.error)
        assert result.reason == ("failed" if bad else "length")
        reasons |= {*bad[:1], result.reason}
    assert reasons == {13, 17, "failed", "length"}
    assert engine.stats.done.retried > 0
    (told,) = [record.getMessage() for record in caplog.records if "failed together" in record.getMessage()]
    assert "rows failed together, and are tried one by one: RuntimeError(" in told
    assert empty(engine)
    assert all(bool((tensor[1:] == 0).all()) for tensor in engine.pool.tensors.values())


def test_cancelling_at_any_moment_frees_the_pages_and_disturbs_nobody() -> None:
    model, draws = build(), torch.Generator().manual_seed(0)
    engine = engine_of(model, max_rows=3, cache_bytes=2**15)
    wanted = {n: alone(model, PROMPT, 6, n_loops=n, temperature=0) for n in (1, 2, 3, 4)}
    kept, gone = [], []
    for i in range(60):
        n = 1 + i % 4
        handle = engine.submit(Request(PROMPT, 6, n, temperature=0))
        if i % 3:
            gone.append(handle)
        else:
            kept.append((n, handle))
        for _ in range(int(torch.randint(0, 5, (), generator=draws))):
            engine.step()
        if gone and i % 2:
            gone.pop(int(torch.randint(0, len(gone), (), generator=draws))).cancel()
    for handle in gone:
        handle.cancel()
        assert handle.done
    assert all(handle.result().tokens == wanted[n] for n, handle in kept)
    assert empty(engine)
    assert engine.stats.done.finished.keys() <= {"length", "cancelled"}


def test_who_comes_and_is_cancelled_while_a_turn_begins_is_let_go() -> None:
    engine, late = engine_of(build()), []

    def come_and_go() -> None:
        late.append(engine.submit(Request(PROMPT, 6)))
        late[0].cancel()

    class Inbox(deque[Any]):
        """Somebody comes right after the first look that found nobody."""

        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found and not late:
                come_and_go()
            return found

    engine._scheduler._inbox = Inbox()
    other = engine.submit(Request(PROMPT, 6))
    assert other.wait().reason == "length"
    assert (late[0].wait().reason, late[0].tokens) == ("cancelled", [])
    assert empty(engine)


def test_who_waits_for_pages_is_served_in_order_and_not_for_ever() -> None:
    model = build()
    layers = Layers(1, 4, 1)
    wide = 6 * len(layers.needed(4))  # pages of four tokens that a request of 21 takes
    engine = engine_of(
        model, max_rows=4, max_loops=4, prefill_chunk=16, cache_bytes=wide * 4 * 2 * 8 * 8 + 4096
    )
    order: list[str] = []
    many = [Request([i], 3, 1, temperature=0, on_token=lambda _: order.append("small")) for i in range(9)]
    large = Request([1] * 10, 12, 4, temperature=0, on_token=lambda _: order.append("large"))
    handles = [engine.submit(request) for request in (*many[:3], large, *many[3:])]
    for handle in handles:
        handle.result()
    assert order.index("large") <= 9, "small ones went past the large one that came before them"
    assert empty(engine)


def test_a_long_prompt_holds_up_neither_short_ones_nor_those_who_decode() -> None:
    engine, order = engine_of(build(), max_rows=3, prefill_chunk=2), []
    busy = engine.submit(Request([1], 30, 4, temperature=0))
    next(iter(busy))
    before = len(busy.tokens)
    long = engine.submit(Request([1] * 36, 2, 4, on_token=lambda _: order.append("long")))
    short = engine.submit(Request([2], 2, 4, on_token=lambda _: order.append("short")))
    next(iter(long))
    assert short.done
    assert order == ["short", "short", "long"]
    assert 18 // 4 <= len(busy.tokens) - before <= 18
    for handle in (busy, long, short):
        handle.result()


def test_the_queue_is_bounded_and_generate_waits_for_room() -> None:
    engine = engine_of(build(), max_rows=1, queue=2)
    handles = [engine.submit(Request(PROMPT, 3)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(Request(PROMPT, 3))
    assert len(engine.generate([PROMPT] * 5, 2)) == 5
    assert all(handle.done for handle in handles)


def test_generate_waits_where_another_thread_was_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, others = engine_of(build(), max_rows=1, queue=2), []
    room = engine._scheduler.room

    def taken() -> bool:
        """Others fill the queue right after the look that found room."""
        found = room()
        while found and room() and len(others) < 4:
            others.append(engine.submit(Request(PROMPT, 2)))
        return found

    monkeypatch.setattr(engine._scheduler, "room", taken)
    assert [result.reason for result in engine.generate([PROMPT] * 3, 2)] == ["length"] * 3
    assert len(others) == 4


def test_generate_runs_nothing_where_one_prompt_would_never_fit() -> None:
    engine = engine_of(build(), max_rows=1, queue=1, cache_bytes=2**16)
    with pytest.raises(ValueError, match="raise cache_bytes"):
        engine.generate([PROMPT, PROMPT, PROMPT], [2, 2, 36], [1, 1, 64])
    assert engine.stats.done.prompt_tokens == 0
    assert empty(engine)


def test_streams_of_one_event_loop_share_turns_and_leaving_one_cancels_it() -> None:
    model = build()
    engine = engine_of(model, max_rows=3)

    async def all_of(n: int) -> list[int]:
        return [token async for token in engine.stream(Request(PROMPT, 7, n, temperature=0))]

    async def some_of() -> list[int]:
        found = []
        stream = engine.stream(Request(PROMPT, 7, 4, temperature=0))
        async for token in stream:
            found.append(token)
            if len(found) == 2:
                break
        await stream.aclose()
        return found

    async def run() -> list[list[int]]:
        return await asyncio.gather(all_of(1), all_of(3), some_of(), all_of(4))

    found = asyncio.run(run())
    assert found[:2] == [alone(model, PROMPT, 7, n_loops=n, temperature=0) for n in (1, 3)]
    assert found[2] == found[3][:2]
    assert engine.stats.done.finished == {"length": 3, "cancelled": 1}
    engine.close()


def test_a_turn_that_found_nothing_to_do_ends_no_stream_that_began_after_it() -> None:
    model = build()
    engine = engine_of(model)

    async def read() -> list[int]:
        return [token async for token in engine.stream(Request(PROMPT, 7, 3, temperature=0))]

    async def run() -> list[int]:
        loop = asyncio.get_running_loop()
        idle: asyncio.Future[bool] = loop.create_future()
        engine._turning = loop, idle
        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        idle.set_result(False)
        return await reading

    assert asyncio.run(run()) == alone(model, PROMPT, 7, n_loops=3, temperature=0)
    engine.close()


def test_threads_may_wait_for_the_same_engine() -> None:
    model = build()
    engine, found = engine_of(model, max_rows=3), {}

    def work(n: int) -> None:
        found[n] = list(engine.submit(Request(PROMPT, 6, n, temperature=0)))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: alone(model, PROMPT, 6, n_loops=n, temperature=0) for n in (1, 2, 3, 4)}


def test_a_callback_may_submit_and_cancel_but_not_wait() -> None:
    engine, more = engine_of(build()), []
    first = engine.submit(
        Request(PROMPT, 4, on_token=lambda _: more.append(engine.submit(Request(PROMPT, 2))))
    )
    first.result()
    assert all(len(handle.result().tokens) == 2 for handle in more)
    waiting = engine.submit(Request(PROMPT, 4, on_token=lambda _: engine.step()))
    with pytest.raises(RequestError, match="may submit and cancel requests, but not wait"):
        waiting.result()
    stopping: list[Any] = []
    stopping.append(engine.submit(Request(PROMPT, 4, on_token=lambda _: stopping[0].cancel())))
    assert stopping[0].wait().reason == "cancelled"
    assert empty(engine)


def test_an_interrupt_ends_everything_and_the_engine_goes_on() -> None:
    engine = engine_of(build())

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    other = engine.submit(Request(PROMPT, 9))
    with pytest.raises(KeyboardInterrupt):
        engine.submit(Request(PROMPT, 9, on_token=interrupt)).wait()
    assert other.wait().reason == "failed"
    assert empty(engine)
    assert len(engine.generate([PROMPT], 3)[0].tokens) == 3


def test_a_device_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(build())
    handles = [engine.submit(Request(PROMPT, new)) for new in (3, 9, 9)]
    engine.step()

    def fail(_: Tensor) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.pool, "clear", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        handles[1].wait()
    assert [handle.state.reason for handle in handles] == ["failed"] * 3
    assert empty(engine)


def test_a_sampler_that_cannot_be_made_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(build())
    handles = [engine.submit(Request(PROMPT, new)) for new in (3, 9)]

    def fail(*_: object) -> None:
        raise RuntimeError("no room for a generator")

    monkeypatch.setattr("open_mythos.inference.intake.Sampler", fail)
    with pytest.raises(RuntimeError, match="no room for a generator"):
        handles[1].wait()
    assert [handle.state.reason for handle in handles] == ["failed"] * 2
    assert empty(engine)


def test_a_thread_that_is_interrupted_while_it_waits_for_a_turn_waits_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(build())

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._changed, "wait", interrupt)
    engine._driver = -1  # another thread
    with pytest.raises(KeyboardInterrupt):
        engine.submit(Request(PROMPT, 9)).wait()
    engine._driver = None
    assert engine._waiting == 0, "turns would stop after each one for a thread that has gone"


def test_an_engine_made_in_inference_mode_frees_pages_outside_of_it() -> None:
    with torch.inference_mode():
        engine = engine_of(build())
    handle = engine.submit(Request(PROMPT, 9))
    engine.step()
    handle.cancel()
    assert handle.done
    assert empty(engine)


def test_a_closed_engine_takes_nothing_in() -> None:
    with engine_of(build()) as engine:
        handle = engine.submit(Request(PROMPT, 9))
        engine.step()
    assert handle.wait().reason == "cancelled"
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(Request(PROMPT, 3))


def test_deterministic_answers_do_not_depend_on_the_batch_to_the_last_bit(
    drawn: dict[int, list[Tensor]],
) -> None:
    model = build().float()
    for rows in (1, 5):
        engine = engine_of(model, max_rows=rows, deterministic=True)
        engine.generate([PROMPT, PROMPT[:2], PROMPT * 2, PROMPT, [2]], 5, [3, 4, 2, 1, 3], 0)
        if rows == 1:
            first = dict(drawn)
            drawn.clear()
    assert first.keys() == drawn.keys()
    for number, rows_of in first.items():
        assert torch.equal(torch.stack(rows_of), torch.stack(drawn[number]))


def test_loops_that_share_pages_give_what_that_policy_gives_alone() -> None:
    model = build()
    engine = engine_of(model, policy=LastLoop(), prefill_chunk=16)
    results = engine.generate([PROMPT, PROMPT[:3]], 8, [3, 4], 0)
    for prompt, n, result in zip((PROMPT, PROMPT[:3]), (3, 4), results, strict=True):
        assert result.tokens == alone(model, prompt, 8, n_loops=n, temperature=0, cache_policy=LastLoop())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"prompt": []}, "prompt is empty"),
    "prompt kind": ({"prompt": [1.5]}, "list of ids or a 1-D tensor"),
    "prompt shape": ({"prompt": torch.zeros(1, 2).long()}, "1-D tensor"),
    "prompt range": ({"prompt": [1, 19]}, r"contains 19: it must be 0 to vocab_size - 1 \(18\)"),
    "n_loops": ({"n_loops": 0}, "n_loops = 0 is not allowed"),
    "n_loops deep": ({"n_loops": 65}, "n_loops = 65 is not allowed: it must be a whole number, 1 to 64"),
    "new": ({"max_new_tokens": 0}, "max_new_tokens = 0 is not allowed"),
    "long": ({"max_new_tokens": 37}, "5 prompt tokens leave room for 36 of 40"),
    "longer": ({"prompt": [1] * 41}, "the prompt has 41 tokens, more than 40"),
    "temperature": ({"temperature": -1}, "temperature = -1 is not allowed"),
    "top_p": ({"top_p": 0}, "top_p = 0 is not allowed"),
    "seed": ({"seed": -1}, "seed = -1 is not allowed"),
    "eos": ({"eos_token_id": 19}, "eos_token_id = 19 is not allowed"),
    "exit": ({"exit": 3}, "exit = 3 is not allowed"),
    "callback": ({"on_token": 3}, "on_token = 3 is not allowed"),
    "pages": ({"n_loops": 64, "max_new_tokens": 36}, "raise cache_bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_before_it_is_queued(name: str) -> None:
    fields, message = BAD[name]
    engine = engine_of(build(), cache_bytes=2**16)
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**({"prompt": PROMPT, "max_new_tokens": 2} | fields)))
    assert empty(engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_rows": 0}, "max_rows = 0 is not allowed"),
        ({"page_size": True}, "page_size = True is not allowed"),
        ({"cache_bytes": 100}, "cache_bytes = 100 is not allowed: it must be a whole number of at least"),
        ({"max_context": 41}, "max_context = 41 is not allowed: it must be a whole number, 1 to 40"),
        ({"policy": "last"}, "policy = 'last' is not allowed"),
        ({"coda_every": 0}, "coda_every = 0 is not allowed"),
    ],
)
def test_a_bad_engine_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(build(), **fields)


def test_generate_takes_one_value_or_one_for_each_prompt() -> None:
    engine = open_mythos.Engine(build())
    with pytest.raises(ValueError, match="n_loops has 3 values for 2 prompts"):
        engine.generate([PROMPT, PROMPT], 2, [1, 2, 3])
    with pytest.raises(ValueError, match=r"prompts must be of shape \(B, S\)"):
        engine.generate(torch.tensor(PROMPT), 2)
    with pytest.raises(ValueError, match="n_loops = -1"):
        engine.generate([PROMPT, PROMPT], 2, [1, -1])
    with pytest.raises(RequestError, match=r"prompts\[1\] failed: a rule failed") as error:
        engine.generate([PROMPT, PROMPT], 2, exit=[None, Raising()])
    assert [(r.reason, len(r.tokens)) for r in error.value.results] == [("length", 2), ("failed", 0)]
    assert empty(engine)
    assert [len(r.tokens) for r in engine.generate(torch.tensor([PROMPT, PROMPT]), [2, 3], 1)] == [2, 3]
