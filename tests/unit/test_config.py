"""The configuration: values, JSON, presets. What it refuses is in test_bad_input.py."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from open_mythos.config import ConfigError, MythosConfig, field_types

EVERY_FIELD_CHANGED: dict[str, Any] = {
    "vocab_size": 100, "dim": 96, "n_heads": 6, "n_kv_heads": 5, "max_seq_len": 7, "max_loop_iters": 3,
    "prelude_layers": 0, "coda_layers": 1, "attn_type": "gqa", "kv_lora_rank": 9, "q_lora_rank": 10,
    "qk_rope_head_dim": 12, "qk_nope_head_dim": 13, "v_head_dim": 14, "n_experts": 15, "n_shared_experts": 0,
    "n_experts_per_tok": 8, "expert_dim": 17, "act_threshold": 1.5, "rope_theta": 10, "lora_rank": 0,
    "max_output_tokens": 20, "dropout": 0.25, "ffn_dim": 21, "norm_eps": 1e-5, "tie_embeddings": False,
    "qk_norm": False, "input_norm": False, "initial_state": "random", "block_output": "state",
    "update_norm": True, "state_norm": True, "previous_heads": 2, "alibi": 0.5, "extra_loops": 2,
    "loop_embedding": True, "halting": "off", "halt_bias_init": 1.0,
    "halt_tolerance": 0.5, "router_bias_rate": 0.0, "init": "upstream", "bos_token_id": 0,
    "eos_token_id": 99, "pad_token_id": 50,
}  # fmt: skip


def test_the_table_above_changes_every_field() -> None:
    defaults = MythosConfig().to_dict()
    assert set(EVERY_FIELD_CHANGED) == set(defaults) == set(field_types())
    assert all(defaults[name] != value for name, value in EVERY_FIELD_CHANGED.items())


@pytest.mark.parametrize("name", EVERY_FIELD_CHANGED)
def test_a_field_alone_is_kept_and_changes_no_other(name: str) -> None:
    value = EVERY_FIELD_CHANGED[name]
    cfg = MythosConfig(**{name: value}) if name != "n_kv_heads" else MythosConfig(n_kv_heads=5)
    follows = {"rope_theta": 17.5} if name == "max_seq_len" else {}
    assert {**MythosConfig().to_dict(), name: value, **follows} == cfg.to_dict()
    assert cfg != MythosConfig()


@pytest.mark.parametrize(
    "cfg", [MythosConfig(), MythosConfig(**EVERY_FIELD_CHANGED), MythosConfig.upstream()]
)
def test_json_round_trip(cfg: MythosConfig) -> None:
    text = cfg.to_json()
    assert MythosConfig.from_json(text) == cfg
    assert MythosConfig.from_json(text).to_json() == text
    assert MythosConfig.from_dict(cfg.to_dict()) == cfg
    assert copy.deepcopy(cfg) == cfg


def test_absent_fields_take_their_defaults() -> None:
    assert MythosConfig.from_json("{}") == MythosConfig()
    assert MythosConfig.from_dict({"dim": 64}).vocab_size == 32000


def test_a_config_cannot_be_changed_but_replaced() -> None:
    cfg = MythosConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.dim = 3  # type: ignore[misc]
    assert cfg.replace(dim=64).dim == 64
    assert cfg.dim == 2048
    assert hash(cfg) == hash(MythosConfig())
    with pytest.raises(ConfigError, match=r"^dim = 0 "):
        dataclasses.replace(cfg, dim=0)


def test_derived_sizes() -> None:
    cfg = MythosConfig(**EVERY_FIELD_CHANGED)
    assert (cfg.head_dim, cfg.dense_dim, cfg.shared_dim, cfg.cached_layers) == (16, 21, 0, 2)
    sizes: dict[str, Any] = {
        "dim": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
    }
    mla, gqa = (MythosConfig(attn_type=name, **sizes) for name in ("mla", "gqa"))
    assert (mla.rope_dim, gqa.rope_dim) == (8, 16)
    assert mla.cached_shapes() == gqa.cached_shapes("mla") == {"latent": (20,)}
    assert gqa.cached_shapes() == mla.cached_shapes("gqa") == {"k": (2, 16), "v": (2, 16)}
    assert mla.replace(n_kv_heads=9).cached_shapes("gqa")["k"] == (4, 16), "no more than there are heads"
    assert MythosConfig(dim=100, n_heads=5).dense_dim == 133
    assert MythosConfig(n_shared_experts=2, n_experts_per_tok=4, expert_dim=10).shared_dim == 80


def test_the_upstream_preset_fixes_what_makes_it_upstream() -> None:
    cfg = MythosConfig.upstream(dim=64, n_heads=4, dropout=0.1)
    assert (cfg.dim, cfg.dropout, cfg.halting, cfg.block_output) == (64, 0.1, "upstream", "state")
    assert MythosConfig.upstream(halting="upstream") == MythosConfig.upstream()


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_mla_ignores_what_belongs_to_gqa(attn_type: str) -> None:
    fields: dict[str, Any] = {"attn_type": attn_type, "dim": 30, "n_heads": 4, "n_kv_heads": 9}
    if attn_type == "mla":
        assert MythosConfig(**fields).n_kv_heads == 9
    else:
        with pytest.raises(ConfigError):
            MythosConfig(**fields)


def test_configs_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import open_mythos; "
        "assert open_mythos.MythosConfig(dim=64).dim == 64"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_rotary_base_follows_the_longest_sequence_once() -> None:
    assert MythosConfig(max_seq_len=32).rope_theta == 80.0
    assert MythosConfig(max_seq_len=2).rope_theta == 10.0
    assert (
        MythosConfig(max_seq_len=32).replace(max_seq_len=4096).rope_theta == 80.0
    )  # weights learned with it
    assert MythosConfig(max_seq_len=32, rope_theta=7.0).rope_theta == 7.0
    assert MythosConfig.upstream(max_seq_len=32, rope_theta=7.0).rope_theta == 7.0


def test_no_more_previous_heads_than_heads() -> None:
    with pytest.raises(
        ConfigError, match=r"^previous_heads = 5 is not allowed: it must be 0 to n_heads \(4\)$"
    ):
        MythosConfig(dim=64, n_heads=4, previous_heads=5)
