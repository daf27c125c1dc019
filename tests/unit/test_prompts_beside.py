"""Prompts that a runner computes beside those who decode: who has one there waits for it, and nobody else does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.runner import Chunk, PlainRunner
from open_mythos.inference.running import Late
from tiny_models import TINY


def tiny_model() -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**TINY)).eval()


class Beside(PlainRunner):
    """Says that prompts run elsewhere."""

    def beside(self, chunk: Chunk) -> AbstractContextManager[Any] | None:
        return nullcontext()


class Slow:
    """Tokens after prompts are there after so many looks, or when they are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
        self.left: dict[int, int] = {}

        def ready(late: Late) -> bool:
            if late.loops[0] is not None:  # after a token
                return True
            self.left[id(late)] = self.left.get(id(late), looks) - 1
            return self.left[id(late)] < 0

        monkeypatch.setattr(Late, "ready", ready)


def prompts(count: int) -> list[list[int]]:
    return [[1 + i, *range(2, 3 + i % 4)] for i in range(count)]


@pytest.mark.parametrize("looks", [0, 3, 10**9])
def test_tokens_are_the_same_however_long_prompts_take(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    model = tiny_model()
    depths = [1 + i % 3 for i in range(9)]
    found = []
    for runner in (PlainRunner, Beside):
        if runner is Beside:
            Slow(monkeypatch, looks)
        with Engine(model, max_rows=3, runner=runner) as engine:
            results = engine.generate(prompts(9), [1 + i % 5 for i in range(9)], depths, 0.8, seed=4)
            found.append([(r.tokens, r.loops, r.prompt_loops, r.reason) for r in results])
            assert engine.stats.free_pages == engine.stats.pages
    assert found[0] == found[1]


def test_others_decode_while_a_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, 5)
    with Engine(tiny_model(), max_rows=2, runner=Beside) as engine:
        first = engine.submit(Request([1, 2], 20, 2, temperature=0))
        while len(first.state.tokens) < 3:
            engine.step()
        second = engine.submit(Request([3], 4, 2, temperature=0))
        before = len(first.state.tokens)
        while not second.state.tokens:
            engine.step()
        assert len(first.state.tokens) >= before + 2
        first.wait()
        second.wait()
        assert len(second.state.tokens) == 4


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_who_goes_while_the_prompt_is_computed_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    Slow(monkeypatch, 10**9)
    with Engine(tiny_model(), max_rows=2, runner=Beside) as engine:
        decoding = engine.submit(Request([1, 2], 30, 2, temperature=0))
        while not decoding.state.tokens:
            engine.step()
        waiting, after = (engine.submit(Request([3 + i], 4, 2, temperature=0)) for i in range(2))
        engine.step()
        assert not waiting.state.tokens
        if how == "close":
            engine.close()
            assert [h.state.reason for h in (decoding, waiting, after)] == ["cancelled"] * 3
        else:
            waiting.cancel()
            assert waiting.state.reason == "cancelled"
            assert len(after.result().tokens) == 4
            assert decoding.result().reason == "length"
            assert waiting.state.tokens == []
        assert engine.stats.free_pages == engine.stats.pages
        assert engine.stats.running == 0


def test_a_prompt_beside_that_fails_fails_alone() -> None:
    class Failing(Beside):
        def prefill(self, chunk: Chunk) -> Any:
            if (chunk.ids == 7).any():
                raise ArithmeticError("seven")
            return super().prefill(chunk)

    with Engine(tiny_model(), max_rows=3, runner=Failing) as engine:
        handles = [engine.submit(Request(prompt, 3, 2, temperature=0)) for prompt in ([1, 2], [7, 3], [4, 5])]
        for handle in handles:
            handle.wait()
        assert [handle.state.reason for handle in handles] == ["length", "failed", "length"]
        assert engine.stats.free_pages == engine.stats.pages


def test_deterministic_engines_and_long_prompts_compute_nothing_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Beside, "beside", lambda self, chunk: asked.append(chunk.ids.shape[1]))
    for options, wanted in (({"deterministic": True}, []), ({"prefill_chunk": 4}, [3])):
        asked.clear()
        with Engine(tiny_model(), max_rows=1, runner=Beside, **options) as engine:  # type: ignore[arg-type]
            engine.generate([[1] * 6, [2] * 3], 2, 2, temperature=0)
        assert asked == wanted


def test_first_tokens_that_are_not_finite_fail() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with Engine(model, max_rows=2, runner=Beside) as engine:
        handle = engine.submit(Request([1, 2], 3, 2, temperature=0))
        handle.wait()
        assert handle.state.reason == "failed"


def test_a_request_of_one_token_keeps_its_pages_until_the_prompt_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Slow(monkeypatch, 10**9)
    with Engine(tiny_model(), max_rows=2, runner=Beside) as engine:
        decoding = engine.submit(Request([1, 2], 30, 2, temperature=0))
        while not decoding.state.tokens:
            engine.step()
        single = engine.submit(Request([3], 1, 2, temperature=0))
        for _ in range(3):
            engine.step()
        assert single.state.tokens == []
        assert engine.stats.running == 2
        slow.left = dict.fromkeys(slow.left, 0)
        assert len(single.result().tokens) == 1
        assert engine.stats.running == 1
