"""The result file of an experiment: all that the page, the table and the figure are made from.

It holds the claim, the verdict, the table, one record for each run, and the command that gives them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from open_mythos.config import ConfigError
from open_mythos.reproduce.base import Arm, Experiment, class_named
from open_mythos.reproduce.plan import Settings
from open_mythos.reproduce.runs import Run, read_json
from open_mythos.reproduce.targets import Record, Verdict, state

__all__ = ["build", "command", "path_of", "previous", "read_all", "read_result", "restored"]


def path_of(name: str, settings: Settings) -> Path:
    """Where the result of this experiment goes."""
    suffix = "" if settings.split == "test" else f"-{settings.split}"
    return settings.out / f"{name}{suffix}.json"


def previous(name: str, settings: Settings) -> list[Record]:
    """The records that an earlier call left.

    Raises:
        ConfigError: the file is damaged, or of a real run while this is a toy.
    """
    path = path_of(name, settings)
    found = read_json(path)
    if found is None:
        return []
    if not isinstance(found.get("runs"), list):
        raise ConfigError(f"{path} is damaged: it holds no runs")
    _check_records(path, found["runs"])
    if settings.quick and not found.get("quick"):
        raise ConfigError(f"{path} holds a real result, which --quick never replaces: name another --out")
    return found["runs"]


def command(experiment: Experiment, settings: Settings) -> str:
    """The command that gives this result again."""
    words = ["mythos", "reproduce", experiment.name]
    words += ["--seeds", str(settings.seeds)] if settings.seeds is not None else []
    words += ["--split", settings.split] if settings.split != "test" else []
    words += ["--device", settings.device] if settings.device is not None else []
    words += ["--quick"] if settings.quick else []
    for change in changed(settings):
        words += ["--set", change]
    return " ".join(words)


def changed(settings: Settings) -> list[str]:
    """The overrides as they were given."""
    return [f"{section}.{key}={_toml(value)}" for section, key, value in settings.changes]


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def build(
    experiment: Experiment,
    settings: Settings,
    runs: Sequence[Run],
    records: Sequence[Record],
    failed: Sequence[Record],
) -> Record:
    """The result of the runs that have finished.

    Args:
        experiment: which.
        settings: of this command.
        runs: all that the experiment has.
        records: of those that have finished, at least one, in the same order.
        failed: ``arm``, ``seed`` and ``error`` of those that did not.
    """
    done = {(record["arm"], record["seed"]) for record in records}
    complete = not settings.quick and all((run.arm, run.seed) in done for run in runs)
    order = list(experiment.arms)
    records = sorted(records, key=lambda record: (order.index(record["arm"]), record["seed"]))
    verdict = _judged(experiment, settings, records)
    return {
        "name": experiment.name,
        "title": experiment.title,
        "claim": experiment.claim,
        "target": experiment.target,
        "notes": experiment.notes,
        "code": experiment.code,
        "order": experiment.order,
        "options": dict(experiment.options),
        "command": command(experiment, settings),
        "split": settings.split,
        "quick": settings.quick,
        "changes": changed(settings),
        "date": max(record["date"] for record in records),
        "written": datetime.now(timezone.utc).date().isoformat(),
        "seeds": experiment.seeds,
        "runs_wanted": len(runs),
        "devices": sorted({record["device"] for record in records}),
        "torch": sorted({record["torch"] for record in records}),
        "open_mythos": sorted({record["open_mythos"] for record in records}),
        "arms": [_arm(arm, records) for arm in experiment.arms.values()],
        "verdict": _verdict(verdict, complete),
        "summary": experiment.summary(records),
        "failed": list(failed),
        "runs": records,
    }


def _judged(experiment: Experiment, settings: Settings, records: Sequence[Record]) -> Verdict:
    try:
        return experiment.judge(records)
    except ConfigError as problem:
        # A toy may leave out the difficulty or loop count that a target asks for.
        if not settings.quick:
            raise
        return Verdict(False, f"A toy cannot be judged: {problem}.")


def _arm(arm: Arm, records: Sequence[Record]) -> Record:
    seeds = [record["seed"] for record in records if record["arm"] == arm.name]
    changes = [f"{section}.{key}={_toml(value)}" for section, key, value in arm.changes]
    return {"name": arm.name, "title": arm.title, "changes": changes, "wanted": arm.seeds, "seeds": seeds}


def _verdict(verdict: Verdict, complete: bool) -> Record:
    return {
        "state": state(verdict, complete),
        "passed": verdict.passed,
        "sentence": verdict.sentence,
        "figures": verdict.figures,
    }


_HOLDS: dict[str, type] = {
    **dict.fromkeys(("name", "title", "claim", "target", "notes", "code", "command", "split", "date"), str),
    **dict.fromkeys(("changes", "devices", "torch", "arms", "failed", "runs"), list),
    **dict.fromkeys(("order", "seeds", "runs_wanted"), int),
    **dict.fromkeys(("options", "verdict", "summary"), dict),
    "quick": bool,
}


def read_result(path: Path) -> Record | None:
    """The result in a file; None if there is no such file.

    Raises:
        ConfigError: it is damaged.
    """
    result = read_json(path)
    if result is None:
        return None
    lacks = [key for key, kind in _HOLDS.items() if not isinstance(result.get(key), kind)]
    for part, keys in (
        ("verdict", ("state", "sentence", "figures")),
        ("summary", ("columns", "format", "rows")),
    ):
        lacks += [f"{part}.{key}" for key in keys if not lacks and key not in result[part]]
    if lacks:
        raise ConfigError(
            f"{path} is damaged: it is no result of mythos reproduce, since {lacks[0]} is not right"
        )
    _check_records(path, result["runs"])
    return result


def _check_records(path: Path, runs: Sequence[Any]) -> None:
    if not all(isinstance(run, dict) and isinstance(run.get("measured"), dict) for run in runs):
        raise ConfigError(f"{path} is damaged: a run in it is no record")


def read_all(folder: Path) -> list[Record]:
    """All results of a folder, by file name.

    Raises:
        ConfigError: one is damaged.
    """
    read = [(path, read_result(path)) for path in sorted(folder.glob("*.json"))]
    return [{**result, "file": path.stem} for path, result in read if result is not None]


def restored(result: Record) -> Experiment:
    """As much of the experiment as drawing takes, from its result alone."""
    arms = {arm["name"]: Arm(arm["name"], arm["title"], arm["wanted"], "", {}, ()) for arm in result["arms"]}
    texts = {key: result[key] for key in ("title", "claim", "target", "seeds", "notes", "code")}
    path = Path(f"{result['name']}.toml")
    return class_named(result["code"])(path=path, arms=arms, sections={}, options=result["options"], **texts)
