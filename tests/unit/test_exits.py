"""Exits: what each rule computes, one meaning on every path, compute that is saved, the report, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from open_mythos import EveryLoop, KVCache, LastLoop, OpenMythos
from open_mythos.inference import exits
from open_mythos.inference.exit_cache import ExitCache, Group
from open_mythos.inference.generate import generate, stream
from tiny_models import SMALL, halting_model

LOOPS = 6
SIZES = SMALL | {"dim": 32, "max_seq_len": 64, "max_loop_iters": LOOPS}


def random_gate() -> exits.Gate:
    torch.manual_seed(2)
    gate = exits.Gate(32, LOOPS - 1)
    torch.nn.init.normal_(gate.loop.weight)
    return gate.double().requires_grad_(False)


RULES = {
    "never": exits.Never(),
    "fixed": exits.Fixed(3),
    "act": exits.ACT(0.5),
    "state": exits.StateChange(0.26, min_loops=2),
    "learned": exits.Learned(random_gate(), 0.75),
    "kl": exits.PredictionChange(3e-2, max_loops=5),
    "kl by head, every second loop": exits.PredictionChange(1e-1, reads="head", every=2),
    "same": exits.SamePrediction(2),
    "top": exits.Confidence(0.35),
    "margin": exits.Confidence(0.2, measure="margin", min_loops=2),
    "entropy": exits.Confidence(2.0, measure="entropy", every=2),
}


def small(attn_type: str = "mla", **changes: object) -> OpenMythos:
    return halting_model({**SIZES, "attn_type": attn_type, **changes})


def text(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def near(a: exits.Answer, b: exits.Answer) -> None:
    assert torch.equal(a.loops, b.loops)
    assert float((a.logits - b.logits).abs().max()) <= 1e-12


def in_chunks(
    model: OpenMythos, ids: Tensor, rule: exits.Rule, sizes: list[int], dense: bool = False
) -> exits.Answer:
    cache, parts = ExitCache(), []
    parts += [exits.forward(model, chunk, rule, cache=cache, dense=dense) for chunk in ids.split(sizes, 1)]
    return exits.Answer(torch.cat([p.logits for p in parts], 1), torch.cat([p.loops for p in parts], 1))


@torch.no_grad()
def by_hand(model: OpenMythos, ids: Tensor, decided: Tensor) -> Tensor:
    """One row, token after token, with a plain cache, whole steps, and deeper slots filled by hand; loops given."""
    cache, out = KVCache(), []
    for i in range(ids.shape[1]):
        ctx = model.context(ids[:, i : i + 1], cache=cache)
        e = model.prelude(ids[:, i : i + 1], ctx)
        h, n = model.initial_state(e), int(decided[0, i])
        for t in range(n):
            h = model.step(h, e, t, ctx)
        if n < LOOPS:
            model.step(h, e, n, ctx)  # for what it shows there
        for t in range(n + 1, LOOPS):
            left = cache.entries[f"recurrent_loop_{n}"]
            cache.write(f"recurrent_loop_{t}", {name: tensor[:, i:].clone() for name, tensor in left.items()})
        out.append(model.coda(h, ctx))
        cache.commit(1, None)
    return torch.cat(out, 1)


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
@pytest.mark.parametrize("name", RULES)
def test_one_pass_chunks_and_single_tokens_give_the_same(attn_type: str, name: str) -> None:
    model, ids, rule = small(attn_type), text(), RULES[name]
    whole = exits.forward(model, ids, rule)
    near(exits.forward(model, ids, rule, dense=True), whole)
    near(exits.forward(model, ids, rule, cache=ExitCache()), whole)
    near(in_chunks(model, ids, rule, [5, 1, 8, 3]), whole)
    near(in_chunks(model, ids, rule, [6, 11], dense=True), whole)
    near(in_chunks(model, ids, rule, [1] * 17), whole)
    alone = exits.forward(model, ids[1:2], rule)  # nor does a row depend on its batch
    near(alone, exits.Answer(whole.logits[1:2], whole.loops[1:2]))
    if name not in ("never", "fixed"):
        assert len(whole.loops.unique()) > 1, "the rule must tell tokens apart here, or this test is empty"


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_paths_agree_where_attention_is_local(attn_type: str) -> None:
    model, ids = small(attn_type, previous_heads=1, alibi=0.7), text()
    for rule in (RULES["state"], RULES["top"]):
        whole = exits.forward(model, ids, rule)
        assert len(whole.loops.unique()) > 1, "the rule must tell tokens apart here, or this test is empty"
        near(exits.forward(model, ids, rule, dense=True), whole)
        near(in_chunks(model, ids, rule, [5, 1, 8, 3]), whole)
        near(in_chunks(model, ids, rule, [1] * 17), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_paths_agree_on_a_gpu(attn_type: str) -> None:
    model, ids = small(attn_type).cuda(), text().cuda()
    for rule in (RULES["state"], RULES["top"]):
        whole = exits.forward(model, ids, rule)
        near(exits.forward(model, ids, rule, dense=True), whole)
        near(in_chunks(model, ids, rule, [5, 1, 8, 3]), whole)
        near(in_chunks(model, ids, rule, [1] * 17), whole)


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_a_token_shows_deeper_loops_what_it_would_have_shown_in_the_next(attn_type: str) -> None:
    model, ids = small(attn_type), text(1)
    answer = exits.forward(model, ids, RULES["state"])
    assert float((by_hand(model, ids, answer.loops) - answer.logits).abs().max()) <= 1e-12


@pytest.mark.parametrize(
    "options", [{"halting": "off", "loop_embedding": True}, {"initial_state": "prelude"}]
)
def test_the_paths_agree_with_other_choices_of_the_model(options: dict[str, object]) -> None:
    model, ids = small(coda_layers=2, state_norm=True, **options), text()
    for rule in (exits.StateChange(0.2), exits.Confidence(0.3)):
        whole = exits.forward(model, ids, rule)
        near(in_chunks(model, ids, rule, [1] * 17), whole)
        assert len(whole.loops.unique()) > 1


def test_never_and_fixed_are_the_plain_model() -> None:
    model, ids = small(halting="off"), text()
    for rule, n_loops in ((exits.Never(), LOOPS), (exits.Fixed(3), 3), (exits.Never(max_loops=2), 2)):
        answer = exits.forward(model, ids, rule)
        assert torch.allclose(answer.logits, model(ids, n_loops), atol=1e-12)
        assert (answer.loops == n_loops).all()


def test_the_act_threshold_selects_what_the_model_selects() -> None:
    model, ids = (
        small(act_threshold=0.5),
        text(4, 1),
    )  # one token: later ones see other entries than without exits
    answer = exits.forward(model, ids, exits.ACT(0.5))
    assert torch.allclose(answer.logits, model(ids), atol=1e-12)
    assert len(answer.loops.unique()) > 1


def test_padding_and_documents_change_nothing() -> None:
    model, rule = small(), exits.StateChange(0.26)
    a, b = text(1, 9), text(2, 6)[1:]
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9)
    ids[0], ids[1, 3:], mask[1, :3] = a[0], b[0], 0
    padded = exits.forward(model, ids, rule, attention_mask=mask)
    alone = exits.forward(model, b, rule)
    near(alone, exits.Answer(padded.logits[1:, 3:], padded.loops[1:, 3:]))
    assert (padded.loops[1, :3] == 1).all()
    documents = torch.tensor([[0] * 9 + [1] * 6])
    packed = exits.forward(model, torch.cat((a, b), 1), rule, document_ids=documents)
    near(alone, exits.Answer(packed.logits[:, 9:], packed.loops[:, 9:]))


def test_last_loop_is_exact_in_one_call_and_an_approximation_after_it() -> None:
    model, ids, rule = small(), text(), RULES["state"]
    exact = exits.forward(model, ids, rule, cache=ExitCache(EveryLoop()))
    near(exits.forward(model, ids, rule, cache=ExitCache(LastLoop())), exact)
    batch = ExitCache(LastLoop())
    steps = [exits.forward(model, ids[:, i : i + 1], rule, cache=batch) for i in range(17)]
    single = ExitCache(LastLoop())
    alone = [exits.forward(model, ids[1:2, i : i + 1], rule, cache=single) for i in range(17)]
    for one, all_rows in zip(alone, steps, strict=True):  # still nobody depends on the batch
        near(one, exits.Answer(all_rows.logits[1:2], all_rows.loops[1:2]))
    assert sorted(batch.entries) == ["coda_0", "prelude_0", "recurrent"]
    error = float((torch.cat([s.logits for s in steps], 1) - exact.logits).abs().max())
    assert error > 1e-6


class _Counted:
    """Rows and tokens that each run of the looped block computes, its experts included."""

    def __init__(self, model: OpenMythos) -> None:
        self.seen: list[tuple[int, int]] = []
        self.model = model

    def __enter__(self) -> list[tuple[int, int]]:
        self.handle = self.model.recurrent.block.ffn.register_forward_pre_hook(
            lambda _, inputs: self.seen.append(tuple(inputs[0].shape[:2]))
        )
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_a_token_that_left_does_not_run_again() -> None:
    model, ids, rule = small(), text(4, 1), RULES["state"]
    with _Counted(model) as seen:
        answer = exits.forward(model, ids, rule, cache=ExitCache())
    assert len(seen) == int(answer.loops.max())
    assert sum(rows * width for rows, width in seen) == int(answer.loops.sum())
    with _Counted(model) as seen:
        answer = exits.forward(model, text(1), rule)
    assert sum(rows * width for rows, width in seen) == int(answer.loops.sum())
    with _Counted(model) as seen:
        exits.forward(model, text(), exits.Fixed(2))
    assert seen == [(3, 17)] * 2


def test_what_nobody_reads_is_not_stored() -> None:
    model, ids, cache = small(), text(), ExitCache()
    exits.forward(model, ids, exits.Fixed(2), cache=cache)
    assert "recurrent_loop_2" not in cache.entries
    plain = KVCache()
    model(ids, 2, plain)
    assert cache.nbytes == plain.nbytes
    exits.forward(model, ids[:, :1], exits.Never(), cache=cache)
    assert cache.slot_length(f"recurrent_loop_{LOOPS - 1}") == 18


def test_a_plain_call_goes_on_deeper_than_the_cached_tokens_ran() -> None:
    model, ids, cache = small(halting="off"), text(1), ExitCache()
    exits.forward(model, ids[:, :-1], exits.Fixed(2), cache=cache)
    assert model(ids[:, -1:], LOOPS, cache).isfinite().all()
    rule, cache = exits.StateChange(0.4), ExitCache()
    decided = exits.forward(model, ids[:, :-1], rule, cache=cache).loops
    assert len(decided.unique()) > 1, "the rule must tell tokens apart here"
    assert int(decided.max()) < LOOPS, "a token that ran all loops has nothing to show in the next"
    logits = model(ids[:, -1:], LOOPS, cache)
    decided = torch.cat((decided, torch.full_like(ids[:, :1], LOOPS)), 1)
    assert torch.allclose(by_hand(model, ids, decided)[:, -1:], logits, atol=1e-12)


def test_trim_select_and_failure_leave_the_cache_usable() -> None:
    model, ids, rule = small(), text(), RULES["top"]
    whole = exits.forward(model, ids, rule)
    cache = ExitCache()
    exits.forward(model, ids[:, :8], rule, cache=cache)
    exits.forward(model, ids[:, 3:9], rule, cache=cache)  # other tokens, to be forgotten
    cache.trim(8)
    cache.select(torch.tensor([2, 1, 0]))

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    handle = model.coda_layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        exits.forward(model, ids.flip(0)[:, 8:], rule, cache=cache)
    handle.remove()
    assert len(cache) == 8
    rest = exits.forward(model, ids.flip(0)[:, 8:], rule, cache=cache)
    near(rest, exits.Answer(whole.logits.flip(0)[:, 8:], whole.loops.flip(0)[:, 8:]))


def seen_with(model: OpenMythos, states: Tensor) -> Iterator[exits.Seen]:
    """States (T, 1, S, D) as rules see them, with the head as the prediction."""
    group, memory = Group.whole(states[0]), {}
    for t in range(1, len(states)):
        yield exits.Seen(t, states[t], states[t - 1], group, model, lambda: torch.empty(0), memory)


def test_rules_compute_what_they_say() -> None:
    model, states = small(), torch.randn(4, 1, 50, 32, dtype=torch.float64)
    states[2:] = states[1] + 0.3 * torch.randn(2, 1, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        logs = model.head(model.norm(states)).log_softmax(-1)
        p = model.recurrent.act(states)
        act = [exits.ACT(0.4).leaves(seen) for seen in seen_with(model, states)]
        # One rule object serves all calls: what a call remembers is its own.
        rules = {
            "state": exits.StateChange(0.41),
            "kl": exits.PredictionChange(0.03, reads="head"),
            "same": exits.SamePrediction(2, reads="head"),
            "top": exits.Confidence(0.3, reads="head"),
            "margin": exits.Confidence(0.1, measure="margin", reads="head"),
            "entropy": exits.Confidence(2.5, measure="entropy", reads="head"),
        }
        got = {name: [rule.leaves(seen) for seen in seen_with(model, states)] for name, rule in rules.items()}
    chances = logs.exp().sort(-1, descending=True).values
    for i, t in enumerate(range(1, 4)):
        left = torch.stack([1 - p[s] for s in range(1, t + 1)]).prod(0)
        moved = (states[t] - states[t - 1]).norm(dim=-1) / states[t].norm(dim=-1)
        kl = (logs[t - 1].exp() * (logs[t - 1] - logs[t])).sum(-1)
        tokens = logs.argmax(-1)
        none = torch.zeros_like(act[0])
        wanted = {
            "state": moved <= 0.41,
            "kl": kl <= 0.03 if i else none,
            "same": (tokens[t] == tokens[t - 1]) & (tokens[t - 1] == tokens[t - 2]) if i == 2 else none,
            "top": chances[t, ..., 0] >= 0.3,
            "margin": chances[t, ..., 0] - chances[t, ..., 1] >= 0.1,
            "entropy": -(logs[t].exp() * logs[t]).sum(-1) <= 2.5,
        }
        assert torch.equal(act[i], 1 - left >= 0.4)
        for name, expected in wanted.items():
            assert torch.equal(got[name][i], expected), name
    counts = {name: int(answers[-1].sum()) for name, answers in got.items()}
    assert all(0 < count < 50 for count in counts.values()), f"{counts}"


@pytest.mark.parametrize("dense", [False, True])
def test_min_loops_max_loops_and_every_are_kept(dense: bool) -> None:
    model, ids = small(), text()
    for rule, allowed in (
        (exits.StateChange(10.0, min_loops=3), {3}),
        (exits.ACT(0.5, min_loops=2, max_loops=4), {2, 3, 4}),
        (exits.Confidence(1e-9, every=4), {4}),
        (exits.PredictionChange(100.0, min_loops=4), {4}),
        (exits.PredictionChange(100.0), {2}),
        (exits.PredictionChange(100.0, every=2), {4}),
        (exits.SamePrediction(1, min_loops=3, max_loops=3), {3}),
    ):
        loops = exits.forward(model, ids, rule, dense=dense).loops
        assert set(loops.unique().tolist()) == allowed, rule
    assert (exits.forward(model, ids, exits.Never(max_loops=5), 3).loops == 3).all()


def test_the_coda_is_asked_only_where_it_counts() -> None:
    model, ids = small(), text()
    asked: list[int] = []
    handle = model.norm.register_forward_pre_hook(lambda *_: asked.append(1))
    exits.forward(model, ids, exits.Confidence(1.0, min_loops=3, every=2))  # asked after loop 4
    handle.remove()
    assert len(asked) == 2  # and the answer itself


def test_generate_counts_loops_and_equals_a_plain_greedy_loop() -> None:
    model, ids, rule = small(), text(), RULES["top"]
    report = exits.LoopReport()
    got = generate(model, ids, 6, temperature=0, exit=rule, report=report)
    fed, spent = ids, []
    for _ in range(6):
        answer = exits.forward(model, fed, rule)
        fed = torch.cat((fed, answer.logits[:, -1].argmax(-1, keepdim=True)), 1)
        spent = answer.loops
    assert torch.equal(got, fed)
    assert torch.equal(torch.tensor(report.histogram("prompt")), spent[:, :17].flatten().bincount())
    assert torch.equal(torch.tensor(report.histogram("new")), spent[:, 17:].flatten().bincount())
    record = report.to_dict()
    assert record["new"]["tokens"] == 15
    assert record["new"]["mean"] == report.mean("new") == float(spent[:, 17:].double().mean())
    assert torch.equal(model.generate(ids, 6, temperature=0, exit=rule), got)
    assert torch.equal(torch.stack(list(stream(model, ids, 6, temperature=0, exit=rule)), 1), got[:, 17:])


def test_generate_with_unequal_prompts_and_finished_rows() -> None:
    model, rule = small(), RULES["state"]
    prompts = [text(1, 9)[0].tolist(), text(2, 4)[1].tolist()]
    report = exits.LoopReport()
    both = generate(model, prompts, 5, temperature=0, exit=rule, report=report)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 5, temperature=0, exit=rule)
        assert torch.equal(alone[0, len(prompt) :], both[row, 9:])
    assert report.to_dict()["prompt"]["tokens"] == 13
    stopped = exits.LoopReport()
    end = int(both[0, 10])
    assert end not in both[1, 9:]
    out = generate(model, prompts, 5, temperature=0, eos_token_id=end, exit=rule, report=stopped)
    assert torch.equal(out[1], both[1])
    assert stopped.to_dict()["new"]["tokens"] == 4 + (1 if int(both[0, 9]) != end else 0)


def test_report_of_nothing() -> None:
    report = exits.LoopReport()
    assert math.isnan(report.mean("new"))
    assert report.to_dict()["new"] == {"tokens": 0, "mean": None, "histogram": []}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exits.Fixed(0), "loops = 0 is not allowed"),
        (lambda: exits.Fixed(True), "loops = True is not allowed"),
        (lambda: exits.Never(min_loops=0), "min_loops = 0"),
        (lambda: exits.Never(min_loops=3, max_loops=2), "max_loops = 2 .* at least min_loops"),
        (lambda: exits.ACT(0), "threshold = 0 .* above 0 and at most 1"),
        (lambda: exits.ACT(1.5), "threshold = 1.5"),
        (lambda: exits.StateChange(-1), "tolerance = -1"),
        (lambda: exits.StateChange(math.inf), "tolerance = inf"),
        (lambda: exits.StateChange("a"), "tolerance = 'a'"),
        (lambda: exits.PredictionChange(0.1, reads="tail"), "reads = 'tail'"),
        (lambda: exits.PredictionChange(math.nan), "tolerance = nan"),
        (lambda: exits.SamePrediction(0), "patience = 0"),
        (lambda: exits.Confidence(0.5, measure="hope"), "measure = 'hope'"),
        (lambda: exits.Confidence(2.0), "threshold = 2.0"),
        (lambda: exits.Confidence(0.5, every=0), "every = 0"),
    ],
)
def test_rules_refuse_bad_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_calls_refuse_what_does_not_fit() -> None:
    model, ids = small(), text()
    with pytest.raises(ValueError, match="exit = 'never' is not allowed"):
        exits.forward(model, ids, "never")
    with pytest.raises(ValueError, match="n_loops = 0"):
        exits.forward(model, ids, exits.Never(), 0)
    with pytest.raises(ValueError, match="must be an ExitCache"):
        exits.forward(model, ids, exits.Never(), cache=KVCache())
    with pytest.raises(ValueError, match="idle must be bool"):
        exits.forward(model, ids, exits.Never(), idle=ids)
    with pytest.raises(ValueError, match="never learned"):
        exits.forward(small(halting="off"), ids, exits.ACT())
    with pytest.raises(ValueError, match="'average' is not allowed"):
        exits.forward(small(halting="average"), ids, exits.Never())
    with pytest.raises(ValueError, match="report is only counted with an exit rule"):
        generate(model, ids, 2, report=exits.LoopReport())
    with pytest.raises(ValueError, match="exit = 3 is not allowed"):
        generate(model, ids, 2, exit=3)
    with pytest.raises(ValueError, match="must be an ExitCache"):
        exits.think(model, model.prelude(ids), model.context(ids), exits.Never(), 3)


def test_the_gate_learns_what_further_loops_gain() -> None:
    model = small()
    model.float()
    batches = [{"ids": text(4, 32)}, {"ids": text(4, 32).flip(1)}]
    gate = exits.fit(model, batches, LOOPS, steps=100)
    again = exits.fit(model, batches, LOOPS, steps=100)
    assert all(torch.equal(a, b) for a, b in zip(gate.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in gate.parameters())
    ids, found, true = text(4, 32), [], []
    with torch.no_grad():
        e = model.prelude(ids)
        states = [model.initial_state(e)]
        for t in range(LOOPS):
            states.append(model.step(states[-1], e, t))
        logs = [model.coda(h).log_softmax(-1) for h in states[1:]]
        left = [(logs[-1].exp() * (logs[-1] - log)).sum(-1) for log in logs]
        for t in range(1, LOOPS):
            gains = [(left[t - 1] - left[k - 1]) / (k - t) for k in range(t + 1, LOOPS + 1)]
            true.append(torch.stack(gains).amax(0).clamp(min=1e-4))
            found.append(gate(states[t], states[t - 1], t))
    found, true = torch.stack(found), torch.stack(true)
    assert 0.5 < float(found.mean() / true.mean()) < 2
    within = [
        float(torch.corrcoef(torch.stack((f, g)).flatten(1).log())[0, 1])
        for f, g in zip(found, true, strict=True)
    ]
    assert min(within) > 0.3, f"{within}"


def test_gates_refuse_what_does_not_fit() -> None:
    model, ids = small(), text()
    with pytest.raises(ValueError, match="depth = 1 is not allowed"):
        exits.fit(model, [{"ids": ids}], 1)
    with pytest.raises(ValueError, match="batches is empty"):
        exits.fit(model, [], 4)
    with pytest.raises(ValueError, match="gate = None is not allowed"):
        exits.Learned(None, 0.1)
    with pytest.raises(ValueError, match="price = 0 is not allowed"):
        exits.Learned(random_gate(), 0)
    with pytest.raises(ValueError, match="fitted for dim = 8, but this model has dim = 32"):
        exits.forward(model, ids, exits.Learned(exits.Gate(8, 4), 0.1))


def test_a_cache_begun_under_another_rule_is_refused() -> None:
    model, ids, cache = small(), text(), ExitCache()
    exits.forward(model, ids, exits.Never(), cache=cache)
    with pytest.raises(ValueError, match="ran under another exit rule"):
        exits.forward(model, ids[:, :1], exits.Confidence(0.9), cache=cache)
    assert len(cache) == 17


def test_a_rule_of_ones_own_is_checked() -> None:
    class Odd(exits.Rule):
        def leaves(self, seen: exits.Seen) -> Tensor:
            return seen.state.sum(-1)

    with pytest.raises(ValueError, match=r"Odd\.leaves must return bool of shape"):
        exits.forward(small(), text(), Odd())
