"""The articles' scripts as functions do what the printed code does, and the command line runs what it is told."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.reproduce import articles
from open_mythos.reproduce.articles import CHAIN_LOOPS, PARITY_LOOPS, chain_script, parity_script
from open_mythos.reproduce.base import named
from open_mythos.reproduce.plan import Settings, all_runs

PRINTED = Path(__file__).resolve().parents[1] / "integration" / "test_articles.py"
TINY = {"dim": 16, "n_heads": 2, "expert_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "lora_rank": 1}


def printed() -> Any:
    """The articles' text, beside the test that runs it."""
    spec = importlib.util.spec_from_file_location("printed_articles", PRINTED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parity_is_the_printed_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights after the same steps, to the bit."""
    built: list[OpenMythos] = []

    def build(fields: dict[str, Any]) -> OpenMythos:
        built.append(OpenMythos(MythosConfig(**fields)))
        return built[-1]

    found = parity_script(5, 3, TINY, bits=6, rows=8, build=build)
    theirs = printed()
    torch.manual_seed(5)
    model = OpenMythos(built[0].cfg)
    short = theirs.PARITY.replace("range(600)", "range(3)")
    monkeypatch.setattr(theirs, "DEVICE", "cpu")
    names = theirs.run(short, {"torch": torch, "model": model, "make_batch": theirs.parity_batches(6)})
    assert found["loss"] == round(float(names["loss"].detach()), 5)
    for (name, ours), parameter in zip(built[0].named_parameters(), names["model"].parameters(), strict=True):
        assert torch.equal(ours, parameter), name


def test_chain_models_and_examples_are_the_printed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = printed()
    names: dict[str, Any] = {"MythosConfig": MythosConfig, "OpenMythos": OpenMythos, "torch": torch}
    built = theirs.run(theirs.MODELS, {**names, "device": "cpu"})
    capsys.readouterr()
    for attention in ("mla", "gqa"):
        assert MythosConfig(**articles.CHAIN_MODELS[attention]) == built[f"cfg_{attention}"]

    example = theirs.CHAIN[: theirs.CHAIN.index("class ChainDataset")]
    random.seed(3)
    data = theirs.run(example, {"random": random, "cfg_mla": built["cfg_mla"]})
    wanted = [data["make_example"](random.randint(2, 5)) for _ in range(50)]
    random.seed(3)
    # The same rules in another order of draws: compare what is drawn, not the stream.
    ids, answers = articles._chains(50, 2, 5, 32)
    for row, answer in [*wanted, *zip(ids.tolist(), answers.tolist(), strict=True)]:
        digits = [token - 10 for token in row if token >= 10]
        assert row == [1, *(10 + d for d in digits), 2] + [0] * (30 - len(digits))
        assert answer == 10 + sum(digits) % 7
        assert 2 <= len(digits) <= 5


def test_what_a_script_reports() -> None:
    found = parity_script(0, 2, TINY, bits=5, rows=16)
    assert set(found["accuracy"]) == set(found["evaluating"]) == set(map(str, PARITY_LOOPS))
    assert sum(found["shares"]) == pytest.approx(1, abs=1e-3)
    assert found["finite"] is True
    chain = chain_script(0, 1, TINY, examples=70, rows=20, read="last")
    assert set(chain["accuracy"]) == set(chain["longer"]) == set(map(str, CHAIN_LOOPS))
    assert json.loads(json.dumps([found, chain])) == [found, chain]


def test_reading_at_eq_or_at_the_end() -> None:
    ids = torch.tensor([[1, 11, 12, 2, 0, 0], [1, 11, 12, 13, 14, 2]])
    logits = torch.arange(12.0).reshape(2, 6, 1)
    assert articles._read(logits, ids, "eq").flatten().tolist() == [3, 11]
    assert articles._read(logits, ids, "last").flatten().tolist() == [5, 11]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parity_script(0, size="big"), "size = 'big' is not allowed: it must be 'tutorial' or"),
        (lambda: chain_script(0, attention="x"), "attention = 'x' is not allowed: it must be 'mla' or"),
        (lambda: chain_script(0, 0, TINY, read="x"), "read = 'x' is not allowed: it must be 'eq' or 'last'"),
        (lambda: articles._settings(["a"]), "setting 'a' is not allowed: it must be key=value"),
        (lambda: articles._settings(["train.lr=1"]), "setting 'train.lr=1' is not allowed"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_arms_hold_common_settings_and_their_own() -> None:
    found = articles._arms(["ours:", "slow: script.lr=1e-4 halting=off"], ["state_norm=true"])
    assert found["ours"] == {"model": {"state_norm": True}, "script": {}}
    assert found["slow"] == {
        "model": {"state_norm": True, "halting": "off"},
        "script": {"lr": 1e-4},
    }
    assert list(articles._arms([], ["dim=16"])) == ["dim=16"]


def test_a_run_that_fails_is_a_record_with_its_error() -> None:
    settings = {"model": TINY, "script": {"steps": 1, "bits": 4, "rows": 4}}
    job = {"script": "parity", "arm": "a", "seed": 1, "settings": settings}
    assert "error" not in articles._job(job)
    failed = articles._job({**job, "settings": {**settings, "model": {**TINY, "dim": 0}}})
    assert failed["error"].startswith("ConfigError: dim = 0 is not allowed")
    assert failed["settings"]["script"] == settings["script"]


def test_the_table_has_medians_and_what_failed() -> None:
    def record(seed: int, at: float) -> dict[str, Any]:
        curve = {str(T): at for T in PARITY_LOOPS}
        rest = {"shares": [0.5, 0.5], "ms_per_step": 30.0, "loss": 0.5, "parameters": 9}
        return {"script": "parity", "arm": "x", "seed": seed, "accuracy": curve, "evaluating": curve, **rest}

    failed = {"script": "parity", "arm": "y", "seed": 0, "error": "ValueError: no"}
    table = articles._table([record(0, 0.5), record(1, 0.7), record(2, 0.9), failed])
    assert "T3 0.700" in table
    assert "range T3 0.50-0.90" in table
    assert "y ValueError: no" in table


def test_the_experiment_runs_both_scripts_with_either_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = named("articles")
    seen: list[tuple[str, int, str, Any]] = []
    longer: list[float] = []

    def script(name: str) -> Any:
        def run(seed: int, length: int, **given: Any) -> dict[str, Any]:
            seen.append((name, seed, given.get("read", ""), given["build"](TINY).cfg.halting))
            changed = dict(given["model_overrides"])
            longer.append(changed.pop("extra_loops", 0.0))
            assert changed == {"qk_norm": True}
            assert given["rows"] == 400
            curve = {str(T): 0.1 * length + 0.01 * T for T in given["loops"]}
            rest = {"shares": [0.3, 0.7], "finite": True, "seconds": 1.0}
            return {"accuracy": curve, "longer": curve, **rest}

        return run

    monkeypatch.setattr(articles, "parity_script", script("parity"))
    monkeypatch.setattr(articles, "chain_script", script("chain"))
    settings = Settings(
        runs=tmp_path, out=tmp_path, seeds=2, quick=False, changes=(("model", "qk_norm", True),)
    )
    records = [
        {"arm": run.arm, "seed": run.seed, "loops": None, "measured": experiment.perform(run, "test")}
        for run in all_runs(experiment, settings)
    ]
    ours, upstream = MythosConfig().halting, MythosConfig.upstream().halting
    assert seen[:3] == [("parity", 0, "", ours), ("chain", 42, "", ours), ("chain", 42, "last", ours)]
    assert [call[3] for call in seen[3:6]] == 3 * [upstream]
    assert [call[3] for call in seen[6:9]] == 3 * [ours]
    assert seen[9:11] == [("parity", 1, "", ours), ("chain", 43, "", ours)]
    assert longer[:18] == 2 * [*6 * [0.0], *3 * [3.0]]
    verdict = experiment.judge(records)
    assert [figure["met"] for figure in verdict.figures] == [True, True, True]
    table = experiment.summary(records)
    assert len(table["rows"]) == 3 * 4
    assert len(table["rows"][0]["cells"]) == len(table["columns"]) == len(table["format"])
    assert experiment.draw(records).axes
