"""Arms crossed with axes, and what stability makes of their records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.config import _UPSTREAM, ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.reproduce.base import load, named
from open_mythos.reproduce.grid import cells
from open_mythos.reproduce.plan import Settings, all_runs
from open_mythos.reproduce.stability import Stability, byte_entropy, growth
from open_mythos.training.step import TrainingError

TOML = """
[experiment]
title = "A grid"
claim = "It holds."
target = "4 of 4"
seeds = 2
code = "grid:Grid"
[experiment.options.grid.lr]
"1e-3" = { "optim.lr" = 1e-3 }
"1e-2" = { "optim.lr" = 1e-2 }
[experiment.options.grid.loops]
2 = { "loops.loops" = 2 }
3 = { "loops.loops" = 3 }
[model]
vocab_size = 4
dim = 16
n_heads = 2
n_kv_heads = 1
attn_type = "gqa"
max_seq_len = 64
n_experts = 4
n_experts_per_tok = 2
expert_dim = 8
[data]
source = "parity"
length = 8
[loops]
kind = "fixed"
loops = 1
[parallel]
device = "cpu"
[arms.ours]
title = "Ours"
[arms.other]
title = "Other"
seeds = 1
"optim.lr" = 0.5
"""


def written(tmp_path: Path, text: str = TOML) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(runs=tmp_path / "runs", out=tmp_path / "out", **changes)


def test_every_arm_stands_at_every_combination(tmp_path: Path):
    grid = load(written(tmp_path))
    names = [f"{row}-{lr}-{loops}" for row in ("ours", "other") for lr in ("1e-3", "1e-2") for loops in "23"]
    assert list(grid.arms) == names
    assert grid.arms["ours-1e-2-3"].title == "Ours · lr 1e-2 · loops 3"
    runs = {(run.arm, run.seed): run for run in all_runs(grid, settings(tmp_path))}
    assert len(runs) == 2 * 4 + 4
    some = runs["ours-1e-2-3", 1]
    assert (some.config.optim.lr, some.config.loops.options["loops"]) == (1e-2, 3)
    assert some.options == {"place": {"row": "ours", "lr": "1e-2", "loops": "3"}}
    # What an arm itself says comes after the grid.
    assert runs["other-1e-2-3", 0].config.optim.lr == 0.5


def test_a_wider_grid_leaves_the_identity_of_a_run(tmp_path: Path):
    more = TOML.replace("[model]\n", '5 = { "loops.loops" = 5 }\n[model]\n', 1)
    before, after = (
        {
            run.arm: run.identity("test", "")
            for run in all_runs(load(written(tmp_path, text)), settings(tmp_path))
        }
        for text in (TOML, more)
    )
    assert len(after) == 12
    assert before.items() <= after.items()


@pytest.mark.parametrize("bad", ['"1e-3" = 1e-3', '"1e-3" = { lr = 1 }'])
def test_an_axis_that_is_no_table_of_overrides_is_refused(bad: str, tmp_path: Path):
    text = TOML.replace('"1e-3" = { "optim.lr" = 1e-3 }', bad)
    with pytest.raises(ConfigError, match=r"toy\.toml: experiment\.options\.grid\.lr"):
        load(written(tmp_path, text))


# Stability.


def record(row: str, lr: str, loops: str, seed: int = 0, **found: Any) -> dict[str, Any]:
    measured = {"bits": 3.0, "entropy": 4.5, "growth": 1.1, "finite": True, "skipped": 0, **found}
    place = {"row": row, "lr": lr, "loops": loops}
    return {"arm": f"{row}-{lr}-{loops}", "seed": seed, "measured": {"place": place, **measured}}


def all_records(row: str = "ours", **found: Any) -> list[dict[str, Any]]:
    rates = ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
    return [record(row, lr, n, seed, **found) for lr in rates for n in ("4", "8", "16") for seed in range(3)]


def stability() -> Stability:
    found = named("stability")
    assert isinstance(found, Stability)
    return found


@pytest.mark.parametrize(
    ("change", "learned", "steady"),
    [
        ({}, True, True),
        ({"bits": 4.01}, False, True),
        ({"bits": 4.0}, True, True),
        ({"bits": None, "growth": None, "finite": False}, False, False),
        ({"finite": False}, False, True),
        ({"growth": 2.001}, True, False),
    ],
)
def test_one_run_decides_whether_all_hold(change: dict[str, Any], learned: bool, steady: bool):
    records = all_records()
    records[7]["measured"].update(change)
    verdict = stability().judge(records)
    assert [figure["met"] for figure in verdict.figures] == [learned, steady]
    assert verdict.passed == (learned and steady)
    assert f"{44 + learned} of 45 runs" in verdict.sentence


def test_fewer_runs_or_other_arms_or_higher_rates_do_not_make_the_claim():
    records = all_records()
    assert not stability().judge(records[:-1]).passed
    lost = {"bits": 8.0, "finite": False, "growth": None}
    assert (
        stability()
        .judge([*records, record("ours", "1e-1", "4", **lost), *all_records("bare", **lost)])
        .passed
    )


def test_the_table_and_the_figure_take_what_has_finished():
    records = [
        record("ours", "3e-4", "4"),
        record("bare", "3e-2", "16", bits=None, growth=None, finite=False),
    ]
    table = stability().summary(records)
    assert [row["cells"][:2] for row in table["rows"]] == [["3e-4", "1 of 1"], ["3e-2", "0 of 1"]]
    assert all(len(row["cells"]) == len(table["columns"]) for row in table["rows"])
    assert len(stability().draw(records).axes) == 2


def test_a_run_that_the_trainer_gives_up_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def give_up(*_: Any) -> None:
        raise TrainingError("the loss was not finite")

    monkeypatch.setattr(Stability, "train", give_up)
    experiment = stability()
    run = next(run for run in all_runs(experiment, settings(tmp_path)) if run.arm == "upstream-1e-1-4")
    found = {"arm": run.arm, "seed": 0, "measured": experiment.perform(run, "test")}
    assert found["measured"]["place"] == {"row": "upstream", "lr": "1e-1", "loops": "4"}
    assert not experiment.learned(found)
    assert not experiment.steady(found)


def test_the_arm_of_the_release_is_the_release(tmp_path: Path):
    for run in all_runs(stability(), settings(tmp_path)):
        if run.arm.startswith("upstream"):
            fields = run.config.model.to_dict()
            assert {name: fields[name] for name in _UPSTREAM} == _UPSTREAM


def test_byte_entropy_is_that_of_the_scored_bytes():
    targets = [torch.tensor([[5, 5, -100]]), torch.tensor([[7, 9, -100]])]
    assert byte_entropy(targets) == pytest.approx(1.5)


def test_growth_is_the_ratio_of_the_states_by_hand():
    torch.manual_seed(0)
    cfg = MythosConfig(
        vocab_size=9, dim=16, n_heads=2, n_kv_heads=1, attn_type="gqa", prelude_layers=1, coda_layers=0,
        n_experts=4, n_experts_per_tok=2, expert_dim=8, lora_rank=0, max_seq_len=16,
    )  # fmt: skip
    model = OpenMythos(cfg).eval()
    with torch.no_grad():
        for parameter in model.recurrent.block.parameters():
            parameter.zero_()
        model.recurrent.injection.B.fill_(1.0)
    batch = {"ids": torch.arange(8).view(2, 4)}
    near, far = growth(model, batch, 2, 6)
    decay = math.exp(-1)
    assert far / near == pytest.approx((1 - decay**6) / (1 - decay**2), rel=1e-5)


def test_cells_keep_the_order_of_the_records():
    records = [record("b", "1", "4"), record("a", "1", "4"), record("b", "2", "4")]
    assert list(cells(records, "row")) == [("b",), ("a",)]
    assert [len(some) for some in cells(records, "row", "lr").values()] == [1, 1, 1]
