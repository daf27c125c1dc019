"""Experiments on reasoning tasks: fair arms, one pass that equals many, and figures computed as the page says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.accounting import flops_per_token, parameters
from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.reproduce.base import Experiment, Run, named, value
from open_mythos.reproduce.plan import Settings, all_runs
from open_mythos.reproduce.tasks import Extrapolation, kept, levels, needed, readouts
from open_mythos.tasks import Task, seeded_generator
from open_mythos.training.loops import loop_distribution
from open_mythos.training.sources import train_stream

TASKS = ("parity", "digit_chain", "khop", "addition")
SMALL = {"vocab_size": 4, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 64}
SMALL |= {"n_experts": 2, "n_experts_per_tok": 1, "expert_dim": 8, "prelude_layers": 1, "coda_layers": 1}
SIZES = {
    "vocab_size",
    "dim",
    "n_heads",
    "n_kv_heads",
    "max_seq_len",
    "max_loop_iters",
    "attn_type",
    "lora_rank",
}
SIZES |= {"prelude_layers", "coda_layers", "n_experts", "n_shared_experts", "n_experts_per_tok", "expert_dim"}


def runs(name: str, tmp_path: Path, **settings: Any) -> dict[str, Run]:
    """The first seed of each arm."""
    settings = {"runs": tmp_path, "out": tmp_path, "seeds": 1, **settings}
    return {run.arm: run for run in all_runs(named(name), Settings(**settings))}


def mean_loops(run: Run) -> float:
    plan = run.config.loops
    return loop_distribution(plan.kind, **plan.options).mean


def widest(task: Task) -> int:
    level = getattr(task, task.difficulty)
    return task.train_width(level if isinstance(level, int) else level[1])


@pytest.mark.parametrize("name", TASKS)
def test_arms_are_as_fair_as_their_titles_say(name: str, tmp_path: Path) -> None:
    arms = runs(name, tmp_path)
    ours = arms["ours"].config
    tokens = widest(ours.data.task())

    def flops(arm: str) -> float:
        cfg, mean = arms[arm].config.model, mean_loops(arms[arm])
        assert mean == int(mean)
        return flops_per_token(cfg, int(mean), context=(tokens + 1) // 2)

    assert mean_loops(arms["ours"]) <= 8
    assert parameters(arms["equal_parameters"].config.model) == parameters(ours.model)
    assert arms["equal_parameters"].loops == arms["equal_flops"].loops == [1]
    assert flops("equal_flops") == pytest.approx(flops("ours"), rel=0.02)
    assert flops("upstream") == pytest.approx(flops("ours"), rel=0.02)
    assert parameters(arms["upstream"].config.model).total == pytest.approx(
        parameters(ours.model).total, rel=0.02
    )
    for run in arms.values():
        same = [getattr(run.config, part) == getattr(ours, part) for part in ("optim", "eval")]
        assert all(same)
        assert replace(run.config.train, seed=0) == replace(ours.train, seed=0)
        assert run.config.data == ours.data or run.arm == "end_only"


@pytest.mark.parametrize("name", TASKS)
def test_the_upstream_arm_is_the_preset(name: str, tmp_path: Path) -> None:
    """A default that changes must be set back in the arm: then this fails and says which."""
    found = runs(name, tmp_path)["upstream"].config.model
    sizes = {key: setting for key, setting in found.to_dict().items() if key in SIZES}
    assert found == MythosConfig.upstream(**sizes).replace(ffn_dim=found.ffn_dim)


@pytest.mark.parametrize("name", TASKS)
def test_levels_are_new_and_fit_the_model(name: str, tmp_path: Path) -> None:
    run = runs(name, tmp_path)["ours"]
    task = run.config.data.task()
    train_stream(run.config)  # refuses what would end the run after its training
    asked = levels(task, run.config.eval.levels, run.options["ranges"])
    assert {str(t.level) for t in named(name).targets} <= set(asked)
    metrics = [t.metric for t in named(name).targets if t.metric]
    assert {path.split(".")[1] for path in metrics} <= set(asked)
    low, high = task._check_level(getattr(task, task.difficulty))
    assert max(map(int, run.config.eval.levels)) > high >= low


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_every_target_is_among_what_is_measured(name: str, quick: bool, tmp_path: Path) -> None:
    experiment = named(name)
    run = runs(name, tmp_path, quick=quick)["ours"]
    asked = levels(run.config.data.task(), run.config.eval.levels, run.options["ranges"])
    curves = dict.fromkeys(asked, [1.0] * len(run.loops))
    measured = {"metric": "accuracy", "better": "higher", "loops": run.loops, "curves": curves}
    measured |= {"kept": dict.fromkeys(asked, 0.0)}
    record = {"arm": "ours", "seed": 0, "measured": measured, "loops": {"mean": 8.0, "max": 15}}
    figures = experiment.judge([record]).figures
    assert len(figures) == len(experiment.targets)
    assert all(figure["n"] == 1 for figure in figures)


@pytest.mark.parametrize("halting", ["select", "off", "average", "upstream"])
@pytest.mark.parametrize("initial", ["zero", "prelude", "random"])
def test_one_pass_reads_out_what_a_call_for_each_count_gives(halting: Any, initial: Any) -> None:
    torch.manual_seed(0)
    cfg = MythosConfig(**SMALL, halting=halting, initial_state=initial, act_threshold=0.8)  # type: ignore[arg-type]
    model = OpenMythos(cfg).eval()
    torch.nn.init.normal_(model.recurrent.act.halt.weight)
    ids = torch.randint(0, 4, (3, 24))
    found = list(readouts(model, ids, [7, 1, 3]))
    assert [count for count, _ in found] == [1, 3, 7]
    with torch.inference_mode():
        for count, logits in found:
            torch.testing.assert_close(logits, model(ids, count))
    assert not torch.allclose(found[0][1], found[2][1])


@pytest.mark.parametrize(
    ("curve", "least", "loss"),
    [
        ([0.5, 0.8, 0.996, 1.0, 0.9], 4, -0.1),
        ([0.5, 1.0, 1.0, 1.0, 0.99], 2, 0.0),
        ([0.5, 0.6, 0.7, 0.8, 0.9], 16, None),
        ([1.0, 1.0, 0.7, 1.0, 1.0], 1, -0.3),
    ],
)
def test_loops_needed_and_what_four_times_as_many_keep(
    curve: list[float], least: int, loss: float | None
) -> None:
    counts = [1, 2, 4, 8, 16]
    assert needed(counts, curve, 0.005) == least
    assert kept(counts, curve, 0.005) == (None if loss is None else pytest.approx(loss))


class Oracle(torch.nn.Module):
    """Answers parity right from 4 loops on, and only the first bits before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 4)
        self.cfg = MythosConfig(**SMALL, halting="average")  # type: ignore[arg-type]

    def context(self, ids: torch.Tensor) -> None:
        return None

    def prelude(self, ids: torch.Tensor, ctx: None) -> torch.Tensor:
        return (ids - 1).masked_fill(ids == 3, 0)

    def initial_state(self, e: torch.Tensor) -> torch.Tensor:
        return e

    def think(self, h: torch.Tensor, e: torch.Tensor, ctx: None, loops: range) -> torch.Tensor:
        answers = e.cumsum(1) % 2 + 1
        if len(loops) < 4:
            answers[:, 3:] = 0
        return answers

    def coda(self, h: torch.Tensor, ctx: None) -> torch.Tensor:
        return torch.nn.functional.one_hot(h, 4).float()


@pytest.mark.parametrize("score", ["token", "sequence", "last_token"])
def test_measure_scores_every_level_at_every_count(score: str, tmp_path: Path) -> None:
    run = runs("parity", tmp_path, quick=True)["ours"]
    run.sections["eval"] |= {"levels": [8, 20], "loops": [2, 4, 16], "examples": 40}
    run.options.update(score=score, ranges=[[3, 5]], tokens=400)  # type: ignore[attr-defined]
    experiment = named("parity")
    assert isinstance(experiment, Extrapolation)
    found = experiment.measure(run, Oracle(), "validation")  # type: ignore[arg-type]
    assert found["loops"] == [2, 4, 16]
    assert list(found["curves"]) == ["trained", "8", "20", "3-5"]
    assert found["rows"] == {"trained": 40, "8": 40, "20": 19, "3-5": 40}
    share = 2 / 8 if score == "token" else 0.0  # BOS and two bits
    assert found["curves"]["8"] == [pytest.approx(share), 1.0, 1.0]
    assert found["needed"]["8"] == 4
    assert found["kept"] == {"trained": 0.0, "8": 0.0, "20": 0.0, "3-5": 0.0}
    record = {"arm": "ours", "seed": 0, "measured": found, "loops": {"mean": 8, "max": 15}}
    assert value(record, level="3-5") == 1.0
    assert value(record, metric="kept.8") == 0.0


def test_an_unknown_score_is_refused(tmp_path: Path) -> None:
    run = runs("parity", tmp_path)["ours"]
    run.options.update(score="bits")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"options.score = 'bits' is not allowed"):
        named("parity").measure(run, Oracle(), "validation")  # type: ignore[arg-type]


def test_the_verdict_needs_depth_and_no_overthinking() -> None:
    experiment: Experiment = named("parity")
    counts = [8, 16, 32, 64, 128, 256]

    def record(seed: int, at: dict[str, list[float]]) -> dict[str, Any]:
        curves = {"64": [0.9, *5 * [0.999]], "128": [0.8, 0.9, *4 * [0.995]], "512": 6 * [0.6], **at}
        measured = {
            "metric": "accuracy",
            "better": "higher",
            "loops": counts,
            "curves": curves,
            "kept": {name: kept(counts, curve, 0.005) for name, curve in curves.items()},
        }
        return {"arm": "ours", "seed": seed, "measured": measured, "loops": {"mean": 8.0, "max": 15}}

    assert experiment.judge([record(seed, {}) for seed in range(6)]).passed
    spoilt = {
        "low at 64": {"64": 6 * [0.99]},
        "no use of depth": {"64": 6 * [0.999]},
        "overthinks": {"64": [0.9, 0.999, 0.999, 0.9, 0.9, 0.9]},
        "low at 128": {"128": [0.8, *5 * [0.98]]},
    }
    for at in spoilt.values():
        assert not experiment.judge([record(seed, at) for seed in range(6)]).passed


@pytest.mark.parametrize("name", TASKS)
def test_the_trainer_draws_what_the_config_says(name: str, tmp_path: Path) -> None:
    config = runs(name, tmp_path)["ours"].config
    task = config.data.task()
    low, high = task._check_level(getattr(task, task.difficulty))
    for level in range(low, high + 1):  # no batch of one difficulty finds its split too small
        task.sample(config.train.batch_size, generator=seeded_generator(0), **{task.difficulty: level})
    stream = train_stream(config)[0]
    batches = [next(stream) for _ in range(20)]
    assert {len(batch["ids"]) for batch in batches} == {config.train.batch_size}
    assert max(batch["ids"].shape[1] for batch in batches) <= widest(task)
    assert max(int(batch["ids"].max()) for batch in batches) < config.model.vocab_size == task.vocab_size
