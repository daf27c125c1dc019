"""What records say: a number looked up in each, its spread over seeds, and whether that reaches a target.

A record's ``measured`` holds curves, ``{"loops": [...], "curves": {level: [...]}}``, or any other numbers by name; a
number that was not finite is None, and reaches no target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from open_mythos.config import ConfigError
from open_mythos.training.checks import choice, error, known, number, whole

__all__ = ["Record", "Target", "Verdict", "by_arm", "judge", "nearest", "shown", "spread", "state", "value"]

Record = dict[str, Any]
TRAINED = "trained"


@dataclass(frozen=True)
class Verdict:
    """What came out, against what was claimed.

    Attributes:
        passed: every target that counts is met.
        sentence: that in words, with the figures.
        figures: for each target label, target, median, min, max, n, met, moonshot; JSON-ready.
    """

    passed: bool
    sentence: str
    figures: list[Record] = field(default_factory=list)


def state(verdict: Verdict, complete: bool) -> str:
    """One of "met", "partly met" and "not met"; "unfinished" while runs that the claim needs are missing."""
    if not complete:
        return "unfinished"
    if verdict.passed:
        return "met"
    return "partly met" if any(f["met"] for f in verdict.figures if not f.get("moonshot")) else "not met"


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each arm, arms in the order in which they come."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    return arms


def spread(values: Sequence[float | None]) -> Record:
    """Median, min, max and n. None stands for a value that was not finite: the median is None if it falls there."""
    known_ones = [v for v in values if v is not None]
    if not known_ones:
        return {"median": None, "min": None, "max": None, "n": len(values)}
    # What is not finite is as bad as can be; which end that is matters not to a median that is only given if finite.
    middle = {median([s if v is None else v for v in values]) for s in (math.inf, -math.inf)}
    agreed = middle.pop() if len(middle) == 1 else None
    return {"median": agreed, "min": min(known_ones), "max": max(known_ones), "n": len(values)}


def nearest(loops: Sequence[int], wanted: float) -> int:
    """The loop count of these that is nearest to ``wanted``; the smaller of two."""
    return min(loops, key=lambda count: (abs(count - wanted), count))


def value(
    record: Record, level: int | str = TRAINED, loops: int | str = "best", metric: str | None = None
) -> float | None:
    """One number of a record.

    Args:
        record: of a run.
        level: a difficulty, or "trained".
        loops: a loop count; "best", "last", or "trained": the count nearest to the training's mean. A run measured
            at one count only, because it never loops, gives its one value for all of them.
        metric: a dotted path in what was measured, instead of a curve.

    Returns:
        The number; None if it was not finite.

    Raises:
        ConfigError: the record has no such number.
    """
    measured = record["measured"]
    if metric is not None:
        return _at_path(measured, metric)
    if str(level) not in (curves := measured.get("curves", {})):
        levels = ", ".join(curves) or "no difficulty"
        raise ConfigError(f"level = {level!r} is not allowed: {record['arm']} was measured at {levels}")
    curve, counts = curves[str(level)], measured["loops"]
    if loops == "best":
        finite = [v for v in curve if v is not None]
        better = max if measured["better"] == "higher" else min
        return better(finite) if finite else None
    if len(counts) == 1:
        return curve[0]
    if loops == "last":
        return curve[-1]
    if loops == TRAINED:
        if not record.get("loops"):
            raise ConfigError(
                f"loops = {loops!r} is not allowed: {record['arm']} has no record of its training"
            )
        loops = nearest(counts, record["loops"]["mean"])
    if loops not in counts:
        raise ConfigError(f"loops = {loops!r} is not allowed: {record['arm']} was measured at {counts}")
    return curve[counts.index(loops)]


def _at_path(measured: Any, path: str) -> float | None:
    for name in path.split("."):
        if not isinstance(measured, Mapping) or name not in measured:
            raise ConfigError(f"metric = {path!r} is not allowed: nothing of that name was measured")
        measured = measured[name]
    if measured is not None and (not isinstance(measured, (int, float))):
        raise ConfigError(f"metric = {path!r} is not allowed: it is no number")
    return measured


@dataclass(frozen=True)
class Target:
    """A bound on a number of one arm's records.

    Attributes:
        label: what the page calls it; made up from the rest when empty.
        arm, level, loops, metric: which number; see :func:`value`. The first arm when ``arm`` is empty.
        minus: the same four, of a number to subtract, seed by seed.
        over: "median" of the seeds, or "worst": every seed has to reach it.
        at_least, at_most: the bounds; at least one of them.
        percent: how numbers are shown; None: as a percentage if they are accuracies.
        moonshot: reported, but not counted in the verdict.
    """

    label: str = ""
    arm: str = ""
    level: int | str = TRAINED
    loops: int | str = "best"
    metric: str | None = None
    minus: Mapping[str, Any] = field(default_factory=dict)
    over: str = "median"
    at_least: float | None = None
    at_most: float | None = None
    percent: bool | None = None
    moonshot: bool = False

    def __post_init__(self) -> None:
        choice("over", self.over, ("median", "worst"))
        bounds = {"at_least": self.at_least, "at_most": self.at_most}
        for name, bound in bounds.items():
            if bound is not None:
                number(name, bound, -math.inf)
        if not any(bound is not None for bound in bounds.values()):
            raise ConfigError("at_least and at_most are missing: one of them must be given")
        if not isinstance(self.minus, Mapping):
            raise error(
                "minus", self.minus, 'a table of arm, level, loops or metric, such as { loops = "last" }'
            )
        for name in self.minus:
            known(f"minus.{name}", name, _WHICH, "a target")
        _check_which("", {name: getattr(self, name) for name in _WHICH})
        _check_which("minus.", self.minus)
        if not isinstance(self.label, str):
            raise error("label", self.label, "a text")
        choice("moonshot", self.moonshot, (True, False))
        if self.percent is not None:
            choice("percent", self.percent, (True, False))


_WHICH = ("arm", "level", "loops", "metric")


def _check_which(where: str, which: Mapping[str, Any]) -> None:
    """Refuse before any training what could only fail after it."""
    for name in ("arm", "metric"):
        if which.get(name) is not None and not isinstance(which[name], str):
            raise error(f"{where}{name}", which[name], "a text")
    level, loops = which.get("level", TRAINED), which.get("loops", "best")
    if level != TRAINED and not (isinstance(level, str) and level):
        whole(f"{where}level", level, 1)
    if isinstance(loops, str):
        choice(f"{where}loops", loops, ("best", "last", TRAINED))
    else:
        whole(f"{where}loops", loops, 1)


def read_target(table: Any, arms: Sequence[str]) -> Target:
    """A target from its TOML table.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    if not isinstance(table, Mapping):
        raise error("experiment.targets", table, "a list of tables")
    for name in table:
        known(f"targets.{name}", name, [f.name for f in fields(Target)], "a target")
    target = Target(**{"arm": arms[0], **table})
    for arm in (target.arm, target.minus.get("arm", target.arm)):
        known(f"targets.arm = {arm!r}", arm, arms, "the experiment", what="arm")
    return target


def shown(number: float | None, percent: bool) -> str:
    """A number in words for people."""
    if number is None:
        return "no number"
    return f"{100 * number:.4g} %" if percent else f"{number:.4g}"


def judge(targets: Sequence[Target], records: Sequence[Record]) -> Verdict:
    """Whether the records reach the targets."""
    figures = [_figure(target, by_arm(records)) for target in targets]
    counted = [f for f in figures if not f["moonshot"]]
    words = [f"{f['label']}: {f['shown']} (wanted {f['target']}{_aside(f)})" for f in figures]
    met = sum(f["met"] for f in counted)
    head = f"{met} of {len(counted)} targets met" if counted else "no target"
    return Verdict(bool(counted) and met == len(counted), f"{head}. {'; '.join(words)}".strip(), figures)


def _aside(figure: Record) -> str:
    return ", a moonshot" if figure["moonshot"] else ""


def _figure(target: Target, arms: Mapping[str, Sequence[Record]]) -> Record:
    """The numbers behind one target, and whether it is met."""
    which = {name: getattr(target, name) for name in ("level", "loops", "metric")}
    records = arms.get(target.arm, [])
    values = [value(record, **which) for record in records]
    if target.minus:
        other = {**which, **target.minus}
        base = {record["seed"]: record for record in arms.get(other.pop("arm", target.arm), [])}
        pairs = [(v, base[r["seed"]]) for v, r in zip(values, records, strict=True) if r["seed"] in base]
        values = [_less(v, value(record, **other)) for v, record in pairs]
    found = spread(values)
    percent = target.percent
    if percent is None:
        accuracy = all(record["measured"].get("metric") == "accuracy" for record in records)
        percent = target.metric is None and accuracy
    text = shown(found["median"], percent) if values else "not measured"
    if len(values) > 1 and found["min"] is not None:
        text += f" ({shown(found['min'], percent)} to {shown(found['max'], percent)})"
    return {
        "label": target.label or _label(target),
        "target": _bounds(target, percent) + (" in every seed" if target.over == "worst" else ""),
        **found,
        "shown": text,
        "met": bool(values) and _reaches(target, values, found["median"]),
        "moonshot": target.moonshot,
    }


def _reaches(target: Target, values: Sequence[float | None], middle: float | None) -> bool:
    low = -math.inf if target.at_least is None else target.at_least
    high = math.inf if target.at_most is None else target.at_most
    checked = [middle] if target.over == "median" else values
    return all(v is not None and low <= v <= high for v in checked)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _bounds(target: Target, percent: bool) -> str:
    signs = (("≥", target.at_least), ("≤", target.at_most))
    return ", ".join(f"{sign} {shown(bound, percent)}" for sign, bound in signs if bound is not None)


def _label(target: Target) -> str:
    def one(which: Mapping[str, Any]) -> str:
        if which["metric"] is not None:
            return f"{which['arm']}, {which['metric']}"
        level = "as trained" if which["level"] == TRAINED else f"level {which['level']}"
        return f"{which['arm']}, {level}, {which['loops']} loops"

    own = {name: getattr(target, name) for name in _WHICH}
    return one(own) + (f" minus {one({**own, **target.minus})}" if target.minus else "")
