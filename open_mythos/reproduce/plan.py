"""From an experiment and what the command asks to runs with whole configs, all checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mythos.config import ConfigError
from open_mythos.reproduce.base import Arm, Change, Experiment, named
from open_mythos.reproduce.runs import Run, Sections
from open_mythos.training.checks import choice, error, known, whole
from open_mythos.training.config import RunConfig, overridden

__all__ = ["Settings", "all_runs", "asked_arms", "is_asked", "make_run"]


@dataclass(frozen=True)
class Settings:
    """What the command asks of all experiments that it names.

    Attributes:
        runs: folder of the run directories.
        out: folder of the results.
        seeds: 0 … seeds - 1; the experiment's own when None.
        arms: names; all when None.
        split: "validation" or "test".
        device: "cpu" or "cuda"; None leaves it to the config.
        changes: overrides of every config.
        quick: toy runs.
        jobs: runs at once; one for each core or GPU when None.
        time_limit: seconds after which no run is started.
        remeasure: measure finished runs anew.
        overwrite: train anew.
    """

    runs: Path
    out: Path
    seeds: int | None = None
    arms: tuple[str, ...] | None = None
    split: str = "test"
    device: str | None = None
    changes: tuple[Change, ...] = ()
    quick: bool = False
    jobs: int | None = None
    time_limit: float | None = None
    remeasure: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        choice("split", self.split, ("validation", "test"))
        for name in ("seeds", "jobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        if self.device is not None:
            choice("device", self.device, ("cpu", "cuda"))
        if self.time_limit is not None and not self.time_limit > 0:  # not a number is not above 0 either
            raise error("time_limit", self.time_limit, "a number of seconds above 0")
        for section, key, value in self.changes:
            if (section, key) == ("train", "seed"):
                raise error("train.seed", value, "left to --seeds, which trains with 0, 1, … in turn")


def all_runs(experiment: Experiment, settings: Settings) -> list[Run]:
    """The runs that the experiment has, whether asked for now or not: seed by seed, arms in their order.

    Raises:
        ConfigError: an arm is unknown, or a config is not right.
    """
    for name in asked_arms(experiment, settings) or ():
        known(f"arm {name!r}", name, experiment.arms, experiment.name, what="arm")
    counts = {name: _seeds(experiment, arm, settings) for name, arm in experiment.arms.items()}
    return [
        make_run(experiment, arm, seed, settings)
        for seed in range(max(counts.values()))
        for arm in experiment.arms.values()
        if seed < counts[arm.name]
    ]


def _seeds(experiment: Experiment, arm: Arm, settings: Settings) -> int:
    if settings.quick:
        return settings.seeds or 1
    wanted = settings.seeds or 0
    return max(arm.seeds, wanted) if arm.seeds == experiment.seeds else arm.seeds


def asked_arms(experiment: Experiment, settings: Settings) -> tuple[str, ...] | None:
    """Names of the arms that the command asks for; None: all."""
    if settings.arms is None and settings.quick:
        return experiment.quick_arms or None
    return settings.arms


def is_asked(run: Run, experiment: Experiment, settings: Settings) -> bool:
    """Whether the command asks for this run of the experiment."""
    arms, seeds = asked_arms(experiment, settings), settings.seeds
    return (arms is None or run.arm in arms) and (seeds is None or run.seed < seeds)


def make_run(experiment: Experiment, arm: Arm, seed: int, settings: Settings) -> Run:
    """One run, its config resolved.

    Raises:
        ConfigError: the config is not right, or what the arm uses does not exist.
    """
    origin = _origin(experiment, arm, seed, settings) if arm.uses else None
    try:
        sections = _sections(experiment, arm, seed, settings, origin)
    except ConfigError as problem:
        raise ConfigError(f"{experiment.path.name}, arm {arm.name}: {problem}") from problem
    options = {**experiment.options, **arm.options, **(experiment.quick_options if settings.quick else {})}
    folder = settings.runs / experiment.name / f"{arm.name}-seed{seed}"
    return Run(
        experiment.name, experiment.path, arm.name, seed, folder, sections, options, settings.quick, origin
    )


def _origin(experiment: Experiment, arm: Arm, seed: int, settings: Settings) -> Run:
    name, slash, other = arm.uses.partition("/")
    if not slash or name == experiment.name:
        raise ConfigError(
            f"{experiment.path.name}: uses = {arm.uses!r} is not allowed: it must be EXPERIMENT/ARM, of another one"
        )
    source = named(name, experiment.path.parent)
    known(f"{experiment.path.name}: uses = {arm.uses!r}", other, source.arms, name, what="arm")
    if source.arms[other].uses:
        raise ConfigError(f"{experiment.path.name}: uses = {arm.uses!r} is not allowed: it trains nothing")
    return make_run(source, source.arms[other], seed, settings)


def _sections(
    experiment: Experiment, arm: Arm, seed: int, settings: Settings, origin: Run | None
) -> Sections:
    """The run's sections, whole and checked where they are a run config."""
    base = {} if origin is None else origin.sections
    own = [change for name, table in experiment.sections.items() for change in _as_changes(name, table)]
    sections = overridden(overridden(base, own), arm.changes)
    if not experiment.CONFIGURED:
        quick = experiment.quick if settings.quick else ()
        return _placed(overridden(sections, (*quick, *settings.changes)), seed, settings)
    sections = RunConfig.from_dict(sections).to_dict()
    if settings.quick:
        sections = overridden(overridden(sections, _toy(sections)), experiment.quick)
    config = RunConfig.from_dict(_placed(overridden(sections, settings.changes), seed, settings))
    if config.data.is_task:
        from open_mythos.training.sources import checked_task

        checked_task(config)
    return config.to_dict()


def _as_changes(name: str, table: Any) -> list[Change]:
    if not isinstance(table, Mapping):
        raise error(f"[{name}]", table, "a section of keys")
    return [(name, key, value) for key, value in table.items()]


def _toy(sections: Sections) -> list[Change]:
    """What makes a run take a second or two."""
    loops, levels = sections["eval"]["loops"], sections["eval"]["levels"]
    return [
        *(("train", name, value) for name, value in (("steps", 2), ("batch_size", 4), ("accumulate", 1))),
        ("optim", "warmup", 1),
        *(("eval", name, value) for name, value in (("examples", 8), ("loops", loops[:2]))),
        ("eval", "levels", levels[:2]),
    ]


def _placed(sections: Sections, seed: int, settings: Settings) -> Sections:
    """With its seed, and the device that "auto" means here."""
    device = settings.device or sections.get("parallel", {}).get("device", "auto")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    changes: list[Change] = [("train", "seed", seed), ("parallel", "device", device)]
    if device == "cpu":
        # One core a run: its numbers are then the same on every machine, and more runs fit side by side.
        changes.append(("train", "threads", 1))
        if settings.quick:
            changes += [("parallel", name, False) for name in ("compile", "graphs")]
    return overridden(sections, changes)
