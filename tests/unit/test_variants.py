"""Named sizes: what their names promise, and that building one takes few operators and no memory."""

from __future__ import annotations

import re

import pytest
import torch

import open_mythos
from open_mythos import MythosConfig, OpenMythos, variants
from open_mythos.accounting import kv_table, parameters, parse_count
from recorded import Operators

NAMED_BY_SIZE = ["1b", "3b", "10b", "50b", "100b", "500b", "1t"]
MOST_OPERATORS = 3  # for each tensor: made, filled, and one more


@pytest.mark.parametrize("size", NAMED_BY_SIZE)
def test_total_parameters_are_within_5_percent_of_the_name(size: str):
    total = parameters(getattr(open_mythos, f"mythos_{size}")()).total
    assert abs(total / parse_count(size) - 1) <= 0.05


@pytest.mark.parametrize(
    ("size", "low", "high"), [("nano", 25e4, 35e4), ("micro", 9e5, 11e5), ("small", 10e6, 15e6)]
)
def test_small_sizes(size: str, low: float, high: float):
    cfg = getattr(open_mythos, f"mythos_{size}")()
    assert low <= parameters(cfg).total <= high
    assert (cfg.vocab_size, cfg.bos_token_id, cfg.eos_token_id, cfg.pad_token_id) == (259, 256, 257, 258)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_builds_on_the_meta_device_with_the_counted_parameters(name: str):
    cfg = variants.VARIANTS[name]()
    with Operators() as operators, torch.device("meta"):
        model = OpenMythos(cfg)
    tensors = dict(model.named_parameters())
    assert sum(p.numel() for p in tensors.values()) == parameters(cfg).total
    assert {device for _, made in operators.calls for device, _ in made} == {"meta"}
    assert len(operators.calls) <= MOST_OPERATORS * len(tensors), "a loop over experts or positions?"


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_shape(name: str):
    cfg = variants.VARIANTS[name]()
    kv = kv_table(cfg)
    for policy in ("every-loop", "last-loop"):
        assert kv["mla", policy] < kv["gqa", policy]
    assert cfg.expert_dim % (64 if cfg.vocab_size > 259 else 16) == 0
    assert cfg.dense_dim % 64 == 0
    assert cfg.replace(attn_type="gqa").n_heads == cfg.n_heads


def test_every_public_variant_is_in_the_table_and_gives_a_config():
    public = [name for name in open_mythos.__all__ if name.startswith("mythos_")]
    assert sorted(public) == sorted(variants.VARIANTS)
    assert all(isinstance(build(), MythosConfig) for build in variants.VARIANTS.values())


def test_the_module_docstring_shows_the_table_as_it_is():
    shown = re.search(r"::\n\n((?:    .*\n)+)", variants.__doc__ or "")
    assert shown is not None
    assert [line.strip() for line in shown[1].splitlines()] == variants.table().splitlines()


@pytest.mark.parametrize("name", ["mythos_nano", "mythos_micro"])
def test_a_small_size_runs(name: str):
    cfg = variants.VARIANTS[name]()
    logits = OpenMythos(cfg)(torch.randint(0, cfg.vocab_size, (1, 8)), n_loops=2)
    assert logits.shape == (1, 8, 259)
    assert logits.isfinite().all()
