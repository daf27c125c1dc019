"""What an experiment is: a TOML file, and Python only for what TOML cannot say.

    claim, targets  ←  judge(records)  ←  measure(run, model)  ←  train(run)     for every arm and seed

Reading and listing experiments loads no torch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.config import ConfigError
from open_mythos.reproduce.runs import Run
from open_mythos.reproduce.tables import by_level
from open_mythos.reproduce.targets import Record, Target, Verdict, by_arm, judge, read_target, spread, value
from open_mythos.training.checks import error, known, whole
from open_mythos.training.config import override, read_toml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from open_mythos.model import OpenMythos
    from open_mythos.training.config import RunConfig

__all__ = [
    "Arm",
    "Experiment",
    "Record",
    "Run",
    "Verdict",
    "by_arm",
    "changes",
    "class_named",
    "curves",
    "folder",
    "load",
    "named",
    "names",
    "spread",
    "value",
]

Change = tuple[str, str, Any]


@dataclass(frozen=True)
class Arm:
    """One row of an experiment: what is changed in its config.

    Attributes:
        name: as in [arms.NAME].
        title: as in the table.
        seeds: seeds 0 … seeds - 1.
        uses: "EXPERIMENT/ARM" whose trained model is taken; empty trains one.
        options: over those of the experiment.
        changes: section, key and value of each override.
    """

    name: str
    title: str
    seeds: int
    uses: str
    options: Mapping[str, Any]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Experiment:
    """What the TOML says, and what to do with a run: override what is special.

    Attributes:
        path: of the TOML.
        title: a few words.
        claim: one sentence with the target number.
        target: the same in short.
        seeds: that the claim needs.
        arms: by name, ours first.
        sections: of the run config, as written.
        targets: what the default :meth:`judge` checks.
        options: free values, over ``OPTIONS``.
        quick: overrides of ``--quick``.
        quick_options: options of ``--quick``.
        quick_arms: those of ``--quick``; all when empty.
        notes: text for the page.
        code: "module:Class" in this package; empty for this class.
        order: place on the page.
    """

    path: Path
    title: str
    claim: str
    target: str
    seeds: int
    arms: Mapping[str, Arm]
    sections: Mapping[str, Any]
    targets: tuple[Target, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: tuple[Change, ...] = ()
    quick_options: Mapping[str, Any] = field(default_factory=dict)
    quick_arms: tuple[str, ...] = ()
    notes: str = ""
    code: str = ""
    order: int = 99

    OPTIONS: ClassVar[dict[str, Any]] = {}
    CONFIGURED: ClassVar[bool] = True
    # What an unfinished measurement keeps in the run's folder, as patterns; measuring anew begins without.
    KEPT: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.path.stem

    def perform(self, run: Run, split: str) -> Record:
        """The whole work of one run, in a process of its own: train, load, measure.

        Args:
            run: which.
            split: "validation" or "test".

        Returns:
            What was measured, JSON-ready.
        """
        self.train(run)
        return self.measure(run, self.load(run), split)

    def train(self, run: Run) -> None:
        """Train the run, or go on where it was cut off; nothing if it has come to its end."""
        if run.origin is not None:
            named(run.origin.experiment, run.origin.source.parent).train(run.origin)
            return
        from open_mythos.training.trainer import train

        if run.trained:
            return
        began = (run.folder / "run.json").is_file() or any(run.folder.glob("checkpoints/step-*"))
        train(run.config, run.folder, resume=began)

    def load(self, run: Run) -> OpenMythos:
        """The trained model, in eval mode, where the run measures."""
        from open_mythos.weights import from_pretrained

        return from_pretrained(run.home / "model").to(run.device).eval()

    def measure(self, run: Run, model: OpenMythos, split: str) -> Record:
        """Numbers about a trained model: by default quality against loops at every difficulty."""
        return curves(model, run.config, run.record, split, run.loops)

    def judge(self, records: Sequence[Record]) -> Verdict:
        """Whether the claim holds: by default whether the targets are met.

        Args:
            records: at least one; of whatever arms and seeds have finished.
        """
        return judge(self.targets, records)

    def summary(self, records: Sequence[Record]) -> Record:
        """The table of the page.

        Returns:
            ``columns``: their names; ``rows``: for each ``arm``, ``title`` and ``cells``, a cell being what
            :func:`spread` gives, a number, a text or None; ``format``: "percent" or "plain", of all or of each column.
        """
        return by_level(records, {name: arm.title for name, arm in self.arms.items()})

    def draw(self, records: Sequence[Record]) -> Figure:
        """The figure of the page, from records alone."""
        from open_mythos.reproduce.figures import quality

        return quality(records, {name: arm.title for name, arm in self.arms.items()}, self.title)


def curves(
    model: OpenMythos, config: RunConfig, run: Mapping[str, Any], split: str, loops: Sequence[int]
) -> Record:
    """Quality against loops at every difficulty, as targets, tables and figures read it.

    Args:
        model: where it is to run.
        config: its [data] and [eval] say what is asked.
        run: run.json of the trained run.
        split: "validation" or "test".
        loops: loop counts.

    Returns:
        ``metric``, ``better`` ("higher" or "lower"), ``unit`` of the difficulty, ``trained``: the difficulty of the
        training as text, ``loops``, ``curves``: "trained" and each level → a value for each loop count.
    """
    from open_mythos.training.evaluate import sweep

    swept = sweep(model, config, run, loops, split=split)
    names = ["trained", *map(str, config.eval.levels)]
    unit, trained = "", ""
    if config.data.is_task:
        task = config.data.task()
        unit = "bits" if config.data.source == "parity" else task.difficulty
        own = getattr(task, task.difficulty)
        trained = f"{own[0]}–{own[1]}" if isinstance(own, (tuple, list)) else str(own)
    return {
        "metric": swept["metric"],
        "better": "higher" if swept["metric"] == "accuracy" else "lower",
        "unit": unit,
        "trained": trained,
        "loops": swept["loops"],
        "curves": {
            name: found["values"] for name, found in zip(names, swept["splits"].values(), strict=True)
        },
    }


def folder() -> Path:
    """Where the experiments are: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        ConfigError: they are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package.parent / "configs" / "reproduce", package / "configs" / "reproduce"):
        if place.is_dir():
            return place
    raise ConfigError(
        "the experiments are not installed: configs/reproduce is not beside the package or in it"
    )


def names(place: Path | None = None) -> list[str]:
    """All experiments, by name."""
    return sorted(path.stem for path in (place or folder()).glob("*.toml"))


def named(name: str, place: Path | None = None) -> Experiment:
    """The experiment of this name.

    Raises:
        ConfigError: there is none, or its file is not right.
    """
    place = place or folder()
    known(f"experiment {name!r}", name, names(place), "configs/reproduce", what="experiment")
    return load(place / f"{name}.toml")


def load(path: Path) -> Experiment:
    """Read an experiment.

    Raises:
        ConfigError: a table, key or value is missing or not allowed. What [model], [data] and the like hold is checked
            when a run is made of it.
    """
    tables = read_toml(path)
    try:
        return _experiment(path, tables)
    except ConfigError as problem:
        raise ConfigError(f"{path.name}: {problem}") from problem


_TEXTS = ("title", "claim", "target")
_KEYS = (*_TEXTS, "seeds", "order", "code", "uses", "notes", "options", "targets")


def _experiment(path: Path, tables: dict[str, Any]) -> Experiment:
    about, quick = _table(tables, "experiment"), _table(tables, "quick")
    for key in about:
        known(f"experiment.{key}", key, _KEYS, "[experiment]")
    for key in (*_TEXTS, "seeds"):
        if key not in about:
            raise ConfigError(f"experiment.{key} is missing: every experiment needs it")
    for key in (*_TEXTS, "code", "uses", "notes"):
        if not isinstance(about.get(key, ""), str):
            raise error(f"experiment.{key}", about[key], "a text")
    whole("experiment.seeds", about["seeds"], 1)
    whole("experiment.order", about.get("order", 99), 0)
    cls = class_named(about.get("code", ""))
    options = {**cls.OPTIONS, **_options(about, "experiment", cls)}
    uses = about.get("uses", "")
    arms = {
        name: _arm(name, table, about["seeds"], uses, cls) for name, table in _table(tables, "arms").items()
    }
    if not arms:
        raise ConfigError("[arms] is missing: an experiment needs at least one arm, such as [arms.ours]")
    quick_options = _options(quick, "quick", cls)
    return cls(
        path=path,
        **{key: about[key] for key in (*_TEXTS, "seeds")},
        arms=arms,
        sections={
            name: table for name, table in tables.items() if name not in ("experiment", "arms", "quick")
        },
        targets=tuple(read_target(table, list(arms)) for table in _list(about, "experiment", "targets")),
        options=options,
        quick=changes("quick", {key: v for key, v in quick.items() if key not in ("options", "arms")}),
        quick_options=quick_options,
        quick_arms=_quick_arms(quick),
        notes=about.get("notes", "").strip(),
        code=about.get("code", ""),
        order=about.get("order", 99),
    )


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise error(f"[{name}]", table, "a table of keys")
    return table


def _list(table: Mapping[str, Any], where: str, key: str) -> list[Any]:
    found = table.get(key, [])
    if not isinstance(found, list):
        raise error(f"{where}.{key}", found, "a list")
    return found


def _quick_arms(quick: Mapping[str, Any]) -> tuple[str, ...]:
    """Names alone: whether the experiment has them is known once it has crossed its arms."""
    found = _list(quick, "quick", "arms")
    if not all(isinstance(name, str) for name in found):
        raise error("quick.arms", found, "a list of names of arms")
    return tuple(found)


def class_named(code: str) -> type[Experiment]:
    """The class "module:Class" of this package, or of a dotted module anywhere that Python finds it."""
    if not code:
        return Experiment
    module, _, name = code.partition(":")
    allowed = "MODULE:CLASS, a class of open_mythos/reproduce/MODULE.py made from Experiment"
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise error("experiment.code", code, allowed)
    module = module if "." in module else f"open_mythos.reproduce.{module}"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as problem:
        if not f"{module}.".startswith(f"{problem.name}."):
            raise
        found = None
    if not isinstance(found, type) or not issubclass(found, Experiment):
        raise error("experiment.code", code, allowed)
    return found


def _options(table: Mapping[str, Any], where: str, cls: type[Experiment]) -> dict[str, Any]:
    options = _table(table, "options")
    for key in options:
        known(f"{where}.options.{key}", key, cls.OPTIONS, cls.__name__, what="option")
    return options


_OF_ARM = ("title", "seeds", "uses", "options")


def _arm(name: str, table: Any, seeds: int, uses: str, cls: type[Experiment]) -> Arm:
    if not isinstance(table, dict):
        raise error(f"[arms.{name}]", table, "a table of keys")
    if not re.fullmatch(r"[\w.=+-]*\w[\w.=+-]*", name):
        raise error("arm", name, "letters, digits and _ . = + -, since a folder is named after it")
    own = {key: table[key] for key in _OF_ARM if key in table}
    for key in ("title", "uses"):
        if not isinstance(own.get(key, ""), str):
            raise error(f"arms.{name}.{key}", own[key], "a text")
    whole(f"arms.{name}.seeds", own.get("seeds", seeds), 1)
    return Arm(
        name,
        own.get("title", name),
        min(own.get("seeds", seeds), seeds),
        own.get("uses", uses),
        _options(own, f"arms.{name}", cls),
        changes(f"arms.{name}", {key: value for key, value in table.items() if key not in _OF_ARM}),
    )


def changes(where: str, table: Mapping[str, Any]) -> tuple[Change, ...]:
    """Dotted overrides, whether the dots are inside quotes or make tables."""
    found: list[Change] = []
    for key, given in table.items():
        pairs = (
            {f"{key}.{name}": inner for name, inner in given.items()}
            if isinstance(given, dict)
            else {key: given}
        )
        for name, setting in pairs.items():
            try:
                found.append((*override(f"{name}=0")[:2], setting))
            except ConfigError as problem:
                raise ConfigError(
                    f"{where}: {name!r} is not allowed: it must be section.key of a run config, such as "
                    '"optim.lr" = 3e-4'
                ) from problem
    return tuple(found)
