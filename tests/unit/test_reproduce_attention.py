"""The table of attentions: equal where it says so, scored with either cache, timed in the same proportions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.accounting import kv_bytes_per_token, parameters
from open_mythos.config import MythosConfig
from open_mythos.model import EveryLoop, KVCache, LastLoop, OpenMythos
from open_mythos.reproduce.attention import Attention, latency, read_by_token, wider
from open_mythos.reproduce.base import named
from open_mythos.reproduce.plan import Settings, all_runs

POLICIES = ("every-loop", "last-loop")


def experiment() -> Attention:
    found = named("attention")
    assert isinstance(found, Attention)
    return found


def runs(tmp_path: Path) -> dict[str, Any]:
    every = all_runs(experiment(), Settings(runs=tmp_path, out=tmp_path))
    return {f"{run.arm}-{run.seed}": run for run in every}


def small(**changes: Any) -> OpenMythos:
    torch.manual_seed(0)
    cfg = MythosConfig(
        vocab_size=19, dim=16, n_heads=2, n_kv_heads=1, attn_type="gqa", prelude_layers=1, coda_layers=1,
        n_experts=4, n_experts_per_tok=2, expert_dim=8, lora_rank=2, max_seq_len=32, kv_lora_rank=4, q_lora_rank=4,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    model = OpenMythos(cfg.replace(**changes)).eval()
    with (
        torch.no_grad()
    ):  # A fresh head reads every state alike; spread the weights, so that a cache matters.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_attentions_are_equal_where_the_titles_say_so(tmp_path: Path):
    found = runs(tmp_path)
    cfg = {
        row: found[f"{row}-text-0"].config.model for row in ("gqa_1", "mla_48", "gqa_2", "mla_112", "gqa_4")
    }
    kv = {row: kv_bytes_per_token(c) for row, c in cfg.items()}
    size = {row: parameters(c).total for row, c in cfg.items()}
    assert kv["gqa_1"] == kv["mla_48"]
    assert kv["gqa_2"] == kv["mla_112"]
    assert size["mla_48"] == pytest.approx(size["gqa_1"], rel=0.01)
    assert size["mla_112"] == pytest.approx(size["gqa_4"], rel=0.01)


def test_seeds_are_for_training_and_a_clock_has_its_own_device(tmp_path: Path):
    found = runs(tmp_path)
    count = {on: sum(f"-{on}-" in name for name in found) for on in ("text", "cpu", "gpu")}
    assert count == {"text": 30, "cpu": 5, "gpu": 5}
    assert found["gqa_1-gpu-0"].config.parallel.device == "cuda"
    assert found["gqa_1-cpu-0"].config.parallel.device == "cpu"


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_wider_model_keeps_its_proportions(attn_type: str):
    cfg = small(attn_type=attn_type).cfg
    wide = wider(cfg, 3, 100)
    assert (wide.dim, wide.n_heads, wide.n_kv_heads, wide.kv_lora_rank) == (48, 6, 3, 12)
    assert (wide.head_dim, wide.v_head_dim, wide.qk_rope_head_dim) == (cfg.head_dim, 8, 4)
    assert wide.dense_dim == 3 * cfg.dense_dim
    assert wide.max_seq_len == 100


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_reading_by_token_is_exact_with_every_loop_and_only_then(attn_type: str):
    model = small(attn_type=attn_type)
    ids = torch.randint(19, (3, 9))
    batch = {"ids": ids, "targets": ids.roll(-1, 1), "document_ids": torch.tensor([[0] * 5 + [1] * 4] * 3)}
    batch["targets"][:, -1] = -100
    with torch.no_grad():
        logits = model(ids, 3, document_ids=batch["document_ids"]).log_softmax(-1)
    picked = logits[:, :-1].gather(-1, ids[:, 1:, None])
    whole = float(-picked.mean() / torch.log(torch.tensor(2.0)))
    assert read_by_token(model, [batch], 3, EveryLoop()) == pytest.approx(whole, rel=1e-5)
    assert read_by_token(model, [batch], 3, LastLoop()) != pytest.approx(whole, rel=1e-4)


def test_a_clock_counts_the_tokens_that_it_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    model, sizes, now = small(), [], iter(range(100))
    forward = model.forward

    def counted(ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        sizes.append(tuple(ids.shape))
        return forward(ids, *rest, **named)

    monkeypatch.setattr(model, "forward", counted)
    # Every look at the clock is a second later than the last.
    monkeypatch.setattr("open_mythos.reproduce.attention.time.perf_counter", lambda: float(next(now)))
    found = latency(model, EveryLoop(), 2, 5, 4, 3, rounds=2)
    assert sizes == 3 * [(2, 5), *4 * [(2, 1)]]
    assert found["prefill_tokens_per_s"] == 10
    assert found["decode_ms"] == 250
    assert found["cache_bytes"] == 2 * 9 * 2 * kv_bytes_per_token(model.cfg, n_loops=3)
    cache = KVCache(LastLoop())
    model(torch.zeros(2, 9, dtype=torch.int64), 3, cache)
    assert latency(model, LastLoop(), 2, 5, 4, 3, rounds=1)["cache_bytes"] == cache.nbytes


def record(row: str, on: str, seed: int = 0, **found: Any) -> dict[str, Any]:
    return {"arm": f"{row}-{on}", "seed": seed, "measured": {"place": {"row": row, "on": on}, **found}}


def test_one_table_of_quality_bytes_and_latency():
    scored = {
        "bits": {"every-loop": 2.0, "last-loop": 2.1}, "bytes": {"every-loop": 80, "last-loop": 24}, "parameters": 7
    }  # fmt: skip
    times = {
        name: {str(b): {"decode_ms": 1.0 + b, "prefill_tokens_per_s": 9.0} for b in (1, 16)}
        for name in POLICIES
    }
    records = [record("gqa_1", "text", seed, **scored) for seed in range(2)]
    records += [record("gqa_1", "cpu", times=times), record("mla_48", "text", **scored)]
    found = experiment()
    table = found.summary(records)
    assert [row["cells"][0] for row in table["rows"]] == ["every-loop", "last-loop"] * 2
    first, *_, last = (row["cells"] for row in table["rows"])
    assert first[1:3] == [7, 80]
    assert first[3]["median"] == 2.0
    assert first[4:] == [2.0, 17.0, 9.0]
    assert last[2] == 24
    assert last[4:] == [None, None, None]
    assert all(len(row["cells"]) == len(table["columns"]) for row in table["rows"])
    verdict = found.judge(records)
    assert not verdict.passed
    assert "2.100 with the last loop's cache" in verdict.sentence
    assert len(found.draw(records).axes) == 1
    whole = [
        record(*arm.rsplit("-", 1), **(scored if arm.endswith("text") else {"times": times}))
        for arm in found.arms
    ]
    assert found.judge(whole).passed
