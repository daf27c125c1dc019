"""Speculation inside the engine: beside other requests, at any depth, under rules; the same tokens, no page lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import LastLoop, OpenMythos
from open_mythos.inference import exits, running
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.generate import generate
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.pages import PagePool
from open_mythos.inference.runner import Batch, PlainRunner, RowState
from open_mythos.inference.speculative import Draft
from open_mythos.rows.plain import PlainRows
from tiny_models import TINY, halting_model

LOOPS = 4
SIZES = TINY | {"max_loop_iters": LOOPS, "tie_embeddings": False, "act_threshold": 0.8}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 3]]
RULES = {
    "fixed, shallower than the draft": exits.Fixed(1),
    "state": exits.StateChange(0.45),
    "act": exits.ACT(0.5),
    "kl": exits.PredictionChange(3e-2),
    "top": exits.Confidence(0.22),
}


def small(seed: int = 0, **changes: Any) -> OpenMythos:
    return halting_model(SIZES | changes, seed)


def alone(model: OpenMythos, prompt: list[int], new: int, **settings: Any) -> list[int]:
    return generate(model, [prompt], new, temperature=0, **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_requests_with_and_without_drafts_share_a_batch(attn_type: str, deterministic: bool) -> None:
    model = small(attn_type=attn_type)
    drafts = [Draft(2, 3), None, Draft(1, 2), Draft(3, 4), None, Draft(2, 3)]
    depths, news = [4, 2, 3, 6, 4, 3], [14, 9, 11, 12, 3, 2]
    prompts = [*PROMPTS, [2, 2, 2], [9, 8]]
    with Engine(model, max_rows=9, max_loops=6, prefill_chunk=4, deterministic=deterministic) as engine:
        results = engine.generate(prompts, news, depths, temperature=0, speculate=drafts)
        done = engine.stats.done
        assert engine.stats.free_pages == engine.stats.pages
    for prompt, new, depth, result in zip(prompts, news, depths, results, strict=True):
        assert result.tokens == alone(model, prompt, new, n_loops=depth)
        assert (result.prompt_loops, result.loops) == ([depth] * len(prompt), [depth] * (new - 1))
    assert 0 < done.kept < done.drafted


class Whole(PlainRunner):
    """Computes whole tokens and rests of tokens at once, as a faster runner would."""

    calls = 0

    def token(self, batch: Batch) -> Tensor:
        self.prelude(batch)
        return self.rest(batch)

    def rest(self, batch: Batch) -> Tensor:
        Whole.calls += 1
        while batch.loops[0] < batch.most[0]:
            self.loop(batch)
            batch = replace(batch, loops=tuple(n + 1 for n in batch.loops))
        return self.coda(batch)


def test_runners_that_compute_whole_drafts_and_checks_at_once() -> None:
    model = small()
    with Engine(model, max_rows=12, runner=Whole) as engine:
        for prompts in (PROMPTS[:1], PROMPTS[:3]):
            results = engine.generate(
                prompts, [12, 12, 9][: len(prompts)], temperature=0, speculate=Draft(2, 3)
            )
            for prompt, result in zip(prompts, results, strict=True):
                assert result.tokens == alone(model, prompt, len(result.tokens))
            if len(prompts) == 1:
                done = engine.stats.done
                assert Whole.calls == done.codas >= done.drafted + done.checks
                assert done.drafted > done.kept


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_graphs_work_in_their_plain_version(attn_type: str) -> None:
    model, served = small(attn_type=attn_type), []

    class Rounds(GraphRunner):
        def round(self, batch: Batch, drafts: int, loops: int) -> Tensor | None:
            logits = super().round(batch, drafts, loops)
            served.append((len(batch.rows), logits is not None))
            return logits

    def make(model: OpenMythos, pool: PagePool, state: RowState) -> GraphRunner:
        return Rounds(model, pool, state, rows=PlainRows())

    for rows, prompts in (
        (12, PROMPTS[:1]),
        (12, [PROMPTS[0], PROMPTS[0][::-1]]),
        (12, PROMPTS),
        (5, PROMPTS),
    ):
        with Engine(model, max_rows=rows, runner=make) as engine:
            results = engine.generate(prompts, 12, temperature=0, speculate=Draft(2, 3))
            assert [r.tokens for r in results] == [alone(model, prompt, 12) for prompt in prompts]
            assert [r.loops for r in results] == [[LOOPS] * 11] * len(prompts)
            assert engine.stats.done.drafted > engine.stats.done.kept
    assert {(4, True), (8, True)} <= set(served)  # drafts and checks of one request, and of two, at once


@pytest.mark.gpu
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_on_a_gpu_graphs_give_the_same_tokens_with_drafts(attn_type: str) -> None:
    model = small(attn_type=attn_type).float().cuda()
    with Engine(model, max_rows=12) as engine:
        assert isinstance(engine.runner, GraphRunner)
        assert engine.runner.reason is None
        plain = engine.generate(PROMPTS, 12, temperature=0)
        quick = engine.generate(PROMPTS, 12, temperature=0, speculate=Draft(2, 3))
        drawn = engine.generate(PROMPTS, 12, temperature=1.0, seed=1, speculate=Draft(2, 3))
        assert 0 < engine.stats.done.kept < engine.stats.done.drafted
        assert engine.stats.free_pages == engine.stats.pages
    assert [r.tokens for r in quick] == [r.tokens for r in plain]
    assert all(len(r.tokens) == 12 for r in drawn)


def test_the_cpus_kernels_compute_drafts_and_checks() -> None:
    model = small().float()
    with Engine(model, max_rows=12) as engine:
        results = engine.generate(PROMPTS, 12, temperature=0, speculate=Draft(2, 3))
        assert engine.stats.done.kept > 0
    assert [r.tokens for r in results] == [alone(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_deterministic_mode_a_check_gives_the_bits_of_plain_decoding(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model, seen = small().to(dtype), []
    draw, accept = running.draw, running.accept_likeliest

    def drawing(samplers: Any, logits: Tensor) -> Tensor:
        seen.extend(logits)
        return draw(samplers, logits)

    def accepting(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        kept, after = accept(drafted, logits)
        del seen[-drafted.shape[1] :]  # what the draft was drawn from
        seen.extend(logits[0, : int(kept) + 1])
        return kept, after

    monkeypatch.setattr(running, "draw", drawing)
    monkeypatch.setattr(running, "accept_likeliest", accepting)
    found = []
    for draft in (None, Draft(2, 3)):
        with Engine(model, max_rows=4, deterministic=True) as engine:
            engine.generate(PROMPTS[1:2], 20, temperature=0, speculate=draft)
        found.append(torch.stack(seen[:20]))
        seen.clear()
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", RULES)
def test_tokens_and_loops_under_an_exit_rule(rule: str) -> None:
    model = small(attn_type=("gqa", "mla")[list(RULES).index(rule) % 2], max_loop_iters=6)
    with Engine(model, max_rows=10, max_loops=6, prefill_chunk=4) as engine:
        plain = engine.generate(PROMPTS[:2], 10, temperature=0, exit=RULES[rule])
        quick = engine.generate(PROMPTS[:2], 10, temperature=0, exit=RULES[rule], speculate=Draft(3, 3))
        assert engine.stats.free_pages == engine.stats.pages
    for prompt, a, b in zip(PROMPTS, plain, quick, strict=False):
        assert (a.tokens, a.loops, a.prompt_loops) == (b.tokens, b.loops, b.prompt_loops)
        assert b.tokens == alone(model, prompt, 10, exit=RULES[rule])


def test_a_row_that_ends_inside_a_draft_ends_there() -> None:
    model = small()
    free = alone(model, PROMPTS[0], 16)
    for eos in sorted(set(free))[:3]:
        with Engine(model, max_rows=6) as engine:
            (result,) = engine.generate(
                PROMPTS[:1], 16, temperature=0, eos_token_id=eos, speculate=Draft(3, 5)
            )
            assert engine.stats.free_pages == engine.stats.pages
        assert result.tokens == free[: free.index(eos) + 1]
        assert result.reason == "eos"


def test_cancelled_and_failing_requests_leave_their_rows_to_others() -> None:
    model = small()

    def fail(token: int) -> None:
        raise RuntimeError("no more")

    with Engine(model, max_rows=4) as engine:
        handles = [
            engine.submit(Request(PROMPTS[1], 16, temperature=0, speculate=Draft(2, 3))),
            engine.submit(Request(PROMPTS[0], 16, temperature=0, speculate=Draft(2, 3), on_token=fail)),
            engine.submit(Request(PROMPTS[1], 16, temperature=0, speculate=Draft(2, 3))),
        ]
        first = iter(handles[0])
        got = [next(first) for _ in range(3)]
        handles[0].cancel()
        assert handles[2].result().tokens == alone(model, PROMPTS[1], 16)
        assert got == handles[2].result().tokens[:3]
        assert [handle.wait().reason for handle in handles] == ["cancelled", "failed", "length"]
        assert engine.stats.free_pages == engine.stats.pages
        assert not engine.pool.host.any()


def test_logits_that_are_not_finite_fail_the_request() -> None:
    model = small()
    with Engine(model, max_rows=4) as engine:
        handles = [
            engine.submit(Request([1, 2], 12, temperature=t, seed=0, speculate=Draft(2, 3))) for t in (0, 1.0)
        ]
        next(iter(handles[0]))
        with torch.no_grad():
            model.head.weight.fill_(torch.nan)
        assert [handle.wait().reason for handle in handles] == ["failed", "failed"]
        assert engine.stats.free_pages == engine.stats.pages


def far_from(wanted: Tensor, pairs: Tensor) -> float:
    """χ² of tokens (N, 2) against probabilities (16,), in standard deviations from its mean."""
    seen = (pairs * torch.tensor([4, 1])).sum(1).bincount(minlength=16).float()
    likely = wanted * len(pairs) >= 5
    found, expected = (torch.cat((x[likely], x[~likely].sum().view(1))) for x in (seen, wanted * len(pairs)))
    statistic, freedom = float(((found - expected) ** 2 / expected.clamp(min=1)).sum()), len(found) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def test_drawn_tokens_have_the_distribution_of_the_full_depth() -> None:
    model, requests = small(2, vocab_size=4), 500
    settings: dict[str, Any] = {"temperature": 1.2, "top_k": 3}
    with Engine(model, max_rows=99) as engine:
        results = engine.generate([[1, 2]] * requests, 4, seed=7, speculate=Draft(1, 2), **settings)
        assert 0.2 < engine.stats.done.kept / engine.stats.done.drafted < 0.95
    # Only tokens after the first come from drafts; plain generation says how probable each pair is.
    ids = torch.tensor([[1, 2]]).repeat(30_000, 1)
    plain = generate(model, ids, 3, seed=1, **settings)[:, 3:]
    wanted = (plain * torch.tensor([4, 1])).sum(1).bincount(minlength=16).float() / len(plain)
    assert far_from(wanted, torch.tensor([result.tokens[1:3] for result in results])) < 5
    shallow = generate(model, ids[:requests], 3, 1, seed=1, **settings)[:, 3:]
    assert far_from(wanted, shallow) > 10  # the draft's own distribution would be seen


def test_the_same_seed_draws_the_same_in_any_company() -> None:
    model = small()
    settings: dict[str, Any] = {"temperature": 1.0, "speculate": Draft(2, 3)}
    with Engine(model, max_rows=12) as engine:
        (one,) = engine.generate(PROMPTS[:1], 12, seed=[5], **settings)
        many = engine.generate(PROMPTS, 12, seed=[5, 6, 7, 8], **settings)
    assert many[0].tokens == one.tokens


@pytest.mark.parametrize(
    ("engine_settings", "settings", "message"),
    [
        ({"max_rows": 3}, {"speculate": Draft(1, 3)}, "Draft.tokens = 3 is not allowed: it takes 4 rows"),
        ({"policy": LastLoop()}, {"speculate": Draft(1, 3)}, "cache_policy = LastLoop"),
        ({}, {"speculate": Draft(LOOPS, 3)}, "Draft.loops = 4 is not allowed with n_loops = 4"),
        ({}, {"speculate": 3}, "speculate = 3 is not allowed"),
        ({}, {"speculate": Draft(1, 3), "exit": exits.Never}, "exit = "),
    ],
)
def test_what_is_refused(engine_settings: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with Engine(small(), **engine_settings) as engine, pytest.raises(ValueError, match=message):
        engine.generate([[1, 2]], 8, **settings)
