"""The names, signatures and hooks that published code relies on."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import open_mythos
import open_mythos.main as door
from open_mythos import KVCache, LastLoop
from open_mythos.main import ACTHalting, MoEFFN, MythosConfig, OpenMythos
from open_mythos.reproduce.articles import CHAIN_MODELS

UPSTREAM_FIELDS = {
    "vocab_size": 32000, "dim": 2048, "n_heads": 16, "n_kv_heads": 4, "max_seq_len": 4096,
    "max_loop_iters": 16, "prelude_layers": 2, "coda_layers": 2, "attn_type": "mla",
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "n_experts": 64, "n_shared_experts": 2, "n_experts_per_tok": 4,
    "expert_dim": 512, "act_threshold": 0.99, "rope_theta": 500000.0, "lora_rank": 16,
    "max_output_tokens": 4096, "dropout": 0.0,
}  # fmt: skip


def build(attn_type: str = "mla", **changes: Any) -> OpenMythos:
    """The model of the digit-chain tutorial, with room for more tokens."""
    fields = {**CHAIN_MODELS["mla"], "attn_type": attn_type, "n_kv_heads": 2, "max_seq_len": 128}
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**{**fields, **changes}))


def footprint(kv: dict[str, dict[str, Tensor]]) -> int:
    """The tutorials' formula."""
    return sum(t.element_size() * t.numel() for entry in kv.values() for t in entry.values())


def test_the_door_has_every_class_and_function_of_the_public_release() -> None:
    names = [
        "ACTHalting", "Expert", "GQAttention", "LTIInjection", "LoRAAdapter", "MLAttention", "MoEFFN",
        "MythosConfig", "OpenMythos", "RMSNorm", "RecurrentBlock", "TransformerBlock", "apply_rope",
        "loop_index_embedding", "precompute_rope_freqs",
    ]  # fmt: skip
    for name in names:
        assert getattr(door, name) is getattr(open_mythos, name)
    assert set(names) <= set(door.__all__)


def test_star_import_gives_every_public_name() -> None:
    code = (
        "from open_mythos import *; import open_mythos; "
        "missing = [n for n in open_mythos.__all__ if n not in globals()]; assert not missing, missing; "
        "assert OpenMythos and mythos_1b and spectral_radius"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_every_public_name_of_a_room_is_there_for_type_checkers_and_at_run_time() -> None:
    for room in ("model", "tokenizer", "weights"):
        module = importlib.import_module(f"open_mythos.{room}")
        # Made by the model, the cache and a run's config, never by a user.
        inner = {"SequenceContext", "Snapshot", "Ids", "tokenizer_of"}
        assert set(module.__all__) - inner <= set(open_mythos.__all__), room
    assert open_mythos.trace is importlib.import_module("open_mythos.analysis.probes").trace


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mythos_7b'"):
        open_mythos.mythos_7b  # noqa: B018
    assert set(open_mythos.__all__) <= set(dir(open_mythos))


def test_every_config_field_of_the_public_release_has_its_default() -> None:
    cfg = MythosConfig()
    ours = {**UPSTREAM_FIELDS, "rope_theta": 2.5 * 4096}  # the one default that differs
    assert {name: getattr(cfg, name) for name in UPSTREAM_FIELDS} == ours
    assert MythosConfig.upstream().rope_theta == UPSTREAM_FIELDS["rope_theta"]
    assert list(cfg.to_dict())[: len(UPSTREAM_FIELDS)] == list(UPSTREAM_FIELDS), "positional arguments, too"


def test_forward_and_generate_take_the_published_arguments_by_position_and_name() -> None:
    forward = list(inspect.signature(OpenMythos.forward).parameters)
    assert forward[:5] == ["self", "input_ids", "n_loops", "kv_cache", "start_pos"]
    model, ids = build(), torch.randint(0, 64, (2, 5))
    assert model(ids, 2, {}, 0).shape == (2, 5, 64)
    assert model(input_ids=ids, n_loops=2, kv_cache={}, start_pos=0).shape == (2, 5, 64)
    assert model.generate(ids, 3, 2, 1.0, 50).shape == (2, 8)
    out = model.generate(input_ids=ids, max_new_tokens=3, n_loops=2, temperature=0.8, top_k=5)
    assert out.shape == (2, 8)
    assert torch.equal(out[:, :5], ids)
    parameters = inspect.signature(open_mythos.generate).parameters
    assert list(parameters)[1:6] == ["input_ids", "max_new_tokens", "n_loops", "temperature", "top_k"]
    assert [parameters[name].default for name in ("max_new_tokens", "temperature", "top_k")] == [64, 1.0, 50]


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
@torch.no_grad()
def test_a_plain_dict_is_filled_and_continues_the_sequence(attn_type: str) -> None:
    model, ids, kv = build(attn_type).eval(), torch.randint(0, 64, (1, 9)), {}
    first = model(ids[:, :6], n_loops=4, kv_cache=kv, start_pos=0)
    assert type(kv) is dict
    assert len(kv) == 1 + 4 + 1
    assert all(type(entry) is dict for entry in kv.values())
    assert all(
        isinstance(t, Tensor) and t.shape[:2] == (1, 6) for entry in kv.values() for t in entry.values()
    )
    last = model(ids[:, 6:], n_loops=4, kv_cache=kv, start_pos=6)
    torch.testing.assert_close(torch.cat((first, last), 1), model(ids, n_loops=4), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("attn_type", "policy", "expected"),
    [("mla", None, 73_728), ("mla", LastLoop(), 36_864), ("gqa", None, 196_608), ("gqa", LastLoop(), 98_304)],
)
@torch.no_grad()
def test_bytes_of_64_tokens_at_4_loops(attn_type: str, policy: Any, expected: int) -> None:
    model, x = build(attn_type), torch.randint(0, 64, (1, 64))
    cache = KVCache(policy)
    model(x, n_loops=4, kv_cache=cache)
    assert footprint(cache.entries) == cache.nbytes == expected
    if policy is None:
        kv: dict[str, dict[str, Tensor]] = {}
        model(x, n_loops=4, kv_cache=kv)
        assert footprint(kv) == expected


def test_a_32_token_prompt_at_max_seq_len_32_gives_33() -> None:
    model = build(max_seq_len=32)
    assert model.generate(torch.randint(0, 64, (1, 32)), max_new_tokens=1, n_loops=2).shape == (1, 33)


def test_the_decay_is_a_vector_strictly_inside() -> None:
    A = build().recurrent.injection.get_A()
    assert A.shape == (128,)
    assert bool(((A > 0) & (A < 1)).all())


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("n_loops", [1, 16])
def test_a_recording_hook_on_the_halting_head_sees_every_loop(n_loops: int, bound: bool) -> None:
    model, ids, record = build(), torch.randint(0, 64, (2, 5)), []
    act = model.recurrent.act
    assert isinstance(act, ACTHalting)
    original = act.forward

    def method(self: Any, h: Tensor) -> Tensor:
        p = original(h)
        record.append(p.detach())
        return p

    act.forward = types.MethodType(method, act) if bound else lambda h: method(act, h)  # type: ignore[method-assign]
    for training in (True, False):
        record.clear()
        logits = model.train(training)(ids, n_loops=n_loops)
        assert len(record) == n_loops
        assert torch.stack(record).shape == (n_loops, 2, 5)
        assert bool(((torch.stack(record) > 0) & (torch.stack(record) < 1)).all())
        assert logits.shape == (2, 5, 64)


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_wrapped_mixture_sees_the_experts_really_used(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model, ids = build(), torch.randint(0, 64, (2, 5))
    ffn: Any = model.recurrent.block.ffn
    assert isinstance(ffn, MoEFFN)
    assert isinstance(ffn.router, nn.Linear)
    assert (ffn.topk, ffn.n_experts, ffn.router_bias.shape) == (2, 4, (4,))
    ffn.router_bias.normal_()
    recorded, used = [], []
    original, route = MoEFFN.forward, MoEFFN.route

    def hooked(self: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        recorded.append(
            (self.router(flat) + self.router_bias).topk(self.topk, dim=-1).indices.sort(-1).values
        )
        return original(self, x)

    def watched(self: Any, flat: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = route(self, flat)
        used.append(experts.sort(-1).values)
        return experts, weights

    monkeypatch.setattr(MoEFFN, "route", watched)
    if where == "class":
        monkeypatch.setattr(MoEFFN, "forward", hooked)
    else:
        ffn.forward = types.MethodType(hooked, ffn)
    model(ids, n_loops=5)
    assert len(recorded) == len(used) == 5
    assert all(torch.equal(a, b) for a, b in zip(recorded, used, strict=True))
    assert recorded[0].shape == (10, 2)


def test_a_plain_training_loop_teaches_every_parameter() -> None:
    model = build()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        x = torch.randint(0, 64, (8, 12))
        loss = nn.functional.cross_entropy(model(x, n_loops=3).view(-1, 64), x.view(-1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Decay alone would shrink each weight by 4e-5 of itself.
    still = [n for n, p in model.named_parameters() if (p - before[n]).abs().max() < 1e-4]
    assert still == []


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4])
def test_two_or_three_of_four_key_heads_as_the_articles_suggest(n_kv_heads: int) -> None:
    model = build("gqa", n_kv_heads=n_kv_heads)
    out = model.generate(torch.randint(0, 64, (2, 5)), max_new_tokens=3, n_loops=2)
    assert out.shape == (2, 8)


def test_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", open_mythos.__version__)
