"""An experiment as it is read, what it asks of records, and the runs that are made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from open_mythos.config import ConfigError
from open_mythos.reproduce import base, targets
from open_mythos.reproduce.plan import Settings, all_runs, is_asked
from open_mythos.reproduce.runs import Run, difference, write_json
from open_mythos.training.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "reproduce"

TOY = (Path(__file__).parent / "toy_experiment.toml").read_text(encoding="utf-8")


def written(folder: Path, text: str = TOY, name: str = "toy") -> base.Experiment:
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return base.load(folder / f"{name}.toml")


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(runs=folder / "runs", out=folder / "results", **changes)


def record(arm: str, seed: int, values: list[float | None], **measured: Any) -> dict[str, Any]:
    curves = {"metric": "accuracy", "better": "higher", "unit": "bits", "trained": "8", "loops": [1, 2, 4, 8]}
    curves["curves"] = {"trained": values, "12": values}
    return {"arm": arm, "seed": seed, "measured": {**curves, **measured}, "loops": {"mean": 2.4, "max": 4}}


def test_an_experiment_is_read_with_its_arms_in_order(tmp_path: Path) -> None:
    toy = written(tmp_path)
    assert (toy.name, toy.title, toy.seeds, list(toy.arms)) == (
        "toy",
        "Toy parity",
        2,
        ["ours", "once", "few"],
    )
    assert toy.arms["once"].changes == (("loops", "kind", "fixed"), ("loops", "loops", 1))
    assert (toy.arms["few"].seeds, toy.arms["few"].title) == (1, "few")
    assert toy.targets[0].arm == "ours"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = 2", "seeds = 0", "experiment.seeds = 0 is not allowed"),
        ("seeds = 2", "", "experiment.seeds is missing"),
        ('claim = "', 'clam = "', "experiment.clam is not allowed: .* did you mean 'claim'"),
        ('title = "Toy parity"', "title = 3", "experiment.title = 3 is not allowed: it must be a text"),
        ("at_least = 0.1", "", "at_least and at_most are missing"),
        ("at_least = 0.1", "at_least = 'x'", "at_least = 'x' is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nlops = 2", "targets.lops is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nloops = 'most'", "loops = 'most' is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\narm = 'our'", "no such arm; did you mean 'ours'"),
        ("at_least = 0.1", "at_least = 0.1\nminus = {arms = 'ours'}", "minus.arms is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nover = 'mean'", "over = 'mean' is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nminus = 5", "minus = 5 is not allowed: it must be a table"),
        ("at_least = 0.1", "at_least = 0.1\narm = 5", "arm = 5 is not allowed: it must be a text"),
        ("at_least = 0.1", "at_least = 0.1\nminus = {arm = 5}", "minus.arm = 5 is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nloops = true", "loops = True is not allowed"),
        ("level = 12", "level = [12]", "level = .12. is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nmetric = 5", "metric = 5 is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nlabel = 5", "label = 5 is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\nmoonshot = 'no'", "moonshot = 'no' is not allowed"),
        ("at_least = 0.1", "at_least = 0.1\npercent = 'no'", "percent = 'no' is not allowed"),
        ("[arms.ours]", "[quick]\narms = 'ours'\n[arms.ours]", "quick.arms = 'ours' is not allowed"),
        ("[arms.ours]", "[quick]\narms = [5]\n[arms.ours]", "quick.arms = .5. is not allowed"),
        ("[arms.ours]", "[arms.ours]\nlr = 3", "'lr' is not allowed: it must be section.key"),
        ("[arms.ours]", "[arms.ours]\nseeds = 0", "arms.ours.seeds = 0"),
        ("[arms.ours]", "[arms.ours]\noptions = {a = 1}", "arms.ours.options.a is not allowed"),
        ("[arms.ours]", "[arms.'a/b']", "arm = 'a/b' is not allowed"),
        ("seeds = 2", "seeds = 2\ncode = 'base:run'", "code = 'base:run' is not allowed"),
        ("seeds = 2", "seeds = 2\ncode = 'nowhere:Toy'", "code = 'nowhere:Toy' is not allowed"),
        ("seeds = 2", "seeds = 2\ncode = 'no.where:Toy'", "code = 'no.where:Toy' is not allowed"),
        ("seeds = 2", "seeds = 2\ncode = '../x'", "code = '../x' is not allowed"),
    ],
)
def test_what_an_experiment_may_not_say(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TOY
    with pytest.raises(ConfigError, match=words) as caught:
        written(tmp_path, TOY.replace(old, new, 1))
    assert str(caught.value).startswith("toy.toml: ")


def test_targets_are_a_list(tmp_path: Path) -> None:
    start = TOY.index("[[experiment.targets]]")
    rest = TOY[TOY.index("[", start + 2 + len("[experiment.targets]]")) :]
    with pytest.raises(
        ConfigError, match=r"toy.toml: experiment.targets = 5 is not allowed: it must be a list"
    ):
        written(tmp_path, TOY[:start] + "targets = 5\n" + rest)


def test_experiments_are_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert base.folder() == CONFIGS
    package = tmp_path / "open_mythos"
    monkeypatch.setattr(base, "__file__", str(package / "reproduce" / "base.py"))
    with pytest.raises(ConfigError, match="the experiments are not installed"):
        base.folder()
    (package / "configs" / "reproduce").mkdir(parents=True)
    assert base.folder() == package / "configs" / "reproduce"


def test_no_arm_and_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one arm"):
        written(tmp_path, TOY.partition("[arms")[0])
    with pytest.raises(ConfigError, match=r"experiment 'tyo' is not allowed: .* did you mean 'toy'"):
        base.named("tyo", tmp_path)


# Targets.


def test_a_value_is_looked_up_in_a_curve_or_by_its_path() -> None:
    one = record("ours", 0, [0.5, 0.6, 0.9, 0.8], halting={"mean": 3})
    assert base.value(one, 12, "best") == 0.9
    assert base.value(one, 12, "last") == 0.8
    assert base.value(one, 12, "trained") == 0.6  # 2 loops are nearest to 2.4
    assert base.value(one, "trained", 1) == 0.5
    assert base.value(one, metric="halting.mean") == 3
    lower = record("ours", 0, [2.0, 1.5, None, 1.7], better="lower")
    assert (base.value(lower), base.value(lower, loops=4)) == (1.5, None)
    once = {**record("once", 0, [0.7]), "loops": None}
    once["measured"]["loops"] = [1]
    assert base.value(once, 12, 8) == base.value(once, 12, "trained") == 0.7
    for wrong in ({"level": 13}, {"loops": 3}, {"metric": "halting.most"}, {"metric": "halting"}):
        with pytest.raises(ConfigError, match="is not allowed: "):
            base.value(one, **wrong)


def test_what_is_not_finite_counts_as_as_bad_as_can_be() -> None:
    assert base.spread([1.0, 3.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert base.spread([1.0, None, 2.0, 3.0, 4.0])["median"] is None
    assert base.spread([2.0, None, 2.0, 2.0])["median"] == 2.0
    assert base.spread([None]) == {"median": None, "min": None, "max": None, "n": 1}


def judged(records: list[dict[str, Any]], **target: Any) -> tuple[bool, dict[str, Any]]:
    found = targets.judge([targets.Target(**{"arm": "ours", "level": 12, **target})], records)
    return found.passed, found.figures[0]


def test_targets_over_the_median_or_every_seed() -> None:
    three = [record("ours", seed, [0.5, 0.6, 0.7, best]) for seed, best in enumerate((0.95, 0.99, 0.97))]
    passed, figure = judged(three, at_least=0.96)
    assert (passed, figure["median"], figure["n"], figure["target"]) == (True, 0.97, 3, "≥ 96 %")
    assert figure["shown"] == "97 % (95 % to 99 %)"
    assert not judged(three, at_least=0.96, over="worst")[0]
    assert judged(three, at_least=0.95, over="worst")[0]
    assert not judged(three, at_least=0.9, at_most=0.96)[0]
    same = [record("ours", seed, [0.97] * 4) for seed in range(2)]
    broken = [*same, record("ours", 3, [None] * 4)]
    assert judged(broken, at_least=0.9)[0]
    assert not judged(broken, at_least=0.9, over="worst")[0]
    assert judged([], at_least=0.1)[1]["shown"] == "not measured"
    assert not judged([], at_least=0.1)[0]


def test_a_target_on_a_difference_pairs_the_seeds() -> None:
    ours = [record("ours", 0, [0.5, 0.6, 0.7, 0.9]), record("ours", 1, [0.5, 0.9, 0.9, 0.9])]
    passed, figure = judged(ours, minus={"loops": "trained"}, at_least=0.1)
    assert passed
    assert figure["min"] == 0.0
    assert figure["max"] == pytest.approx(0.3)
    assert not judged(ours, minus={"loops": "trained"}, at_least=0.1, over="worst")[0]
    other = [*ours, record("once", 0, [0.4, 0.4, 0.4, 0.4])]
    assert judged(other, minus={"arm": "once"}, at_least=0.5)[1]["n"] == 1


def test_states_of_a_verdict() -> None:
    one = [record("ours", 0, [0.5, 0.6, 0.7, 0.9])]
    goals = [targets.Target(arm="ours", at_least=0.8), targets.Target(arm="ours", at_least=0.95)]
    moonshot = targets.Target(arm="ours", at_least=1.0, moonshot=True)
    verdicts = [targets.judge(some, one) for some in (goals[:1], goals, goals[1:], [goals[0], moonshot])]
    assert [targets.state(v, True) for v in verdicts] == ["met", "partly met", "not met", "met"]
    assert targets.state(verdicts[0], False) == "unfinished"
    assert "1 of 2 targets met" in verdicts[1].sentence
    assert not targets.judge([], one).passed


# Runs.


def test_runs_come_seed_by_seed_with_whole_configs(tmp_path: Path) -> None:
    runs = all_runs(written(tmp_path), settings(tmp_path))
    assert [(r.arm, r.seed) for r in runs] == [
        *(("ours", 0), ("once", 0), ("few", 0)),
        *(("ours", 1), ("once", 1)),
    ]
    first, once = runs[:2]
    assert (first.config.train.seed, runs[3].config.train.seed, first.config.train.threads) == (0, 1, 1)
    assert (first.loops, once.loops) == ([1, 2, 4], [1])
    assert once.config.loops.kind == "fixed"
    assert Run.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    more = all_runs(written(tmp_path), settings(tmp_path, seeds=3))
    assert [r.seed for r in more if r.arm == "ours"] == [0, 1, 2]
    assert [r.seed for r in more if r.arm == "few"] == [0]


def test_a_part_is_asked_for_while_the_rest_still_counts(tmp_path: Path) -> None:
    toy, some = written(tmp_path), settings(tmp_path, arms=("once",), seeds=1)
    assert [str(r) for r in all_runs(toy, some) if is_asked(r, toy, some)] == ["toy once seed 0"]
    assert len(all_runs(toy, some)) == 5


def test_quick_makes_toys_and_what_is_set_comes_last(tmp_path: Path) -> None:
    text = TOY + '[quick]\narms = ["few"]\n"eval.examples" = 5\n'
    some = settings(tmp_path, quick=True, changes=(("train", "batch_size", 2),))
    toy = written(tmp_path, text)
    asked = [run for run in all_runs(toy, some) if is_asked(run, toy, some)]
    assert [str(run) for run in asked] == ["toy few seed 0"]
    config = asked[0].config
    assert (config.train.steps, config.train.batch_size, config.eval.examples) == (2, 2, 5)
    assert config.eval.loops == (1, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 0}, "seeds = 0 is not allowed: it must be a whole number of at least 1"),
        ({"jobs": 0}, "jobs = 0"),
        ({"split": "train"}, "split = 'train' is not allowed: it must be 'validation' or 'test'"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"time_limit": 0}, "time_limit = 0"),
        ({"time_limit": float("nan")}, "time_limit = nan is not allowed"),
        ({"changes": (("train", "seed", 5),)}, "train.seed = 5 is not allowed: it must be left to --seeds"),
        ({"changes": (("data", "length", [9, 3]),)}, r"toy.toml, arm ours: data: length=\(9, 3\)"),
        ({"changes": (("data", "lenth", 3),)}, "toy.toml, arm ours: data: .*lenth"),
        ({"changes": (("eval", "levels", [40]),)}, "toy.toml, arm ours: eval.levels = 40 is not allowed"),
        (
            {"changes": (("model", "vocab_size", 2),)},
            "toy.toml, arm ours: model.vocab_size = 2 is not allowed",
        ),
        ({"arms": ("our",)}, "arm 'our' is not allowed: toy has no such arm; did you mean 'ours'"),
        ({"changes": (("optim", "lr", -1),)}, "toy.toml, arm ours: optim.lr = -1 is not allowed"),
    ],
)
def test_what_a_command_may_not_ask(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        all_runs(written(tmp_path), settings(tmp_path, **changes))


def test_an_arm_may_take_the_model_of_another_experiment(tmp_path: Path) -> None:
    source = written(tmp_path)
    head = TOY.partition("[[")[0]
    user = written(tmp_path, head + "uses = 'toy/once'\n[eval]\nloops = [3]\n[arms.rule]\n", "user")
    run = all_runs(user, settings(tmp_path))[1]
    assert run.origin == all_runs(source, settings(tmp_path))[4]
    assert (run.home, run.folder) == (tmp_path / "runs/toy/once-seed1", tmp_path / "runs/user/rule-seed1")
    assert (run.config.loops.kind, run.config.eval.loops, run.seed) == ("fixed", (3,), 1)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    for wrong, words in (("toy", "EXPERIMENT/ARM"), ("toy/on", "no such arm"), ("user/rule", "of another")):
        bad = written(tmp_path, head + f"uses = '{wrong}'\n[arms.rule]\n", "user")
        with pytest.raises(ConfigError, match=words):
            all_runs(bad, settings(tmp_path))


def test_the_identity_follows_what_decides_the_numbers(tmp_path: Path) -> None:
    def identity(split: str = "test", code: str = "", **changes: Any) -> str:
        pairs = tuple((*name.split("__"), value) for name, value in changes.items())
        return all_runs(written(tmp_path), settings(tmp_path, changes=pairs))[0].identity(split, code)

    same = identity()
    assert identity(train__log_every=3, train__save_every=2, parallel__compile=False) == same
    others = [
        identity("validation"),
        identity(code="x:Y"),
        identity(optim__lr=0.5),
        identity(eval__examples=9),
        identity(train__steps=5),
    ]
    assert len({same, *others}) == 6


def test_a_difference_is_named() -> None:
    old = {"train": {"steps": 3, "log_every": 1}, "data": {"length": [1, 2]}, "eval": {"loops": [1]}}
    new = {"train": {"steps": 3, "log_every": 2}, "data": {"length": (1, 2)}, "eval": {"loops": [2]}}
    assert difference(old, new) is None
    assert difference(old, {**new, "train": {"steps": 4}}) == "train.steps was 3 and is 4 now"


def test_a_written_file_has_few_lines_and_none_that_is_long(tmp_path: Path) -> None:
    value = {
        "curve": [1, -2.5e-07, None],
        "long curve": [i / 7 for i in range(100)],
        "tokens": [{"text": f"[1,  {i}]\n", "loops": i} for i in range(300)],
        "runs": [{"seed": seed, "sentence": "word " * 30, "none": [], "nothing": {}} for seed in range(2)],
        "sentence": "é" * 200,
    }
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert ' "curve": [1, -2.5e-07, null],\n' in text
    lines = text.splitlines()
    assert len(lines) < 200
    assert all(len(line) <= 110 for line in lines if '"sentence"' not in line)
    full = [len(line) for line in lines if line.startswith("  {") and line.endswith("},")]
    assert min(full) + len(', {"text": "[1,  299]\\n", "loops": 299}') > 110, "a line has room for one more"


def test_a_written_file_holds_what_json_makes_of_keys_and_tuples(tmp_path: Path) -> None:
    value = {1: (2, 3), "long": dict.fromkeys(range(2), ("x" * 60, "y" * 60))}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == json.loads(json.dumps(value))
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "y.json", {"x": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_makes_runs(path: Path, tmp_path: Path) -> None:
    experiment = base.load(path)
    for quick in (False, True):
        runs = all_runs(experiment, settings(tmp_path, quick=quick, device="cpu" if quick else None))
        assert len({run.folder for run in runs}) == len(runs)
        for run in runs if experiment.CONFIGURED else ():
            assert isinstance(run.config, RunConfig)
