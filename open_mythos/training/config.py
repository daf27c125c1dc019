"""The configuration of a run: TOML sections, checked when read, with overrides from the command line.

Imports no torch, so that a config can be read and inspected fast.

    [model]   fields of MythosConfig, perhaps over variant = "mythos_..."; vocab_size defaults to the data's
    [data]    source = "python", a path, or the name of a task; then what that source takes
    [loops]   kind = "fixed", "uniform", "poisson" or "progressive"; per; then what that kind takes
    [optim]   [train]   [parallel]   [adapt]   [checkpoint]   [log]   [eval]   fields of the classes below
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.training.checks import choice, error, known, number, whole
from open_mythos.training.dataconfig import TASK_NAMES, DataConfig
from open_mythos.training.logconfig import LogConfig
from open_mythos.variants import VARIANTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "AdaptConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LoopsConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "overridden",
    "override",
    "read_toml",
]

# What each kind of loop count takes, and the default (None in _REQUIRED must be given).
_REQUIRED = object()
LOOP_FIELDS: dict[str, dict[str, Any]] = {
    "fixed": {"loops": _REQUIRED, "backprop": None},
    "uniform": {"low": 1, "high": _REQUIRED, "backprop": None},
    "poisson": {"rate": _REQUIRED, "sigma": 0.5, "backprop": 8},
    "progressive": {"free": _REQUIRED, "grad": _REQUIRED},
}


@dataclass(frozen=True)
class LoopsConfig:
    """How many loops a training step runs; see :mod:`open_mythos.training.loops`.

    Attributes:
        kind: "fixed" (loops, backprop), "uniform" (low, high, backprop), "poisson" (rate, sigma, backprop) or
            "progressive" (free, grad).
        options: those numbers.
        per: "batch" draws one count for all sequences of a forward pass, "sequence" one for each.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    per: str = "batch"

    def __post_init__(self) -> None:
        choice("loops.kind", self.kind, LOOP_FIELDS)
        choice("loops.per", self.per, ("batch", "sequence"))
        fields = LOOP_FIELDS[self.kind]
        for name in self.options:
            known(f"loops.{name}", name, fields, f"kind {self.kind!r}")
        options = {**fields, **self.options}
        for name, value in options.items():
            if value is _REQUIRED:
                raise ConfigError(f"loops.{name} is missing: kind {self.kind!r} needs it")
            if name in ("rate", "sigma"):
                number(f"loops.{name}", value, 0, above=True)
            elif name != "backprop" or value is not None:
                whole(f"loops.{name}", value, 0 if name == "free" else 1)
        if self.kind == "uniform" and options["high"] < options["low"]:
            raise error("loops.high", options["high"], f"at least loops.low ({options['low']})")
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule.

    Attributes:
        kind: "adamw", or "muon": Muon for the matrices inside the blocks and AdamW for the rest; see
            :mod:`open_mythos.training.optim`.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled decay of the matrices; :func:`open_mythos.training.optim.parameter_groups`.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: AdamW's epsilon.
        clip: largest global gradient norm; 0 does not clip.
        schedule: "cosine" (to the end), "wsd" (constant, then linear over the last ``decay`` of the steps) or
            "constant"; each after ``warmup`` linear steps.
        warmup: steps.
        decay: share of all steps, "wsd" only.
        floor: lowest learning rate as a share of ``lr``.
        muon_lr: peak learning rate of Muon, which follows the same schedule.
        muon_momentum: decay of Muon's momentum.
        injection_scale: A, Δ and B of the injection learn at so many times lr. At high rates less than 1 keeps A, and
            with it the length of the state, from drifting off.
    """

    kind: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    schedule: str = "cosine"
    warmup: int = 100
    decay: float = 0.2
    floor: float = 0.1
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    injection_scale: float = 1.0

    def __post_init__(self) -> None:
        choice("optim.kind", self.kind, ("adamw", "muon"))
        number("optim.muon_lr", self.muon_lr, 0, above=True)
        number("optim.muon_momentum", self.muon_momentum, 0, 1, below=True)
        number("optim.injection_scale", self.injection_scale, 0, above=True)
        number("optim.lr", self.lr, 0, above=True)
        number("optim.weight_decay", self.weight_decay, 0)
        for name in ("beta1", "beta2"):
            number(f"optim.{name}", getattr(self, name), 0, 1, below=True)
        number("optim.eps", self.eps, 0, above=True)
        number("optim.clip", self.clip, 0)
        choice("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        whole("optim.warmup", self.warmup, 0)
        number("optim.decay", self.decay, 0, 1)
        number("optim.floor", self.floor, 0, 1)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
        steps: optimiser steps.
        batch_size: B of one forward pass, all processes together.
        accumulate: forward passes per optimiser step, each with its own batch and loop count.
        seed: of weights, data order, loop counts and noise.
        threads: CPU threads; 0 leaves torch's choice. With a fixed number a run gives the same numbers on
            machines with more cores.
        log_every: steps between records in metrics.jsonl.
        save_every: steps between checkpoints; 0 saves at the end only.
        max_skips: steps in a row whose update may be left out because the loss or a gradient is not finite;
            one more ends the run.
        balance: batches at most, after the last step, on which nothing but the routers' bias is fitted and judged,
            forward only, at ``model.max_loop_iters`` loops, the depth of use. Many experts need it: a router that
            still learns, at other depths, never lets the bias come to rest. 0: none; otherwise at least 20.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    seed: int = 0
    threads: int = 0
    log_every: int = 10
    save_every: int = 500
    max_skips: int = 10
    balance: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1)):
            whole(f"train.{name}", getattr(self, name), low)
        for name in ("seed", "threads", "save_every", "max_skips", "balance"):
            whole(f"train.{name}", getattr(self, name), 0)
        if 0 < self.balance < 20:
            raise error("train.balance", self.balance, "0 or at least 20")


@dataclass(frozen=True)
class ParallelConfig:
    """Where the step runs, and how it is spread; none of it is part of the model.

    Attributes:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: of the matrix products, "fp32" or "bf16". Parameters, and what must not be rounded (norms,
            injection, router bias and counts, loss), stay in float32.
        compile: compile the step with torch.compile.
        graphs: start the step's kernels as CUDA graphs; see :mod:`open_mythos.training.gradients`. On several GPUs
            only without accumulation. Needs "bf16", and widths that are multiples of 8.
        recompute: what backward computes again instead of keeping: "none", "selective" or "loop"; see
            :mod:`open_mythos.training.acceleration`.
        replicas: whole copies of the parameters; each is sharded over world size / replicas processes.
        reshard: free the gathered parameters between forward and backward: less memory, more communication.
    """

    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    graphs: bool = False
    recompute: str = "none"
    replicas: int = 1
    reshard: bool = False

    def __post_init__(self) -> None:
        choice("parallel.device", self.device, ("auto", "cpu", "cuda"))
        choice("parallel.precision", self.precision, ("fp32", "bf16"))
        choice("parallel.compile", self.compile, (True, False))
        choice("parallel.graphs", self.graphs, (True, False))
        choice("parallel.recompute", self.recompute, ("none", "selective", "loop"))
        whole("parallel.replicas", self.replicas, 1)
        choice("parallel.reshard", self.reshard, (True, False))


@dataclass(frozen=True)
class AdaptConfig:
    """What training begins with, and what it changes; see :mod:`open_mythos.training.adapt`.

    Attributes:
        start: directory of a saved model. Weights and [model] come from there; empty starts afresh.
        kind: "none" trains all parameters, "lora" those of the per-loop LoRA alone.
        rank: of the LoRA that is added to a model without one; 0 takes 8, or the rank that the model has.
    """

    start: str = ""
    kind: str = "none"
    rank: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.start, str):
            raise error("adapt.start", self.start, "a directory of a saved model")
        choice("adapt.kind", self.kind, ("none", "lora"))
        whole("adapt.rank", self.rank, 0)
        if self.kind == "lora" and not self.start:
            raise ConfigError(
                "adapt.start is missing: adapting needs a saved model to start from (--from DIR)"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """How checkpoints are kept; how often is ``train.save_every``.

    Attributes:
        keep: so many, the newest.
        asynchronous: write to disk beside the training that goes on.
    """

    keep: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        whole("checkpoint.keep", self.keep, 1)
        choice("checkpoint.asynchronous", self.asynchronous, (True, False))


@dataclass(frozen=True)
class EvalConfig:
    """The sweep over loops.

    Attributes:
        loops: loop counts to evaluate, each at least 1; ascending and without repeats.
        levels: further difficulties of a task, beside the one trained on.
        examples: rows (for text: blocks of seq_len tokens) in each split.
    """

    loops: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    levels: tuple[int, ...] = ()
    examples: int = 128

    def __post_init__(self) -> None:
        for name in ("loops", "levels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise error(f"eval.{name}", value, "a list of whole numbers")
            for item in value:
                whole(f"eval.{name}", item, 1)
            object.__setattr__(self, name, tuple(sorted(set(value))))
        if not self.loops:
            raise error("eval.loops", [], "a list with at least one whole number")
        whole("eval.examples", self.examples, 1)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Make one with :func:`load_config` or :meth:`from_dict`."""

    model: MythosConfig
    data: DataConfig
    loops: LoopsConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.train.balance and (self.model.router_bias_rate == 0 or self.adapt.kind == "lora"):
            raise error("train.balance", self.train.balance, "0 where the routers' bias stays as it is")
        if self.data.is_task:
            return
        if self.eval.levels:
            raise error("eval.levels", list(self.eval.levels), "empty for text, which has no difficulty")
        length, longest = self.data.options["seq_len"], self.model.max_seq_len
        if length > longest:
            raise error("data.seq_len", length, f"at most model.max_seq_len ({longest})")

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> RunConfig:
        """The config with these sections, as TOML or run.json hold them.

        Raises:
            ConfigError: a section or key is unknown, missing or not allowed.
        """
        for name, section in sections.items():
            known(f"[{name}]", name, _SECTIONS, "a run config", what="section")
            if not isinstance(section, Mapping):
                raise error(f"[{name}]", section, "a section of keys")
        data, loops = dict(sections.get("data", {})), dict(sections.get("loops", {}))
        for name, section, key in (("data", data, "source"), ("loops", loops, "kind")):
            if key not in section:
                raise ConfigError(f"{name}.{key} is missing: every run config needs it")
        data_config = DataConfig(data.pop("source"), data)
        return cls(
            model=_model(dict(sections.get("model", {})), data_config),
            data=data_config,
            loops=LoopsConfig(loops.pop("kind"), per=loops.pop("per", "batch"), options=loops),
            **{name: _section(name, cls_, sections) for name, cls_ in _PLAIN.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """All sections with every default filled in, JSON-ready; :meth:`from_dict` reads it back."""
        return {
            "model": self.model.to_dict(),
            "data": {"source": self.data.source, **self.data.options},
            "loops": {"kind": self.loops.kind, "per": self.loops.per, **self.loops.options},
            **{name: _plain(getattr(self, name)) for name in _PLAIN},
        }


# Sections whose keys are the fields of a class.
_PLAIN: dict[str, Any] = {
    "optim": OptimConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "adapt": AdaptConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "eval": EvalConfig,
}
_SECTIONS = ("model", "data", "loops", *_PLAIN)


def _plain(section: Any) -> dict[str, Any]:
    """The fields of a section as JSON has them."""
    fields = dataclasses.asdict(section)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML config and apply overrides such as ``optim.lr=3e-4``.

    Raises:
        ConfigError: the file is not there or not TOML, or a key or value is not allowed.
    """
    path = Path(path)
    sections = read_toml(path)
    try:
        return RunConfig.from_dict(overridden(sections, [override(text) for text in overrides]))
    except ConfigError as problem:
        raise ConfigError(f"{path.name}: {problem}") from problem


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        ConfigError: the file is not there or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as problem:
        raise ConfigError(f"config {str(path)!r} is not there: it must be a TOML file") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"config {str(path)!r} is not valid TOML: {problem}") from problem


def overridden(sections: Mapping[str, Any], changes: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """Sections with changes (section, key, value) applied; ``sections`` stays as it is.

    A new ``loops.kind`` or another sort of ``data.source`` first empties its section (but for ``loops.per``):
    the old options belong to the old kind.

    Raises:
        ConfigError: what should be a section is not one.
    """
    new = copy.deepcopy(dict(sections))
    for section, key, value in changes:
        old = new.setdefault(section, {})
        if not isinstance(old, dict):
            raise ConfigError(f"[{section}] = {old!r} is not allowed: it must be a section of keys")
        kind = {"loops": "kind", "data": "source"}.get(section)
        if key == kind and _sort(section, old.get(key)) != _sort(section, value):
            for name in set(old) - {"per"}:
                del old[name]
    for section, key, value in changes:
        new[section][key] = value
    return new


def override(text: str) -> tuple[str, str, Any]:
    """Section, key and value of ``section.key=value``.

    Raises:
        ConfigError: it is not of that form, or a run config has no such section.
    """
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        allowed = "section.key=value, such as optim.lr=3e-4"
        raise ConfigError(f"override {text!r} is not allowed: it must be {allowed}")
    known(f"override {text!r}", section, _SECTIONS, "a run config", what="section")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()  # a bare word is a string


def _sort(section: str, value: Any) -> Any:
    """What decides which options fit: the kind of loops, the task, or text of any source."""
    return value if section == "loops" or value in TASK_NAMES else "text"


def _model(fields: dict[str, Any], data: DataConfig) -> MythosConfig:
    variant = fields.pop("variant", None)
    base = {} if variant is None else _variant(variant).to_dict()
    tokens = data.tokens(given=fields)
    size, needed = fields.get("vocab_size"), tokens.get("vocab_size")
    if isinstance(size, int) and needed is not None and size < needed:
        raise error("model.vocab_size", size, f"at least {needed} for text")
    try:
        return MythosConfig(**{**base, **tokens, **fields})
    except ConfigError as problem:
        raise ConfigError(f"model.{problem}") from problem


def _variant(name: Any) -> MythosConfig:
    known(f"model.variant = {name!r}", str(name), VARIANTS, "OpenMythos", what="variant")
    return VARIANTS[name]()


def _section(name: str, cls: Any, sections: Mapping[str, Any]) -> Any:
    section = sections.get(name, {})
    for key in section:
        known(f"{name}.{key}", key, [f.name for f in dataclasses.fields(cls)], f"[{name}]")
    return cls(**section)
