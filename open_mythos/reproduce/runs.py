"""One arm with one seed: its config, its folder, and what says that it is the same run as before.

A run's folder holds what the trainer writes (run.json, checkpoints/, model/), and ``job.json``, ``log.txt`` and
``measured-SPLIT.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.config import ConfigError
from open_mythos.reproduce.layout import layout
from open_mythos.training.config import RunConfig
from open_mythos.training.dataconfig import FREE

if TYPE_CHECKING:
    import torch

__all__ = ["Run", "difference", "read_json", "training_part", "write_json"]

Sections = dict[str, Any]

# What decides no number of a training, or only by rounding.
_FREE: dict[str, tuple[str, ...]] = {
    "train": ("log_every", "save_every", "max_skips"),
    "data": FREE,
    "parallel": ("device", "compile", "graphs", "recompute", "replicas", "reshard"),
}

_FREE_SECTIONS = ("eval", "log", "checkpoint")

# Settings younger than results, with the value that changes nothing: only another one is part of what a run is.
_NEUTRAL: dict[str, dict[str, Any]] = {"train": {"balance": 0}}


@dataclass(frozen=True)
class Run:
    """One arm with one seed, the same in the process that starts it and in its own.

    Attributes:
        experiment: name.
        source: the experiment's TOML.
        arm: name.
        seed: from 0.
        folder: the run's own; anything it writes goes here.
        sections: of its config, JSON-ready: resolved, with every default, unless the experiment has no config.
        options: of the experiment, the arm and ``--quick``.
        quick: a toy run.
        origin: the run whose trained model is taken; None trains its own.
    """

    experiment: str
    source: Path
    arm: str
    seed: int
    folder: Path
    sections: Sections
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    origin: Run | None = None

    def __str__(self) -> str:
        return f"{self.experiment} {self.arm} seed {self.seed}"

    @property
    def home(self) -> Path:
        """The run directory that holds the trained model."""
        return self.folder if self.origin is None else self.origin.home

    @cached_property
    def config(self) -> RunConfig:
        """The run config.

        Raises:
            ConfigError: the sections do not make one.
        """
        return RunConfig.from_dict(self.sections)

    @property
    def device(self) -> torch.device:
        """Where the run trains and measures."""
        import torch

        wanted = self.sections.get("parallel", {}).get("device", "auto")
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted)

    @property
    def loops(self) -> list[int]:
        """Loop counts to measure at: a model trained at one loop only has one."""
        plan = self.config.loops
        if plan.kind == "fixed" and plan.options["loops"] == 1:
            return [1]
        return list(self.config.eval.loops)

    @property
    def record(self) -> dict[str, Any]:
        """run.json of the trained run; empty if there is none."""
        return read_json(self.home / "run.json") or {}

    @property
    def trained(self) -> bool:
        """The training has come to its end, and its model is there."""
        return bool(self.record.get("finished")) and (self.home / "model" / "config.json").is_file()

    def identity(self, split: str, code: str) -> str:
        """A hash of all that decides the measured numbers.

        Args:
            split: that is measured.
            code: "module:Class" of the experiment.
        """
        origin = None if self.origin is None else training_part(self.origin.sections)
        parts = {
            "training": training_part(self.sections),
            "origin": origin,
            "eval": self.sections.get("eval"),
            "options": dict(self.options),
            "split": split,
            "code": code,
        }
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` reads it back."""
        origin = None if self.origin is None else self.origin.to_dict()
        plain = {name: getattr(self, name) for name in ("experiment", "arm", "seed", "sections", "quick")}
        paths = {"source": str(self.source), "folder": str(self.folder)}
        return {**plain, **paths, "options": dict(self.options), "origin": origin}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Run:
        """What :meth:`to_dict` gave."""
        origin = value["origin"]
        return cls(
            **{
                **value,
                "source": Path(value["source"]),
                "folder": Path(value["folder"]),
                "origin": None if origin is None else cls.from_dict(origin),
            }
        )


def training_part(sections: Mapping[str, Any]) -> Sections:
    """The sections that decide what a training computes, in one form whether they come from JSON or not."""
    kept = {name: section for name, section in sections.items() if name not in _FREE_SECTIONS}
    plain = {
        name: {
            key: value
            for key, value in section.items()
            if key not in _FREE.get(name, ()) and (key, value) not in _NEUTRAL.get(name, {}).items()
        }
        for name, section in kept.items()
    }
    return json.loads(json.dumps(plain))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting in which two trainings differ, in words; None if they are the same."""
    before, after = training_part(old), training_part(new)
    for section in {**before, **after}:
        one, other = before.get(section, {}), after.get(section, {})
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return f"{section}.{key} was {one.get(key)!r} and is {other.get(key)!r} now"
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is no such file.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as problem:
        raise ConfigError(f"{path} is damaged: {problem}") from problem
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it holds no object")
    return found


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; a reader sees the old one or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(layout(value) + "\n", encoding="utf-8")
    os.replace(part, path)
