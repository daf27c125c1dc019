"""Shares of experts counted as the model chooses them, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.reproduce.base import named
from open_mythos.reproduce.experts import Experts, prices, watch
from open_mythos.reproduce.plan import Settings, all_runs

TASKS = ("parity", "digit_chain", "khop", "addition", "text")


def experiment() -> Experts:
    found = named("experts")
    assert isinstance(found, Experts)
    return found


def record(row: str, task: str, experts: str, seed: int = 0, **found: Any) -> dict[str, Any]:
    place = {"row": row, "task": task, "experts": experts}
    measured = {"place": place, "least": 0.8, "most": 1.3, "bits": 1.0, **found}
    return {"arm": f"{row}-{task}-{experts}", "seed": seed, "measured": measured}


def every(row: str, **found: Any) -> list[dict[str, Any]]:
    places = [(task, experts) for task in TASKS for experts in ("4", "16", "100")]
    return [record(row, *place, seed, **found) for place in places for seed in range(6)]


def test_the_grid_is_every_task_with_every_number_of_experts(tmp_path: Path):
    runs = all_runs(experiment(), Settings(runs=tmp_path, out=tmp_path))
    ours = [run.config for run in runs if run.options["place"]["row"] == "ours" and run.seed == 0]
    assert {(c.data.source, c.model.n_experts) for c in ours} == {
        (source, n)
        for source in ("parity", "digit_chain", "khop", "addition", "python")
        for n in (4, 16, 100)
    }
    assert {c.model.n_experts_per_tok * c.model.expert_dim for c in ours} == {64}
    rates = {run.options["place"]["row"]: run.config.model.router_bias_rate for run in runs}
    assert rates["free"] == 0 < rates["ours"]


def test_one_starved_expert_anywhere_fails_the_claim():
    records = every("ours")
    assert experiment().judge(records).passed
    records[40]["measured"]["least"] = 0.49
    verdict = experiment().judge(records)
    assert not verdict.passed
    assert "89 of 90 runs" in verdict.sentence
    assert not experiment().judge(every("ours")[:-1]).passed, "a missing run is no proof"
    assert experiment().judge([*every("ours"), *every("free", least=0.0)]).passed


def test_the_price_is_that_of_pairs_of_seeds():
    records = [record("ours", "text", "4", seed, bits=bits) for seed, bits in enumerate((1.2, 1.5, 1.1))]
    assert prices(records) is None
    records += [record("free", "text", "4", seed, bits=bits) for seed, bits in enumerate((1.0, 1.0))]
    assert prices(records) == pytest.approx(0.35)
    rows = experiment().summary(records)["rows"]
    assert [row["cells"][-1] for row in rows] == [pytest.approx(0.35), None]
    assert "balance costs +0.3500 bits" in experiment().judge(records).sentence
    assert len(experiment().draw(records).axes) == 1


def test_shares_are_those_of_the_router_over_all_loops_without_padding():
    torch.manual_seed(0)
    cfg = MythosConfig(
        vocab_size=9, dim=16, n_heads=2, n_kv_heads=1, attn_type="gqa", prelude_layers=1, coda_layers=0,
        n_experts=5, n_experts_per_tok=2, expert_dim=8, lora_rank=0, max_seq_len=16,
    )  # fmt: skip
    model = OpenMythos(cfg).eval()
    ffn = model.recurrent.block.ffn
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    targets = torch.tensor([[-100, 3, 4, -100], [5, -100, -100, -100]])
    ffn.router_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0, -9.0]))
    found = watch(model, [{"ids": ids, "targets": targets}], 3, padded=True)
    # Five tokens, three loops; the bias puts the first expert into every choice and the last into none.
    assert sum(found["loads"]) == 5 * 3 * 2
    assert (found["loads"][0], found["loads"][4]) == (5 * 3, 0)
    whole = watch(model, [{"ids": ids, "targets": targets}], 3, padded=False)
    assert sum(whole["loads"]) == 8 * 3 * 2
    with torch.no_grad():
        logits = model(ids, 3).log_softmax(-1)
    wanted = -(logits[0, 1, 3] + logits[0, 2, 4] + logits[1, 0, 5]) / 3 / torch.log(torch.tensor(2.0))
    assert found["bits"] == pytest.approx(float(wanted), rel=1e-5)
    assert not ffn.router._forward_hooks
