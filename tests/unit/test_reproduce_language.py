"""The language experiment: arms of equal size and cost, what a rise is, and the exponent of loops against layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from open_mythos import MythosConfig, OpenMythos
from open_mythos.accounting import parameters
from open_mythos.reproduce import base, language
from open_mythos.reproduce.plan import Settings, all_runs
from open_mythos.training.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def configs(place: str = "reproduce") -> dict[str, RunConfig]:
    experiment = base.named("language", CONFIGS / place)
    settings = Settings(out=Path("out"), runs=Path("runs"))
    return {run.arm: run.config for run in all_runs(experiment, settings) if run.seed == 0}


@pytest.fixture(scope="module")
def arms() -> dict[str, RunConfig]:
    return configs()


def test_the_dense_arms_have_one_pass_and_nothing_routed(arms: dict[str, RunConfig]) -> None:
    for name in ("equal_parameters", "equal_flops", "dense_4", "dense_8"):
        config = arms[name]
        assert (config.loops.kind, config.loops.options["loops"]) == ("fixed", 1)
        assert config.model.n_experts == config.model.n_experts_per_tok == 1
        assert config.model.expert_dim == config.model.dense_dim
        looped = ("update_norm", "state_norm", "previous_heads", "alibi", "lora_rank", "loop_embedding")
        assert not any(getattr(config.model, name) for name in looped)


def test_equal_parameters_and_equal_flops_are_so_within_two_percent(arms: dict[str, RunConfig]) -> None:
    size = {name: parameters(config.model).total for name, config in arms.items()}
    cost = {name: language.training_flops(config) for name, config in arms.items()}
    assert 95e6 < size["ours"] < 110e6
    assert size["equal_parameters"] == pytest.approx(size["ours"], rel=0.02)
    assert cost["equal_flops"] == pytest.approx(cost["ours"], rel=0.02)


def test_every_arm_sees_the_same_tokens(arms: dict[str, RunConfig]) -> None:
    first = arms["ours"]
    for config in arms.values():
        assert (config.data, config.train) == (first.data, first.train)
        assert config.eval == first.eval
    tokens = (
        first.train.steps * first.train.batch_size * first.train.accumulate * first.data.options["seq_len"]
    )
    assert tokens >= 100_000_000
    assert first.eval.examples * first.data.options["seq_len"] >= 2_000_000
    mean = language.mean_depth(first)
    assert {1, mean, 4 * mean} <= set(first.eval.loops)


@pytest.mark.parametrize(("place", "arm"), [("reproduce", "upstream"), ("search", "upstream_3e-4")])
def test_the_upstream_arm_is_the_preset(place: str, arm: str) -> None:
    model = configs(place)[arm].model
    sizes = {name: value for name, value in model.to_dict().items() if name in SIZES}
    ours = MythosConfig.upstream(**sizes)
    assert model == ours.replace(ffn_dim=model.ffn_dim)  # a width, the same as in the other arms


SIZES = (
    "vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "max_loop_iters", "prelude_layers", "coda_layers",
    "attn_type", "n_experts", "n_shared_experts", "n_experts_per_tok", "expert_dim", "lora_rank", "eos_token_id",
)  # fmt: skip


def test_the_search_differs_from_the_report_in_length_only() -> None:
    report, search = configs()["ours"], configs("search")["ours"]
    assert search.model == report.model
    assert search.loops == report.loops
    assert search.data == report.data
    assert search.parallel == report.parallel
    assert search.train.steps < report.train.steps


def test_active_parameters_are_those_of_a_token() -> None:
    config = MythosConfig(vocab_size=64, dim=32, n_heads=2, n_kv_heads=1, attn_type="gqa", prelude_layers=2,
                          coda_layers=1, n_experts=8, n_experts_per_tok=2, expert_dim=16)  # fmt: skip
    model = OpenMythos(config)
    once, block = language.active(config)
    named = dict(model.named_parameters())
    looped = sum(p.numel() for name, p in named.items() if name.startswith("recurrent."))
    rest = sum(
        p.numel() for name, p in named.items() if not name.startswith(("recurrent.", "embed.", "head."))
    )
    assert once == rest
    assert block == looped - 6 * 3 * 32 * 16


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ([2.0, 1.9, 1.8, 1.7], 0.0),
        ([2.0, 1.9, 1.919, 1.5], 0.01),
        ([2.0, 1.8, 1.8, 9.0], 0.0),
        ([2.0, 1.9, math.nan, 1.5], math.inf),
    ],
)
def test_a_rise_is_over_the_least_before_it_and_within_reach(bits: list[float], expected: float) -> None:
    assert language.rise([1, 2, 4, 64], bits, 32) == pytest.approx(expected)


def bits_of(size: float) -> float:
    return 2.0 - 0.1 * math.log(size / 1e6)


def measured(loops: list[int], bits: list[float], once: int, block: int) -> dict[str, Any]:
    curves = {"loops": loops, "better": "lower", "curves": {"trained": bits}}
    return {**curves, "once": once, "block": block, "mean": 8.0}


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_the_exponent_that_made_the_figures_is_found_again(phi: float) -> None:
    dense = [(n * 10**6, bits_of(n * 1e6)) for n in (10, 30, 60)]
    for loops in (2, 8):
        bits = bits_of(8e6 + loops**phi * 5e6)
        assert language.exponent(dense, 8_000_000, 5_000_000, loops, bits) == pytest.approx(phi, abs=1e-9)


def test_exponents_come_from_the_dense_arms_of_the_records() -> None:
    sizes = {"small": (10_000_000, 2_000_000), "large": (40_000_000, 8_000_000)}
    records = [
        {"arm": name, "seed": 0, "measured": measured([1], [bits_of(sum(size))], *size)}
        for name, size in sizes.items()
    ]
    ours = [bits_of(8e6 + t**0.5 * 5e6) for t in (1, 2, 8, 32)]
    curve = measured([1, 2, 8, 32], ours, 8_000_000, 5_000_000)
    records += [{"arm": "ours", "seed": seed, "measured": curve} for seed in (0, 1)]
    found = language.exponents(records, "ours")
    assert list(found) == [2, 8]  # not at one loop, and not beyond twice the mean
    assert found[8] == [pytest.approx(0.5)] * 2
    assert language.exponents(records[1:], "ours") == {}


def test_no_exponent_where_the_loops_are_worth_less_than_nothing() -> None:
    dense = [(10_000_000, 2.0), (30_000_000, 1.9)]
    assert language.exponent(dense, 20_000_000, 5_000_000, 4, 2.5) is None
    assert language.exponent([(1, 1.0), (2, 1.0)], 1, 1, 4, 1.0) is None


def test_the_figure_and_table_take_any_arms() -> None:
    experiment = base.named("language", CONFIGS / "reproduce")

    def record(arm: str, loops: list[int], bits: list[Any]) -> dict[str, Any]:
        found = measured(loops, bits, 8_000_000, 5_000_000) | {
            "metric": "bits_per_byte", "rise": 0.0, "best_over_mean": loops[-1] / 8, "train_flops": 1e9,
            "unique_tokens": 10**6, "epochs": 2.0, "scored_tokens": 10**6,
        }  # fmt: skip
        return {"arm": arm, "seed": 0, "measured": found, "parameters": 10**8, "tokens": 2 * 10**6}

    ours = record("ours", [1, 8, 32], [2.0, 1.5, 1.4])
    dense = [record("equal_flops", [1], [1.45]), record("dense_4", [1], [1.9])]
    lost = record("upstream", [1, 8, 32], [1.9, None, None])
    lost["measured"] |= {"rise": None, "best_over_mean": 1 / 8}
    gone = record("fixed", [1, 8, 32], [None, None, None])
    gone["measured"] |= {"rise": None, "best_over_mean": None}
    rows = experiment.summary([ours, lost, gone])["rows"]
    assert [row["cells"][-1] for row in rows] == ["0.00 %", "not finite", "not finite"]
    assert [row["cells"][5]["median"] for row in rows] == [1.4, 1.9, None]
    experiment.draw([ours, lost, gone])
    for records in ([ours], dense, [ours, *dense]):
        figure = experiment.draw(records)
        lines = list(figure.axes[1].lines)
        assert len(lines) == len(records)
        low, high = figure.axes[1].get_ylim()
        assert low < min(min(r["measured"]["curves"]["trained"]) for r in records) < high
        rows = experiment.summary(records)["rows"]
        assert [row["arm"] for row in rows] == [r["arm"] for r in records]
        assert rows[0]["cells"][5]["median"] == min(records[0]["measured"]["curves"]["trained"])
