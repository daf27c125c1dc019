"""Speculation by depth: what comes out is what comes out without it, tokens or distribution; nothing runs twice."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import LastLoop, OpenMythos
from open_mythos.inference import exits
from open_mythos.inference.generate import generate, stream
from open_mythos.inference.sampling import probabilities
from open_mythos.inference.speculative import (
    Draft,
    DraftCache,
    accept_drawn,
    accept_likeliest,
    following,
    keeping,
)
from tiny_models import TINY, halting_model

LOOPS = 4
# A fresh model with tied embeddings repeats its last token, at any depth.
SIZES = TINY | {"max_loop_iters": LOOPS, "tie_embeddings": False}
KINDS: dict[str, dict[str, Any]] = {
    "mla": {"attn_type": "mla"},
    "gqa": {"attn_type": "gqa", "halting": "off"},
    "gqa, local heads": {"attn_type": "gqa", "alibi": 0.5, "previous_heads": 1, "initial_state": "prelude"},
    "mla, halting early": {"attn_type": "mla", "act_threshold": 0.5},
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 3]]


def small(seed: int = 0, **changes: Any) -> OpenMythos:
    return halting_model(SIZES | changes, seed)


def count(model: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Token positions that go through each way into the model."""
    seen: Counter[str] = Counter()

    def counting(name: str, own: Any) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any) -> Tensor:
            seen[name] += x.shape[1]
            return own(x, *args)

        return call

    for name in ("prelude", "step", "coda"):
        monkeypatch.setattr(model, name, counting(name, getattr(model, name)))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", [Draft(1, 1), Draft(1, 5), Draft(3, 2), Draft(2, 60)], ids=str)
def test_the_likeliest_tokens_are_those_of_plain_generation(kind: str, draft: Draft) -> None:
    model, report = small(**KINDS[kind]), exits.LoopReport()
    for prompts in (PROMPTS, PROMPTS[1:2]):
        plain = generate(model, prompts, 16, temperature=0)
        quick = generate(model, prompts, 16, temperature=0, speculate=draft, report=report)
        assert torch.equal(plain, quick)
    assert 0 < report.kept < report.drafted  # so that drafts ended early, and late


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_a_row_that_ends_inside_a_draft_ends_there(attn_type: str) -> None:
    model = small(attn_type=attn_type, pad_token_id=0)
    free = generate(model, PROMPTS, 16, temperature=0)[:, 6:]
    ends = {int(free[row, at]) for row, at in ((0, 3), (1, 7), (3, 12))}
    for eos in ends:
        plain = generate(model, PROMPTS, 16, temperature=0, eos_token_id=eos)
        quick = generate(model, PROMPTS, 16, temperature=0, eos_token_id=eos, speculate=Draft(3, 5))
        assert torch.equal(plain, quick)


@pytest.mark.parametrize("new", [0, 1, 2, 3, 7])
def test_never_more_tokens_than_were_asked_for(new: int) -> None:
    model = small()
    for prompts in (PROMPTS, [[1, 2]]):
        plain = generate(model, prompts, new, temperature=0)
        assert torch.equal(plain, generate(model, prompts, new, temperature=0, speculate=Draft(3, 4)))


def test_a_draft_does_not_reach_past_the_longest_sequence() -> None:
    model = small(max_seq_len=20)
    for prompts, new in ((PROMPTS, 15), ([[1, 2]], 19), ([[1] * 20], 1)):
        plain = generate(model, prompts, new, temperature=0)
        assert torch.equal(plain, generate(model, prompts, new, temperature=0, speculate=Draft(3, 6)))


def test_rows_that_keep_different_tokens_share_a_cache_of_the_plain_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    squeezed: list[int] = []
    own = DraftCache.squeeze

    def watched(cache: DraftCache) -> None:
        before = cache.length
        own(cache)
        squeezed.append(before - cache.length)

    monkeypatch.setattr(DraftCache, "squeeze", watched)
    model = small(1)
    prompts = [[i, 12 - i] for i in range(12)]
    plain = generate(model, prompts, 20, temperature=0)
    assert torch.equal(plain, generate(model, prompts, 20, temperature=0, speculate=Draft(2, 4)))
    assert max(squeezed) > 0  # columns that only refused tokens held


def test_masks_and_tensors_of_prompts() -> None:
    model, ids = small(), torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    plain = generate(model, ids, 20, temperature=0, attention_mask=mask)
    assert torch.equal(
        plain, generate(model, ids, 20, temperature=0, attention_mask=mask, speculate=Draft(2, 3))
    )


def test_a_stream_gives_the_same_columns_and_the_mode_back() -> None:
    model = small().train()
    whole = generate(model, PROMPTS, 12, temperature=0)[:, 6:]
    assert model.training
    columns = []
    for token in stream(model, PROMPTS, 12, temperature=0, speculate=Draft(3, 3)):
        assert model.training
        assert not token.is_inference()
        columns.append(token)
    assert torch.equal(torch.stack(columns, 1), whole)


def test_no_loop_of_a_drafted_token_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = small(), exits.LoopReport()
    seen = count(model, monkeypatch)
    generate(model, [[1, 2, 3]], 30, temperature=0, speculate=Draft(3, 4), report=report)
    fed = report.checks + report.drafted
    assert 0 < report.kept < report.drafted
    assert seen["prelude"] == 3 + fed
    assert seen["step"] == LOOPS * (3 + fed)
    assert seen["coda"] == 3 + report.drafted + fed  # once for each draft, once for each check
    assert report.to_dict()["drafts"] == {
        "checks": report.checks,
        "drafted": report.drafted,
        "kept": report.kept,
    }
    assert report.to_dict()["new"] == {"tokens": 29, "mean": LOOPS, "histogram": [0] * LOOPS + [29]}


RULES = {
    "never": exits.Never(),
    "fixed, deeper than the draft": exits.Fixed(3),
    "fixed, shallower than the draft": exits.Fixed(1),
    "act": exits.ACT(0.5),
    "state": exits.StateChange(0.45),
    "kl": exits.PredictionChange(3e-2),
    "kl by head, every second loop": exits.PredictionChange(1e-1, reads="head", every=2),
    "same": exits.SamePrediction(1),
    "top": exits.Confidence(0.22),
    "entropy": exits.Confidence(2.3, measure="entropy", every=2),
}


@pytest.mark.parametrize("rule", RULES)
def test_tokens_and_loops_under_an_exit_rule_are_those_of_the_rule_alone(rule: str) -> None:
    model = small(attn_type=("mla", "gqa")[list(RULES).index(rule) % 2], max_loop_iters=6)
    spread, settings = set(), {"temperature": 0, "exit": RULES[rule]}
    for prompts, draft in ((PROMPTS, Draft(3, 4)), (PROMPTS[1:2], Draft(2, 3))):
        alone, quick = exits.LoopReport(), exits.LoopReport()
        plain = generate(model, prompts, 14, **settings, report=alone)
        found = generate(model, prompts, 14, **settings, report=quick, speculate=draft)
        assert torch.equal(plain, found)
        for part in ("prompt", "new"):
            assert alone.to_dict()[part] == quick.to_dict()[part]
        spread |= {loops for loops, tokens in enumerate(alone.histogram("new")) if tokens}
    if rule not in ("never", "fixed, deeper than the draft", "fixed, shallower than the draft"):
        assert len(spread) > 1  # or the rule would have decided nothing


# Draws.


def test_every_sequence_has_exactly_the_probability_of_the_full_depth() -> None:
    vocab, tokens, generator = 3, 2, torch.Generator().manual_seed(0)
    starts = [start for size in range(tokens + 1) for start in itertools.product(range(vocab), repeat=size)]
    p, q = (
        {s: (2 * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(0) for s in starts}
        for _ in range(2)
    )
    found: dict[tuple[int, ...], float] = {}  # of each sequence that one check may give

    def add(sequence: tuple[int, ...], chance: Tensor, among: Tensor) -> None:
        for token, share in enumerate(among / among.sum()):
            key = (*sequence, token)
            found[key] = found.get(key, 0.0) + float(chance * share)

    for drafted in itertools.product(range(vocab), repeat=tokens):
        befores = [drafted[:i] for i in range(tokens + 1)]
        proposed = torch.stack([q[before] for before in befores[:-1]]).unsqueeze(0)
        wanted = torch.stack([p[before] for before in befores]).unsqueeze(0)
        keep = keeping(torch.tensor([drafted]), proposed, wanted)[0]
        chance = torch.stack(
            [q[before][token] for before, token in zip(befores, drafted, strict=False)]
        ).prod()
        for kept, before in enumerate(befores):
            among = following(torch.tensor([kept]), proposed, wanted)[0]
            add(before, chance * (1 - keep[kept] if kept < tokens else 1), among)
            chance = chance * keep[kept] if kept < tokens else chance
    # A shorter sequence is gone on with from p: what it is the start of has the rest of its probability.
    for sequence in itertools.product(range(vocab), repeat=tokens + 1):
        got = sum(
            found.get(sequence[: size + 1], 0.0)
            * float(
                torch.stack(
                    [p[sequence[:i]][sequence[i]] for i in range(size + 1, tokens + 1)] or [torch.ones(())]
                ).prod()
            )
            for size in range(tokens + 1)
        )
        exact = float(torch.stack([p[sequence[:i]][token] for i, token in enumerate(sequence)]).prod())
        assert abs(got - exact) < 1e-14
    assert abs(sum(found.values()) - 1) < 1e-14


def chi_square(seen: Tensor, wanted: Tensor) -> float:
    """Σ (seen − wanted)² / wanted, and its distance from the mean in standard deviations of that many cells."""
    cells = len(seen) - 1
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    return (statistic - cells) / (2 * cells) ** 0.5


def follow(kept: Tensor, after: Tensor, drafted: Tensor) -> Tensor:
    """The first two tokens of each row that one check gives, as one number; −1 where it gives only one."""
    first = torch.where(kept > 0, drafted[:, 0], after)
    second = torch.where(kept > 1, drafted[:, 1], after)
    return torch.where(kept > 0, first * 4 + second, -1)


def test_what_accept_drawn_keeps_has_the_wanted_distribution_and_a_wrong_rule_has_not() -> None:
    rows, generator = 40_000, torch.Generator().manual_seed(0)
    p = torch.randn(3, 4, generator=generator).softmax(-1)
    q = torch.randn(2, 4, generator=generator).softmax(-1)
    drafted = torch.stack([torch.multinomial(x, rows, True, generator=generator) for x in q], 1)
    kept, after = accept_drawn(drafted, q.expand(rows, -1, -1), p.expand(rows, -1, -1), generator)
    first = torch.where(kept > 0, drafted[:, 0], after)
    assert chi_square(first.bincount(minlength=4).float(), rows * p[0]) < 5
    pairs = follow(kept, after, drafted)
    long = pairs[pairs >= 0]
    # Whether there is a second token depends on the first alone.
    seconds = (long % 4).bincount(minlength=4).float()
    assert chi_square(seconds, len(long) * p[1]) < 5
    thirds = after[kept == 2].bincount(minlength=4).float()
    assert chi_square(thirds, float(thirds.sum()) * p[2]) < 5
    # Drawing from p where a token was refused, which looks natural, is wrong; the same test sees it.
    natural = torch.multinomial(p[0], rows, True, generator=generator)
    wrong = torch.where(kept > 0, drafted[:, 0], natural)
    assert chi_square(wrong.bincount(minlength=4).float(), rows * p[0]) > 20


def test_equal_distributions_keep_everything() -> None:
    p = torch.randn(5, 3, 7).softmax(-1)
    drafted = p[:, :2].argmax(-1)
    kept, _ = accept_drawn(drafted, p[:, :2], p, torch.Generator().manual_seed(0))
    assert kept.tolist() == [2] * 5


def test_a_token_that_the_full_depth_excludes_is_never_kept() -> None:
    q, p = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    for seed in range(50):
        kept, after = accept_drawn(torch.tensor([[0]]), q, p, torch.Generator().manual_seed(seed))
        assert (kept.item(), after.item()) == (0, 1)


def test_the_likeliest_are_kept_up_to_the_first_difference() -> None:
    logits = torch.eye(5)[torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])]
    kept, after = accept_likeliest(torch.tensor([[1, 2, 3], [1, 0, 3], [0, 2, 3]]), logits)
    assert kept.tolist() == [3, 1, 0]
    assert after.tolist() == [4, 2, 1]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.5, "top_p": 0.8}],
    ids=str,
)
def test_sampled_sequences_have_the_distribution_of_the_full_depth(sampling: dict[str, Any]) -> None:
    model, rows, new = small(2, vocab_size=4), 4000, 3
    settings = {"top_k": None, **sampling}
    ids = torch.tensor([[1, 2]])
    wanted = []
    for sequence in itertools.product(range(4), repeat=new):
        fed = torch.cat((ids, torch.tensor([sequence[:-1]])), 1)
        with torch.no_grad():
            chances = probabilities(model(fed)[0, 1:], **settings)
        wanted.append(float(chances.gather(1, torch.tensor(sequence).unsqueeze(1)).prod()))
    report = exits.LoopReport()
    out = generate(model, ids.repeat(rows, 1), new, seed=3, speculate=Draft(1, 2), report=report, **settings)
    assert 0.2 < report.kept / report.drafted < 0.95
    seen = (out[:, 2:] * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64).float()
    chances = torch.tensor(wanted)
    assert float(seen[chances == 0].sum()) == 0
    likely = chances * rows >= 5  # the usual bound under which the statistic is not chi-square
    cells = [torch.cat((x[likely], x[~likely].sum().view(1))) for x in (seen, chances * rows)]
    full = cells[1] > 0
    assert chi_square(cells[0][full], cells[1][full]) < 5
    # The draft's own distribution fails the same test.
    shallow = generate(model, ids.repeat(rows, 1), new, 1, seed=3, **settings)
    seen = (shallow[:, 2:] * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64).float()
    cells[0] = torch.cat((seen[likely], seen[~likely].sum().view(1)))
    assert chi_square(cells[0][full], cells[1][full]) > 20


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Draft(0, 4), "Draft.loops = 0 is not allowed"),
        (lambda: Draft(2, 0), "Draft.tokens = 0 is not allowed"),
        (lambda: Draft(True, 4), "Draft.loops = True is not allowed"),
        (lambda: Draft(2, 1.5), r"Draft.tokens = 1.5 is not allowed"),  # type: ignore[arg-type]
    ],
)
def test_drafts_that_are_refused(make: Callable[[], Draft], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"speculate": (2, 4)}, r"speculate = \(2, 4\) is not allowed: it must be a Draft"),
        (
            {},
            {"speculate": Draft(4, 2)},
            "Draft.loops = 4 is not allowed with n_loops = 4: it must be 1 to 3",
        ),
        ({}, {"speculate": Draft(1, 2), "n_loops": 1}, "speculate is not allowed with n_loops = 1"),
        ({}, {"speculate": Draft(1, 2), "cache_policy": LastLoop()}, r"cache_policy = LastLoop\(\) is not"),
        ({"halting": "average"}, {"speculate": Draft(1, 2)}, "halting = 'average' is not allowed"),
        ({}, {"speculate": Draft(1, 2), "exit": "never"}, "exit = 'never' is not allowed"),
    ],
)
def test_generations_that_cannot_be_drafted(
    changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(small(**changes), [[1, 2]], 4, **arguments)
