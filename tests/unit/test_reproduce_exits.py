"""The experiments on exits: their arithmetic, their search, and what they make of records."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.accounting import flops_per_token
from open_mythos.config import ConfigError
from open_mythos.inference import exits
from open_mythos.reproduce import exits_decode as ed
from open_mythos.reproduce import exits_measure as em
from open_mythos.reproduce.base import named
from open_mythos.training.config import RunConfig
from open_mythos.training.evaluate import sweep

CFG = MythosConfig(
    vocab_size=259,
    dim=32,
    n_heads=4,
    n_kv_heads=2,
    attn_type="gqa",
    max_seq_len=64,
    max_loop_iters=4,
    prelude_layers=1,
    coda_layers=1,
    n_experts=4,
    n_experts_per_tok=2,
    n_shared_experts=1,
    expert_dim=16,
    lora_rank=0,
)


def test_spearman_is_the_correlation_of_mean_ranks() -> None:
    a, b = torch.tensor([3, 1, 1, 2, 5]), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.9])
    ranks = torch.tensor([[4, 1.5, 1.5, 3, 5], [1, 4, 2.5, 2.5, 5]], dtype=torch.float64)
    assert em.spearman(a, b) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-12)
    assert em.spearman(b, b) == pytest.approx(1)
    assert em.spearman(torch.ones(5), b) == 0


def test_shares_count_loops_and_the_rules_own_decoding() -> None:
    loops, full = torch.tensor([1, 1, 3, 4]), 4
    loop = flops_per_token(CFG, 2, context=8) - flops_per_token(CFG, 1, context=8)
    whole = flops_per_token(CFG, 4, context=8)
    plain = em.shares(CFG, exits.StateChange(0.1), loops, full, 8)
    assert (plain["loops"], plain["loops_share"]) == (2.25, 0.5625)
    assert plain["flops_share"] == pytest.approx(1 - 1.75 * loop / whole)
    head = 2 * 32 * 259
    # Asked after loops 1 to 3, of those that still run: 3 of the four tokens' askings are 1, 1, 3, 3.
    asked = em.shares(CFG, exits.Confidence(0.5, reads="head"), loops, full, 8)
    assert asked["flops_share"] == pytest.approx(plain["flops_share"] + 2 * head / whole)
    gate = exits.Learned(exits.Gate(32, 4), 0.1)
    assert em.shares(CFG, gate, loops, full, 8)["flops_share"] == pytest.approx(
        plain["flops_share"] + 2 * (2 * 33 * 64) / whole
    )
    second = em.shares(CFG, exits.Confidence(0.5, every=2), loops, full, 8)  # after loop 2: 0, 0, 1, 1
    coda = flops_per_token(CFG, 1, context=8) - flops_per_token(CFG.replace(coda_layers=0), 1, context=8)
    assert second["flops_share"] == pytest.approx(plain["flops_share"] + 0.5 * (head + coda) / whole)


@pytest.mark.parametrize("first", [0, 1, 4, 9, 16, 31, 32])
def test_the_search_finds_the_first_that_passes(first: int) -> None:
    tried: list[float] = []

    def point(number: float) -> dict[str, Any]:
        tried.append(number)
        return {"bits": 1.0 if number >= first else 2.0, "loops": number}

    family = em.Family("", lambda x, full: exits.Never(), tuple(range(33)))
    points, chosen = em.search(family, point, 8, 1.5)
    assert chosen == first
    assert len(tried) == len(set(tried)) <= 12
    assert [p["value"] for p in points] == sorted(tried)


def test_the_search_says_when_nothing_passes() -> None:
    family = em.Family("", lambda x, full: exits.Fixed(int(x)), tuple(range(1, 65)), heeds=False)
    points, chosen = em.search(family, lambda x: {"bits": 2.0, "loops": x}, 8, 1.5)
    assert chosen is None
    assert [p["value"] for p in points] == list(range(1, 9))


def test_every_family_makes_rules_that_leave_later_and_later() -> None:
    torch.manual_seed(0)
    model, ids = OpenMythos(CFG).eval(), torch.randint(0, 259, (1, 8))
    with torch.no_grad():
        model.recurrent.act.halt.weight.normal_(std=0.1)
    for name, family in em.FAMILIES.items():
        values = family.values if family.heeds else family.values[:8]
        means = [
            float(exits.forward(model, ids, family.make(x, 8), 8).loops.double().mean())
            for x in (values[0], values[len(values) // 2], values[-1])
        ]
        assert means == sorted(means), name
        assert means[0] < means[-1], name


def text_run(tmp_path: Path) -> RunConfig:
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(
            f"Document {i} says $x$. " * (2 + i % 5), encoding="utf-8"
        )
    fields = dataclasses.asdict(CFG)
    model = {name: fields[name] for name in ("dim", "n_heads", "n_kv_heads", "attn_type", "max_seq_len")}
    rest = ("prelude_layers", "coda_layers", "n_experts", "n_experts_per_tok", "n_shared_experts")
    model |= {name: fields[name] for name in (*rest, "expert_dim", "lora_rank", "max_loop_iters")}
    return RunConfig.from_dict(
        {
            "model": model,
            "data": {"source": str(tmp_path / "text"), "seq_len": 32},
            "loops": {"kind": "fixed", "loops": 4},
            "train": {"steps": 1, "batch_size": 4},
        }
    )


def test_a_text_is_scored_as_the_model_does_and_points_are_kept(tmp_path: Path) -> None:
    config = text_run(tmp_path)
    torch.manual_seed(0)
    model = OpenMythos(config.model.replace(halting="off")).eval()
    text = em.Text(model, config, "validation", 96, 64)
    scored = text.score(exits.Never(), 3)
    rows = text.rows
    with torch.no_grad():
        logits = model(rows["ids"], 3, document_ids=rows["document_ids"])
    asked = rows["targets"] >= 0
    nats = -logits.log_softmax(-1).gather(-1, rows["targets"].clamp(min=0).unsqueeze(-1)).squeeze(-1)[asked]
    assert torch.allclose(scored.nats, nats, atol=1e-5)
    assert (scored.loops == 3).all()
    assert scored.bits == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-5)  # of bytes
    few = dataclasses.replace(config, eval=dataclasses.replace(config.eval, examples=3))
    swept = sweep(model, few, {"loops": {"mean": 4, "max": 4}}, [3], split="validation")
    assert scored.bits == pytest.approx(swept["splits"]["validation"]["values"][0], rel=1e-5)
    kept = em.Kept(tmp_path / "points.json", "a")
    study = em.Study(model, config, 4, 64, kept)
    gate = study.gate(tmp_path / "gate.pt", 128, 10)
    read = study.gate(tmp_path / "gate.pt", 128, 10)
    assert all(torch.equal(a, b) for a, b in zip(gate.parameters(), read.parameters(), strict=True))
    families = {name: em.FAMILIES[name] for name in ("fixed", "kl-second")}
    families["learned"] = em.learned(gate)
    bits, limit, found = study.search(families, 96, 0.01)
    assert limit == pytest.approx(1.01 * bits)
    again = em.Study(model, config, 4, 64, em.Kept(tmp_path / "points.json", "a"))
    again.kept.of = lambda name, measure: json.loads((tmp_path / "points.json").read_text())["points"][name]  # type: ignore[method-assign]
    assert again.search(families, 96, 0.01) == (bits, limit, found)
    assert em.Kept(tmp_path / "points.json", "b").points == {}
    whole, rules = study.report(families, found, text)
    assert [rule["name"] for rule in rules] == list(families)
    for rule in rules:
        assert sum(rule["histogram"]) == len(whole["full"].nats)
        assert rule["bits_ratio"] == pytest.approx(rule["bits"] / whole["full"].bits)
        assert len(rule["loops_by_difficulty"]) == 10
    meanings = study.meanings(exits.StateChange(0.4), 96)
    assert meanings["next"]["loops"] < 4
    assert meanings["next"]["bits"] != meanings["last"]["bits"]
    never = study.meanings(exits.Never(), 96)
    assert never["next"] == pytest.approx(never["last"])
    policies = ed.policies(text, exits.StateChange(0.4), 4, 2, 16)
    assert policies["tokens"] == 32
    assert policies["every"]["rule"] == pytest.approx(policies["one_pass"], rel=1e-4)
    assert policies["every"]["full"]["loops"] == 4 > policies["last"]["rule"]["loops"]
    shown = em.shown_text(text, exits.Fixed(2), 4, tokens=40)
    assert [len(window) for window in shown] == [32, 32]
    assert "".join(token["text"] for token in shown[0]).isprintable()
    assert {token["loops"] for window in shown for token in window} == {2}


def test_consistency_and_decoding_of_a_model() -> None:
    torch.manual_seed(0)
    model, ids = OpenMythos(CFG).eval(), torch.randint(0, 259, (1, 16))
    rule = exits.StateChange(0.3)
    found = ed.consistency(model, ids, rule, 4)
    assert found["loops_differ"] == 0
    assert found["largest_difference"] <= 1e-12
    assert model.embed.weight.dtype == torch.float32
    timed = ed.decode(model, ids, exits.Fixed(1), 4, prompt=13)
    assert timed["loops_share"] == 0.25
    assert timed["tokens"] == 3


def rule_record(name: str, heeds: bool, flops: float, met: bool = True) -> dict[str, Any]:
    search = [
        {"value": v, "bits": 2.0 + 0.1 / v, "loops": float(v), "loops_share": v / 4, "flops_share": flops}
        for v in (1, 2, 3)
    ]
    figures = {"bits": 2.01, "bits_ratio": 1.004, "loops": 1.8, "loops_share": 0.45, "flops_share": flops}
    return {
        "name": name,
        "title": f"by {name}",
        "heeds": heeds,
        "number": 2,
        "met_in_search": met,
        "search": search,
        **figures,
        "histogram": [0, 5, 5, 0, 0],
        "spearman": 0.3 if heeds else None,
        "spearman_two_loops": 0.3 if heeds else None,
        "loops_by_difficulty": [1 + i / 10 for i in range(10)],
    }


def records_of(rules: list[dict[str, Any]], best: dict[str, Any]) -> list[dict[str, Any]]:
    measured = {
        "metric": "bits_per_byte",
        "full": 4,
        "full_bits": 2.0,
        "two_bits": 2.1,
        "full_in_search": 2.0,
        "limit": 2.008,
        "tokens": 10,
        "rules": rules,
        "best": best,
        "text": [[{"text": s, "loops": 1 + i % 4} for i, s in enumerate("A $line$\nand\tmore" * 4)]] * 2,
    }
    return [{"arm": "ours", "seed": seed, "measured": measured} for seed in range(3)]


def titles(figure: Any) -> list[str]:
    return [ax.get_title(loc) for ax in figure.get_axes() for loc in ("left", "center")]


def test_the_best_rule_heeds_the_token_keeps_the_bits_and_costs_least() -> None:
    experiment: Any = named("exits-small")
    rules = [
        rule_record("fixed", False, 0.1),
        rule_record("kl", True, 0.9),
        rule_record("state", True, 0.5),
        rule_record("top", True, 0.2, met=False),
    ]
    best = experiment._best(rules)
    assert best["name"] == "state"
    records = records_of(rules, best)
    assert experiment.judge(records).passed
    table = experiment.summary(records)
    assert [row["title"] for row in table["rows"]] == ["by fixed", "by kl", "by state", "by top"]
    assert table["rows"][2]["cells"][3]["median"] == pytest.approx(0.004)
    assert table["rows"][0]["cells"][4] is None
    assert "By state: loops by difficulty" in titles(experiment.draw(records))
    other = records_of(rules, {**best, "name": "kl", "title": "by kl"})[:1]
    assert "Best rule of each seed: loops by difficulty" in titles(experiment.draw([*records, *other]))
    worse = {**best, "spearman": 0.0}
    assert not experiment.judge(records_of(rules, worse)).passed


def test_families_are_checked() -> None:
    experiment: Any = named("exits-small")
    model = OpenMythos(CFG.replace(halting="off"))
    with pytest.raises(ConfigError, match=r"'luck' is not allowed: each must be one of fixed, state, act"):
        experiment._families(model, {"families": ["luck"]})
    with pytest.raises(ConfigError, match="must name a rule that heeds the token"):
        experiment._families(model, {"families": ["fixed", "act"]})
    assert list(experiment._families(model, {"families": ["act", "learned"]})) == ["learned"]


def test_halting_is_measured_judged_and_drawn() -> None:
    experiment: Any = named("halting")
    config = RunConfig.from_dict(
        {
            **experiment.sections,
            "eval": {"examples": 8, "loops": [4]},
            "data": {"source": "parity", "length": 6},
        }
    )
    torch.manual_seed(0)
    model = OpenMythos(config.model).eval()

    @dataclasses.dataclass
    class Run:
        config: RunConfig
        record: dict[str, Any]
        options: dict[str, Any]

    measured = experiment.measure(Run(config, {"loops": {"max": 12}}, {"level": 0}), model, "validation")
    assert sum(measured["histogram"]) == 8 * 6
    assert measured["lost"] == pytest.approx(measured["last"] - measured["halting"])
    fine = {**measured, "mean_exit": 6.0, "alive": 1.0, "lost": 0.0, "last": 0.97}
    dead = {**fine, "mean_exit": 12.0, "alive": 0.0}
    records = [{"arm": "ours", "seed": i, "measured": fine} for i in range(20)]
    assert experiment.judge(records).passed
    for bad in (dead, {**fine, "lost": 0.006}, {**fine, "last": 0.5}):
        assert not experiment.judge([*records[1:], {"arm": "ours", "seed": 0, "measured": bad}]).passed
    assert experiment.summary(records)["rows"][0]["cells"][0]["median"] == 6.0
    assert experiment.draw(records).get_axes()
