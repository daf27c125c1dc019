"""The cache as an object: trim, snapshot, select, bytes, growth, failure in the middle, plain dicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import EveryLoop, KVCache, LastLoop, MythosConfig, OpenMythos

S = 7
ATTENTION = ("gqa", "mla")


def build(attn_type: str = "mla", **changes: Any) -> OpenMythos:
    """A small float64 model."""
    sizes = {
        "vocab_size": 23, "dim": 24, "n_heads": 4, "n_kv_heads": 3, "max_seq_len": 64, "max_loop_iters": 6,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": attn_type, "kv_lora_rank": 6, "q_lora_rank": 10,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "n_experts": 5, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 7, "lora_rank": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**{**sizes, **changes})).double().eval()


def layout(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids (3, S) and the marks that go with them."""
    ids = torch.randint(0, 23, (3, S))
    if name == "left":
        return ids, {"attention_mask": torch.arange(S) >= torch.tensor([[0], [3], [6]])}
    if name == "packed":
        return ids, {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5] * 7, [0, 1, 0, 1, 4, 4, 0]])}
    return ids, {}


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def contents(cache: Any) -> Any:
    """A deep copy of everything a cache knows."""
    entries = cache.entries if isinstance(cache, KVCache) else cache
    copied = {slot: {name: t.clone() for name, t in entry.items()} for slot, entry in entries.items()}
    if not isinstance(cache, KVCache):
        return copied
    marks = None if cache.segments is None else cache.segments.tolist()
    return copied, marks, cache.packed, cache.length, cache.nbytes


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["plain", "left", "packed"])
@pytest.mark.parametrize("policy", [EveryLoop(), LastLoop()])
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_trim_and_redo_and_restore_give_the_same(attn_type: str, policy: Any, name: str) -> None:
    model = build(attn_type)
    ids, marks = layout(name)

    def feed(cache: KVCache, start: int, stop: int) -> Tensor:
        part = {key: mark[:, start:stop] for key, mark in marks.items()}
        return model(ids[:, start:stop], 3, cache, **part)

    cache = KVCache(policy)
    feed(cache, 0, 4)
    four = contents(cache)
    snapshot = cache.snapshot()
    first = feed(cache, 4, 7)
    after = contents(cache)
    cache.trim(4)
    same(contents(cache), four)
    same(feed(cache, 4, 7), first)
    for _ in range(2):
        cache.restore(snapshot)
        same(contents(cache), four)
        same(feed(cache, 4, 7), first)
        same(contents(cache), after)
    cache.trim(0)
    assert (len(cache), cache.nbytes, cache.entries, cache.segments, cache.packed) == (0, 0, {}, None, False)
    feed(cache, 0, 4)
    same(feed(cache, 4, 7), first)


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_selected_rows_continue_as_those_rows(attn_type: str) -> None:
    model = build(attn_type)
    ids, marks = layout("left")
    mask = marks["attention_mask"]
    rows = torch.tensor([2, 0, 0, 1])
    cache = KVCache(capacity=20)
    model(ids[:, :5], 3, cache, attention_mask=mask[:, :5])
    cache.select(rows)
    assert cache.batch_size == 4
    got = model(ids[rows, 5:], 3, cache, attention_mask=mask[rows, 5:])
    near(got, model(ids, 3, attention_mask=mask)[rows, 5:])


@contextmanager
def failing(model: OpenMythos) -> Iterator[None]:
    """The coda's feed-forward layer raises, after every slot of the cache has been written."""

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt("in the middle")

    handle = model.coda_layers[-1].ffn.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["cache", "capacity", "last loop", "dict", "masked"])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_a_failure_in_the_middle_leaves_the_cache_as_it_was(attn_type: str, past: int, kind: str) -> None:
    model = build(attn_type)
    ids, marks = layout("left" if kind == "masked" else "plain")
    cache: Any = {
        "dict": {},
        "capacity": KVCache(capacity=20),
        "last loop": KVCache(LastLoop()),
    }.get(kind, KVCache())
    if past:
        model(ids[:, :past], 4, cache, **{key: mark[:, :past] for key, mark in marks.items()})
    before = contents(cache)
    rest = {key: mark[:, past:] for key, mark in marks.items()}
    with failing(model), pytest.raises(KeyboardInterrupt):
        model(ids[:, past:], 4, cache, **rest)
    same(contents(cache), before)
    if kind != "last loop":
        near(model(ids[:, past:], 4, cache, **rest)[:, -1], model(ids, 4, **marks)[:, -1])


@torch.no_grad()
def test_a_snapshot_is_not_touched_by_later_calls() -> None:
    model = build()
    ids, _ = layout("plain")
    cache = KVCache(capacity=10)
    model(ids[:, :4], 2, cache)
    snapshot = cache.snapshot()
    kept = {slot: {name: t.clone() for name, t in entry.items()} for slot, entry in snapshot.entries.items()}
    cache.trim(2)
    model(ids[:, 4:], 2, cache)
    same(snapshot.entries, kept)
    cache.restore(snapshot)
    model(ids[:, 4:], 2, cache)
    same(snapshot.entries, kept)


# Sizes, growth, dtype.


@torch.no_grad()
def test_bytes_follow_the_formula_and_capacity_is_held_at_once() -> None:
    cfg = build().cfg
    ids, _ = layout("plain")
    for attn_type, width in (("mla", cfg.kv_lora_rank + cfg.qk_rope_head_dim), ("gqa", 2 * 3 * cfg.head_dim)):
        for policy, slots in ((EveryLoop(), 2 + 4), (LastLoop(), 2 + 1)):
            cache = KVCache(policy, capacity=20)
            model = build(attn_type)
            model(ids, 4, cache)
            found = {name: tuple(x.shape[2:]) for name, x in cache.entries["prelude_0"].items()}
            assert found == model.cfg.cached_shapes() == cfg.cached_shapes(attn_type)
            assert cache.nbytes == slots * 3 * S * width * 8
            assert cache.allocated_bytes == slots * 3 * 20 * width * 8
            held = {slot: entry.copy() for slot, entry in cache._buffers.items()}
            model(ids, 4, cache)
            assert all(cache._buffers[slot][name] is held[slot][name] for slot in held for name in held[slot])


@torch.no_grad()
def test_buffers_grow_by_half_and_keep_what_they_hold() -> None:
    model, cache, reference = build(), KVCache(), {}
    ids = torch.randint(0, 23, (2, 60))
    moves, last = 0, None
    for t in range(60):
        model(ids[:, t : t + 1], 1, cache)
        model(ids[:, t : t + 1], 1, reference)
        buffer = cache._buffers["prelude_0"]["latent"]
        moves, last = moves + (buffer is not last), buffer
    assert moves < 15
    same(cache.entries, reference)
    assert cache.allocated_bytes <= 1.6 * cache.nbytes


@torch.no_grad()
def test_a_dict_holds_no_more_than_its_tokens() -> None:
    """Its bytes are counted by published code, and its tensors may be moved or saved."""
    model, entries = build(), {}
    ids, _ = layout("plain")
    for column in range(4):
        model(ids[:, column : column + 1], 2, entries)
    for entry in entries.values():
        for tensor in entry.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_cache_filled_in_inference_mode_continues_outside_it() -> None:
    model, (ids, _) = build(), layout("plain")
    for capacity in (0, 20):
        cache = KVCache(capacity=capacity)
        with torch.inference_mode():
            model(ids[:, :3], 3, cache)
        with torch.no_grad():
            got = model(ids[:, 3:5], 3, cache)
        near(got, model(ids[:, :5], 3)[:, 3:].detach())
        model(ids[:, 5:], 3, cache).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_the_cache_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    for attn_type in ATTENTION:
        # All experts for every token: a choice among them may fall either way in low precision.
        model = build(attn_type, n_experts_per_tok=5, expert_dim=3).to(dtype)
        (ids, marks), cache = layout("left"), KVCache()
        full = model(ids, 3, **marks)
        assert full.dtype == dtype
        parts = [
            model(ids[:, a:b], 3, cache, attention_mask=marks["attention_mask"][:, a:b])
            for a, b in ((0, 4), (4, 7))
        ]
        assert {t.dtype for entry in cache.entries.values() for t in entry.values()} == {dtype}
        atol = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
        torch.testing.assert_close(parts[1][0], full[0, 4:], rtol=0, atol=atol)
