"""Every way to compute the same thing computes the same thing: float64, at most 1e-12 apart.

Cached decode, chunked prefill and the full forward; padded and alone; packed and alone; absorbed and expanded
MLA. The references here share no cache code with the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import EveryLoop, KVCache, LastLoop, MLAttention, MythosConfig, OpenMythos
from open_mythos.model.attention import distance_penalty
from open_mythos.model.cache import CacheError

ATOL = 1e-12
S = 7
LENGTHS = (7, 4, 1)
LOOPS = (1, 4, 16)
ATTENTION = ("gqa", "mla")
LAYOUTS = ("plain", "left", "right", "packed", "packed+left")


def build(attn_type: str = "mla", seed: int = 0, **changes: Any) -> OpenMythos:
    """A small float64 model in which nothing is zero by initialisation."""
    cfg = MythosConfig(
        **{
            "vocab_size": 23,
            "dim": 24,
            "n_heads": 4,
            "n_kv_heads": 3,
            "max_seq_len": 64,
            "max_loop_iters": 6,
            "prelude_layers": 1,
            "coda_layers": 1,
            "attn_type": attn_type,
            "kv_lora_rank": 6,
            "q_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
            "n_experts": 5,
            "n_shared_experts": 1,
            "n_experts_per_tok": 2,
            "expert_dim": 7,
            "lora_rank": 3,
            "act_threshold": 0.8,
            "halt_bias_init": -1.5,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = OpenMythos(cfg).double().eval()
    recurrent = model.recurrent
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        recurrent.act.halt.weight.normal_(std=0.4)
        recurrent.block.ffn.router_bias.normal_(std=0.3)  # type: ignore[union-attr]
        if recurrent.lora is not None:
            recurrent.lora.B.normal_(std=0.3)
            recurrent.lora.scale.weight.normal_()
    return model


def layout(name: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Ids (3, S), the marks that go with them, and where the logits count."""
    ids = torch.randint(0, 23, (len(LENGTHS), S))
    real = torch.ones_like(ids, dtype=torch.bool)
    marks: dict[str, Tensor] = {}
    for row, length in enumerate(LENGTHS):
        if "left" in name:
            real[row, : S - length] = False
        elif name == "right":
            real[row, length:] = False
    if "left" in name or name == "right":
        marks["attention_mask"] = real.long()
    if "packed" in name:
        marks["document_ids"] = torch.tensor(
            [[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5], [0, 1, 0, 1, 4, 4, 0]][: len(LENGTHS)]
        )
    return ids, marks, real


def chunked(
    model: OpenMythos, ids: Tensor, cuts: Sequence[int], n_loops: int, cache: Any, **marks: Tensor
) -> Tensor:
    """Logits of all positions, fed in pieces that end at each cut."""
    out, start = [], 0
    for cut in (*cuts, ids.shape[1]):
        part = {name: mark[:, start:cut] for name, mark in marks.items()}
        out.append(model(ids[:, start:cut], n_loops, cache, **part))
        start = cut
    return torch.cat(out, 1)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("n_loops", LOOPS)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_decode_and_every_chunking_equal_the_full_forward(attn_type: str, n_loops: int, name: str) -> None:
    model = build(attn_type)
    ids, marks, real = layout(name)
    full = model(ids, n_loops, **marks)
    splits: list[tuple[int, ...]] = [(cut,) for cut in range(1, S)]
    splits += [(2, 5), (1, 3, 4), tuple(range(1, S))]
    for cuts in splits:
        cache = KVCache(capacity=3 if len(cuts) == 2 else 0)
        near(chunked(model, ids, cuts, n_loops, cache, **marks)[real], full[real])
        assert len(cache) == S
    if not marks:
        for cuts in ((), (3,), tuple(range(1, S))):
            near(chunked(model, ids, cuts, n_loops, {}), full)


@pytest.mark.parametrize("name", ["left", "right"])
@pytest.mark.parametrize("n_loops", LOOPS)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(attn_type: str, n_loops: int, name: str) -> None:
    model = build(attn_type)
    ids, marks, real = layout(name)
    full = model(ids, n_loops, **marks)
    for row in range(len(LENGTHS)):
        near(full[row, real[row]], model(ids[row, real[row]].unsqueeze(0), n_loops)[0])


@pytest.mark.parametrize("name", ["packed", "packed+left"])
@pytest.mark.parametrize("n_loops", LOOPS)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_a_packed_document_equals_the_document_alone(attn_type: str, n_loops: int, name: str) -> None:
    """Also a document whose tokens are not next to each other."""
    model = build(attn_type)
    ids, marks, real = layout(name)
    full = model(ids, n_loops, **marks)
    for row in range(len(LENGTHS)):
        for document in marks["document_ids"][row].unique():
            own = (marks["document_ids"][row] == document) & real[row]
            if own.any():
                near(full[row, own], model(ids[row, own].unsqueeze(0), n_loops)[0])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_scores_that_fall_with_distance_fall_alike_however_tokens_are_fed(attn_type: str, name: str) -> None:
    model, plain = build(attn_type, alibi=0.7, previous_heads=1), build(attn_type)
    ids, marks, real = layout(name)
    full = model(ids, 4, **marks)
    assert (full - plain(ids, 4, **marks))[real].abs().max() > 1e-3
    for cuts in ((4,), (2, 5), tuple(range(1, S))):
        near(chunked(model, ids, cuts, 4, KVCache(), **marks)[real], full[real])
    documents = marks.get("document_ids", torch.zeros_like(ids))
    for row in range(len(LENGTHS)):
        for document in documents[row].unique():
            own = (documents[row] == document) & real[row]
            if own.any():
                near(full[row, own], model(ids[row, own].unsqueeze(0), 4)[0])


def test_the_distance_penalty_is_slope_times_distance() -> None:
    got = distance_penalty(None, 2, 3, torch.tensor([1.0, 0.25]))
    for head, slope in enumerate((1.0, 0.25)):
        for query in range(3):
            for key in range(5):
                distance = query + 2 - key
                assert got[0, head, query, key] == (-slope * distance if distance >= 0 else -torch.inf)


def test_heads_for_the_token_before_see_nothing_else() -> None:
    mask = torch.tensor(
        [[True, False, False, False], [True, True, False, False], [False, False, True, False]]
    )
    got = distance_penalty(mask.view(1, 1, 3, 4), 1, 3, torch.tensor([1.0]), previous=2)
    assert got.shape == (1, 3, 3, 4)
    assert (got[0, 0] == got[0, 1]).all()
    assert [row.nonzero().flatten().tolist() for row in got[0, 0] == 0] == [[0], [0], [2]]
    assert (got[0, 0] <= 0).all()
    torch.testing.assert_close(got[:, 2:], distance_penalty(mask.view(1, 1, 3, 4), 1, 3, torch.tensor([1.0])))


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_what_padding_holds_changes_nothing(attn_type: str) -> None:
    model = build(attn_type)
    ids, marks, real = layout("left")
    other = torch.where(real, ids, (ids + 1) % 23)
    near(model(ids, 4, **marks)[real], model(other, 4, **marks)[real])
    assert not torch.equal(model(ids, 4)[:, -1], model(other, 4)[:, -1])


@torch.no_grad()
def test_the_models_here_halt_at_many_loops() -> None:
    """Otherwise the tests above would say nothing about halting."""
    model, chosen = build(), []
    ids, _, _ = layout("plain")
    ctx = model.context(ids)
    e = model.prelude(ids, ctx)
    h, states = model.initial_state(e), []
    for t in range(16):
        h = model.step(h, e, t, ctx)
        states.append(h)
    out = model.think(model.initial_state(e), e, ctx, range(16))
    chosen = torch.stack([(out == s).all(-1) for s in states]).long().argmax(0)
    assert len(chosen.unique()) >= 4


@pytest.mark.parametrize(
    "changes",
    [
        {"halting": "off"},
        {"halting": "average"},
        {"halting": "upstream", "loop_embedding": True, "block_output": "state", "initial_state": "prelude"},
        {"initial_state": "random", "state_norm": True, "qk_norm": False, "input_norm": False},
        {
            "prelude_layers": 0,
            "coda_layers": 0,
            "lora_rank": 0,
            "tie_embeddings": False,
            "n_shared_experts": 0,
        },
        {"prelude_layers": 2, "coda_layers": 3, "n_kv_heads": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_decode_equals_forward_under_every_choice(attn_type: str, changes: dict[str, Any]) -> None:
    model = build(attn_type, **changes)
    ids, marks, real = layout("left")
    full = model(ids, 8, **marks)
    for cuts in ((3,), tuple(range(1, S))):
        near(chunked(model, ids, cuts, 8, KVCache(), **marks)[real], full[real])


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_cached_past_is_a_constant_to_the_gradient(attn_type: str) -> None:
    """A prefill with gradients enabled leaves the same gradient as one without."""
    ids, _, _ = layout("plain")
    grads = []
    for enabled in (True, False):
        model, cache = build(attn_type), KVCache()
        with torch.set_grad_enabled(enabled):
            model(ids[:, :4], 2, cache)
        model(ids[:, 4:], 2, cache).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert sum(grad is not None and bool(grad.abs().max() > 1e-6) for grad in grads[0]) > 20
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=ATOL)


# Mixed depth.


class Slow:
    """The model without any KV cache: past tokens are kept as each layer's normalised input.

    Feeding an attention layer those inputs again rebuilds their keys and values. With ``every_loop`` one set
    is kept for each loop; otherwise the looped layer keeps its last loop's only.
    """

    def __init__(self, model: OpenMythos, every_loop: bool) -> None:
        self.model, self.every_loop = model, every_loop
        self.kept: dict[str, Tensor] = {}
        self.done = 0

    def layer(self, block: Any, x: Tensor, slot: str) -> Tensor:
        normed = block.attn_norm(x)
        seen = torch.cat((self.kept[slot], normed), 1) if slot in self.kept else normed
        self.fresh[slot] = seen
        x = x + block.attn(seen, self.ctx, "")[:, -x.shape[1] :]
        return x + block.ffn(block.ffn_norm(x))

    def loop(self, h: Tensor, e: Tensor, t: int) -> Tensor:
        core: Any = self.model.recurrent
        x = core.norm(h + e)
        y = self.layer(core.block, x, f"loop {t}" if self.every_loop else "loop")
        scale = core.lora.scale.weight[min(t, self.model.cfg.max_loop_iters - 1)]
        update = y - x + (core.lora.down(y) * scale) @ core.lora.B
        return core.injection.get_A() * h + core.injection.B * e + update

    def select(self, states: list[Tensor]) -> Tensor:
        """Token by token: the first state by which the chance to have halted has reached the threshold."""
        act, out = self.model.recurrent.act, states[-1].clone()
        for row, column in itertools.product(range(out.shape[0]), range(out.shape[1])):
            going = 1.0
            for state in states:
                token = state[row, column]
                going *= 1 - float(torch.sigmoid(token @ act.halt.weight[0] + act.halt.bias[0]))
                if 1 - going >= self.model.cfg.act_threshold:
                    out[row, column] = token
                    break
        return out

    def __call__(self, ids: Tensor, n_loops: int) -> Tensor:
        model = self.model
        self.done += ids.shape[1]
        self.ctx = model.context(torch.zeros(ids.shape[0], self.done))
        self.fresh: dict[str, Tensor] = {}
        e = model.embed(ids) * model.cfg.dim**0.5
        for i, block in enumerate(model.prelude_layers):
            e = self.layer(block, e, f"prelude {i}")
        e = model.input_norm(e)
        states = [torch.zeros_like(e)]
        for t in range(n_loops):
            states.append(self.loop(states[-1], e, t))
        h = states[-1] if model.cfg.halting == "off" else self.select(states[1:])
        for i, block in enumerate(model.coda_layers):
            h = self.layer(block, h, f"coda {i}")
        self.kept.update(self.fresh)
        return model.head(model.norm(h))


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_the_reference_is_the_model(attn_type: str) -> None:
    model = build(attn_type)
    ids, _, _ = layout("plain")
    near(Slow(model, True)(ids, 9), model(ids, 9))


@pytest.mark.parametrize("loops", [(16, 4), (4, 4, 1), (5, 3, 3, 2), (4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_decoding_at_fewer_loops_is_exact(attn_type: str, loops: tuple[int, ...]) -> None:
    """Each token has its own depth; at each of its loops it sees the others as they were at that loop."""
    model = build(attn_type)
    ids, _, _ = layout("plain")
    cuts = (0, *range(S - len(loops) + 1, S + 1))
    chunks = [ids[:, a:b] for a, b in itertools.pairwise(cuts)]
    cache, entries, slow = KVCache(), {}, Slow(model, True)
    for chunk, n_loops in zip(chunks, loops, strict=True):
        expected = slow(chunk, n_loops)
        near(model(chunk, n_loops, cache), expected)
        near(model(chunk, n_loops, entries), expected)


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_mixed_depth_is_the_last_token_taken_at_its_own_depth(attn_type: str) -> None:
    """The same through prelude, step and coda alone: states of two depths meet before the coda."""
    model = build(attn_type, halting="off")
    ids, _, _ = layout("plain")
    ctx = model.context(ids)
    e = model.prelude(ids, ctx)
    h, states = model.initial_state(e), []
    for t in range(9):
        h = model.step(h, e, t, ctx)
        states.append(h)
    mixed = torch.cat((states[8][:, :-1], states[2][:, -1:]), 1)
    cache = KVCache()
    model(ids[:, :-1], 9, cache)
    near(model(ids[:, -1:], 3, cache), model.coda(mixed, ctx)[:, -1:])


def size(cache: Any) -> dict[str, list[torch.Size]]:
    entries = cache.entries if isinstance(cache, KVCache) else cache
    return {slot: [tensor.shape for tensor in entry.values()] for slot, entry in entries.items()}


@pytest.mark.parametrize("kind", ["cache", "dict"])
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_more_loops_than_the_cache_holds_is_refused(attn_type: str, kind: str) -> None:
    model = build(attn_type)
    ids, _, _ = layout("plain")
    cache: Any = KVCache() if kind == "cache" else {}
    model(ids[:, :3], 2, cache)
    before = size(cache)
    with pytest.raises(CacheError, match=r"n_loops = 4 .*holds 3 tokens.*at most 2 loops"):
        model(ids[:, 3:4], 4, cache)
    assert size(cache) == before
    model(ids[:, 3:4], 1, cache)
    with pytest.raises(CacheError, match=r"n_loops = 2 .*loop 2 of only 3.*at most 1 loops"):
        model(ids[:, 4:5], 2, cache)
    if isinstance(cache, KVCache):
        cache.trim(3)
        near(model(ids[:, 3:5], 2, cache), model(ids[:, :5], 2)[:, 3:])


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_last_loop_is_exact_in_one_call_and_its_own_rule_after(attn_type: str) -> None:
    model = build(attn_type)
    ids, _, _ = layout("plain")
    cache = KVCache(LastLoop())
    near(model(ids, 5, cache), model(ids, 5))
    for loops in [(5, 5, 5), (2, 6, 1), (16, 4, 16)]:
        cache, slow, exact = KVCache(LastLoop()), Slow(model, False), Slow(model, True)
        for chunk, n_loops in zip((ids[:, :4], ids[:, 4:6], ids[:, 6:]), loops, strict=True):
            logits = model(chunk, n_loops, cache)
            near(logits, slow(chunk, n_loops))
            if loops == (5, 5, 5):
                off = (logits - exact(chunk, n_loops)).abs().max()
                assert off < ATOL if chunk.shape[1] == 4 else off > 1e-3, "the approximation should show here"


# Generation.


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_padded_greedy_generation_equals_unpadded(attn_type: str) -> None:
    """100 random prompts; alone means in a batch of equal lengths, where nothing is padded."""
    model = build(attn_type, seed=3)
    prompts = [torch.randint(0, 23, (1 + i % 9,)) for i in range(100)]
    settings: dict[str, Any] = {"max_new_tokens": 6, "n_loops": 3, "temperature": 0}
    alone: dict[int, list[int]] = {}
    for length in range(1, 10):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = model.generate(torch.stack([prompts[i] for i in rows]), **settings)
        alone.update({i: batch[j, length:].tolist() for j, i in enumerate(rows)})
    assert len({tuple(tokens) for tokens in alone.values()}) > 20
    as_list = model.generate([prompt.tolist() for prompt in prompts], **settings)[:, 9:]
    assert as_list.tolist() == [alone[i] for i in range(100)]
    for side in ("left", "right"):
        ids, mask = torch.full((100, 9), 7), torch.zeros(100, 9)
        for i, prompt in enumerate(prompts):
            place = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
            ids[i, place], mask[i, place] = prompt, 1
        out = model.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(out[:, :9], ids)
        assert out[:, 9:].tolist() == [alone[i] for i in range(100)]


@pytest.mark.parametrize("policy", [None, EveryLoop()])
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_greedy_generation_equals_full_forwards(attn_type: str, policy: Any) -> None:
    model = build(attn_type)
    ids = torch.randint(0, 23, (3, 4))
    out = model.generate(ids, max_new_tokens=8, n_loops=5, temperature=0, cache_policy=policy)
    for _ in range(8):
        ids = torch.cat((ids, model(ids, 5)[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, ids)


# MLA's two cores.


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_absorbed_and_expanded_mla_agree(monkeypatch: pytest.MonkeyPatch, new: int, name: str) -> None:
    model = build("mla")
    ids, marks, real = layout(name)
    out, taken = {}, []
    for core in ("_attend_absorbed", "_attend_expanded"):
        original = getattr(MLAttention, core)

        def watch(self: Any, *args: Any, original: Any = original, core: str = core) -> Tensor:
            taken.append(core)
            return original(self, *args)

        monkeypatch.setattr(MLAttention, core, watch)
    for absorb in (True, False):
        monkeypatch.setattr(MLAttention, "_absorbing_pays", lambda *_, absorb=absorb: absorb)
        cache = KVCache()
        part = {key: mark[:, : S - new] for key, mark in marks.items()}
        model(ids[:, : S - new], 4, cache, **part)
        taken.clear()
        part = {key: mark[:, S - new :] for key, mark in marks.items()}
        out[absorb] = model(ids[:, S - new :], 4, cache, **part)[real[:, S - new :]]
        assert set(taken) == {"_attend_absorbed" if absorb else "_attend_expanded"}
    near(out[True], out[False])


def test_one_new_token_is_absorbed_and_a_long_prefill_is_not() -> None:
    attn = MLAttention(MythosConfig())
    assert attn._absorbing_pays(1, 1024)
    assert not attn._absorbing_pays(1024, 2048)
