"""The page says what the result files say, and no more; figures and table need nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from open_mythos import cli
from open_mythos.config import ConfigError
from open_mythos.reproduce import base, pages, results
from open_mythos.reproduce.command import _folders, _list
from open_mythos.reproduce.figures import quality
from open_mythos.reproduce.plan import Settings, all_runs
from open_mythos.reproduce.runs import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "reproduce"
TOY = Path(__file__).parent / "toy_experiment.toml"


def record(arm: str, seed: int, best: float | None, loops: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    values = [0.5, 0.6, best][: len(loops)]
    return {
        "arm": arm,
        "seed": seed,
        "measured": {
            "metric": "accuracy",
            "better": "higher",
            "unit": "bits",
            "trained": "8",
            "loops": list(loops),
            "curves": {"trained": values, "12": values, "16": values},
        },
        "loops": {"mean": 1.5, "max": 2},
        "device": "CPU",
        "torch": "2.13.0",
        "open_mythos": "1",
        "date": "2030-01-01",
    }


RECORDS = [
    *(record("ours", seed, best) for seed, best in enumerate((0.9, 0.99995))),
    *(record("once", seed, None, (1,)) for seed in range(2)),
    record("few", 0, None),
]


def result(folder: Path, records: list[dict[str, Any]] = RECORDS, **asked: Any) -> dict[str, Any]:
    """The toy's result with these records, written as NAME.json."""
    path = folder / "toy.toml"
    path.write_text(TOY.read_text(encoding="utf-8"), encoding="utf-8")
    settings = Settings(runs=folder / "runs", out=folder / "results", **asked)
    toy = base.load(path)
    failed = [{"arm": "few", "seed": 0, "error": "it broke"}] if asked.get("quick") else []
    made = results.build(toy, settings, all_runs(toy, settings), records, failed)
    settings.out.mkdir(exist_ok=True)
    write_json(results.path_of("toy", settings), made)
    path.unlink()  # what follows has the result alone
    return made


def test_a_page_says_which_pythons_the_runs_had(tmp_path: Path) -> None:
    """Some experiments learn the text that comes with it."""
    older = [each | {"python": "3.11.7"} for each in RECORDS[:1]]
    newer = [each | {"python": "3.12.3"} for each in RECORDS[1:3]]
    result(tmp_path, [*older, *newer, *RECORDS[3:]])
    text = pages.page(results.read_all(tmp_path / "results"), Path())
    assert "torch 2.13.0; Python 3.11.7 (1 run), 3.12.3 (2 runs), not noted (2 runs). " in text


def test_page_and_figures_come_from_the_result_file_alone(tmp_path: Path) -> None:
    made = result(tmp_path)
    out = tmp_path / "results"
    assert [path.name for path in pages.write_pages(out)] == ["toy.png", "results.md"]
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text == pages.page(results.read_all(out), Path())
    assert "| [Toy parity](#toy-parity) | ≥ 10 % | met | 95 % (90 % to 100 %) |" in text
    assert "**Verdict: met.**" in text
    assert "| one loop | 8 bits (as trained) | 50 % | 50 % | 1 | 50 % |" in text
    assert "Repeat: `mythos reproduce toy`. Made on 2030-01-01: CPU; torch 2.13.0." in text
    assert "![Toy parity](toy.png)" in text
    before = (out / "toy.png").read_bytes()
    pages.write_pages(out)
    assert (out / "toy.png").read_bytes() == before
    made["runs"][0]["measured"]["curves"]["16"][2] = 0.7
    assert pages.figure(made) != before


def test_the_page_says_what_keeps_a_result_from_being_the_claims(tmp_path: Path) -> None:
    result(tmp_path, RECORDS[:2], quick=True, split="validation", changes=(("optim", "lr", 0.5),))
    out = tmp_path / "results"
    (text,) = [pages.page(results.read_all(out), Path("x"))]
    for words in (
        "Verdict: unfinished",
        "a toy run",
        "Measured on the validation split",
        "Changed: `optim.lr=0.5`",
        "2 of 3 runs have finished",
        "- failed: few, seed 0: it broke",
        "Repeat: `mythos reproduce toy --split validation --quick --set optim.lr=0.5`",
        "](x/toy-validation.png)",
    ):
        assert words in text, words


def test_the_figure_tells_how_many_seeds_its_arms_have() -> None:
    def title(records: list[dict[str, Any]]) -> str:
        return quality(records, {"ours": "a", "once": "b", "few": "c"}, "Toy").get_suptitle()

    assert title(RECORDS) == "Toy, median and range of 1 or 2 seeds"
    assert title(RECORDS[:2]) == "Toy, median and range of 2 seeds"
    assert title(RECORDS[-1:]) == "Toy"


def test_the_seeds_of_many_arms_are_told_by_their_number() -> None:
    arms = [{"title": f"arm {i}", "seeds": list(range(3 if i < 14 else 0))} for i in range(30)]
    assert pages._arms({"arms": arms}) == "Seeds: 3 for 14 arms, 0 for 16 arms."
    assert pages._arms({"arms": arms[:14]}) == "Seeds: 3 for each arm."
    assert pages._arms({"arms": arms[13:15]}) == "Seeds: arm 13 3, arm 14 0."


def test_the_readme_picture_is_our_own_arm_on_parity(tmp_path: Path) -> None:
    made = result(tmp_path)
    out = tmp_path / "results"
    write_json(out / "parity.json", {**made, "name": "parity"})
    written = {path.name for path in pages.write_pages(out)}
    assert written == {"toy.png", "parity.png", "readme.png", "results.md"}
    before = (out / "readme.png").read_bytes()
    parity = {**made, "file": "parity"}
    parity["runs"][2]["measured"]["curves"]["16"][0] = 0.9  # another arm's
    assert pages.readme_picture([parity]) == before
    parity["runs"][0]["measured"]["curves"]["16"][0] = 0.9
    assert pages.readme_picture([parity]) != before
    assert pages.readme_picture([{**parity, "file": "khop"}]) is None
    assert pages.readme_picture([{**parity, "runs": parity["runs"][2:]}]) is None


def test_where_the_page_goes() -> None:
    assert pages.page_path(Path("docs/results/reproduce")) == Path("docs/results.md")
    assert pages.page_path(Path("elsewhere")) == Path("elsewhere/results.md")


def test_list_shows_claims_verdicts_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(tmp_path)
    for name in ("toy", "other"):
        (tmp_path / f"{name}.toml").write_text(TOY.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "--list", "--configs", str(tmp_path), "--out", str(tmp_path / "results")])
    assert not stop.value.code
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    claim = "At least 10 % of 12 bits."
    assert ["other", claim, "≥ 10 %", "not run"] in cells
    assert ["toy", claim, "≥ 10 %", "met", "95 % (90 % to 100 %)"] in cells


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("parrity",), "experiment 'parrity' is not allowed: configs/reproduce has no such experiment"),
        (("toy", "--seeds", "0"), "seeds = 0 is not allowed"),
        (("toy", "--arms", "ours,twice"), "arm 'twice' is not allowed"),
        (("toy", "--split", "train"), "split = 'train' is not allowed"),
        (("toy", "--set", "lr=3"), "override 'lr=3' is not allowed"),
        (("toy", "--time-limit", "-1"), "time_limit = -1.0 is not allowed"),
        (("--pages", "--out", "nowhere"), "out = 'nowhere' is not there"),
    ],
)
def test_bad_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(TOY.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *args, "--configs", "."])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()


def test_only_what_counts_goes_where_the_page_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = Path("runs/reproduce"), Path("runs/reproduce-results")
    assert _folders(False, "test", [], None) == elsewhere  # not in a checkout
    Path("docs/results").mkdir(parents=True)
    real = Path("docs/results/reproduce")
    assert _folders(False, "test", [], None) == (elsewhere[0], real)
    trials = {
        _folders(*asked)
        for asked in (
            (False, "validation", [], None),
            (True, "test", [], None),
            (False, "test", [], Path("mine")),
            (False, "test", ["optim.lr=1"], None),
            (False, "test", ["optim.lr=2", "data.source='x/y'"], None),
        )
    }
    assert len(trials) == 5
    assert real not in {out for _, out in trials}


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"runs": []}'):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="is damaged"):
            pages.write_pages(tmp_path)
    made = result(tmp_path)
    path = tmp_path / "results" / "toy.json"
    for key in ("arms", "order", "verdict", "summary"):
        path.write_text(json.dumps({**made, key: None}), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"toy.json is damaged: .* since {key} is not right"):
            pages.write_pages(tmp_path / "results")
    path.write_text(json.dumps({**made, "verdict": {}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"since verdict\.state is not right"):
        _list([replace(base.load(TOY), path=Path("toy.toml"))], tmp_path / "results")
    path.write_text(json.dumps({**made, "runs": [{"arm": "ours"}]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"toy\.json is damaged: a run in it is no record"):
        results.previous("toy", Settings(runs=tmp_path, out=tmp_path / "results"))
    with pytest.raises(ConfigError, match="a run in it is no record"):
        pages.write_pages(tmp_path / "results")


# What the repository holds.


def stale(page: str, folder: Path) -> bool:
    """Whether the page is not what the result files of the folder make."""
    return page != pages.page(results.read_all(folder), Path("results/reproduce"))


def test_the_page_of_results_is_not_stale() -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert not stale(page, RESULTS), "run `mythos reproduce --pages`"


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    made = result(tmp_path)
    out = tmp_path / "results"
    page = pages.page(results.read_all(out), Path("results/reproduce"))
    assert not stale(page, out)
    write_json(out / "toy.json", {**made, "claim": "more"})
    assert stale(page, out)
    write_json(out / "toy.json", made)
    write_json(out / "more.json", made)
    assert stale(page, out)


def test_results_kept_here_are_real_and_have_their_pictures() -> None:
    for made in results.read_all(RESULTS):
        name = made["file"]
        assert name == made["name"], f"{name}.json is not of the test split"
        assert not made["quick"], f"{name}.json is of a toy run"
        assert not made["changes"], f"{name}.json is of a changed experiment"
        assert (RESULTS / f"{name}.png").is_file(), f"{name}.png is missing"
        assert (ROOT / "configs/reproduce" / f"{name}.toml").is_file(), f"{name}.toml is missing"
        assert not re.search(r"\bNaN\b|Infinity", json.dumps(made))
