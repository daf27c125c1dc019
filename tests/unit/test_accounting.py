"""Counts against what they count: the model's parameters, a real cache's bytes, torch's FLOP counter."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_mythos import ConfigError, EveryLoop, KVCache, LastLoop, MythosConfig, OpenMythos
from open_mythos.accounting import (
    flops_per_token,
    format_count,
    kv_bytes_per_token,
    kv_table,
    parameters,
    parse_count,
    propose,
)
from open_mythos.reproduce.articles import CHAIN_MODELS

# The digit-chain tutorial's model, with room for more tokens.
TUTORIAL: dict[str, Any] = {**CHAIN_MODELS["mla"], "n_kv_heads": 2, "max_seq_len": 128}
del TUTORIAL["attn_type"]


def random_config(seed: int) -> MythosConfig:
    """A valid config of random sizes and choices."""
    draw = random.Random(seed)
    heads = draw.randint(1, 6)
    experts = draw.randint(1, 9)
    return MythosConfig(
        vocab_size=draw.randint(2, 90),
        dim=heads * 2 * draw.randint(1, 12),
        n_heads=heads,
        n_kv_heads=draw.randint(1, heads),
        max_loop_iters=draw.randint(1, 6),
        prelude_layers=draw.randint(0, 3),
        coda_layers=draw.randint(0, 3),
        attn_type=draw.choice(["mla", "gqa"]),
        kv_lora_rank=draw.randint(1, 20),
        q_lora_rank=draw.randint(1, 20),
        qk_rope_head_dim=2 * draw.randint(1, 6),
        qk_nope_head_dim=draw.randint(1, 12),
        v_head_dim=draw.randint(1, 12),
        n_experts=experts,
        n_shared_experts=draw.randint(0, 3),
        n_experts_per_tok=draw.randint(1, experts),
        expert_dim=draw.randint(1, 20),
        lora_rank=draw.randint(0, 5),
        ffn_dim=draw.choice([None, draw.randint(1, 30)]),
        tie_embeddings=draw.random() < 0.5,
        qk_norm=draw.random() < 0.5,
        input_norm=draw.random() < 0.5,
        update_norm=draw.random() < 0.5,
        state_norm=draw.random() < 0.5,
        halting=draw.choice(["select", "average", "off"]),
    )


def part_of(name: str) -> str:
    """The part of :func:`parameters` that a parameter of the model belongs to."""
    prefixes = {
        "embed.": "embed",
        "prelude_layers.": "prelude",
        "input_norm.": "prelude",
        "recurrent.block.attn.": "recurrent.attention",
        "recurrent.block.ffn.router.": "recurrent.router",
        "recurrent.block.ffn.w_": "recurrent.routed_experts",
        "recurrent.block.ffn.shared.": "recurrent.shared_experts",
        "recurrent.lora.": "recurrent.lora",
        "recurrent.injection.": "recurrent.injection",
        "recurrent.act.": "recurrent.halting",
        "recurrent.": "recurrent.norms",
        "coda_layers.": "coda",
        "norm.": "coda",
        "head.": "head",
    }
    return next(part for prefix, part in prefixes.items() if name.startswith(prefix))


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_parameters_equal_the_models_part_by_part(first: int):
    for seed in range(first, first + 20):
        cfg = random_config(seed)
        with torch.device("meta"):
            model = OpenMythos(cfg)
        found = dict.fromkeys(parameters(cfg).parts, 0)
        for name, parameter in model.named_parameters():
            found[part_of(name)] += parameter.numel()
        count = parameters(cfg)
        assert found == count.parts, cfg
        assert count.total == sum(p.numel() for p in model.parameters())
        assert count.recurrent == sum(p.numel() for p in model.recurrent.parameters())


@pytest.mark.parametrize("seed", range(6))
def test_active_parameters_are_those_with_a_gradient_from_one_token(seed: int):
    cfg = random_config(seed).replace(halting="average", act_threshold=0.99)
    model = OpenMythos(cfg.replace(init="upstream"))
    model(torch.zeros(1, 1, dtype=torch.int64), n_loops=1).square().sum().backward()
    ffn = model.recurrent.block.ffn
    used = (ffn.w_out.grad.flatten(1).abs().sum(1) > 0).sum()
    assert used == cfg.n_experts_per_tok
    idle = (cfg.n_experts - cfg.n_experts_per_tok) * 3 * cfg.dim * cfg.expert_dim
    rows = 0 if cfg.tie_embeddings else (cfg.vocab_size - 1) * cfg.dim
    assert parameters(cfg).active == parameters(cfg).total - idle - rows
    assert parameters(cfg.replace(halting="off")).active == parameters(cfg).active - cfg.dim - 1


@pytest.mark.parametrize("policy", ["every-loop", "last-loop"])
@pytest.mark.parametrize("seed", range(12))
def test_kv_bytes_equal_a_real_caches(seed: int, policy: str):
    cfg = random_config(seed)
    cache = KVCache(EveryLoop() if policy == "every-loop" else LastLoop())
    model = OpenMythos(cfg)
    for ids in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)):
        with torch.no_grad():
            model(ids, n_loops=3, kv_cache=cache)
    assert cache.nbytes == 2 * 6 * kv_bytes_per_token(cfg, policy, 3, 4)


def test_kv_bytes_of_the_tutorial_config():
    cfg = MythosConfig(**TUTORIAL, attn_type="mla")
    table = {key: 64 * value for key, value in kv_table(cfg, n_loops=4, bytes_per_element=4).items()}
    assert table == {
        ("mla", "every-loop"): 73_728,
        ("mla", "last-loop"): 36_864,
        ("gqa", "every-loop"): 196_608,
        ("gqa", "last-loop"): 98_304,
    }
    assert kv_bytes_per_token(cfg.replace(attn_type="gqa"), n_loops=4, bytes_per_element=4) * 64 == 196_608


def counted(model: OpenMythos, *args: Any, **kwargs: Any) -> int:
    """Operations by torch's counter, which knows plain products but not every fused attention kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args, **kwargs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("halting", ["select", "off"])
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_flops_of_a_sequence_equal_torchs_count(attn_type: str, halting: str):
    # float64, where the expert products are plain ones. Equal query and value widths, because attention pads
    # unequal ones, and padding is not counted here.
    cfg = MythosConfig(**{**TUTORIAL, "v_head_dim": 32}, attn_type=attn_type, halting=halting)
    model = OpenMythos(cfg).double()
    for length, loops in ((1, 1), (16, 2), (33, 5)):
        ids = torch.randint(0, 64, (2, length))
        expected = 2 * length * flops_per_token(cfg, loops, context=length)
        assert counted(model, ids, n_loops=loops) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("attn_type", "context", "tolerance"), [("gqa", 40, 1e-3), ("mla", 5, 0.01), ("mla", 120, 0.05)]
)
def test_flops_of_a_decode_step_follow_torchs_count(attn_type: str, context: int, tolerance: float):
    # MLA's absorbed form also sums the rope channels as values and drops them, which is not counted here:
    # hence its tolerance.
    cfg = MythosConfig(**{**TUTORIAL, "v_head_dim": 32}, attn_type=attn_type)
    model, cache = OpenMythos(cfg).double(), KVCache()
    with torch.no_grad():
        model(torch.randint(0, 64, (1, context - 1)), n_loops=3, kv_cache=cache)
    found = counted(model, torch.zeros(1, 1, dtype=torch.int64), n_loops=3, kv_cache=cache)
    assert flops_per_token(cfg, 3, context=context, decode=True) == pytest.approx(found, rel=tolerance)


def test_flops_grow_by_the_same_amount_with_every_loop():
    cfg = MythosConfig(**TUTORIAL)
    flops = [flops_per_token(cfg, loops, context=32) for loops in (1, 2, 8)]
    assert (flops[2] - flops[1]) == 6 * (flops[1] - flops[0])
    assert flops_per_token(cfg, context=32) == flops[2]


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_tutorial_config_fits_200k_with_the_experts_per_token_kept(attn_type: str):
    cfg = MythosConfig(**TUTORIAL, attn_type=attn_type)
    assert parameters(cfg).total > 370_000
    smaller, changes = propose(cfg, "200k")
    assert 190_000 < parameters(smaller).total <= 200_000
    assert (smaller.n_experts_per_tok, smaller.n_experts) == (cfg.n_experts_per_tok, cfg.n_experts)
    assert (smaller.dim, smaller.vocab_size) == (128, 64)
    heads = "n_heads: 4 -> 2" if attn_type == "mla" else "n_kv_heads: 2 -> 1"
    assert heads in changes
    assert any(change.startswith("expert_dim: 64 -> ") for change in changes)
    assert OpenMythos(smaller)(torch.zeros(1, 4, dtype=torch.int64), n_loops=2).shape == (1, 4, 64)


@pytest.mark.parametrize("seed", range(60))
def test_propose_fits_and_follows_the_order(seed: int):
    cfg = random_config(seed).replace(n_experts=8, n_experts_per_tok=4, expert_dim=48)
    total = parameters(cfg).total
    budget = int(total * random.Random(seed).uniform(0.5, 1.1))
    smaller, changes = propose(cfg, budget)
    assert parameters(smaller).total <= budget
    before, after = cfg.to_dict(), smaller.to_dict()
    names = {change.split(":")[0] for change in changes}
    assert names == {name for name in before if before[name] != after[name]}
    assert (
        not names
        - {"expert_dim", "n_heads", "n_kv_heads", "ffn_dim", "n_experts_per_tok", "n_experts"}
        - {name for name in before if name.endswith("_rank")}
    )
    narrow = narrowest(cfg)
    assert ("n_experts_per_tok" in names) <= (parameters(narrow).total > budget)
    assert ("n_experts" in names) <= (parameters(narrow.replace(n_experts_per_tok=1)).total > budget)
    if total <= budget:
        assert (smaller, changes) == (cfg, [])


def narrowest(cfg: MythosConfig) -> MythosConfig:
    """Every width at its floor, an eighth but at least 8; what must not fit before an expert goes."""

    def floor(value: int) -> int:
        least = max(8, -(-value // 8))
        return min(value, -(-least // 8) * 8)

    heads = "n_heads" if cfg.attn_type == "mla" else "n_kv_heads"
    changes = {"expert_dim": floor(cfg.expert_dim), heads: max(1, -(-getattr(cfg, heads) // 8))}
    if cfg.prelude_layers + cfg.coda_layers:
        changes["ffn_dim"] = floor(cfg.dense_dim)
    if cfg.attn_type == "mla":
        changes.update(q_lora_rank=floor(cfg.q_lora_rank), kv_lora_rank=floor(cfg.kv_lora_rank))
    return cfg.replace(**changes, lora_rank=-(-cfg.lora_rank // 8))


def test_propose_takes_the_articles_first_step_alone_when_it_is_enough():
    cfg = MythosConfig(**TUTORIAL)
    smaller, changes = propose(cfg, 300_000)
    assert changes == ["expert_dim: 64 -> 32"]
    assert smaller == cfg.replace(expert_dim=32)


def test_propose_refuses_what_cannot_be_reached():
    with pytest.raises(
        ConfigError, match=r"budget = 20,000 parameters is not allowed: .* lower one of these"
    ):
        propose(MythosConfig(**TUTORIAL), "20k")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *[("200k", 200_000), ("1.5M", 1_500_000), ("7b", 7 * 10**9), ("1T", 10**12), (" 3 B ", 3 * 10**9)],
        *[("200_000", 200_000), ("17", 17), (200_000, 200_000), ("0.5k", 500)],
    ],
)
def test_parse_count(text: str | int, count: int):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "k", "0", "-5", "1.5", "1e6", "7 q", "nan", "1.5.2k", "0.0001k", "٣k", 0, -1, True, None, 1.5],
)
def test_parse_count_refuses(text: Any):
    with pytest.raises(ValueError, match="is not a parameter count: it must be a whole number of at least 1"):
        parse_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0"), (999, "999"), (1000, "1k"), (370_434, "370k"), (999_499, "999k"), (999_500, "1M")],
        *[(1_060_000, "1.06M"), (12_345_678, "12.3M"), (7 * 10**9, "7B"), (10**15, "1000T")],
    ],
)
def test_format_count(count: int, text: str):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: flops_per_token(c, 0), "n_loops = 0 is not allowed"),
        (lambda c: flops_per_token(c, True), "n_loops = True is not allowed"),
        (lambda c: flops_per_token(c, context=0), "context = 0 is not allowed"),
        (lambda c: kv_bytes_per_token(c, "some"), "policy = 'some' is not allowed"),
        (lambda c: kv_bytes_per_token(c, attn_type="mha"), "attn_type = 'mha' is not allowed"),
        (lambda c: kv_bytes_per_token(c, bytes_per_element=0), "bytes_per_element = 0 is not allowed"),
        (lambda c: kv_bytes_per_token(c, n_loops=-1), "n_loops = -1 is not allowed"),
    ],
)
def test_bad_arguments(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(MythosConfig(**TUTORIAL))


def test_counting_needs_no_torch():
    code = "import sys, open_mythos.variants as v; v.table(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
